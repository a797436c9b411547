"""A chain of agents over one question, in four modes: text, text + prefix cache, AVP exact relay, AVP latent.

All modes hold the same conversation: the question and the planner's task, its reply, the critic's task, and so on to
the
solver. In the latent mode all but the last agent think instead of writing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter

import click
from transformers.utils.logging import disable_progress_bar

from avp.bench.baseline import Conversation, counted
from avp.bench.results import Hop, Run, Settings, environment, summarize, write_json
from avp.connectors.huggingface import HuggingFaceConnector
from avp.context import Context
from avp.errors import AVPError, UsageError

MODES = ("text", "prefix", "exact", "latent")
OnHop = Callable[[str, int, Hop], None]
_TASKS = {
    "planner": "You are the planner. Make a plan.",
    "critic": "You are the critic. Find what is wrong.",
    "refiner": "You are the refiner. Improve it.",
    "solver": "You are the solver. Give the answer.",
}


def roles(agents: int) -> list[str]:
    """Planner first, solver last, critics and refiners by turns between them."""
    if agents < 2:
        raise UsageError(f"a chain of {agents} is no chain. Fix: pass at least 2 agents.")
    return ["planner", *(("critic", "refiner")[i % 2] for i in range(agents - 2)), "solver"]


def prompts(question: str, agents: int, *, chat: bool) -> list[str]:
    """What each agent is told. A base model has no turns, so paragraphs part them."""
    told = [_TASKS[role] for role in roles(agents)]
    told[0] = f"{question}\n\n{told[0]}"
    return told if chat else [f"{'' if i == 0 else chr(10) * 2}{text}\n\n" for i, text in enumerate(told)]


def run_chain(
    connector: HuggingFaceConnector, question: str, *, agents: int, settings: Settings, on_hop: OnHop = lambda *_: None
) -> list[Run]:
    """The chain in each of the settings' modes, one after the other, on the same model."""
    told = prompts(question, agents, chat=bool(connector.tokenizer.chat_template))
    runs: list[Run] = []
    for mode in settings.modes:
        hops: list[Hop] = []
        for index, hop in enumerate(_hops(mode, connector, told, settings)):
            hops.append(hop)
            on_hop(mode, index, hop)
        exactness = {"exact": "exact", "latent": "approximate"}.get(mode, "text")
        runs.append(Run(mode, agents, question, exactness, tuple(hops)))
    return _compare(runs)


def warm_up(connector: HuggingFaceConnector) -> None:
    """The first passes of a process are slow; no mode should pay for them."""
    settings = Settings("", 4, 1, fixed_length=True)
    run_chain(connector, "Warm up. " * 20, agents=2, settings=settings)


def _compare(runs: list[Run]) -> list[Run]:
    """Whether each run's tokens, at every hop, are those of text + prefix cache."""
    prefix = next((run for run in runs if run.mode == "prefix"), None)
    if prefix is None:
        return runs
    expected = [hop.tokens for hop in prefix.hops]
    return [
        replace(run, same_as_prefix=[hop.tokens for hop in run.hops] == expected)
        if run.mode in ("text", "exact")
        else run
        for run in runs
    ]


def _hops(mode: str, connector: HuggingFaceConnector, told: Sequence[str], settings: Settings) -> Iterator[Hop]:
    names = roles(len(told))
    if mode in ("text", "prefix"):
        yield from _text_hops(mode, connector, told, settings, names)
    elif settings.wire:
        yield from _process_hops(mode, told, settings, names)
    else:
        context: Context | None = None
        for i, prompt in enumerate(told):
            steps = settings.steps if mode == "latent" and i < len(told) - 1 else 0
            hop, context = relay_hop(connector, context, prompt, agent=names[i], steps=steps, settings=settings)
            yield hop


