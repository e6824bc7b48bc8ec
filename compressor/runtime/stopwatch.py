"""Where the time and the memory of a run went: what `timings.json` holds, apart from every byte
comparison.
"""

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STAGES = ("calibrate", "probe", "decompose", "allocate", "train", "write", "evaluate")


class Stopwatch:
    """Wall-clock seconds per stage; `total` runs from construction.

    >>> stopwatch = Stopwatch()
    >>> with stopwatch("probe"):
    ...     pass
    """

    def __init__(self):
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to a stage; a stage may be entered again, and counts when it
        fails too.
        """
        if stage not in self._seconds:
            raise ValueError(f"unknown stage {stage!r}; stages: {', '.join(STAGES)}")
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage (0 if it did not run) and in total up to now."""
        return self._seconds | {"total": time.perf_counter() - self._start}

    def to_json(self) -> dict[str, Any]:
        """The contents of `timings.json`."""
        return {
            "seconds": self.seconds(),
            "peak_memory_bytes": peak_memory(),
            "peak_device_memory_bytes": peak_device_memory(),
            "host": host(),
        }


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes.

    On Linux from VmHWM, because ru_maxrss of a child process starts at the peak of the process that
    launched it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = next(
            line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")
        )
        return int(kilobytes) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def peak_device_memory() -> int | None:
    """Largest memory allocated on any CUDA device so far, in bytes; None without one or before
    torch is imported.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return max(
        torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())
    )


def host() -> dict[str, Any]:
    """The machine and the versions behind the figures."""
    torch = sys.modules.get("torch")
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "device": torch.cuda.get_device_name()
        if torch is not None and torch.cuda.is_available()
        else platform.machine(),
        "python": platform.python_version(),
        "torch": None if torch is None else torch.__version__,
    }
