"""`avp bench net`: hand-overs between two processes of this machine, as ratios to a plain copy of the same bytes.

Every figure is a ratio of two things measured in this run on this machine, by turns; none of them is a test.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import click

from avp.bench import net_disk, net_first, net_peer, net_transfer
from avp.bench.peer import Shape
from avp.bench.perf import print_table, words
from avp.bench.perf_figure import Figure
from avp.bench.perf_lossless import real_text, text_ids
from avp.bench.results import environment, write_json
from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import UsageError

NAMES = ("unix", "tcp", "peer", "delta", "memory", "disk", "ttft")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, how large and how often."""

    names: tuple[str, ...] = NAMES
    model: str = "smollm2"
    text: str = ""
    peer: str | None = None  # the reason not to measure the peer; None: measure it
    shape: Shape = field(default_factory=Shape)
    tokens: int = 1000  # of the context whose first token is timed
    prompt: int = 20
    rounds: int = 7
    processes: int = 3  # new processes for each transport of the memory figure


def measure(plan: Plan, folder: Path, *, tell: Callable[[str], object]) -> Iterator[Figure]:
    """The figures of the plan, one after the other; files are written to `folder`."""
    shape, n = plan.shape, plan.rounds
    makers: dict[str, Callable[[], list[Figure]]] = {
        "unix": partial(net_transfer.unix, shape, n=n),
        "tcp": partial(net_transfer.tcp, shape, n=n),
        "peer": partial(net_peer.peer_http, shape, folder, n=n, peer=plan.peer, tell=tell),
        "delta": partial(net_transfer.delta, shape, n=n),
        "memory": partial(net_transfer.memory, shape, n=plan.processes),
        "disk": partial(net_disk.disk, shape, folder, n=n),
        "ttft": partial(_first_token, plan),
    }
    for name in plan.names:
        tell(f"{name} …")
        yield from makers[name]()


def document(figures: Sequence[Figure], plan: Plan) -> dict[str, object]:
    """The benchmark's one JSON document."""
    settings = {"model": plan.model, "rounds": plan.rounds, "names": list(plan.names), "shape": asdict(plan.shape)}
    return {
        "benchmark": "net",
        "settings": settings,
        "environment": environment(),
        "results": [figure.to_json() for figure in figures],
    }


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, folder, .gguf file or hub id.")
@click.option("--only", default=",".join(NAMES), show_default=True, help="What to measure, with commas.")
@click.option(
    "--peer/--no-peer", default=True, show_default=True, help="Compare with avp==0.6.2 in an environment of its own."
)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="How often each is measured.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for net.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output.")
def command(model: str, only: str, peer: bool, rounds: int, out: Path | None, as_json: bool) -> None:
    """Ratios within one run, two processes: unix:, HTTP, gRPC, the peer, what is known, memory, disk, first token."""
    from rich.console import Console

    names = tuple(only.split(","))
    if set(names) - set(NAMES):
        raise UsageError(f"no figure is named {sorted(set(names) - set(NAMES))}. Fix: use some of {', '.join(NAMES)}.")
    console = Console(stderr=True)
    plan = Plan(names, model, real_text(None), None if peer else "switched off with --no-peer", rounds=rounds)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="avp-net-") as folder:
        tell = partial(console.print, markup=False, highlight=False)
        for figure in measure(plan, Path(folder), tell=tell):
            figures.append(figure)
            tell(f"  {figure.name}: {words(figure)}")
    found = document(figures, plan)
    if out is not None:
        write_json(found, out / "net.json", echo=click.echo)
    if as_json:
        write_json(found, None, echo=click.echo)
    else:
        print_table(figures)


def _first_token(plan: Plan) -> list[Figure]:
    connector = HuggingFaceConnector.from_pretrained(plan.model, dtype="float32")
    ids = text_ids(connector, plan.text, plan.tokens + plan.prompt)
    return net_first.first_token(connector, plan.model, ids, prompt=plan.prompt, n=plan.rounds)
