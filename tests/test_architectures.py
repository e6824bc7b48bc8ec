"""Which structured methods work on which architectures: whole runs on tiny models, and the table of
them in docs/reference/architectures.md.

    UPDATE_PAGE=1 python -m pytest -m slow tests/test_architectures.py

writes the table; without it a table that is not what the runs say fails. A method works if the
compressed model gives the same logits token by token with its cache as in one pass, and these are
not the original's; otherwise it must refuse in one line.
"""

import os
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.models import VOCABULARY, save_tiny

from compressor.errors import ConfigError
from compressor.pipeline import job as jobs
from compressor.pipeline import run, stages
from compressor.recipe.load import load_recipe

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "architectures.md"
START, END = (
    "<!-- architectures: written by tests/test_architectures.py -->\n",
    "<!-- end of architectures -->\n",
)
KINDS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "phi3": "Phi-3",
    "mixtral": "Mixtral",
    "gpt2": "GPT-2",
    "opt": "OPT",
    "gpt_neox": "GPT-NeoX",
}
UNIFORM = ("allocation={kind: uniform, keep: 0.7, count: bits}",)
METHODS = {  # column: preset and what is set
    "lorap": ("lorap", ()),
    "channels": ("channels", UNIFORM),
    "value_dims": (
        None,
        ("method=[{targets: 'role:vo', candidates: [{name: value_dims}]}]", *UNIFORM),
    ),
    "heads": (
        None,
        ("method=[{targets: 'role:attention', candidates: [{name: heads}]}]", *UNIFORM),
    ),
    "rotary_pairs": (
        None,
        ("method=[{targets: 'role:qk', candidates: [{name: rotary_pairs}]}]", *UNIFORM),
    ),
    "transact": ("transact", ("allocation.keep=0.7",)),
    "armor": ("armor", ("allocation.keep=0.85", "method.0.candidates.0.options={sweeps: 1}")),
}
SMALL = [
    "calibration.windows=6",
    "calibration.length=24",
    "calibration.heldout=2",
    "model.device=cpu",
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """`built`: a job and its modules; `of`: what becomes of a method on an architecture, None if it
    works, else why not.
    """
    folder = tmp_path_factory.mktemp("architectures")
    windows = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(0))
    save_file({"windows": windows}, folder / "tokens.safetensors")

    @cache
    def source(kind: str):
        return jobs.open_source(str(save_tiny(folder / kind, kind)), None)

    def built(kind: str, column: str, *more: str):
        preset, sets = METHODS[column]
        named = {
            "model.name": str(source(kind).path),
            "calibration.source": f"{folder / 'tokens.safetensors'}:windows",
        }
        job = jobs.start(load_recipe(preset, [*SMALL, *sets, *more], named), source(kind))
        return job, run.plan_and_build(job, stages.statistics(job)).modules

    @cache
    def found(kind: str, column: str) -> str | None:
        try:
            job, modules = built(kind, column)
        except ConfigError as error:
            return reason(str(error))
        check(job, modules)
        return None

    return SimpleNamespace(of=found, built=built)


@torch.no_grad()
def check(job: jobs.Job, modules) -> None:
    """Logits in one pass, those token by token with a cache, and those of the original."""
    job.model.set_attn_implementation("eager")
    ids = torch.arange(3, 15).view(1, -1)
    original = job.model(ids).logits
    stages.install(job, modules)
    logits, cache, steps = job.model(ids).logits, None, []
    for place in range(ids.shape[1]):
        out = job.model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-3, atol=1e-4)
    assert (
        modules and torch.isfinite(logits).all() and not torch.allclose(logits, original, atol=1e-6)
    )


def reason(message: str) -> str:
    """A refusal without the linear or module that it names first, and without what to do."""
    assert "\n" not in message and ";" in message, message
    return re.sub(r"^\S*\.\S*: |^a target: ", "", message).partition(";")[0].strip()


def table(outcome) -> str:
    """The table of the page: a row for each architecture, and what the letters mean."""
    found = {kind: {column: outcome.of(kind, column) for column in METHODS} for kind in KINDS}
    reasons = sorted({why for row in found.values() for why in row.values() if why})
    letters = {why: chr(ord("a") + index) for index, why in enumerate(reasons)}
    lines = [
        "| | " + " | ".join(f"`{column}`" for column in METHODS) + " |",
        "|---" * (len(METHODS) + 1) + "|",
    ]
    lines += [
        f"| {KINDS[kind]} | " + " | ".join(letters.get(why, "yes") for why in row.values()) + " |"
        for kind, row in found.items()
    ]
    return (
        "\n".join([*lines, "", *(f"- {letter}: refused, {why}" for why, letter in letters.items())])
        + "\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_works_or_refuses_with_its_reason(kind, outcome):
    assert {column for column in METHODS if outcome.of(kind, column) is None} >= {"armor"}


@pytest.mark.parametrize("column", METHODS)
def test_keeping_everything_changes_nothing(column, outcome):
    job, modules = outcome.built("llama", column, "allocation.keep=1.0")
    assert modules == {}
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    stages.install(job, modules)
    after = job.model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(tensor, after[name]) for name, tensor in before.items()
    )


def test_the_page_says_what_the_runs_say(outcome):
    before, _, rest = PAGE.read_text().partition(START)
    written, _, after = rest.partition(END)
    if os.environ.get("UPDATE_PAGE"):
        PAGE.write_text(before + START + table(outcome) + END + after)
    else:
        assert written == table(outcome), (
            "run UPDATE_PAGE=1 python -m pytest -m slow tests/test_architectures.py"
        )
