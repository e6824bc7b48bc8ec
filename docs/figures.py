"""Draw the figures of README and docs from docs/assets/figures.json.

`python docs/figures.py [FOLDER]` draws; `python docs/figures.py --curves CHECKPOINT` first takes
three error curves of a checkpoint into that file.
"""

import json
import sys
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
DATA = ASSETS / "figures.json"
INK, ACCENT, GREY = "#222222", "#3949ab", "#8d8d8d"
COLOURS = ("#c0612b", "#2e7d32", "#8d6e63", "#7b1fa2", "#00838f", "#9e9d24", "#ad1457", "#546e7a")
LINEARS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.14.self_attn.o_proj",
    "model.layers.20.mlp.down_proj",
)


def draw(folder: Path) -> list[Path]:
    """Write every figure into a folder; return the paths."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(STYLE)
    data = json.loads(DATA.read_text(encoding="utf-8"))
    figures = {
        "smollm2": draw_divergence(data["smollm2"]),
        "curves": draw_curves(data["curves"]),
        "pivoted": draw_pivoted(),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], format="svg", metadata={"Date": None}, bbox_inches="tight")
    return paths


STYLE = {
    "svg.hashsalt": "compressor",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def panel(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def draw_divergence(data: dict[str, Any]) -> Any:
    """Divergence from the original against the fraction kept, one mark for each measured model."""
    figure, axes = panel(8, 4)
    for series, colour in zip(data["series"], (ACCENT, *COLOURS), strict=True):
        kept, divergence = zip(*series["points"], strict=True)
        ours = series.get("ours", False)
        axes.plot(
            kept,
            divergence,
            "o-",
            color=colour,
            linewidth=2.6 if ours else 1.4,
            markersize=9 if ours else 6,
        )
        left = kept[0] < 0.6
        axes.annotate(
            series["name"],
            (kept[0], divergence[0]),
            xytext=(-9 if left else 9, series.get("lift", 0)),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=colour,
            fontweight="bold" if ours else "normal",
        )
    axes.set_yscale("log")
    axes.set_xlim(0.44, 0.95)
    axes.set_xticks(
        [0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85],
        ["55 %", "60 %", "65 %", "70 %", "75 %", "80 %", "85 %"],
    )
    axes.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_xlabel("kept of the linears, masks included")
    axes.set_ylabel("KL(original‖compressed), nats per token")
    axes.set_title("SmolLM2-135M: what a size costs (lower is better)", loc="left", fontsize=11)
    return figure


def draw_curves(data: dict[str, Any]) -> Any:
    """Error against size for a few linears; the chosen sizes are marked."""
    figure, axes = panel(7, 3.6)
    for (name, linear), colour in zip(data["linears"].items(), COLOURS, strict=False):
        chosen = tuple(linear["chosen"])
        points = sorted([*zip(linear["kept"], linear["error"], strict=True), chosen])
        label = name.removeprefix("model.layers.")
        axes.plot(*zip(*points, strict=True), "-", color=colour, linewidth=1.8, label=label)
        axes.plot(*chosen, "o", color=colour, markersize=9)
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.2)
    axes.set_xlim(0, 1.0)
    axes.set_xlabel("bits kept of this linear")
    axes.set_ylabel("relative error")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_pivoted() -> Any:
    """Numbers stored for a square weight at every rank, in units of the dense weight."""
    figure, axes = panel(7, 3.2)
    ranks = [step / 100 for step in range(101)]
    axes.plot(
        ranks,
        [2 * rank for rank in ranks],
        color=COLOURS[0],
        linewidth=2,
        label="a pair of factors: r (m + n)",
    )
    axes.plot(
        ranks,
        [rank * (2 - rank) for rank in ranks],
        color=ACCENT,
        linewidth=2.4,
        label="pivoted: r (m + n − r)",
    )
    axes.axhline(1, color=GREY, linewidth=1.2, linestyle="--")
    axes.annotate("dense", (0.02, 1), xytext=(0, 5), textcoords="offset points", color=GREY)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.6)
    axes.set_xlabel("rank ÷ full rank, square weight")
    axes.set_ylabel("numbers stored ÷ m n")
    axes.legend(frameon=False, loc="lower right")
    return figure


def take_curves(checkpoint: Path) -> None:
    """Copy the curves and choices of three linears of a checkpoint into figures.json."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    curves = {
        curve["linear"]: curve
        for curve in json.loads((checkpoint / "curves.json").read_text(encoding="utf-8"))["curves"]
    }
    choices = json.loads((checkpoint / "plan.json").read_text(encoding="utf-8"))["linears"]
    linears = {}
    for name in LINEARS:
        choice = choices[name]
        chosen = [choice["bits"] / choice["dense_bits"], choice["measured"]]
        linears[name] = {
            "kept": curves[name]["kept"],
            "error": curves[name]["error"],
            "chosen": chosen,
        }
    data["curves"]["linears"] = linears
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[:1] == ["--curves"]:
        take_curves(Path(arguments[1]))
        arguments = arguments[2:]
    draw(Path(arguments[0]) if arguments else ASSETS)