def _text_hops(
    mode: str, connector: HuggingFaceConnector, told: Sequence[str], settings: Settings, names: Sequence[str]
) -> Iterator[Hop]:
    conversation = Conversation(connector.model, connector.tokenizer, reuse=mode == "prefix")
    per_token = connector.identity.layout.bytes_per_token(str(connector.model.dtype).removeprefix("torch."))
    for name, prompt in zip(names, told, strict=True):
        reply = conversation.say(prompt, max_new_tokens=settings.max_new_tokens, min_new_tokens=settings.min_new_tokens)
        held = (reply.prompt_tokens + len(reply.tokens) - 1) * per_token
        yield Hop(
            name,
            reply.prompt_tokens,
            reply.positions,
            len(reply.tokens),
            0,
            reply.text_bytes,
            reply.ttft,
            reply.seconds,
            held,
            reply.text,
            reply.tokens,
        )


def relay_hop(
    connector: HuggingFaceConnector, context: Context | None, prompt: str, *, agent: str, steps: int, settings: Settings
) -> tuple[Hop, Context]:
    """One agent with AVP: think (`steps` > 0) or write, from the context it was handed."""
    handed = context.nbytes if context is not None else 0
    if steps:
        started = perf_counter()
        with counted(connector.model) as counter:
            after = connector.think(prompt, steps=steps, context=context)
        seconds = perf_counter() - started
        prompt_tokens = len(after) - steps - (len(context) if context is not None else 0)
        return Hop(agent, prompt_tokens, counter.count, 0, steps, handed, seconds, seconds, after.nbytes, "", ()), after
    with counted(connector.model) as counter:
        found = connector.generate(
            prompt, context=context, max_new_tokens=settings.max_new_tokens, min_new_tokens=settings.min_new_tokens
        )
    hop = Hop(
        agent,
        found.usage.prompt_tokens - found.usage.cached_tokens,
        counter.count,
        len(found.tokens),
        0,
        handed,
        found.receipt.seconds["ttft"],
        found.receipt.seconds["total"],
        found.context.nbytes,
        str(found),
        found.tokens,
        found.receipt.reasons,
    )
    return hop, found.context


def _process_hops(mode: str, told: Sequence[str], settings: Settings, names: Sequence[str]) -> Iterator[Hop]:
    """Each agent in a process of its own, that has ended before the next begins; the context travels as a bundle's
    bytes.
    """
    with tempfile.TemporaryDirectory(prefix="avp-wire-") as folder:
        before: Path | None = None
        for i, prompt in enumerate(told):
            after = Path(folder) / f"{i}.avp"
            job = {
                "settings": asdict(settings),
                "agent": names[i],
                "prompt": prompt,
                "steps": settings.steps if mode == "latent" and i < len(told) - 1 else 0,
                "context": before and str(before),
                "save": str(after),
            }
            done = subprocess.run(
                [sys.executable, "-m", "avp.bench.hop"],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                timeout=1800,
                check=False,
            )
            if done.returncode:
                raise AVPError(
                    f"agent {names[i]} failed in its process: {done.stderr[-800:]} Fix: run without --wire to see more."
                )
            fields = json.loads(done.stdout.splitlines()[-1])
            fields["bytes"] = before.stat().st_size if before else 0
            yield Hop(**{**fields, "tokens": tuple(fields["tokens"]), "reasons": tuple(fields["reasons"])})
            before = after


