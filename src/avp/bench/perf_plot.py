"""The plot of `avp bench perf`: each ratio over its target, and decoding time by length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from avp.bench.perf_figure import Figure
from avp.bench.plot import COLOURS, style


def plot_perf(figures: Sequence[Figure], folder: Path) -> Path:
    """perf.svg: right of the line is reached; the label is the ratio itself and its target."""
    style()
    folder.mkdir(parents=True, exist_ok=True)
    shown = [figure for figure in figures if figure.value and figure.target.limit]
    growth = next((figure.detail["lengths"] for figure in figures if "lengths" in figure.detail), None)
    plot, axes = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.26 * max(len(shown), 6)), layout="constrained", width_ratios=(3, 2)
    )
    for row, figure in enumerate(reversed(shown)):
        value, limit = figure.value or 1.0, figure.target.limit or 1.0
        least = figure.target.at_least is not None
        share = value / limit if least else limit / value
        axes[0].barh(row, share, color=COLOURS["exact" if figure.reached else "text"], height=0.6)
        axes[0].text(
            max(share, 1) * 1.06, row, f"{value:.3g} ({'≥' if least else '≤'} {limit:g})", va="center", fontsize=8
        )
    axes[0].set_yticks(range(len(shown)), [figure.name for figure in reversed(shown)], fontsize=8)
    axes[0].axvline(1, color="#808080", linewidth=1)
    axes[0].set_xscale("log")
    axes[0].set_title("ratio over its target (log)")
    axes[0].margins(x=0.25)
    if isinstance(growth, list):
        for name, colour, label in (("avp", "exact", "AVP"), ("transformers", "prefix", "DynamicCache")):
            times = [1e3 * row[f"{name}_seconds_per_token"] for row in growth]
            axes[1].plot(
                [row["context_tokens"] for row in growth], times, marker="o", color=COLOURS[colour], label=label
            )
        axes[1].legend()
        axes[1].set_ylim(bottom=0)
        axes[1].set_xlabel("context, tokens")
    axes[1].set_title("decoding, ms a token")
    path = folder / "perf.svg"
    plot.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(plot)
    return path
