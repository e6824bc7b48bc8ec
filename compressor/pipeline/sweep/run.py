"""Every point of a sweep in a folder of its own, with what they have in common done once; what is
finished is never done again.

    OUTDIR/points/NAME/              the checkpoint of each point, whole or not there
    OUTDIR/results.jsonl             a line for each point that has ended, in the order of the sweep
    OUTDIR/report.html               all finished points on one page
    OUTDIR/work                      statistics, decompositions and probes; gone once every point is
                                     finished

Statistics are collected once for each model and calibration, for the union of what its points need.
Decompositions, probes and modules are kept in one store, by what they depend on: five sizes of one
method decompose and probe once.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compressor.errors import CompressorError, ConfigError
from compressor.files import model_folder
from compressor.files.documents import differences, read_json, replace_text
from compressor.files.staging import located, remove
from compressor.pipeline import dry_run, job
from compressor.pipeline import run as pipeline
from compressor.pipeline.sweep.points import Point
from compressor.recipe.load import dump_yaml, parse_yaml
from compressor.reporting import page
from compressor.resume.journal import SUFFIX, discard_journal
from compressor.resume.store import FolderStore, digest
from compressor.runtime.progress import Progress, silent

POINTS, WORK, RESULTS, REPORT = "points", "work", "results.jsonl", "report.html"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """The points and where they go."""

    points: Sequence[Point]
    output: Path

    def place(self, point: Point) -> Path:
        return self.output / POINTS / point.name

    @property
    def work(self) -> Path:
        return self.output / WORK


def outline(points: Sequence[Point], progress: Progress = silent) -> list[dict[str, Any]]:
    """What a sweep would do: for each point its settings, estimated bytes, and estimated seconds
    without what an earlier point has done.

    Reads headers only. Raises CompressorError for the first point that could not be run.
    """
    rows, seen = [], set()
    for point in progress(points, "outline"):
        source = model_folder.read_headers(
            model_folder.resolve(point.recipe.model.name, point.recipe.model.revision)
        )
        with _named(point):
            found = dry_run.outline(point.recipe, source)
        seconds = dict(found["estimated_seconds"])
        for stage, key in (
            ("calibrate", family(point)),
            ("decompose", shared(point)),
            ("probe", shared(point)),
        ):
            if (stage, key) in seen:
                seconds.pop(stage, None)
            seen.add((stage, key))
        size = found["bytes"]["compressed_at_most"]
        rows.append(
            {"name": point.name}
            | point.settings
            | {"kept": found["kept"], "bytes": size, "seconds": sum(seconds.values())}
        )
    return rows


def family(point: Point) -> str:
    """What points must have in common to use the same statistics."""
    recipe = point.recipe
    return digest([recipe.model.model_dump(mode="json"), job.collected_as(recipe), recipe.seed])


def shared(point: Point) -> str:
    """What points must have in common to use the same decompositions and probes."""
    recipe = point.recipe.model_dump(mode="json")
    return digest(
        [
            family(point),
            recipe["method"],
            recipe["output"]["dtype"],
            recipe["allocation"]["probe"],
            recipe["compensation"],
        ]
    )


def run(
    points: Sequence[Point],
    output: Path,
    jobs: int = 1,
    restart: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run every point that is not finished, in this process or in `jobs` others; write and return
    the results.

    A point that fails does not stop the others. Raises ConfigError before any work if the folder
    holds something else, or a finished point of another recipe (with `restart` that point is run
    again), or if another process is at it.
    """
    sweep = Sweep(points, located(output))
    with _alone(sweep):
        finished = (
            {}
            if restart
            else {
                point.name: row
                for point in points
                if (row := finished_row(sweep, point)) is not None
            }
        )
        results = dict(finished)
        _write(sweep, results)
        missing = [point for point in points if point.name not in finished]
        ready = _calibrated(sweep, {family(point) for point in missing}, progress)
        for point, row in _ended(sweep, ready, missing, jobs, restart, progress):
            results[point.name] = row
            _write(sweep, results)
        rows = pareto([results[point.name] for point in points])
        replace_text(sweep.output / RESULTS, _lines(rows))
        failed = [row for row in rows if row["status"] != "done"]
        if not failed:
            remove(sweep.work)
    done = [sweep.place(point) for point in points if results[point.name]["status"] == "done"]
    if done:
        page.write(page.read(done), sweep.output / REPORT)
    return {
        "output": str(sweep.output),
        "points": rows,
        "failed": len(failed),
        "report": str(sweep.output / REPORT) if done else None,
    }


