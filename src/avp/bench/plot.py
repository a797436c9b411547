"""SVG plots from runs; colours that read on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from avp.bench.results import Hop, Run

matplotlib.use("svg")
from matplotlib import pyplot as plt

COLOURS = {"text": "#d1495b", "prefix": "#edae49", "exact": "#00798c", "latent": "#7b6cc4"}
LABELS = {"text": "text", "prefix": "text + prefix cache", "exact": "AVP exact relay", "latent": "AVP latent"}
_GREY = "#808080"
_PANELS: tuple[tuple[str, Callable[[Hop], float]], ...] = (
    ("positions computed", lambda hop: hop.positions),
    ("TTFT, seconds", lambda hop: hop.ttft),
    ("bytes handed over, MB", lambda hop: hop.bytes / 1e6),
)


def style() -> None:
    """One look for all plots: transparent, grey axes, deterministic SVG."""
    plt.rcParams.update(
        {
            "svg.hashsalt": "avp",
            "svg.fonttype": "none",
            "font.size": 10,
            "text.color": _GREY,
            "axes.labelcolor": _GREY,
            "axes.edgecolor": _GREY,
            "axes.titlecolor": _GREY,
            "xtick.color": _GREY,
            "ytick.color": _GREY,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )


def plot_chain(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One figure for each length of the chain: positions, TTFT and bytes by hop, means over the questions."""
    style()
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for agents in sorted({run.agents for run in runs}):
        chosen = [run for run in runs if run.agents == agents]
        figure, axes = plt.subplots(1, len(_PANELS), figsize=(11, 3.2), layout="constrained")
        for axis, (title, value) in zip(axes, _PANELS, strict=True):
            for mode in dict.fromkeys(run.mode for run in chosen):
                same = [run for run in chosen if run.mode == mode]
                heights = [mean(value(run.hops[i]) for run in same) for i in range(agents)]
                axis.plot(
                    range(1, agents + 1), heights, marker="o", markersize=3, color=COLOURS[mode], label=LABELS[mode]
                )
            axis.set_title(title)
            axis.set_xlabel("hop")
            axis.set_ylim(bottom=0)
        axes[0].legend()
        path = folder / f"chain-{agents}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)
        paths.append(path)
    return paths
