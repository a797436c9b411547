"""`avp hello`: what another agent says of itself."""

from __future__ import annotations

from collections.abc import Iterator

import click

from avp.cli.connection import connection, connection_options, reached
from avp.cli.words import document, facts
from avp.greeting import hello_to_json
from avp.handshake import Hello


@click.command()
@click.argument("url")
@click.option("--measure", is_flag=True, help="Send 8 MiB and show the bandwidth.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@connection_options(timeout=30.0)
def hello(url: str, *, measure: bool, as_json: bool) -> None:
    """Show what the agent at URL says of itself.

    Its model, engine and codecs, what it takes and accepts, and how fast it computes. With --measure, "bandwidth" is
    that from here to there, in bytes a second.
    """
    seconds = connection().timeout
    with reached(url) as remote:
        answer = remote.hello(timeout=seconds)
        bandwidth = remote.measure(timeout=seconds) if measure else None
    if as_json:
        document({**hello_to_json(answer), "bandwidth": bandwidth if measure else answer.bandwidth})
    else:
        facts(_rows(answer, bandwidth))


def _rows(answer: Hello, bandwidth: float | None) -> Iterator[tuple[str, str]]:
    yield "agent", answer.agent
    if answer.model is None:
        yield "model", "none: it keeps and gives contexts, and generates nothing"
    else:
        model = answer.model
        yield "model", f"{model.id} (family {model.family})"
        yield "weights", model.weights
        yield "tokenizer", model.tokenizer
        yield "layers", str(len(model.layout.layers))
        yield "engine", f"{answer.engine}, {answer.dtype}"
        if answer.dtype:
            yield "bytes/token", f"{model.layout.bytes_per_token(answer.dtype):,}"
    yield "accepts", answer.accept.label
    yield "modes", ", ".join(answer.modes)
    yield "codecs", ", ".join(f"{codec.name} ({codec.exactness.label})" for codec in answer.codecs)
    yield "transports", ", ".join(answer.transports)
    limits = answer.limits
    yield "limits", f"{limits.tokens:,} tokens, {limits.bytes:,} bytes, {limits.layers:,} layers"
    yield "prefill", "not measured yet" if answer.prefill is None else f"{answer.prefill:,.0f} tokens/s"
    if bandwidth is not None:
        yield "bandwidth", f"{bandwidth:,.0f} bytes/s ({8e-9 * bandwidth:.2f} Gb/s)"
