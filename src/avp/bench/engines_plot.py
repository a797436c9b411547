"""The plot of `avp bench engines`: next tokens that agree, and continuations that are identical, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from avp.bench.plot import COLOURS, style

_GREY = "#808080"
_PANELS = (("agreement", "B's next token unchanged, %", 90), ("identical", "32-token continuations identical, %", 0))
Row = Mapping[str, object]


def plot_engines(document: Mapping[str, object], folder: Path) -> Path:
    """engines.svg: bars with 95 % intervals; a line where the target is; in the label the mean KL."""
    style()
    folder.mkdir(parents=True, exist_ok=True)
    results = document["results"]
    rows: list[Row] = list(reversed(results)) if isinstance(results, list) else []
    plot, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.36 * max(len(rows), 3)), layout="constrained", sharey=True)
    for axis, (name, title, start) in zip(axes, _PANELS, strict=True):
        for at, row in enumerate(rows):
            _bar(axis, at, row, name)
        axis.set_title(title)
        axis.set_xlim(start, 100)
    axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    path = folder / "engines.svg"
    plot.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(plot)
    return path


def _bar(axis: Axes, at: int, row: Row, name: str) -> None:
    """The share, its interval, its target, and the figure in words."""
    found, targets, reached = row[name], row["target"], row["reached"]
    if not (isinstance(found, dict) and isinstance(targets, dict) and isinstance(reached, dict)):
        return
    share, low, high = (100 * float(found[key]) for key in ("share", "low", "high"))
    colour = COLOURS["text" if reached.get(name) is False else "exact"]
    axis.barh(at, share, color=colour, height=0.6)
    axis.plot([low, high], [at, at], color=_GREY, linewidth=1.5)
    if targets[name] is not None:
        axis.plot([100 * targets[name]] * 2, [at - 0.4, at + 0.4], color=COLOURS["prefix"], linewidth=2)
    left = axis.get_xlim()[0]
    words = f"{share:.1f} of {found['n']:,}" if name == "agreement" else f"{found['hits']} of {found['n']}"
    axis.annotate(words, (0, at), (4, 0), ("axes fraction", "data"), "offset points", va="center", color="white")
    axis.set_xlim(left)


def _label(row: Row) -> str:
    return f"{row['sender']} → {row['receiver']} ({row['weights']})\nKL {float(str(row['kl'])):.1g}"
