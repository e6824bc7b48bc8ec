"""Sizes and durations as people write them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def size_in_bytes(size: str | int) -> int:
    """Turn `3.2GiB`, `500 MB` or a number of bytes into bytes. Raises ValueError saying which units
    exist.
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]*)", str(size).strip())
    if type(size) not in (str, int) or match is None or match[2] not in _UNITS:
        raise ValueError(
            f"must be a number with a unit ({', '.join(filter(None, _UNITS))}) such as 3.2GiB, "
            f"not {size!r}"
        )
    if (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"must be at least one byte, not {size!r}")
    return count


def _size(value: Any) -> Any:
    size_in_bytes(value)
    return value


Size = Annotated[str | int, BeforeValidator(_size)]


_SECONDS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(duration: str) -> float:
    """Turn `90s`, `10m` or `1.5h` into seconds. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh])", str(duration).strip())
    if match is None or not (seconds := float(match[1]) * _SECONDS[match[2]]):
        raise ValueError(f"must be a time with its unit (s, m, h) such as 10m, not {duration!r}")
    return seconds


def _duration(value: str) -> str:
    seconds_of(value)
    return value


Duration = Annotated[str, BeforeValidator(_duration)]