@contextmanager
def _alone(sweep: Sweep) -> Iterator[None]:
    """Make the folders and hold them. Raises ConfigError if they hold something else, or another
    process is at it.
    """
    if sweep.output.exists() and not sweep.output.is_dir():
        raise ConfigError(f"{sweep.output}: exists and is not a folder")
    if (
        sweep.output.is_dir()
        and any(sweep.output.iterdir())
        and not (sweep.output / POINTS).is_dir()
    ):
        raise ConfigError(
            f"{sweep.output}: holds something else than a sweep; choose another folder"
        )
    (sweep.output / POINTS).mkdir(parents=True, exist_ok=True)
    lock = FileLock(sweep.output / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{sweep.output}: another process runs a sweep there; wait for it, or choose another "
            "folder"
        ) from None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(
            f"stopped; the same command goes on with what is missing in {sweep.output}",
            file=sys.stderr,
        )
        raise
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def finished_row(sweep: Sweep, point: Point) -> dict[str, Any] | None:
    """The result of a point that is finished; None if it is not. Raises ConfigError if it is, with
    another recipe or of another model.
    """
    place = sweep.place(point)
    if not (place / "report.json").is_file() or place.with_name(place.name + SUFFIX).exists():
        return None
    report = read_json(place / "report.json")
    if report["reason"] is not None and point.recipe.evaluation.enabled:
        return None
    before = parse_yaml(
        (place / "recipe.yaml").read_text(encoding="utf-8"), str(place / "recipe.yaml")
    )
    now = parse_yaml(dump_yaml(_forced(point)), point.name)
    found = differences(before, now)
    model = model_folder.content_digest(
        model_folder.read(
            model_folder.resolve(point.recipe.model.name, point.recipe.model.revision)
        )
    )
    if model != report["fingerprints"]["model"]:
        found.append(
            f"the model is {report['fingerprints']['model'][:12]}… there and {model[:12]}… here"
        )
    if found:
        raise ConfigError(
            f"{place}: holds another run: {'; '.join(found)}; pass --restart to run it again, or "
            "choose another folder"
        )
    return row_of(point, report, read_json(place / "timings.json"))


def _forced(point: Point) -> Any:
    """The recipe of a point, whose folder is the sweep's to replace."""
    recipe = point.recipe
    return recipe.model_copy(
        update={"output": recipe.output.model_copy(update={"overwrite": True})}
    )


def _calibrated(
    sweep: Sweep, missing: set[str], progress: Progress
) -> dict[str, Path | CompressorError]:
    """Statistics of the families named: their folder, or why there are none. They serve all points,
    so they are the same in every run.
    """
    families: dict[str, list[Point]] = {}
    for point in sweep.points:
        families.setdefault(family(point), []).append(point)
    found: dict[str, Path | CompressorError] = {}
    for key, (first, *others) in ((key, families[key]) for key in families if key in missing):
        needs = digest(
            [
                [one.recipe.model_dump(mode="json")["method"], one.recipe.allocation.search]
                for one in (first, *others)
            ]
        )
        place = sweep.work / f"statistics-{digest([key, needs])[:16]}"
        try:
            if not place.is_dir():
                pipeline.calibrate(
                    first.recipe,
                    place,
                    progress=progress,
                    others=[point.recipe for point in others],
                    restart=False,
                )
            found[key] = place
        except CompressorError as error:
            found[key] = error
    return found


