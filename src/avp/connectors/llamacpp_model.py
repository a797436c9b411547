"""A name to a GGUF file, and what the file says: cache layout, tokenizer, chat template. No engine, no transformers.

The layout is in the normal form that `avp.connectors.layout` gives for the transformers config of the same file, so
that one file has one identity in both engines.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from avp.connectors import models
from avp.connectors.gguf_header import Header, file_digest, read_header
from avp.errors import ModelNotFound, UnsupportedCache, UsageError
from avp.identity import CacheLayout, LayerLayout, canonical_json

OLLAMA = "ollama:"
_IMAGE = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_GEMMA_LOCAL_THETA = 10000.0  # of sliding layers, where the file does not say


@dataclass(frozen=True, slots=True)
class _Architecture:
    """`interleaved`: keys are kept for interleaved rotation; `period`: every so many layers one is not sliding."""

    interleaved: bool
    period: int = 0


_KNOWN: Mapping[str, _Architecture] = MappingProxyType(
    {
        "llama": _Architecture(True),
        "qwen2": _Architecture(False),
        "gemma3": _Architecture(False, period=6),
    }
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A GGUF file and what AVP needs to know of it before an engine loads it."""

    path: Path
    title: str
    family: str
    weights: str
    header: Header
    layout: CacheLayout
    interleaved: bool
    positions: int


def open_model(name: str | Path) -> ModelFile:
    """The model of that name: "smollm2", "gemma3", a .gguf file, or "ollama:NAME[:TAG]" as Ollama keeps it on disk.

    Raises:
        ModelNotFound: there is none. UnsupportedCache: an architecture that AVP does not carry.
    """
    path = _find(str(name))
    header = read_header(path)
    title = models.BUILTIN[str(name)].title if str(name) in models.BUILTIN else str(name)
    family = header.text("general.architecture")
    layout = cache_layout(header)
    positions = _number(header, "context_length")
    return ModelFile(path, title, family, file_digest(path), header, layout, _KNOWN[family].interleaved, int(positions))


def _find(name: str) -> Path:
    if name in models.BUILTIN:
        return models.fetch(name)
    if name.startswith(OLLAMA):
        return ollama_blob(name.removeprefix(OLLAMA))
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelNotFound(
            f"no model {name!r} for llama.cpp: it is no built-in ({', '.join(models.BUILTIN)}) and no file. "
            "Fix: pass the path of a .gguf file, or ollama:NAME."
        )
    return path


# --- Ollama's folder


