"""The verbs under `compressor adapter`: tools for LoRA adapters of PEFT."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from compressor.cli.command import Outcome, verb
from compressor.cli.options import OVERWRITE

app = typer.Typer(help="Tools for LoRA adapters of PEFT.", no_args_is_help=True)


@app.command()
@verb
def squeeze(
    adapter: Annotated[
        str,
        Argument(
            metavar="ADAPTER",
            help="PEFT adapter, plain LoRA: its folder or hub identifier.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)
    ],
    rank: Annotated[
        int | None, Option(metavar="R", help="Rank of every module that has more.")
    ] = None,
    keep: Annotated[
        float | None,
        Option(
            metavar="FRACTION", help="Fraction kept of the adapter's parameters, over all modules."
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        Option(
            metavar="STATS",
            help="Statistics of the base from `compressor calibrate`: lose least at its inputs.",
        ),
    ] = None,
    overwrite: OVERWRITE = False,
) -> Outcome:
    """Write an adapter of smaller ranks, the nearest there is to what this one adds to its base."""
    from compressor.pipeline.squeeze_adapter import squeeze_adapter
    from compressor.reporting.records import Squeezed

    squeezed = squeeze_adapter(adapter, output, rank, keep, stats, overwrite)
    return Outcome(squeezed, record=Squeezed)
