"""What the pictures of all tools have in common, and those that several of them draw. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import format_tokens

DOTS_PER_INCH = 140
OURS = "etap_rt"
FLOOR = "stream floor"
OURS_COLOR, FLOOR_COLOR, PAPER_COLOR = "#1f77b4", "#888888", "#666666"
OTHER_COLORS = ("#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")

# TFLOP/s at 512 ... 64K tokens, 16 requests of 16 heads, on an H20: arXiv 2506.01969, the paper's table.
PAPER_TOKENS = tuple(512 << i for i in range(8))
PAPER_H20 = {
    "FlashMLA": (9, 13, 19, 23, 27, 30, 31, 32),
    "FlashMLA-ETAP": (13, 21, 34, 46, 61, 75, 85, 89),
}
PAPER_BATCH = 16

Line = Mapping[int, float]  # tokens -> value


@contextmanager
def figure(path: Path, title: str, panels: int = 1, height: float = 4.2, width: float = 6.4) -> Iterator[list[Any]]:
    """A figure of some panels side by side, as their axes; written to `path` (PNG or what its ending says) at the end.

    Raises SystemExit, with what to install, without matplotlib.
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
        drawn, axes = pyplot.subplots(1, panels, figsize=(width * panels, height), squeeze=False, layout="constrained")
        try:
            yield list(axes[0])
            drawn.suptitle(title, fontsize=10)
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=DOTS_PER_INCH)
        finally:
            pyplot.close(drawn)


def colors_of(names: Sequence[str]) -> dict[str, str]:
    """A color a name; ours and the floor always have the same."""
    fixed = {OURS: OURS_COLOR, FLOOR: FLOOR_COLOR}
    others = [name for name in names if name not in fixed]
    return fixed | {name: OTHER_COLORS[i % len(OTHER_COLORS)] for i, name in enumerate(others)}


def draw_by_length(axes: Any, lines: Mapping[str, Line], y_label: str) -> None:
    """Lines over a logarithmic axis of tokens; ours is drawn thicker, the floor dashed."""
    colors = colors_of(list(lines))
    for name, line in lines.items():
        style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "linewidth": 1.2}
        if name == OURS:
            style |= {"linewidth": 2.4, "zorder": 3}
        elif name == FLOOR:
            style |= {"linestyle": "--", "marker": ""}
        axes.plot(list(line), list(line.values()), label=name, color=colors[name], **style)
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
    axes: Any, tflop_per_s: float, tb_per_s: float, points: Mapping[str, Mapping[str, tuple[float, float]]]
) -> None:
    """The two roofs of a GPU and points below them.

    `points`: by library, by label, (flop per byte of cache, TFLOP/s).
    """
    everything = [point for labelled in points.values() for point in labelled.values()]
    left = min(intensity for intensity, _ in everything) / 2
    right = max(tflop_per_s / tb_per_s, *(intensity for intensity, _ in everything)) * 2
    knee = tflop_per_s / tb_per_s
    axes.plot([left, knee, right], [left * tb_per_s, tflop_per_s, tflop_per_s], color="black", linewidth=1)
    axes.annotate(f"{tb_per_s:g} TB/s", (left * 1.1, left * tb_per_s * 1.7), fontsize=8)
    axes.annotate(f"{tflop_per_s:g} TFLOP/s", (knee, tflop_per_s * 1.08), fontsize=8)
    colors = colors_of(list(points))
    for name, labelled in points.items():
        x, y = zip(*labelled.values())
        axes.scatter(x, y, s=26 if name == OURS else 14, color=colors[name], label=name, zorder=3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flop per byte of cache")
    axes.set_ylabel("TFLOP/s")
