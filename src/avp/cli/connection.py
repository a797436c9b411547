"""The options of every command that talks to an agent, and the connection that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from avp.cli.words import clean
from avp.errors import AVPError
from avp.network import Remote, connect
from avp.remote import Own
from avp.security import Security
from avp.segment import Exactness

F = TypeVar("F", bound=Callable[..., object])
CLASSES = click.Choice([each.label for each in Exactness])
PEM = click.Path(exists=True, dir_okay=False, path_type=Path)


@dataclass(frozen=True, slots=True)
class Connection:
    """What is brought to the other end, and the seconds that a call may take."""

    security: Security
    timeout: float


def _note(ctx: click.Context, param: click.Parameter, value: object) -> object:
    ctx.meta[f"avp.{param.name}"] = value
    return value


def connection_options(*, timeout: float) -> Callable[[F], F]:
    """Token, certificates, HTTP/2 and the time that a call may take; `connection()` has what was given."""
    option = partial(click.option, expose_value=False, callback=_note)
    seconds = click.FloatRange(min=0, min_open=True)
    options = (
        option("--token", envvar="AVP_TOKEN", show_envvar=True, help="Bearer token to show."),
        option("--ca", type=PEM, help="PEM file of the authorities that sign the server's certificate."),
        option("--cert", type=PEM, help="PEM file of a certificate to show."),
        option("--key", type=PEM, help="PEM file of its key."),
        option("--http2", is_flag=True, help="Speak HTTP/2 to http and https URLs."),
        option(
            "--timeout", type=seconds, default=timeout, show_default=True, metavar="SECONDS", help="Time of a call."
        ),
    )

    def add(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return add


def connection() -> Connection:
    """The connection of the command that is running."""
    given = click.get_current_context().meta
    security = Security(
        token=given["avp.token"] or None,
        ca=given["avp.ca"],
        cert=given["avp.cert"],
        key=given["avp.key"],
        http2=given["avp.http2"],
    )
    return Connection(security, given["avp.timeout"])


@contextmanager
def reached(url: str, *, own: Own | None = None) -> Iterator[Remote]:
    """The agent at `url`, as the options of the running command say."""
    with cleaned(), connect(url, own=own, security=connection().security) as remote:
        yield remote


@contextmanager
def cleaned() -> Iterator[None]:
    """Errors inside may quote the other end; what in them steers a terminal is taken out."""
    try:
        yield
    except AVPError as error:
        error.args = (clean(str(error)),)
        raise
