"""Calibrate, decompose and probe for five sizes of one method in a sweep, against one run of that
method.

    python -m benchmarks.sweep [--model reference] [--config default]

One run is a sweep of one point, so that both collect statistics, keep what they find and read it
back in the same way.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

SIZES = (0.9, 0.8, 0.7, 0.6, 0.5)
STAGES = ("calibrate", "decompose", "probe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reference")
    parser.add_argument("--config", default="default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        one = seconds(Path(temporary) / "one", arguments, SIZES[2:3])
        five = seconds(Path(temporary) / "five", arguments, SIZES)
    print(
        f"{'sweep of five sizes':20} {'calibrate':>10} {'decompose':>10} {'probe':>8} "
        f"{'together':>9} {'ratio':>6}"
    )
    for name, found in (("one run", one), ("five sizes", five)):
        figures = " ".join(
            f"{found[stage]:{width}.2f}" for stage, width in zip(STAGES, (10, 10, 8), strict=True)
        )
        print(
            f"{name:20} {figures} {sum(found.values()):9.2f} "
            f"{sum(found.values()) / sum(one.values()):6.2f}"
        )


def seconds(
    folder: Path, arguments: argparse.Namespace, sizes: tuple[float, ...]
) -> dict[str, float]:
    """Seconds of the stages over all points of a sweep, its calibration included."""
    from compressor.pipeline import run
    from compressor.pipeline.sweep import run as sweep
    from compressor.pipeline.sweep.points import read_points

    folder.mkdir()
    base = {"model": {"name": arguments.model}, "evaluation": {"windows": 4}}
    file = folder / "sweep.yaml"
    file.write_text(
        json.dumps(
            {"base": base, "grid": {"config": [arguments.config], "allocation.keep": list(sizes)}}
        )
    )
    calibrate, spent = run.calibrate, []

    def timed(*args, **options):
        start = time.perf_counter()
        calibrate(*args, **options)
        spent.append(time.perf_counter() - start)

    run.calibrate = timed
    try:
        sweep.run(read_points(file), folder / "out")
    finally:
        run.calibrate = calibrate
    found = dict.fromkeys(STAGES, 0.0) | {"calibrate": sum(spent)}
    for path in (folder / "out" / "points").glob("*/timings.json"):
        for stage in STAGES:
            found[stage] += json.loads(path.read_text())["seconds"][stage]
    return found


if __name__ == "__main__":
    main()
