"""What a name on the command line stands for: a model, a saved bundle, an agent; loaded, or only its hello."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote, urlsplit

import click

from avp import registry
from avp.cli.connection import connection, reached
from avp.cli.progress import ensure_model
from avp.cli.words import say
from avp.context import Context
from avp.delta import sender_of
from avp.errors import UsageError
from avp.handshake import Hello, offers
from avp.identity import ModelIdentity
from avp.registry import missing_extra
from avp.segment import Exactness

if TYPE_CHECKING:
    from avp.connectors.huggingface import HuggingFaceConnector
    from avp.connectors.llamacpp import LlamaCppConnector

ENGINES = ("huggingface", "llamacpp")  # those of avp.connectors that load a model by its name alone
engine_option = click.option(
    "--engine", type=click.Choice(ENGINES), default=ENGINES[0], show_default=True, help="What runs the model."
)


@dataclass(frozen=True, slots=True)
class Source:
    """What was named. tokens: positions of a saved context; None: of no context."""

    kind: str  # "model", "file" or "agent"
    hello: Hello
    tokens: int | None = None


def read_text(file: str) -> str:
    """The text in a file, or of stdin for "-".

    Raises:
        UsageError: it cannot be read, or is no UTF-8.
    """
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}. Fix: name a file, or - for stdin.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is no UTF-8 text. Fix: write it in UTF-8.") from error


def load_connector(
    name: str, *, engine: str = ENGINES[0], device: str | None = None, dtype: str | None = None
) -> HuggingFaceConnector | LlamaCppConnector:
    """The model of that name in an engine, fetched first where it is built in and not here yet.

    Raises:
        ModelNotFound, UnsupportedCache, MissingExtra: see `from_pretrained` of the engine's connector.
        UsageError: a device that is not here.
    """
    kind = cast("type[HuggingFaceConnector] | type[LlamaCppConnector]", registry.load("avp.connectors", engine))
    if engine == ENGINES[0]:  # the other one reads the GGUF file as it is
        _quiet()
        ensure_model(name)
    say(f"loading {name} …")
    try:
        return kind.from_pretrained(name, device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:
        if device is None:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{name} cannot be loaded on {device}: {reason}. Fix: choose another --device.") from error


def load_bundle(path: Path) -> Context:
    """The context in a file, mapped, not read.

    Raises:
        UsageError: the file cannot be read. BundleError: it is no bundle.
    """
    try:
        return Context.load(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}. Fix: name a bundle, a file.avp.") from error


def source_of(name: str, *, accept: Exactness) -> Source:
    """What a model, a file or an agent says of itself; `accept` is what the first two put up with.

    No weights are loaded where the model's fingerprint is noted beside its checkpoint.

    Raises:
        ModelNotFound, UsageError, BundleError, ConnectionFailed: it is none of these, or cannot be read or reached.
    """
    scheme = urlsplit(name).scheme
    if scheme == "file":
        return _file(Path(unquote(urlsplit(name).path)), accept=accept)
    if scheme in registry.names("avp.transports"):
        with reached(name) as remote:
            return Source("agent", remote.hello(timeout=connection().timeout))
    path = Path(name).expanduser()
    if path.suffix == ".avp" or (path.is_file() and path.suffix != ".gguf"):
        return _file(path, accept=accept)
    return Source("model", _model(name, accept=accept))


def _file(path: Path, *, accept: Exactness) -> Source:
    """A saved context; a file that is not there yet takes whatever comes."""
    keeps = Hello(f"file:{path}", codecs=offers(), accept=Exactness.TEXT)
    if not path.exists():
        return Source("file", keeps)
    context = load_bundle(path)
    return Source("file", replace(sender_of(keeps, context), accept=accept), len(context.tokens))


def _model(name: str, *, accept: Exactness) -> Hello:
    try:
        from avp.connectors import loading
        from avp.connectors.state import ENGINE, dtype_name
    except ImportError as error:
        raise missing_extra(error, feature=f"the model {name!r}") from error
    _quiet()
    ensure_model(name)
    identity = _noted_identity(name) or load_connector(name).identity
    dtype = dtype_name(loading.pick_dtype(None, loading.pick_device(None)))
    return Hello(name, identity, ENGINE, dtype, codecs=offers(), accept=accept)


def _noted_identity(name: str) -> ModelIdentity | None:
    """The identity of a checkpoint whose fingerprint is noted; None: it is not, or an adapter lies there."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from avp.connectors import loading
    from avp.connectors.layout import cache_layout
    from avp.connectors.weights import kept_fingerprint, tokenizer_fingerprint

    folder = loading.resolve(name)
    checkpoint = folder if isinstance(folder, Path) else loading.hub_folder(folder)
    values = checkpoint and kept_fingerprint(checkpoint)
    if not checkpoint or not values or (checkpoint / "adapter_config.json").exists():
        return None
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        noted = (checkpoint / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(checkpoint) if noted else None
    except (OSError, ValueError):  # the connector says what is wrong
        return None
    layout = cache_layout(config, generation or GenerationConfig.from_model_config(config))
    weights = loading.gguf_digest(checkpoint, values) or values
    return ModelIdentity(loading.title(name), config.model_type, weights, tokenizer_fingerprint(tokenizer), layout)


def _quiet() -> None:
    """No bars of transformers: stderr has our own."""
    try:
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise missing_extra(error, feature="a model") from error
    disable_progress_bar()
