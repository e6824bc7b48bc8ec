"""Which figures a page shows of one checkpoint, from its report and its curves; `plots` draws
them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compressor.reporting import plots

SHOWN = 48  # lines in one panel; of more, as of many experts, that many are shown, evenly chosen

Entry = Mapping[str, Any]


def of(report: Mapping[str, Any], curves: Sequence[Entry]) -> list[tuple[str, str]]:
    """Captions and figures, as inline SVG."""
    linears = report["linears"]
    found = (
        [("Allocation, and the errors predicted and measured", plots.allocation(linears))]
        if linears
        else []
    )
    found += heat_maps(linears)
    lines = lines_of(linears, curves)
    for method in dict.fromkeys(curve["method"] for curve in curves):
        mine = [line for line in lines if line["method"] == method]
        shapes = thinned([line for line in mine if len(line["kept"]) > 1])
        if shapes:
            caption = (
                f"What each linear could have been: error of {method} against the size kept; dots "
                "are the choices"
            )
            found.append(
                (
                    caption,
                    plots.panels(
                        shapes, "kept", "error", "kept (bits)", "relative error", marks=True
                    ),
                )
            )
        spectra = thinned([line for line in mine if len(line.get("ranks", ())) > 1])
        if spectra:
            caption = (
                f"Singular values, weighted by the metric of {method}: share of the energy in each"
            )
            found.append(
                (
                    caption,
                    plots.panels(
                        spectra, "ranks", "spectrum", "singular value, by size", "share of energy"
                    ),
                )
            )
    return found


def heat_maps(linears: Sequence[Entry]) -> list[tuple[str, str]]:
    """Size, error and damage by block and projection; those that were not measured are left out."""
    maps = {
        "Share of bits removed": (
            "removed",
            "viridis",
            lambda part: 1 - _sum(part, "bits") / _sum(part, "dense_bits"),
        ),
        "Error of the output": ("relative error", "YlOrRd", lambda part: _largest(part, "error")),
        "Damage counted by the allocation": (
            "nats per token",
            "YlOrRd",
            lambda part: _largest(part, "kl"),
        ),
    }
    found = []
    for caption, (label, colours, value) in maps.items():
        cells = {place: value(part) for place, part in _by_place(linears).items()}
        cells = {place: value for place, value in cells.items() if value is not None}
        found += [(caption, plots.heat_map(cells, label, colours))] if cells else []
    return found


def lines_of(linears: Sequence[Entry], curves: Sequence[Entry]) -> list[dict[str, Any]]:
    """The curves with the panel and block they belong to, and with the choice that was made if it
    was of that method, (kept, error).
    """
    chosen = {linear["name"]: linear for linear in linears}
    lines = []
    for curve in curves:
        members = [chosen[name] for name in curve["members"]]
        place = place_of(curve["members"][0])
        if place is None:
            continue
        mark = None
        if all(member["method"] == curve["method"] for member in members):
            error = (
                members[0]["predicted"]
                if members[0]["measured"] is None
                else members[0]["measured"]
            )
            mark = _sum(members, "bits") / _sum(members, "dense_bits"), error
        names = [name.rpartition(".")[2] for name in curve["members"]]
        together = len(set(names)) > 1
        panel = f"{place[1].rpartition('.')[0]}.{{{','.join(names)}}}" if together else place[1]
        lines.append(
            {**curve, "panel": panel, "block": place[0], "name": curve["linear"], "mark": mark}
        )
    return lines


def thinned(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most SHOWN lines for each panel."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        panels.setdefault(line["panel"], []).append(line)
    return [line for part in panels.values() for line in part[:: -(-len(part) // SHOWN)]]


def place_of(name: str) -> tuple[int, str] | None:
    """Block and projection of a linear; experts of one block share a place. None outside the
    blocks.
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)", name)
    return match and (int(match[1]), re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", match[2]))


def _by_place(linears: Sequence[Entry]) -> dict[tuple[int, str], list[Entry]]:
    found: dict[tuple[int, str], list[Entry]] = {}
    for linear in linears:
        if place := place_of(linear["name"]):
            found.setdefault(place, []).append(linear)
    return found


def _sum(linears: Sequence[Entry], key: str) -> float:
    return sum(linear[key] for linear in linears)


def _largest(linears: Sequence[Entry], key: str) -> float | None:
    return max((linear[key] for linear in linears if linear[key] is not None), default=None)
