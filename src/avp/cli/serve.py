"""`avp serve`: an agent at one or more URLs, until it is told to end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, perf_counter
from types import MappingProxyType
from urllib.parse import urlsplit

import click

from avp import transports
from avp.agent import Agent, serve_async
from avp.cli.connection import CLASSES, PEM
from avp.cli.source import engine_option, load_connector
from avp.cli.words import say
from avp.errors import UsageError
from avp.folders import machine_secret
from avp.interop.avp04_endpoint import check_hashes
from avp.security import Security, Tenant
from avp.session import Quota
from avp.stores.settings import parse_amount
from avp.telemetry import listening, log_spans
from avp.transports.address import refuse_open

_NETWORKS = ("http", "https", "grpc", "grpcs")
_WARM = 64  # tokens of the first prefill
_GRACE = 5.0  # seconds that generations get to end after the last call was ended
_LEVELS = ("debug", "info", "warning", "error")


def _amount(units: Mapping[str, int]) -> Callable[[click.Context, click.Parameter, str | None], int | None]:
    """A whole number and a unit, as bytes or seconds."""

    def convert(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
        try:
            return None if value is None else parse_amount(value, units=units)
        except UsageError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return convert


_SIZE = _amount(MappingProxyType({"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}))
_TIME = _amount(MappingProxyType({"s": 1, "m": 60, "h": 3600, "d": 86400}))


@click.command()
@click.option("--listen", "urls", multiple=True, required=True, metavar="URL", help="Where. May be given again.")
@click.option(
    "--model", default="smollm2", show_default=True, help="Built-in name, folder, .gguf file, hub id or ollama:NAME."
)
@engine_option
@click.option("--no-model", is_flag=True, help="Keep and give contexts only.")
@click.option("--name", help="What others call it; by default the model's name.")
@click.option("--device", help="cuda, mps or cpu, for llama.cpp gpu or cpu; by default the first that is there.")
@click.option("--dtype", help="float32, float16 or bfloat16; of llama.cpp's cache float16, float32 or q8_0.")
@click.option("--store", default="disk:", show_default=True, metavar="URL", help="Where segments are kept.")
@click.option(
    "--memory",
    metavar="SIZE",
    callback=_SIZE,
    default="8GiB",
    show_default=True,
    help="KV under handles, of all tenants.",
)
@click.option("--tenant-memory", metavar="SIZE", callback=_SIZE, help="The same, of one tenant; by default all.")
@click.option(
    "--ttl",
    metavar="TIME",
    callback=_TIME,
    default="1h",
    show_default=True,
    help="Life of a handle after its last use.",
)
@click.option(
    "--idle",
    metavar="TIME",
    callback=_TIME,
    default="30s",
    show_default=True,
    help="How long a caller may be silent within a call.",
)
@click.option("--running", type=click.IntRange(min=1), default=2, show_default=True, help="Generations at once.")
@click.option("--waiting", type=click.IntRange(min=0), default=64, show_default=True, help="How many more may queue.")
@click.option("--accept", type=CLASSES, default="exact", show_default=True, help="The worst class that it takes.")
@click.option("--peer", "peers", multiple=True, metavar="URL", help="Fetches handles from here. May be given again.")
@click.option(
    "--trust-model-hash",
    multiple=True,
    metavar="HASH",
    help="What peers of AVP 0.4 call this model: their KV is taken. May be given again.",
)
@click.option("--token", envvar="AVP_TOKEN", show_envvar=True, help="Callers must show it; peers are shown it.")
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="AVP_TOKENS",
    show_envvar=True,
    help='Lines "token tenant": callers must show one of these. --token is then for peers alone.',
)
@click.option(
    "--tenant-secret",
    envvar="AVP_TENANT_SECRET",
    show_envvar=True,
    help="Of the salts of --tokens: the same for servers that share a store. By default one of this machine.",
)
@click.option("--tls-cert", type=PEM, help="PEM file of the server's certificate.")
@click.option("--tls-key", type=PEM, help="PEM file of its key.")
@click.option("--client-ca", type=PEM, help="Callers must show a certificate that these authorities signed.")
@click.option("--http2", is_flag=True, help="Speak HTTP/2 as well as HTTP/1.1.")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback although everybody may call.")
@click.option("--log-level", type=click.Choice(_LEVELS), default="warning", show_default=True, help="Of the log.")
@click.option("--json", "as_json", is_flag=True, help='Print {"urls": [...]} on one line.')
def serve(
    *,
    urls: tuple[str, ...],
    model: str,
    engine: str,
    no_model: bool,
    name: str | None,
    device: str | None,
    dtype: str | None,
    store: str,
    memory: int,
    tenant_memory: int | None,
    ttl: int,
    idle: int,
    running: int,
    waiting: int,
    accept: str,
    peers: tuple[str, ...],
    trust_model_hash: tuple[str, ...],
    token: str | None,
    tokens_file: Path | None,
    tenant_secret: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    client_ca: Path | None,
    http2: bool,
    insecure: bool,
    log_level: str,
    as_json: bool,
) -> None:
    """Serve a model as an agent: it takes contexts, generates from them, and gives them on.

    Prints where it listens, a line for each URL, once it is ready. SIGINT or SIGTERM ends it: what is under way gets a
    few seconds. A second one ends it at once.
    """
    token = token or None
    tokens = _read_tokens(tokens_file, tenant_secret) if tokens_file else {token: Tenant()} if token else {}
    security = Security(token, MappingProxyType(tokens), client_ca, tls_cert, tls_key, insecure, http2)
    _check(urls, security)
    check_hashes(trust_model_hash)
    connector = None if no_model else load_connector(model, engine=engine, device=device, dtype=dtype)
    agent = Agent(
        connector,
        name=name or ("keeper" if no_model else Path(model).name),
        store=store,
        accept=accept,
        quota=Quota(memory, tenant_memory, ttl, running, waiting, idle=idle),
        security=security,
        peers=peers,
    )
    with _logging(log_level):
        with agent:
            _warm_up(agent)
            asyncio.run(_serve(agent, urls, trust=trust_model_hash, as_json=as_json))
        _wait_for_threads()


async def _serve(agent: Agent, urls: Sequence[str], *, trust: Sequence[str], as_json: bool) -> None:
    """Listen, say so, and close at the first signal."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def end(which: signal.Signals) -> None:
        if told.is_set():
            os._exit(128 + which)
        told.set()

    async with await serve_async(agent, *urls, trust_model_hash=trust) as server:
        for which in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(which, end, which)
        if as_json:
            click.echo(json.dumps({"urls": server.urls}))
        else:
            click.echo("\n".join(f"listening at {url}" for url in server.urls))
        await told.wait()
        say("closing …")


