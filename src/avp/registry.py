"""Names to plug-ins, through Python's entry points; built-ins register in the same way as anybody else's."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import distributions, entry_points
from typing import TYPE_CHECKING, cast

from avp.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from avp.protocols import Codec, Projection

# The extra that brings a module, for the message of MissingExtra.
_EXTRAS = (
    ("torch", "hf"),
    ("transformers", "hf"),
    ("gguf", "hf"),
    ("jinja2", "hf"),
    ("llama_cpp", "llamacpp"),
    ("httpx2", "http"),
    ("zstandard", "zstd"),
    ("click", "cli"),
    ("rich", "cli"),
    ("anyio", "http"),
    ("httpcore2", "http"),
    ("hypercorn", "http"),
    ("h2", "http"),
    ("starlette", "http"),
    ("uvicorn", "http"),
    ("httptools", "http"),
    ("grpc", "grpc"),
    ("redis", "redis"),
    ("obstore", "s3"),
    ("matplotlib", "bench"),
    ("psutil", "bench"),
)


def names(group: str) -> tuple[str, ...]:
    """Names registered under `group` ("avp.codecs", "avp.projections", "avp.connectors"), sorted."""
    return _names(group, tuple(sys.path))


@cache  # to read all that is installed takes longer than most hand-overs
def _names(group: str, path: tuple[str, ...]) -> tuple[str, ...]:
    found = distributions(path=list(path))
    return tuple(sorted({point.name for each in found for point in each.entry_points if point.group == group}))


def missing_extra(error: ImportError, *, feature: str) -> MissingExtra:
    """The `MissingExtra` to raise from an ImportError of an optional library."""
    module = (error.name or "").partition(".")[0]
    extra = dict(_EXTRAS).get(module, "hf")
    return MissingExtra(
        f'{feature} needs {module or "a library"}, which is not installed. Fix: pip install "avp[{extra}]"'
    )


@cache
def load(group: str, name: str) -> object:
    """The object registered under `name`.

    Raises:
        UsageError: nothing has that name.
        MissingExtra: its library is not installed.
    """
    for point in entry_points(group=group):
        if point.name == name:
            try:
                return cast(object, point.load())
            except ImportError as error:
                if (error.name or "").partition(".")[0] == "avp":
                    raise  # a fault of ours, not a library that is missing
                raise missing_extra(
                    error, feature=f"{group.removeprefix('avp.').removesuffix('s')} {name!r}"
                ) from error
    raise UsageError(
        f"no {group.removeprefix('avp.').removesuffix('s')} is named {name!r}. "
        f"Fix: use one of {', '.join(names(group)) or 'none (is avp installed?)'}, or install what brings it."
    )


def codec(name: str) -> Codec:
    """The codec named `name`; raises as `load`."""
    return cast("Codec", load("avp.codecs", name))


def projection(name: str) -> Projection:
    """The projection named `name`; raises as `load`."""
    return cast("Projection", load("avp.projections", name))
