"""One point of a sweep in a process of its own: `python -m compressor.cli.worker` with its task as
JSON on stdin.
"""

import json
import sys
from pathlib import Path

from compressor.cli.command import errors_in_one_line
from compressor.errors import CompressorError
from compressor.pipeline import run
from compressor.recipe.load import parse_yaml
from compressor.recipe.sections import Recipe
from compressor.resume.store import SharedStore


def main() -> None:
    """Run the point; exit code and message as those of `compressor compress`."""
    task = json.load(sys.stdin)
    recipe = Recipe.model_validate(parse_yaml(task["recipe"], "recipe"))
    with errors_in_one_line(verbose=False):
        shared = SharedStore(Path(task["store"]))
        found = run.compress(recipe, Path(task["output"]), stats=Path(task["stats"]), shared=shared)
        if failure := found.get("failure"):
            raise CompressorError(failure)


if __name__ == "__main__":
    main()
