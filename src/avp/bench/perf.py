"""`avp bench perf`: serialisation, memory, first token, decoding, fan-out and the lossless codec, as ratios.

Every figure is a ratio of two things measured in this run on this machine, by turns; none of them is a test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import click

from avp.bench import perf_engine, perf_memory, perf_wire
from avp.bench.peer import Shape
from avp.bench.perf_figure import Figure
from avp.bench.perf_lossless import lossless, real_text, text_ids
from avp.bench.results import environment, write_json
from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import UsageError

NAMES = ("to_bytes", "from_bytes", "memory", "ttft", "decode", "fanout", "lossless")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, how large and how often."""

    names: tuple[str, ...] = NAMES
    model: str = "smollm2"
    text: str = ""
    peer: str | None = None  # the reason not to measure the peer; None: measure it
    shape: Shape = field(default_factory=Shape)
    sizes: perf_engine.Sizes = field(default_factory=perf_engine.Sizes)
    rounds: int = 7
    processes: int = 3  # fresh processes for each step of the memory figure


Load = Callable[[str, str], HuggingFaceConnector]


def measure(plan: Plan, *, load: Load, tell: Callable[[str], object]) -> Iterator[Figure]:
    """The figures of the plan, one after the other; `load(model, dtype)` is called only where an engine is needed."""
    connector = cache(lambda dtype: load(plan.model, dtype))

    @cache
    def ids() -> Sequence[int]:
        sizes = plan.sizes
        count = max(*sizes.lengths, sizes.context + max(sizes.prompt, *sizes.fork_prompts) + sizes.forks)
        return text_ids(connector("float32"), plan.text, count)

    for name in plan.names:
        tell(f"{name} …")
        if name == "to_bytes":
            yield from perf_wire.to_bytes(plan.shape, n=plan.rounds, peer=plan.peer, tell=tell)
        elif name == "from_bytes":
            yield from perf_wire.from_bytes(plan.shape, n=plan.rounds, peer=plan.peer, tell=tell)
        elif name == "memory":
            yield from perf_memory.memory(plan.shape, n=plan.processes)
        elif name == "ttft":
            yield from perf_engine.ttft(connector("float32"), ids(), plan.sizes, n=plan.rounds)
        elif name == "decode":
            yield from perf_engine.decode(connector("float32"), ids(), plan.sizes, n=plan.rounds)
        elif name == "fanout":
            yield from perf_engine.fanout(connector("float32"), ids(), plan.sizes)
        else:
            made = {dtype: (lambda dtype=dtype: connector(dtype)) for dtype in ("bfloat16", "float32")}
            yield from lossless(made, plan.text, tokens=plan.sizes.context, n=plan.rounds)


def document(figures: Sequence[Figure], plan: Plan) -> dict[str, object]:
    """The benchmark's one JSON document."""
    return {
        "benchmark": "perf",
        "settings": {"model": plan.model, "rounds": plan.rounds, "names": list(plan.names)},
        "environment": environment(),
        "results": [figure.to_json() for figure in figures],
    }


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, folder, .gguf file or hub id.")
@click.option("--only", default=",".join(NAMES), show_default=True, help="What to measure, with commas.")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), default=None, help="Text of the contexts."
)
@click.option(
    "--peer/--no-peer", default=True, show_default=True, help="Compare with avp==0.6.2 in an environment of its own."
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for perf.json and perf.svg.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output.")
def command(model: str, only: str, text: Path | None, peer: bool, out: Path | None, as_json: bool) -> None:
    """Ratios within one run: serialisation, memory, first token, decoding, fan-out, lossless codec."""
    from rich.console import Console

    names = tuple(only.split(","))
    if set(names) - set(NAMES):
        raise UsageError(f"no figure is named {sorted(set(names) - set(NAMES))}. Fix: use some of {', '.join(NAMES)}.")
    console = Console(stderr=True)
    plan = Plan(names, model, real_text(text), None if peer else "switched off with --no-peer")
    figures: list[Figure] = []
    for figure in measure(plan, load=_load, tell=lambda line: console.print(line, markup=False, highlight=False)):
        figures.append(figure)
        console.print(f"  {figure.name}: {words(figure)}", markup=False, highlight=False)
    found = document(figures, plan)
    if out is not None:
        from avp.bench.perf_plot import plot_perf

        write_json(found, out / "perf.json", echo=click.echo)
        plot_perf(figures, out)
    if as_json:
        write_json(found, None, echo=click.echo)
    else:
        print_table(figures)


def _load(model: str, dtype: str) -> HuggingFaceConnector:
    return HuggingFaceConnector.from_pretrained(model, dtype=dtype)


def words(figure: Figure) -> str:
    """A figure in a line, while others are measured."""
    if figure.value is None:
        return f"not measured: {figure.not_measured}"
    return f"{figure.value:.3g} (target {_limit(figure) or 'none'}; {_spread(figure)})"


def _limit(figure: Figure) -> str:
    limit = figure.target.limit
    return "" if limit is None else f"{'≥' if figure.target.at_least is not None else '≤'} {limit:g}"


def _spread(figure: Figure) -> str:
    low, high = figure.spread
    return f"n = {len(figure.ratios)}" + (f", {low:.3g} to {high:.3g}" if len(figure.ratios) > 1 else "")


def print_table(figures: Sequence[Figure]) -> None:
    """All figures, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "ratio", "target", "reached", "rounds, smallest to largest")
    for figure in figures:
        reached = {True: "yes", False: "no", None: ""}[figure.reached]
        ratio = "not measured" if figure.value is None else f"{figure.value:.3g}"
        spread = figure.not_measured or _spread(figure)
        table.add_row(figure.name, ratio, _limit(figure), reached, spread)
    Console().print(table)
