"""Checkpoints for report pages."""

import json
from pathlib import Path

from compressor.plan import Choice, Plan
from compressor.reporting import report

SIZES = report.Sizes(
    original_bytes=4 * 2**20, compressed_bytes=2**20, other_bits=16_000, other_parameters=1_000
)


EVALUATION = {
    "perplexity": 6.6,
    "perplexity_original": 5.5,
    "kl": 0.25,
    "tokens": 32768,
    "window": 512,
}


MARKS = {"evaluation": "abc", "model": "def"}


def checkpoint(
    folder: Path, kl: float | None = 0.25, size: int = 2**20, method: str = "low_rank", **changes
) -> Path:
    """The readable files of a compressed checkpoint of two blocks."""
    names = [
        f"model.layers.{block}.{part}"
        for block in range(2)
        for part in ("attn.q_proj", "mlp.experts.0.w1", "mlp.experts.1.w1")
    ]
    choice = {
        "setting": {"rank": 4},
        "parameters": 500,
        "dense_bits": 16_000,
        "dense_parameters": 1_000,
    }
    errors = {"predicted": 0.01, "measured": 0.02, "error": 0.02, "kl": 0.001}
    kept = {
        name: Choice(method, bits=8_000 + 100 * index, **choice, **errors)
        for index, name in enumerate(names)
    }
    plan = Plan(kept, contest={"together": 0.2, "low_rank alone": 0.3})
    sizes = report.Sizes(SIZES.original_bytes, size, SIZES.other_bits, SIZES.other_parameters)
    found = (
        report.add_evaluation(
            report.build_report(plan, sizes, "bits", fingerprints=MARKS, warnings=["5 % < 10 %"]),
            report.Evaluated(report.to_scores(EVALUATION | {"kl": kl})),
        )
        | changes
    )
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    (folder / "report.json").write_text(json.dumps(found))
    line = {
        "method": method,
        "kept": [0.1, 0.5, 0.9],
        "error": [0.5, 0.02, 0.001],
        "ranks": [1, 2, 9],
        "spectrum": [0.9, 0.09, 0.0],
    }
    lines = [{"linear": name, "members": [name]} | line for name in names]
    (folder / "curves.json").write_text(json.dumps({"curves": lines}))
    (folder / "recipe.yaml").write_text("seed: 7 # <b>bold</b>\n")
    return folder
