"""`avp demo`: the chain of four agents, in four ways, side by side."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from avp.bench.chain import MODES, run_chain, warm_up
from avp.bench.results import Hop, Run, Settings, environment, write_json
from avp.cli.progress import ensure_model
from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import AVPError

QUESTION = (
    "A bakery sells rye loaves for 4 euros and wheat loaves for 3 euros. On Saturday it sold 56 loaves and took "
    "190 euros. "
    "On Sunday it sold 10 rye loaves fewer than on Saturday and as many wheat loaves. How many euros did it "
    "take on Sunday?"
)
_TITLES = {
    "text": "text: every agent prefills everything again",
    "prefix": "text + prefix cache: one process, transformers' own cache",
    "exact": "AVP exact relay: the KV-cache is handed over",
    "latent": "AVP latent: all but the last think in vectors",
}


@click.command()
@click.option("--agents", default=4, show_default=True, help="Agents in the chain.")
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, folder, .gguf file or hub id.")
@click.option("--question", default=QUESTION, help="What the agents work on; by default a word problem.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens that each agent writes at most.")
@click.option("--steps", default=20, show_default=True, help="Latent steps of an agent that thinks.")
@click.option(
    "--fixed-length", is_flag=True, help="Every agent writes just --max-new-tokens: end of sequence is suppressed."
)
@click.option(
    "--wire", is_flag=True, help="Each agent of the AVP modes in a process of its own; the context travels as bytes."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def demo(
    agents: int,
    model: str,
    question: str,
    max_new_tokens: int,
    steps: int,
    fixed_length: bool,
    wire: bool,
    as_json: bool,
) -> None:
    """Four agents, one question, four ways to hand over: what each computes, sends and takes."""
    console = Console(stderr=as_json)
    ensure_model(model)
    disable_progress_bar()
    with console.status(f"loading {model}"):
        connector = HuggingFaceConnector.from_pretrained(model)
        warm_up(connector)
    settings = Settings(model, max_new_tokens, steps, fixed_length, wire)
    console.print(
        f"[bold]{connector.identity.id}[/] on {connector.model.device}, {connector.model.dtype}; {agents} agents"
    )
    console.print(_lengths(settings))
    tables = {mode: _hop_table(mode) for mode in MODES}
    started: list[str] = []
    with Live(console=console, refresh_per_second=4) as live:

        def on_hop(mode: str, index: int, hop: Hop) -> None:
            if mode not in started:
                started.append(mode)
            tables[mode].add_row(*_cells(hop))
            live.update(Group(*(tables[each] for each in started)))

        runs = run_chain(connector, question, agents=agents, settings=settings, on_hop=on_hop)
    console.print()
    exact = next(run for run in runs if run.mode == "exact")
    console.print(_summary(runs))
    for run in runs:
        console.print(f"[bold]{run.mode}[/]: {run.hops[-1].text.strip() or '(no text)'}", markup=True, highlight=False)
    console.print(_verdict(exact))
    if as_json:
        document: dict[str, object] = {
            "settings": asdict(settings),
            "question": question,
            "environment": environment(),
            "runs": [run.to_json() for run in runs],
            "saved": _saved(runs),
        }
        write_json(document, None, echo=click.echo)
    if not exact.same_as_prefix:
        raise AVPError(
            "the exact relay's tokens differ from those of text + prefix cache. This must not be. Fix: report "
            "it with --json."
        )


def _lengths(settings: Settings) -> str:
    if settings.fixed_length:
        return f"Every agent writes exactly {settings.max_new_tokens} tokens in every mode: EOS is suppressed."
    limit = settings.max_new_tokens
    return f"A turn ends where it ends, at {limit} tokens at most; compare seconds only with --fixed-length."


def _hop_table(mode: str) -> Table:
    table = Table(title=_TITLES[mode], title_justify="left", title_style="bold")
    for name in (
        "agent",
        "prompt tokens",
        "positions computed",
        "new tokens",
        "latent steps",
        "handed over",
        "TTFT",
        "seconds",
    ):
        table.add_column(name, justify="left" if name == "agent" else "right")
    return table


def _cells(hop: Hop) -> tuple[str, ...]:
    return (
        hop.agent,
        f"{hop.prompt_tokens:,}",
        f"{hop.positions:,}",
        f"{hop.new_tokens:,}",
        f"{hop.latent_steps or ''}",
        _size(hop.bytes),
        f"{hop.ttft:.2f} s",
        f"{hop.seconds:.2f} s",
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _saved(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Against text in the same run: share of positions not computed, and how many times faster."""
    text = next(run for run in runs if run.mode == "text")
    return {
        run.mode: {"positions_saved": 1 - run.positions / text.positions, "speed_up": text.seconds / run.seconds}
        for run in runs
    }


def _summary(runs: list[Run]) -> Table:
    table = Table(title="Against text, in this run", title_justify="left", title_style="bold")
    for name in ("mode", "class", "positions", "saved", "seconds", "speed-up", "TTFT of the last", "peak KV"):
        table.add_column(name, justify="left" if name in ("mode", "class") else "right")
    saved = _saved(runs)
    for run in runs:
        table.add_row(
            run.mode,
            run.exactness,
            f"{run.positions:,}",
            f"{saved[run.mode]['positions_saved']:.0%}",
            f"{run.seconds:.1f}",
            f"{saved[run.mode]['speed_up']:.2f}x",
            f"{run.hops[-1].ttft:.2f} s",
            _size(max(hop.kv_bytes for hop in run.hops)),
        )
    return table


def _verdict(exact: Run) -> str:
    count = sum(len(hop.tokens) for hop in exact.hops)
    if exact.same_as_prefix:
        return f"[green]Exact:[/] all {count} tokens of the exact relay equal those of text + prefix cache."
    return "[red]Not exact:[/] the exact relay's tokens differ from those of text + prefix cache."