def _ended(
    sweep: Sweep,
    ready: dict[str, Path | CompressorError],
    points: Sequence[Point],
    jobs: int,
    restart: bool,
    progress: Progress,
) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Each point with its result, as they end."""
    start = (
        partial(_in_a_process, sweep, jobs)
        if jobs > 1
        else partial(_here, sweep, progress=progress)
    )
    with ThreadPoolExecutor(jobs) as pool:
        work = partial(_result, sweep, ready, restart, start)
        rows: Iterable[dict[str, Any]] = pool.map(work, points) if jobs > 1 else map(work, points)
        yield from zip(points, progress(rows, "sweep", len(points)), strict=True)


def _result(
    sweep: Sweep, ready: dict[str, Path | CompressorError], restart: bool, start: Any, point: Point
) -> dict[str, Any]:
    stats, place = ready[family(point)], sweep.place(point)
    if restart:
        discard_journal(place)
    try:
        if isinstance(stats, CompressorError):
            raise stats
        start(point, stats)
    except (
        Exception
    ) as error:  # whatever it is, it is the result of this point, and the others go on
        reason = (
            str(error) if isinstance(error, CompressorError) else f"{type(error).__name__}: {error}"
        )
        log.error(
            "%s failed: %s", point.name, reason, exc_info=not isinstance(error, CompressorError)
        )
        return {
            "name": point.name,
            "settings": point.settings,
            "status": "failed",
            "error": " ".join(reason.split()),
        }
    return row_of(point, read_json(place / "report.json"), read_json(place / "timings.json"))


def _here(sweep: Sweep, point: Point, stats: Path, progress: Progress) -> None:
    found = pipeline.compress(
        _forced(point),
        sweep.place(point),
        stats=stats,
        progress=progress,
        shared=FolderStore(sweep.work / "store"),
    )
    if failure := found.get("failure"):
        raise CompressorError(failure)


def _in_a_process(sweep: Sweep, jobs: int, point: Point, stats: Path) -> None:
    """Run a point in a process of its own, with its part of the processors. Raises CompressorError
    with the last line it printed.
    """
    task = {
        "recipe": dump_yaml(_forced(point)),
        "output": str(sweep.place(point)),
        "stats": str(stats),
        "store": str(sweep.work / "store"),
    }
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    ended = subprocess.run(
        [sys.executable, "-m", "compressor.cli.worker"],
        input=json.dumps(task),
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        check=False,
    )
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise CompressorError(
            last
            if ended.returncode > 0
            else f"the process was killed by signal {-ended.returncode}: {last}"
        )


def row_of(point: Point, report: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
    """The line of a finished point."""
    return {
        "name": point.name,
        "settings": point.settings,
        "status": "done",
        "kept": report["kept"]["targets"],
        "bytes": report["bytes"]["compressed"],
        "kl": report["kl"],
        "perplexity": report["perplexity"]["compressed"],
        "heldout_kl": (report["heldout"] or {}).get("kl"),
        "seconds": timings["seconds"]["total"],
    }


def pareto(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, with `best` for those that no other beats in both bytes and divergence."""

    def beaten(row: dict[str, Any]) -> bool:
        mine = row["bytes"], row["kl"]
        return any(
            theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True))
            for theirs in scored
        )

    scored = [(row["bytes"], row["kl"]) for row in rows if row.get("kl") is not None]
    return [row | ({"best": not beaten(row)} if row.get("kl") is not None else {}) for row in rows]


def _write(sweep: Sweep, results: dict[str, dict[str, Any]]) -> None:
    replace_text(
        sweep.output / RESULTS,
        _lines(pareto([results[point.name] for point in sweep.points if point.name in results])),
    )


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def _named(point: Point) -> Iterator[None]:
    """Put the name of the point before what is wrong with it."""
    try:
        yield
    except CompressorError as error:
        raise type(error)(f"{point.name}: {error}") from None
