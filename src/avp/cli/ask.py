"""`avp ask`: text from another agent, as it comes, after a context that it keeps."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from dataclasses import asdict

import click

from avp.cli.connection import cleaned, connection, connection_options
from avp.cli.source import read_text
from avp.cli.words import clean, document, handle_to_json, say, say_receipt
from avp.errors import UsageError
from avp.handle import Handle, RemoteGeneration
from avp.network import connect_async
from avp.receipt import receipt_to_json
from avp.remote_stream import RemoteStream
from avp.segment import Exactness


@click.command()
@click.argument("url")
@click.argument("prompt", default="")
@click.option("--context", metavar="HANDLE", help="Go on from this context.")
@click.option("--from", "keeper", metavar="URL", help="The agent that keeps it, if another; it is fetched from there.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="At most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample of this much probability.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given again.")
@click.option("--seed", type=int, help="The same seed draws the same tokens.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, at the end.")
@connection_options(timeout=600.0)
def ask(
    url: str,
    prompt: str,
    *,
    context: str | None,
    keeper: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: tuple[str, ...],
    seed: int | None,
    as_json: bool,
) -> None:
    """Ask the agent at URL, and print what it says as it comes.

    PROMPT is the user's turn; - reads it from stdin. The handle of what is there afterwards goes to stderr.
    """
    if keeper is not None and context is None:
        raise UsageError("--from says who keeps the context. Fix: give --context, or leave it out.")
    text = read_text("-") if prompt == "-" else prompt
    if not text and context is None:
        raise UsageError("there is nothing to say anything to. Fix: give a PROMPT, or --context.")
    handle = None if context is None else Handle(context, keeper or url, 0, Exactness.EXACT, 0.0)
    reach = connection()

    async def run() -> RemoteGeneration:
        async with connect_async(url, security=reach.security) as remote:
            stream = remote.stream(
                text,
                context=handle,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop=stop,
                seed=seed,
                timeout=reach.timeout,
            )
            return await _show(stream, silent=as_json)

    with cleaned():
        _tell(asyncio.run(run()), as_json=as_json)


async def _show(stream: RemoteStream, *, silent: bool) -> RemoteGeneration:
    """Print the pieces as they come; on a terminal, without what would steer it."""
    steered = sys.stdout.isatty()
    said = ""
    async with aclosing(stream):
        try:
            async for piece in stream:
                if not silent:
                    said = clean(piece, keep="\n\t") if steered else piece
                    click.echo(said, nl=False)
        finally:
            if said and not said.endswith("\n"):
                click.echo()
        return await stream.result()


def _tell(answer: RemoteGeneration, *, as_json: bool) -> None:
    """The handle and the figures."""
    usage, receipt, handle = answer.usage, answer.receipt, answer.handle
    if as_json:
        document(
            {
                "text": str(answer),
                "tokens": list(answer.tokens),
                "finish_reason": answer.finish_reason,
                "usage": asdict(usage),
                **handle_to_json(handle),
                "receipt": receipt_to_json(receipt),
            }
        )
        return
    say(f"handle: {handle}")
    say_receipt(
        receipt,
        did=f"{usage.completion_tokens} tokens after {usage.prompt_tokens}, of which {usage.cached_tokens} came with "
        f"the context; {receipt.positions_computed} positions computed; ended by {answer.finish_reason}",
    )
