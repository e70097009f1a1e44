"""What the pictures of all tools have in common, and those that several of them draw. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import format_tokens

DOTS_PER_INCH = 110
LEGEND_INCHES = 1.7  # that an entry of the legend takes
OURS = "etap_rt"
FLOOR = "stream floor"
FLOOR_COLOR, PAPER_COLOR = "#888888", "#666666"
# The same in every picture: a library by its name, whoever ships it.
COLORS = {
    OURS: "#1f77b4",
    FLOOR: FLOOR_COLOR,
    "FlashMLA": "#d62728",
    "FlashAttention-3": "#2ca02c",
    "FlashInfer": "#9467bd",
    "torch": "#ff7f0e",
    "CuPy": "#8c564b",
}
MARKERS = {OURS: "o", "FlashMLA": "s", "FlashAttention-3": "^", "FlashInfer": "D", "torch": "v", "CuPy": "x"}
OTHER_COLORS = ("#d62728", "#2ca02c", "#9467bd")  # of lines that are no libraries

# TFLOP/s at 512 ... 64K tokens, 16 requests of 16 heads, on an H20: arXiv 2506.01969, the paper's table.
PAPER_TOKENS = tuple(512 << i for i in range(8))
PAPER_H20 = {
    "FlashMLA": (9, 13, 19, 23, 27, 30, 31, 32),
    "FlashMLA-ETAP": (13, 21, 34, 46, 61, 75, 85, 89),
}
PAPER_BATCH = 16
BESIDE = 1.035  # factor between neighbours in a roofline

Line = Mapping[int, float]  # tokens -> value


@contextmanager
def figure(
    path: Path,
    title: str,
    about: str,
    rows: int = 1,
    columns: int = 1,
    height: float = 4.2,
    width: float = 6.4,
    **subplots: Any,
) -> Iterator[list[Any]]:
    """A figure of panels, each `width` x `height` inches, as their axes, row by row; written to `path` at the end.

    `title` says what is drawn, `about` (a smaller line) where and when it was measured. Panels share one legend, of
    everything that has a label. Raises SystemExit, with what to install, without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install 'etap-rt[tools]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "grid.alpha": 0.3,
        "legend.fontsize": 8,
        "legend.frameon": False,
    }
    with pyplot.rc_context(settings):
        size = (width * columns, height * rows + 0.8)
        drawn, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **subplots)
        try:
            yield list(axes.flat)
            labelled = {
                label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels())
            }
            legend = drawn.legend(
                list(labelled.values()),
                list(labelled),
                title=title,
                title_fontproperties={"size": 12, "weight": "bold"},
                loc="outside upper center",
                ncols=max(1, min(len(labelled), int(size[0] / LEGEND_INCHES))),
            )
            legend.get_title().set_multialignment("center")
            drawn.supxlabel(about, fontsize=8, color=PAPER_COLOR)
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=DOTS_PER_INCH)
        finally:
            pyplot.close(drawn)


def style_of(name: str) -> dict[str, Any]:
    """How the line of a library is drawn: ours thick and below the others, the floor dashed."""
    if name == FLOOR:
        return {"color": FLOOR_COLOR, "linestyle": "--", "linewidth": 1.2}
    known = next((key for key in MARKERS if name.startswith(key)), "")
    if name == OURS:
        return {"color": COLORS[OURS], "marker": MARKERS[OURS], "markersize": 6, "linewidth": 3.2, "zorder": 2}
    color, marker = COLORS.get(known, "black"), MARKERS.get(known, ".")
    return {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.2, "zorder": 3}


def draw_by_length(axes: Any, lines: Mapping[str, Line], y_label: str) -> None:
    """Lines over a logarithmic axis of tokens; those without a point are left out."""
    for name, line in lines.items():
        if line:
            axes.plot(list(line), list(line.values()), label=name, **style_of(name))
    label_tokens(axes, sorted({tokens for line in lines.values() for tokens in line}))
    axes.set_ylabel(y_label)


def draw_paper(axes: Any) -> None:
    """The paper's lines, which were measured on another GPU."""
    for (name, values), linestyle in zip(PAPER_H20.items(), (":", "-.")):
        axes.plot(PAPER_TOKENS, values, linestyle, color=PAPER_COLOR, label=f"{name} on an H20 (paper)")


def label_tokens(axes: Any, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [format_tokens(count) for count in tokens])
    axes.minorticks_off()
    axes.set_xlabel("tokens a request")


def draw_roofline(
    axes: Any,
    tflop_per_s: float,
    tb_per_s: float,
    points: Mapping[str, Mapping[tuple[str, str], tuple[float, float]]],
) -> None:
    """The two roofs of a GPU and points below them.

    `points`: by library, by call (in two words, row and column), (flop per byte of cache, TFLOP/s). Libraries stand
    beside each other, a little to the left and right of where they belong.
    """
    calls = {call: intensity for labelled in points.values() for call, (intensity, _) in labelled.items()}
    knee = tflop_per_s / tb_per_s
    left, right = min(calls.values()) / 2, max(knee, *calls.values()) * 2
    axes.plot([left, knee, right], [left * tb_per_s, tflop_per_s, tflop_per_s], color="black", linewidth=1)
    slope = (left * knee) ** 0.5
    offset = {"xytext": (-6, 6), "textcoords": "offset points", "fontsize": 8, "ha": "right"}
    axes.annotate(f"memory: {tb_per_s:g} TB/s", (slope, slope * tb_per_s), **offset)
    axes.annotate(f"tensor cores: {tflop_per_s:g} TFLOP/s", (right, tflop_per_s), **offset)
    for index, (name, labelled) in enumerate(points.items()):
        shift = BESIDE ** (index - (len(points) - 1) / 2)
        x, y = zip(*((intensity * shift, rate) for intensity, rate in labelled.values()))
        axes.plot(x, y, label=name, **style_of(name) | {"linestyle": "", "markersize": 6})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 2)  # room for what the points are
    rows = list(dict.fromkeys(row for row, _ in calls))
    place = {"textcoords": "offset points", "fontsize": 8, "color": PAPER_COLOR}
    for (row, column), intensity in calls.items():
        height = (0, 4 + 12 * rows.index(row))
        axes.annotate(column, (intensity, 0), height, xycoords=("data", "axes fraction"), ha="center", **place)
    for index, row in enumerate(rows):
        axes.annotate(f"{row}:", (0, 0), (4, 4 + 12 * index), xycoords="axes fraction", **place)
    axes.set_xlabel("flop per byte of cache")
    axes.set_ylabel("TFLOP/s")