def questions(path: Path, limit: int) -> list[tuple[str, str]]:
    """(id, question) of the first `limit` rows of a JSON-lines file.

    Raises:
        UsageError: a row is no object with a "question".
    """
    rows: list[tuple[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if len(rows) == limit:
                break
            try:
                row = json.loads(line)
                rows.append((str(row.get("id", number)), str(row["question"])))
            except (ValueError, KeyError, AttributeError) as error:
                raise UsageError(
                    f'{path}, line {number + 1}: no JSON object with a "question" ({error!r}). Fix: pass JSON lines.'
                ) from error
    if not rows:
        raise UsageError(f"{path} holds no questions. Fix: pass JSON lines with a question each.")
    return rows


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help='JSON lines with a "question".',
)
@click.option("--limit", default=10, show_default=True, help="Questions taken from the file.")
@click.option("--agents", default="4", show_default=True, help="Lengths of the chain, with commas: 2,4,8,16.")
@click.option("--max-new-tokens", default=128, show_default=True, help="Tokens that each agent writes.")
@click.option("--steps", default=20, show_default=True, help="Latent steps of an agent that thinks.")
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, folder, .gguf file or hub id.")
@click.option("--modes", default=",".join(MODES), show_default=True, help="Modes to run, with commas.")
@click.option(
    "--free-length",
    is_flag=True,
    help="Let a turn end where it ends; by default all modes write the same number of tokens.",
)
@click.option("--wire", is_flag=True, help="Each agent of the AVP modes in a process of its own.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for the JSON and chain-*.svg.")
@click.option("--name", default="chain", show_default=True, help="Name of the JSON file.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output.")
def command(
    data: Path,
    limit: int,
    agents: str,
    max_new_tokens: int,
    steps: int,
    model: str,
    modes: str,
    free_length: bool,
    wire: bool,
    out: Path | None,
    name: str,
    as_json: bool,
) -> None:
    """A chain of agents over a data set, in four modes in one run: positions, TTFT, bytes, seconds."""
    from avp.bench.plot import plot_chain

    lengths = _numbers(agents)
    chosen = tuple(modes.split(","))
    if set(chosen) - set(MODES):
        raise UsageError(f"unknown modes {sorted(set(chosen) - set(MODES))}. Fix: use some of {', '.join(MODES)}.")
    settings = Settings(model, max_new_tokens, steps, not free_length, wire, chosen)
    disable_progress_bar()
    connector = HuggingFaceConnector.from_pretrained(model)
    rows = questions(data, limit)
    warm_up(connector)
    runs = _run_all(connector, rows, lengths, settings)
    document: dict[str, object] = {
        "benchmark": "chain",
        "settings": {**asdict(settings), "data": data.name, "limit": limit},
        "environment": environment(),
        "summary": summarize(runs),
        "runs": [run.to_json() for run in runs],
    }
    if out is not None:
        write_json(document, out / f"{name}.json", echo=click.echo)
        plot_chain(runs, out)
    if as_json:
        write_json(document, None, echo=click.echo)
    else:
        _print_summary(document["summary"])


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--agents {text!r} is no list of numbers. Fix: pass --agents 2,4,8.") from error


def _run_all(
    connector: HuggingFaceConnector, rows: Sequence[tuple[str, str]], lengths: Sequence[int], settings: Settings
) -> list[Run]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    runs: list[Run] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("chains", total=len(rows) * sum(lengths) * len(settings.modes))
        for count in lengths:
            for identifier, question in rows:

                def on_hop(mode: str, index: int, hop: Hop, count: int = count, identifier: str = identifier) -> None:
                    progress.update(task, advance=1, description=f"{count} agents, question {identifier}, {mode}")

                done = run_chain(connector, question, agents=count, settings=settings, on_hop=on_hop)
                runs.extend(replace(run, question=identifier) for run in done)
    return runs


def _print_summary(summary: object) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "agents",
        "mode",
        "n",
        "positions",
        "saved against text",
        "speed-up (95 %)",
        "TTFT of the last",
        "= text + prefix cache",
    )
    for row in summary if isinstance(summary, list) else ():
        saved, speed, same = row["positions_saved"], row["speed_up"], row["same_as_prefix"]
        table.add_row(
            str(row["agents"]),
            row["mode"],
            str(saved["n"]),
            f"{row['positions']:,.0f}",
            f"{saved['mean']:.1%}",
            f"{speed['mean']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})",
            f"{row['last_ttft']:.3f} s",
            f"{same[0]} of {same[1]}" if same else "",
        )
    Console().print(table)
