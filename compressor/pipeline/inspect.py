"""Describe what a checkpoint holds, from headers and its own plan and report."""

from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, ConfigError
from compressor.files.documents import read_json
from compressor.files.model_folder import ModelFolder
from compressor.linears import build_empty
from compressor.pipeline.dry_run import TORCH_DTYPES


def describe_checkpoint(source: ModelFolder, plot: Path | None = None) -> dict[str, Any]:
    """Describe what a checkpoint stores for each compressed linear.

    plot: where a figure of its errors is written, if anywhere.
    """
    specs = source.quantization.get("linears", {})
    choices = (
        read_json(source.path / "plan.json")["linears"]
        if (source.path / "plan.json").is_file()
        else {}
    )
    rows = []
    for name, spec in specs.items():
        dtypes = [
            TORCH_DTYPES[info.dtype]
            for tensor, info in source.tensors.items()
            if tensor.rpartition(".")[0] == name
        ]
        module = build_empty(spec, next(dtype for dtype in dtypes if dtype.is_floating_point))
        choice = choices.get(name, {})
        shape = f"{spec['out_features']} × {spec['in_features']}"
        sizes = {
            "bits": module.bits(),
            "dense_bits": choice.get("dense_bits"),
            "error": choice.get("error"),
        }
        rows.append(
            {"name": name, "kind": spec["kind"], "shape": shape, "rank": spec.get("rank"), **sizes}
        )
    description = {
        "checkpoint": str(source.path),
        "model_type": source.config.get("model_type"),
        "weight_bytes": source.weight_bytes,
        "tensors": len(source.tensors),
        "files": list(source.files),
        "compressed_linears": len(rows),
        "linears": rows,
    }
    if plot is not None:
        if not choices:
            raise CheckpointError(
                f"{source.path}: has no plan.json, so there are no errors to draw"
            )
        draw(choices, plot)
        description["plot"] = str(plot)
    return description


def draw(choices: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw fraction kept and relative error of every targeted linear, in the order of the model.
    Needs the extra `report`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib; install it with `pip install compressor[report]`"
        ) from None
    names, figure = (
        list(choices),
        Figure(figsize=(max(6.0, 0.18 * len(choices)), 6), layout="constrained"),
    )
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(
        names,
        [choices[name]["bits"] / choices[name]["dense_bits"] for name in names],
        color="tab:blue",
    )
    upper.set(ylabel="kept (stored bits)", ylim=(0, 1.02))
    lower.bar(names, [choices[name]["error"] or 0.0 for name in names], color="tab:red")
    lower.set(ylabel="relative output error")
    lower.tick_params(axis="x", labelrotation=90, labelsize=6)
    figure.savefig(path)
