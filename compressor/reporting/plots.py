"""Figures as inline SVG: text stays text, ink takes the colour of the page around it, and every
mark names itself when pointed at.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any
from xml.etree import ElementTree

from compressor.errors import ConfigError

INK = "#010203"  # stands for the page's own text colour
SVG = "http://www.w3.org/2000/svg"
SERIES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
MARKERS = "osD^vP*X"
PANELS = 3  # beside each other
DEPTH = 1e-6  # of a logarithmic scale, below its top
LEGEND = {
    "frameon": False,
    "ncols": 4,
    "fontsize": 8,
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
}  # above the axes
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compressor",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.2,
    "axes.axisbelow": True,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        INK,
    ),
}


def _styled(draw: Callable[..., str]) -> Callable[..., str]:
    """Run a function that draws under STYLE. Raises ConfigError where matplotlib is missing."""

    @wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> str:
        try:
            import matplotlib
        except ImportError:
            raise ConfigError(
                "a report in HTML needs matplotlib; install it with `pip install "
                "compressor[report]`, or write .md"
            ) from None
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return drawn


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both coordinates (smaller is better), by
    growing first coordinate.
    """
    front, least = [], float("inf")
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < least:
            front.append(index)
            least = points[index][1]
    return front


@_styled
def trade_off(points: Sequence[Mapping[str, Any]], label: str) -> str:
    """Score against size: one mark for each of {name, series, mib, score}, one colour for each
    series, and a line along the best.
    """
    axes = _axes(7, 4)
    places = [(point["mib"], point["score"]) for point in points]
    front = [places[index] for index in pareto_front(places)]
    axes.plot(
        *zip(*front, strict=True),
        color=INK,
        linewidth=1,
        alpha=0.5,
        drawstyle="steps-post",
        zorder=1,
    )
    titles = {}
    for order, series in enumerate(dict.fromkeys(point["series"] for point in points)):
        colour, marker = SERIES[order % len(SERIES)], MARKERS[order // len(SERIES) % len(MARKERS)]
        axes.plot([], [], marker, color=colour, label=series)
        for index, point in enumerate(points):
            if point["series"] == series:
                axes.plot(
                    point["mib"],
                    point["score"],
                    marker,
                    color=colour,
                    markersize=8,
                    zorder=2,
                    gid=f"point-{index}",
                )
                titles[f"point-{index}"] = (
                    f"{point['name']}: {point['mib']:,.4g} MiB, {point['score']:.4g}"
                )
    axes.set(
        xlabel="weight files, MiB",
        ylabel=label,
        yscale="log" if min(score for _, score in places) > 0 else "linear",
    )
    axes.grid(True, which="both")
    axes.legend(**LEGEND)
    return _to_svg(axes, titles)


@_styled
def heat_map(cells: Mapping[tuple[int, str], float], label: str, colours: str) -> str:
    """Values by block (columns) and projection (rows); cells without a value stay empty."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    blocks, rows = (
        sorted({block for block, _ in cells}),
        list(dict.fromkeys(projection for _, projection in cells)),
    )
    axes = _axes(max(7, 2.6 + 0.25 * len(blocks)), max(1.6, 0.9 + 0.3 * len(rows)))
    scale = ScalarMappable(Normalize(0, max(cells.values()) or 1.0), colormaps[colours])
    titles = {}
    for index, ((block, projection), value) in enumerate(cells.items()):
        place = (blocks.index(block) - 0.5, rows.index(projection) - 0.5)
        axes.add_patch(
            Rectangle(
                place,
                1,
                1,
                facecolor=scale.to_rgba(value),  # type: ignore[arg-type]  # numbers will do
                edgecolor=INK,
                linewidth=0.2,
                gid=f"cell-{index}",
            )
        )
        titles[f"cell-{index}"] = f"block {block}, {projection}: {value:.4g}"
    every = max(1, len(blocks) // 16)
    axes.set(xlim=(-0.5, len(blocks) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel="block")
    axes.set_xticks(range(0, len(blocks), every), blocks[::every])
    axes.set_yticks(range(len(rows)), rows)
    axes.figure.colorbar(scale, ax=axes, label=label, fraction=0.04)
    return _to_svg(axes, titles)


@_styled
def allocation(linears: Sequence[Mapping[str, Any]]) -> str:
    """Fraction kept of each linear in the order of the model, coloured by method, above the error
    that it leaves.
    """
    upper = _axes(max(7, 1.5 + 0.06 * len(linears)), 4.5, rows=2)
    lower = upper.figure.axes[1]
    methods = list(dict.fromkeys(linear["method"] for linear in linears))
    titles, seen = {}, set()
    for index, linear in enumerate(linears):
        colour = SERIES[methods.index(linear["method"]) % len(SERIES)]
        named = {"label": linear["method"]} if linear["method"] not in seen else {}
        seen.add(linear["method"])
        kept = linear["bits"] / linear["dense_bits"]
        upper.bar(index, kept, width=0.85, color=colour, gid=f"bar-{index}", **named)
        titles[f"bar-{index}"] = f"{linear['name']}: {linear['method']}, {100 * kept:.1f} % kept"
    for key, marker in (("predicted", "-"), ("measured", "."), ("error", "--")):
        values = [linear.get(key) for linear in linears]
        if any(values):
            lower.plot(
                [value or None for value in values],
                marker,
                label=key,
                linewidth=1,
                color=SERIES["-.--".index(marker)],
            )
    upper.set(ylabel="kept (bits)", ylim=(0, 1.02), xlim=(-1, len(linears)))
    lower.set(
        ylabel="relative error",
        xlabel="linear, in the order of the model",
        yscale="log" if lower.lines else "linear",
    )
    for axes in (upper, lower):
        axes.grid(True, axis="y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(**LEGEND)
    return _to_svg(upper, titles)


@_styled
def panels(
    lines: Sequence[Mapping[str, Any]],
    across: str,
    up: str,
    label: str,
    height: str,
    marks: bool = False,
) -> str:
    """Lines {panel, block, name, mark, …} in a panel for each projection, coloured by block,
    heights on a logarithmic scale.

    across, up: keys of their points; label, height: what these mean. marks: whether to put a dot at
    the `mark` (x, y) of a line.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = list(dict.fromkeys(line["panel"] for line in lines))
    rows = -(-len(names) // PANELS)
    axes = _axes(7.5, 0.6 + 1.9 * rows, rows, PANELS)
    every, titles = axes.figure.axes, {}
    last = max(line["block"] for line in lines)
    scale = ScalarMappable(
        Normalize(0, max(last, 1)), colormaps["cool"]
    )  # readable on light and dark
    for index, line in enumerate(lines):
        place, colour = every[names.index(line["panel"])], scale.to_rgba(line["block"])
        points = [(x, y) for x, y in zip(line[across], line[up], strict=True) if y > 0]
        place.plot(
            *zip(*points, strict=True), color=colour, linewidth=1, gid=f"line-{index}"
        ) if points else None
        titles[f"line-{index}"] = line["name"]
        if marks and line["mark"] and line["mark"][1]:
            place.plot(*line["mark"], "o", color=colour, markersize=4, gid=f"mark-{index}")
            titles[f"mark-{index}"] = (
                f"{line['name']}: {100 * line['mark'][0]:.1f} % kept, {line['mark'][1]:.3g}"
            )
    for place, name in zip(every, names, strict=False):
        place.set_title(name, fontsize=8)
        place.set_yscale("log")
        place.set_ylim(bottom=max(place.get_ylim()[0], place.get_ylim()[1] * DEPTH))
        place.tick_params(labelsize=7, labelbottom=True)
        place.minorticks_off()
        place.grid(True, which="major")
    for place in every[len(names) :]:
        place.remove()
    axes.figure.supxlabel(label, fontsize=10, color=INK)
    axes.figure.supylabel(height, fontsize=10, color=INK)
    if last:
        axes.figure.colorbar(
            scale,
            ax=every[: len(names)],
            label="block",
            fraction=0.03,
            aspect=30,
            shrink=0.5,
            ticks=[0, last],
        )
    return _to_svg(axes, titles)


def _axes(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    """The first axes of a new figure of this size in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.subplots(rows, columns, sharex=True)
    return figure.axes[0]


def _to_svg(axes: Any, titles: Mapping[str, str]) -> str:
    for each in axes.figure.axes:
        if each.get_yscale() == "log":
            each.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            low, high = each.get_ylim()
            few = (
                high < 30 * low
            )  # then there may be one power of ten or none, and a label at 2 and 5 as well
            each.yaxis.set_minor_formatter(
                lambda value, _, few=few: f"{value:g}" if few and f"{value:e}"[0] in "25" else ""
            )
    written = io.StringIO()
    axes.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return inline(written.getvalue(), titles)


def inline(svg: str, titles: Mapping[str, str]) -> str:
    """Turn an SVG document into an element of a page: titles added, metadata and fixed sizes
    removed, ink in the page's colour.
    """
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(svg)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    for element in root.iter():
        if (name := element.get("id", "")) in titles:
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = titles[name]
            element.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor")


def prefixed(figure: str, prefix: str) -> str:
    """The same figure with a prefix before its ids, so that it can share a page with others."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", figure)
