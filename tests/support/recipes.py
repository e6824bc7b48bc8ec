"""Small recipes, and the tensors of what they write."""

from pathlib import Path

from compressor.recipe.load import load_recipe

SMALL = [
    "calibration.windows=12",
    "calibration.length=32",
    "calibration.heldout=4",
    "calibration.batch_size=4",
    "evaluation.windows=6",
]


def recipe(model: Path, text: Path, *overrides: str, config: str | None = None, **options):
    named = {
        "model.name": str(model),
        "calibration.source": str(text),
        "evaluation.source": str(text),
        "model.device": "cpu",
    }
    return load_recipe(config, [*SMALL, *overrides], named | options)


def tensors(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