def ollama_blob(name: str) -> Path:
    """The GGUF file of a model that Ollama pulled, by its manifest; Ollama itself need not run.

    Raises:
        ModelNotFound: it is not there, or not whole.
    """
    folder = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models").expanduser()
    manifest = folder / "manifests" / _manifest_path(name)
    try:
        said = json.loads(manifest.read_bytes())
        layer = next(each for each in said["layers"] if each["mediaType"] == _IMAGE)
        digest, size = _DIGEST.fullmatch(layer["digest"]), int(layer["size"])
    except FileNotFoundError as error:
        raise ModelNotFound(
            f"Ollama has no model {name!r}: there is no {manifest}. "
            f"Fix: `ollama pull {name}`, or set OLLAMA_MODELS to its folder of models."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ModelNotFound(f"{manifest} names no model. Fix: `ollama pull {name}`.") from error
    blob = folder / "blobs" / f"sha256-{digest[1] if digest else ''}"
    if digest is None or not blob.is_file() or blob.stat().st_size != size:
        raise ModelNotFound(f"the model that {manifest} names is not whole: {blob}. Fix: `ollama pull {name}`.")
    return blob


def _manifest_path(name: str) -> Path:
    """registry.ollama.ai/library/NAME/latest, unless the name says more: HOST/USER/NAME:TAG."""
    *head, last = name.split("/")
    model, _, tag = last.partition(":")
    parts = [*head, model]
    parts = [*("registry.ollama.ai", "library")[: max(3 - len(parts), 0)], *parts, tag or "latest"]
    if len(parts) != 4 or not all(re.fullmatch(r"[\w.-]+", part) and part.strip(".") for part in parts):
        raise ModelNotFound(f"{name!r} is no name of an Ollama model. Fix: use NAME, NAME:TAG or USER/NAME:TAG.")
    return Path(*parts)


# --- the cache


def cache_layout(header: Header) -> CacheLayout:
    """The layout of the KV-cache of the model that a GGUF file holds.

    Raises:
        UnsupportedCache: an architecture, rotary scaling or head shape that AVP does not carry.
    """
    name = header.text("general.architecture")
    if name not in _KNOWN:
        raise UnsupportedCache(
            f"llama.cpp keeps the cache of {name or 'a file without architecture'} in a way that AVP does not know. "
            f"Known are {', '.join(_KNOWN)}. Fix: hand over text."
        )
    heads, wide = int(_number(header, "attention.head_count")), int(_number(header, "embedding_length"))
    dim = int(_number(header, "attention.key_length", wide // max(heads, 1)))
    kv_heads = int(_number(header, "attention.head_count_kv", heads))
    _refuse(header, name, dim)
    count = int(_number(header, "block_count"))
    window = int(_number(header, "attention.sliding_window", 0)) if _KNOWN[name].period else 0
    scale = float(dim) ** -0.5 if name == "gemma3" else 0.0
    rope = _rope(header, name, _number(header, "rope.freq_base", 10000.0))
    near = _number(header, "rope.freq_base_swa", _GEMMA_LOCAL_THETA)
    local = _plain_rope(near)
    layers = tuple(
        LayerLayout(kv_heads, dim, window if slides else 0, local if slides else rope, 0.0, scale)
        for slides in _sliding(header, name, count, window)
    )
    return CacheLayout(layers)


def _sliding(header: Header, name: str, count: int, window: int) -> list[bool]:
    pattern = header.values.get(f"{name}.attention.sliding_window_pattern", _KNOWN[name].period)
    if not window:
        return [False] * count
    if isinstance(pattern, tuple):
        return [bool(each) for each in pattern[:count]]
    period = int(pattern) if isinstance(pattern, int) else _KNOWN[name].period
    return [(i + 1) % period != 0 for i in range(count)]


def _refuse(header: Header, name: str, dim: int) -> None:
    """What the layout could not say."""
    if int(_number(header, "attention.value_length", dim)) != dim:
        raise UnsupportedCache(f"{name} has keys and values of unequal length. Fix: hand over text.")
    if int(_number(header, "rope.dimension_count", dim)) != dim:
        raise UnsupportedCache(f"{name} rotates a part of each key, which AVP does not carry. Fix: hand over text.")
    if name == "gemma3" and int(_number(header, "block_count")) == 62:
        raise UnsupportedCache(
            "Gemma-3-27B scales its attention in a way that its file does not say. Fix: hand over text."
        )


def _rope(header: Header, name: str, theta: float) -> str:
    kind = header.text(f"{name}.rope.scaling.type")
    if kind in ("", "none") and header.factors:
        # As Llama 3.1 scales. transformers writes this in another way, so such KV stays with llama.cpp.
        return canonical_json({"factors": header.factors, "rope_theta": theta, "rope_type": "factors"})
    if kind in ("", "none"):
        return _plain_rope(theta)
    if kind == "linear":
        factor = _number(header, "rope.scaling.factor", 1.0)
        return canonical_json({"factor": factor, "partial": None, "rope_theta": theta, "rope_type": "linear"})
    raise UnsupportedCache(
        f"{name} scales its rotary positions by {kind!r}, which AVP does not know here. Fix: hand over text."
    )


def _plain_rope(theta: float) -> str:
    return canonical_json({"partial": None, "rope_theta": theta, "rope_type": "default"})


def _number(header: Header, key: str, default: float | None = None) -> float:
    name = header.text("general.architecture")
    value = header.values.get(f"{name}.{key}", default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(
            f"the GGUF file does not say {name}.{key}, or not as one number. Fix: convert the model again."
        )
    return value