def _check(urls: Sequence[str], security: Security) -> None:
    """Refuse before a model is loaded what a transport would refuse afterwards."""
    for url in urls:
        transports.find(url)
        if urlsplit(url).scheme in _NETWORKS:
            refuse_open(url, security=security)


def _read_tokens(path: Path, secret: str | None) -> dict[str, Tenant]:
    """Tenants by token; no message quotes a line."""
    key = secret.encode() if secret else machine_secret()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}). Fix: give a UTF-8 text file.") from None
    tokens: dict[str, Tenant] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or words[0] in tokens:
            raise UsageError(
                f"line {number} of {path} is no token and its tenant, or repeats a token. "
                'Fix: write lines "token tenant"; a line that begins with # is a comment.'
            )
        tokens[words[0]] = Tenant.named(words[1], secret=key)
    if not tokens:
        raise UsageError(f'{path} holds no token. Fix: write lines "token tenant", or leave --tokens out.')
    return tokens


def _warm_up(agent: Agent) -> None:
    """Compute a short prompt twice, so that the first caller waits for no library, and the rate is known."""
    agent.hello()
    connector = agent.connector
    if connector is None:
        return
    size = min(_WARM, connector.max_positions)
    ids = [index % len(connector.vocabulary()) for index in range(size)]
    connector.prefill(ids)
    started = perf_counter()
    connector.prefill(ids)
    agent.endpoint.desk.prefill = size / (perf_counter() - started)


def _wait_for_threads() -> None:
    """Let generations end at their next token; a long prefill has none, and the process ends without it."""
    due = monotonic() + _GRACE
    for thread in threading.enumerate():
        if thread.name.startswith("avp-generate"):
            thread.join(max(0.0, due - monotonic()))
            if thread.is_alive():
                say("a generation that was under way is ended with the process")
                sys.stdout.flush()
                os._exit(0)


@contextmanager
def _logging(level: str) -> Iterator[None]:
    """AVP's own log on stderr; at "debug" with every span."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("avp").setLevel(level.upper())
    if level != "debug":
        yield
        return
    with listening(log_spans):
        yield
