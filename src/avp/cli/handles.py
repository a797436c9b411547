"""`avp fetch`, `avp renew`, `avp revoke`: what can be done with a handle besides going on from it."""

from __future__ import annotations

from pathlib import Path

import click

from avp.cli.connection import CLASSES, connection, connection_options, reached
from avp.cli.words import document, say, say_receipt
from avp.errors import UsageError
from avp.receipt import receipt_to_json
from avp.remote import Own
from avp.segment import Exactness


@click.command()
@click.argument("url")
@click.argument("handle")
@click.option(
    "-o", "--output", "file", required=True, metavar="FILE", type=click.Path(path_type=Path), help="Where to."
)
@click.option("--accept", type=CLASSES, default="exact", show_default=True, help="The worst class that will do.")
@click.option("--codec", default="raw", show_default=True, metavar="NAME", help="How KV is written to the file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of the file's name.")
@connection_options(timeout=600.0)
def fetch(url: str, handle: str, *, file: Path, accept: str, codec: str, as_json: bool) -> None:
    """Write the context that the agent at URL keeps under HANDLE to a file.

    The file holds the prompt, as a bundle; only its owner can read it.
    """
    own = Own("avp fetch", accept=Exactness.parse(accept))
    with reached(url, own=own) as remote:
        context, receipt = remote.receive(handle, timeout=connection().timeout)
    try:
        size = context.save(file, codec=codec)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}. Fix: choose another file.") from error
    if as_json:
        about = {"file": str(file), "bytes": size, "kind": context.kind, "length": len(context)}
        document({**about, "exactness": context.exactness.label, "receipt": receipt_to_json(receipt)})
        return
    say_receipt(receipt, did=f"{len(context):,} positions came; {size:,} bytes written")
    click.echo(str(file))


@click.command()
@click.argument("url")
@click.argument("handle")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@connection_options(timeout=30.0)
def renew(url: str, handle: str, *, as_json: bool) -> None:
    """Begin the time of HANDLE again; print the seconds that it lives now."""
    with reached(url) as remote:
        ttl = remote.renew(handle, timeout=connection().timeout)
    if as_json:
        document({"ttl": ttl})
    else:
        click.echo(f"{ttl:g}")


@click.command()
@click.argument("url")
@click.argument("handle")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@connection_options(timeout=30.0)
def revoke(url: str, handle: str, *, as_json: bool) -> None:
    """End HANDLE: nobody can go on from it, or fetch it, any more."""
    with reached(url) as remote:
        remote.revoke(handle, timeout=connection().timeout)
    if as_json:
        document({"revoked": True})
    else:
        say("revoked")
