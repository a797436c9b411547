"""`avp bench llamacpp`: a context continued in llama.cpp against its own prefill, and KV in and out of its state.

Every figure is a ratio of two things measured in this run on this machine, by turns; none of them is a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from avp.bench.perf import print_table
from avp.bench.perf_figure import Figure, Target, compare, rounds, timed
from avp.bench.perf_lossless import real_text
from avp.bench.results import environment, write_json

if TYPE_CHECKING:
    from avp.connectors.llamacpp import LlamaCppConnector


@dataclass(frozen=True, slots=True)
class Plan:
    """How large, and how often."""

    tokens: int = 1000
    prompt: int = 20
    rounds: int = 7


def continuing(connector: LlamaCppConnector, ids: Sequence[int], plan: Plan) -> Figure:
    """The first token after a context, and the same after all of it is computed again."""
    context = connector.prefill(list(ids[: plan.tokens]))
    rest = list(ids[plan.tokens : plan.tokens + plan.prompt])
    seconds = rounds(
        {
            "context": timed(lambda: connector.generate(rest, context=context, max_new_tokens=1)),
            "prefill": timed(lambda: connector.generate([*context.tokens, *rest], max_new_tokens=1)),
        },
        plan.rounds,
    )
    target = Target("llama.cpp's own prefill of the whole prompt", at_least=10)
    sizes = {"context_tokens": plan.tokens, "prompt_tokens": plan.prompt}
    return compare("continue", seconds["prefill"], seconds["context"], target, **sizes)


def canonical(connector: LlamaCppConnector, ids: Sequence[int], plan: Plan) -> list[Figure]:
    """KV of llama.cpp's state to the canonical layout, and back."""
    from avp.connectors.llamacpp_state import from_canonical, to_canonical

    context, shape = connector.prefill(list(ids[: plan.tokens])), connector.memory.shape
    count = len(context)

    def back() -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return from_canonical(
            lambda layer, part: ((each.start, each.read(layer, part)) for each in context.segments),
            shape=shape,
            count=count,
        )

    blob = back()
    seconds = rounds(
        {
            "copy": timed(lambda: bytes(blob.data), times=3),
            "to": timed(lambda: to_canonical(blob, shape=shape, start=0, stop=count), times=3),
            "back": timed(back, times=3),
        },
        plan.rounds,
    )
    target = Target("a plain copy of the same bytes", at_least=0.25)
    return [
        compare("to_canonical", seconds["copy"], seconds["to"], target, bytes=blob.nbytes),
        compare("from_canonical", seconds["copy"], seconds["back"], target, bytes=blob.nbytes),
    ]


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, .gguf file or ollama:NAME.")
@click.option("--rounds", "count", default=7, show_default=True, type=click.IntRange(1), help="How often each.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for llamacpp.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output.")
def command(model: str, count: int, out: Path | None, as_json: bool) -> None:
    """Ratios within one run of llama.cpp: a context against its own prefill, its state to canonical KV and back."""
    from avp.connectors.llamacpp import LlamaCppConnector

    connector, plan = LlamaCppConnector.from_pretrained(model), Plan(rounds=count)
    needed = plan.tokens + plan.prompt
    ids = connector.tokenize(real_text(None)[: 20 * needed])[:needed]
    figures = [continuing(connector, ids, plan), *canonical(connector, ids, plan)]
    document: dict[str, object] = {
        "benchmark": "llamacpp",
        "settings": {"model": model, "rounds": count},
        "environment": environment(),
        "results": [figure.to_json() for figure in figures],
    }
    if out is not None:
        write_json(document, out / "llamacpp.json", echo=click.echo)
    if as_json:
        write_json(document, None, echo=click.echo)
    else:
        print_table(figures)
