"""The command line: one function for each verb, which calls the package and says how its result is
shown.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or
recipe, 3 a quality gate that does not hold, 130 interrupted, 143 terminated.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from compressor import __version__
from compressor.cli.command import Outcome, errors_in_one_line, verb
from compressor.cli.commands import adapter, listings
from compressor.cli.options import (
    CHECKPOINT,
    DANGER,
    DEVICE,
    LIMITS,
    MAX_HELP,
    MIN_HELP,
    MODEL,
    OVERWRITE,
    PUBLIC,
    PUSH_TO,
    RESTART,
    TOLERANCE_HELP,
)
from compressor.errors import ConfigError
from compressor.runtime.progress import Progress

if TYPE_CHECKING:
    from compressor.recipe.sections import Recipe

app = typer.Typer(
    help="Compress Hugging Face causal language models without retraining, and report what it "
    "cost.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 a quality gate that does not "
    "hold, 130 interrupted, 143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
@verb
def compress(
    recipe: "Recipe",
    output: Annotated[
        Path, Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)
    ],
    stats: Annotated[
        Path | None,
        Option(
            metavar="STATS",
            help="Statistics from `compressor calibrate`, in place of collecting them.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, Option(metavar="FILE", help="Edited plan.json to run, in place of allocating.")
    ] = None,
    restart: RESTART = False,
    push_to: PUSH_TO = None,
    public: PUBLIC = False,
    *,
    progress: Progress,
) -> Outcome:
    """Compress a model into a new checkpoint, evaluate it and print the before/after table."""
    from compressor.checkpoint import hub
    from compressor.pipeline import distributed, run
    from compressor.reporting import report
    from compressor.runtime import launched

    hub.check(push_to, public)
    story = distributed if launched.world_size() > 1 else run
    found = story.compress(
        recipe, output, plan=plan, stats=stats, progress=progress, restart=restart
    )
    if found is None:  # not the main process
        return Outcome({})
    found |= hub.deliver(output, push_to, public, found.get("failure"), progress)
    return Outcome(found, report.render(found), found.get("failure"))


@app.command()
@verb
def plan(
    recipe: "Recipe",
    stats: Annotated[
        Path | None,
        Option(
            metavar="STATS",
            help="Statistics from `compressor calibrate`: decompose and allocate too.",
        ),
    ] = None,
    *,
    progress: Progress,
) -> Outcome:
    """Print what `compress` would do, from the headers of the model's files alone. Writes
    nothing.
    """
    from compressor.pipeline import run
    from compressor.reporting.records import Outline

    return Outcome(run.plan(recipe, stats=stats, progress=progress), record=Outline)


@app.command()
@verb
def calibrate(
    recipe: "Recipe",
    stats: Annotated[
        Path, Argument(metavar="STATS", help="Folder for the statistics.", show_default=False)
    ],
    restart: RESTART = False,
    *,
    progress: Progress,
) -> Outcome:
    """Collect the statistics that a recipe needs, for `compress --stats`."""
    from compressor.pipeline import run
    from compressor.reporting.records import Collected

    overwrite = recipe.output.overwrite
    collected = run.calibrate(
        recipe, stats, overwrite=overwrite, progress=progress, restart=restart
    )
    return Outcome(collected, record=Collected)


@app.command()
@verb
def evaluate(
    model: MODEL,
    against: Annotated[
        str | None,
        Option(
            metavar="ORIGINAL",
            help="Model to compare with: mean KL(original‖model) in nats per token.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        Option(
            metavar="SOURCE", help="Text to predict, as for calibration; bundled text if left out."
        ),
    ] = None,
    column: Annotated[
        str | None, Option(metavar="NAME", help="Column or key that holds the text.")
    ] = None,
    window: Annotated[
        int | None, Option(metavar="N", min=2, help="Tokens in a window; windows do not overlap.")
    ] = None,
    windows: Annotated[
        int | None,
        Option(metavar="N", min=1, help="Number of windows; the whole text if left out."),
    ] = None,
    tasks: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="lm-eval tasks: names, or files, which may run code.",
            rich_help_panel=DANGER,
        ),
    ] = None,
    limit: Annotated[
        int | None, Option(metavar="N", min=1, help="Examples of each task; all if left out.")
    ] = None,
    batch_size: Annotated[int, Option(metavar="N", min=1, help="Windows in one forward pass.")] = 8,
    speed: Annotated[
        bool, Option("--speed", help="Also measure tokens per second and peak memory.")
    ] = False,
    device: DEVICE = "auto",
    restart: RESTART = False,
    *,
    progress: Progress,
) -> Outcome:
    """Measure perplexity, divergence from the original and lm-eval tasks. NaN or overflow is a
    failed run.
    """
    from compressor.pipeline import run
    from compressor.reporting.tables import render_evaluation

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if limit is not None and not names:
        raise ConfigError("--limit counts the examples of lm-eval tasks; give --tasks too")
    scores = run.evaluate(
        model,
        against=against,
        text=text,
        column=column,
        window=window,
        windows=windows,
        tasks=names,
        limit=limit,
        batch_size=batch_size,
        speed=speed,
        device=device or "auto",
        restart=restart,
        progress=progress,
    )
    return Outcome(scores, render_evaluation(scores))


@app.command()
@verb
def inspect(
    checkpoint: CHECKPOINT,
    plot: Annotated[
        Path | None,
        Option(
            metavar="FILE", help="Also draw the errors of the linears (needs the extra 'report')."
        ),
    ] = None,
) -> Outcome:
    """Print what is stored for each linear of a compressed checkpoint, and what it cost."""
    from compressor.pipeline import run
    from compressor.reporting.records import Inspection

    return Outcome(run.inspect(checkpoint, plot=plot), record=Inspection)


@app.command()
@verb
def sweep(
    file: Annotated[
        Path,
        Argument(
            metavar="FILE", help="YAML file of a sweep: base, grid, zip, runs.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        Argument(metavar="OUTDIR", help="Folder for its points and results.", show_default=False),
    ],
    jobs: Annotated[
        int | None,
        Option(
            metavar="N",
            min=1,
            help="Points that run at the same time, in processes of their own; 1 if left out.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Print the points with estimated sizes and times; run nothing."),
    ] = False,
    restart: RESTART = False,
    *,
    progress: Progress,
) -> Outcome:
    """Run every point of a sweep that is not finished yet, sharing statistics and decompositions;
    table, results.jsonl and report.
    """
    from compressor.pipeline.sweep import points
    from compressor.pipeline.sweep import run as sweep
    from compressor.reporting import tables
    from compressor.reporting.records import PlannedSweep

    if dry_run and (jobs is not None or restart):
        option = "--restart" if restart else "--jobs"
        raise ConfigError(f"--dry-run runs nothing, so it takes no {option}; leave it out")
    found = points.read_points(file)
    if dry_run:
        return Outcome({"points": sweep.outline(found, progress)}, record=PlannedSweep)
    result = sweep.run(found, output, jobs or 1, restart, progress)
    failed = result["failed"]
    failure = (
        f"{failed} of {len(found)} points failed; the same command runs them again"
        if failed
        else None
    )
    return Outcome(result, tables.render_sweep(result["points"]), failure)


@app.command()
@verb
def clean(
    outputs: Annotated[
        list[Path] | None,
        Argument(
            metavar="[OUTPUT…]", help="Outputs of runs that were stopped.", show_default=False
        ),
    ] = None,
) -> Outcome:
    """Remove what stopped runs left: beside outputs, and of evaluations in the cache. Outputs
    themselves are not touched.
    """
    from compressor.resume import journal

    removed = [
        str(path)
        for output in [*(outputs or ()), *journal.stopped_outputs(journal.user_cache())]
        for path in journal.clean(output)
    ]
    return Outcome({"removed": removed}, "\n".join(removed) or "nothing was left")


@app.command()
@verb
def verify(checkpoint: CHECKPOINT, *, progress: Progress) -> Outcome:
    """Check a checkpoint: checksums, headers, complete tensors, finite numbers."""
    from compressor.pipeline import run

    problems = run.verify(checkpoint, progress)
    failure = (
        f"{checkpoint}: {len(problems)} problem{'s' * (len(problems) > 1)} found"
        if problems
        else None
    )
    return Outcome(
        {"checkpoint": checkpoint, "problems": problems},
        "\n".join(problems) or f"{checkpoint}: no problems",
        failure,
    )


@app.command()
@verb
def export(
    checkpoint: CHECKPOINT,
    output: Annotated[
        Path, Argument(metavar="OUTPUT", help="Folder to write.", show_default=False)
    ],
    format_: Annotated[
        Literal["dense", "compressed-tensors", "peft"],
        Option(
            "--format",
            help="Ordinary weights; integers as compressed-tensors reads them; the same with "
            "residuals as an adapter.",
        ),
    ] = "dense",
    overwrite: OVERWRITE = False,
    *,
    progress: Progress,
) -> Outcome:
    """Write a compressed checkpoint in another format."""
    from compressor.pipeline import run

    return Outcome(
        run.export(checkpoint, output, format=format_, overwrite=overwrite, progress=progress)
    )


@app.command()
@verb
def report(
    checkpoints: Annotated[
        list[Path],
        Argument(metavar="CHECKPOINT…", help="Folders that `compress` wrote.", show_default=False),
    ],
    output: Annotated[
        Path,
        Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Page to write: .html or .md.",
            show_default=False,
        ),
    ],
    sample: Annotated[
        list[str] | None,
        Option(
            metavar="TEXT",
            help="Prompt that original and compressed model continue; loads both; repeatable.",
        ),
    ] = None,
    tokens: Annotated[
        int | None, Option(metavar="N", min=1, help="Length of a sample; 48 if left out.")
    ] = None,
    *,
    progress: Progress,
) -> Outcome:
    """Write one page about one or several checkpoints: tables, heat maps, allocations, size against
    damage, recipes.
    """
    from compressor.reporting import page
    from compressor.reporting.records import Page

    if tokens is not None and not sample:
        raise ConfigError("--tokens is the length of samples; give --sample too")
    runs = page.read(page.checked(output, checkpoints))
    if sample:
        from compressor.evaluation import samples

        runs = page.with_samples(
            runs, samples.side_by_side(checkpoints, sample, tokens or 48, progress=progress)
        )
    return Outcome(page.write(runs, output), record=Page)


@app.command()
@verb
def gate(
    report: Annotated[
        Path,
        Argument(
            metavar="CHECKPOINT|REPORT",
            help="Checkpoint folder, or its report.json.",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        Path, Option(metavar="FILE", help="Report to compare with.", show_default=False)
    ],
    max_perplexity_increase: Annotated[
        str | None, Option(metavar="2%|0.5", help="Rise allowed.", rich_help_panel=LIMITS)
    ] = None,
    max_kl: Annotated[
        str | None,
        Option(metavar="0.05|1.5x", help="Largest KL, in nats per token.", rich_help_panel=LIMITS),
    ] = None,
    max_: Annotated[
        list[str] | None,
        Option("--max", metavar="SCORE=0.05|1.02x", help=MAX_HELP, rich_help_panel=LIMITS),
    ] = None,
    min_: Annotated[
        list[str] | None,
        Option("--min", metavar="SCORE=0.4|0.95x", help=MIN_HELP, rich_help_panel=LIMITS),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        Option(metavar="SCORE=2%|0.5", help=TOLERANCE_HELP, rich_help_panel=LIMITS),
    ] = None,
    limits: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="YAML file of limits; options add to it and win.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    junit: Annotated[
        Path | None, Option(metavar="FILE", help="Also write the checks as JUnit XML.")
    ] = None,
    github: Annotated[
        bool, Option("--github", help="Print broken limits as GitHub annotations.")
    ] = False,
    update: Annotated[
        bool,
        Option(
            "--update", help="Write the scores of this report to the baseline; nothing is compared."
        ),
    ] = False,
) -> Outcome:
    """Hold a report against a baseline. Exit code 3 if a limit is broken; without limits, if
    perplexity rose by over 2 %.
    """
    from compressor.reporting import gate
    from compressor.reporting.records import Baseline

    ceilings = [*(max_ or ()), *([f"kl={max_kl}"] if max_kl is not None else ())]
    named = gate.named_limits(ceilings, min_ or (), tolerance or (), max_perplexity_increase)
    if update:
        gate.refuse_limits(named, limits, junit, github)
        return Outcome(gate.update(report, baseline), record=Baseline)
    given = gate.merge(gate.read_limits(limits), named) if limits else named or None
    found = gate.compare(report, baseline, given)
    if junit:
        gate.write_junit(junit, found)
    return Outcome(
        found,
        gate.render(found),
        broken=[gate.line(message, github) for message in found["broken"]],
    )


for listing in (listings.methods, listings.presets, listings.schema):
    app.command()(verb(listing))
app.add_typer(adapter.app, name="adapter")


@app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with the same arguments, our checkpoints included."""
    from compressor.evaluation.lm_eval import run_cli

    with errors_in_one_line(verbose=False):
        raise typer.Exit(run_cli(context.args))
