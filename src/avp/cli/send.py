"""`avp send`: a saved context, or one that is computed here, goes to another agent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from avp.cli.connection import CLASSES, connection, connection_options, reached
from avp.cli.source import engine_option, load_bundle, load_connector, read_text
from avp.cli.words import document, handle_to_json, say_receipt
from avp.context import Context, text_context
from avp.errors import UsageError
from avp.handshake import POLICIES
from avp.protocols import Connector, Prompt
from avp.receipt import receipt_to_json
from avp.remote import Own
from avp.segment import Exactness
from avp.telemetry import Trace, listening


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--to", "url", required=True, metavar="URL", help="The agent that it goes to.")
@click.option("--prompt", metavar="TEXT", help="Compute this here instead, and send it while it is computed.")
@click.option("--prompt-file", metavar="FILE", help="The same, from a file; - for stdin.")
@click.option("--model", metavar="NAME", help="What computes the prompt; without it the prompt goes as text.")
@engine_option
@click.option("--accept", type=CLASSES, default="exact", show_default=True, help="The worst class that will do.")
@click.option(
    "--policy", type=click.Choice(POLICIES), default="best", show_default=True, help="The best mode, or the fastest."
)
@click.option("--codec", metavar="NAME", help="How KV becomes bytes; by default nothing is lost.")
@click.option(
    "--trace", metavar="FILE", type=click.Path(path_type=Path), help="Write what was done when, for Perfetto."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the handle.")
@connection_options(timeout=600.0)
def send(
    file: Path | None,
    *,
    url: str,
    prompt: str | None,
    prompt_file: str | None,
    model: str | None,
    engine: str,
    accept: str,
    policy: str,
    codec: str | None,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Hand the context in FILE, or after a prompt, over to the agent at --to.

    The handle goes to stdout, alone, so that H=$(avp send ...) works; what was done goes to stderr. Only what the other
    agent lacks travels.
    """
    content, connector = _content(file, _prompt(prompt, prompt_file), model, engine)
    own = Own("avp send", connector, accept=Exactness.parse(accept))
    with _traced(trace), reached(url, own=own) as remote:
        handle = remote.hand_over(content, policy=policy, codec=codec, timeout=connection().timeout)
    receipt = handle.receipt
    if receipt is None:
        raise UsageError("the hand-over has no receipt. Fix: report this.")
    if as_json:
        document({**handle_to_json(handle), "receipt": receipt_to_json(receipt)})
        return
    amounts = f"{receipt.bytes_sent:,} bytes sent, {receipt.bytes_reused:,} of KV were there already"
    say_receipt(receipt, did=f"{len(handle):,} positions are at {url}; {amounts}")
    click.echo(str(handle))


def _prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    """The prompt, from wherever it is to come."""
    if prompt is not None and prompt_file is not None:
        raise UsageError("both --prompt and --prompt-file are given. Fix: give one.")
    return prompt if prompt_file is None else read_text(prompt_file)


def _content(
    file: Path | None, prompt: str | None, model: str | None, engine: str
) -> tuple[Context | Prompt, Connector | None]:
    """What is handed over, and the model that computes it."""
    if (file is None) == (prompt is None):
        raise UsageError("one thing is handed over. Fix: name a bundle, or give --prompt or --prompt-file.")
    if file is not None:
        if model is not None:
            raise UsageError("a bundle names its model. Fix: leave --model out.")
        return load_bundle(file), None
    text = prompt or ""
    return (text_context(text), None) if model is None else (text, load_connector(model, engine=engine))


@contextmanager
def _traced(path: Path | None) -> Iterator[None]:
    """Write a trace of the block, however it ends."""
    if path is None:
        yield
        return
    trace = Trace()
    try:
        with listening(trace):
            yield
    finally:
        try:
            trace.save(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}. Fix: choose another --trace.") from error
