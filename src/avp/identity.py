"""ModelIdentity: which weights, which tokenizer, which cache layout. KV moves only between equal ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

from blake3 import blake3

from avp.buffers import itemsize
from avp.errors import BundleError, LimitExceeded, UsageError


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """What one attention layer caches, and what changes its numbers without changing the weights."""

    kv_heads: int
    head_dim: int
    window: int = 0  # positions that a query sees, itself included; 0: all
    rope: str = ""  # rotary schedule, canonical JSON; "": none
    softcap: float = 0.0  # cap on attention logits; 0: none
    scale: float = 0.0  # factor on attention logits; 0: 1/sqrt(head_dim)

    def __post_init__(self) -> None:
        # 50, 50.0 and -0.0 are equal to their like, and so must be their JSON, which the digest is made of.
        object.__setattr__(self, "softcap", float(self.softcap) + 0.0)
        object.__setattr__(self, "scale", float(self.scale) + 0.0)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The cache of a model, layer by layer."""

    layers: tuple[LayerLayout, ...]

    @property
    def digest(self) -> str:
        """BLAKE3 of the layout, 64 hex digits: layers, heads, windows, rotary schedule, softcap and scale."""
        return _digest(self)

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV that one position takes in `dtype` ("bfloat16", "float32", …)."""
        return itemsize(dtype) * sum(2 * layer.kv_heads * layer.head_dim for layer in self.layers)


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a connector runs. `weights` and `layout` decide where KV may go; `id` and `family` are for people."""

    id: str
    family: str
    weights: str  # BLAKE3 fingerprint of the weights, 64 hex digits
    tokenizer: str  # BLAKE3 fingerprint of the tokenizer, 64 hex digits
    layout: CacheLayout

    def same_weights(self, other: ModelIdentity) -> bool:
        """Whether KV of one is KV of the other: equal weights and equal cache layout, whatever the names say."""
        return self.weights == other.weights and self.layout == other.layout

    def same_tokenizer(self, other: ModelIdentity) -> bool:
        """Whether token ids mean the same text to both."""
        return self.tokenizer == other.tokenizer

    def describe(self) -> str:
        """One short phrase for messages."""
        return f"{self.id} (weights {self.weights[:8]}…)"


def canonical_json(value: object, *, sort_keys: bool = True) -> str:
    """JSON without spaces, UTF-8, keys sorted (or in the order given): equal values give equal text.

    Raises:
        UsageError: the value is not JSON (a set, bytes, NaN, half a surrogate pair, …).
    """
    try:
        text = json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        if not text.isascii():
            text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"a value cannot be written as JSON: {error}. Fix: pass only strings, numbers, lists and dicts."
        ) from error


@cache
def _digest(layout: CacheLayout) -> str:
    return blake3(canonical_json([asdict(layer) for layer in layout.layers]).encode()).hexdigest()


def fingerprint(entries: Iterable[tuple[str, Sequence[int], bytes]]) -> str:
    """BLAKE3 over (name, shape, values) of every tensor, in the order given; 64 hex digits."""
    hasher = blake3(b"avp-weights-1\0", max_threads=blake3.AUTO)
    for name, shape, values in entries:
        hasher.update(canonical_json([name, list(shape), len(values)]).encode())
        hasher.update(values)
    return hasher.hexdigest()


def identity_to_json(identity: ModelIdentity) -> dict[str, object]:
    """The manifest's form; equal layers are written once."""
    unique = list(dict.fromkeys(identity.layout.layers))
    return {
        "id": identity.id,
        "family": identity.family,
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "layouts": [asdict(layer) for layer in unique],
        "layers": [unique.index(layer) for layer in identity.layout.layers],
    }


_ASK = "Fix: ask the sender for a valid bundle."
_LAYER_RANGES: Mapping[str, tuple[int, int]] = {
    "kv_heads": (1, 2**16),
    "head_dim": (1, 2**16),
    "window": (0, 2**31),
    "softcap": (0, 2**31),
    "scale": (0, 2**31),
}
_LAYER_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "kv_heads": int,
    "head_dim": int,
    "window": int,
    "rope": str,
    "softcap": (int, float),
    "scale": (int, float),
}


def identity_from_json(value: object, *, max_layers: int) -> ModelIdentity:
    """The identity of a manifest.

    Raises:
        LimitExceeded: more layers than `max_layers`.
        BundleError: a field is missing, of the wrong type, or out of range.
    """
    fields = ("id", "family", "weights", "tokenizer", "layouts", "layers")
    if not isinstance(value, dict) or set(value) != set(fields):
        raise BundleError(f"the manifest's model must have just the fields {', '.join(fields)}. {_ASK}")
    if any(not isinstance(value[name], str) for name in fields[:4]):
        raise BundleError(f"the manifest's model has a name or fingerprint that is no string. {_ASK}")
    layouts, index = value["layouts"], value["layers"]
    if not isinstance(layouts, list) or not isinstance(index, list) or not 1 <= len(layouts) <= len(index):
        raise BundleError(f"the manifest's layers are no list, or fewer than its layouts. {_ASK}")
    if len(index) > max_layers:
        raise LimitExceeded(
            f"the bundle's model has {len(index)} layers; at most {max_layers} are allowed. Fix: raise Limits.layers."
        )
    unique = tuple(_layer_from_json(layer) for layer in layouts)
    if any(type(i) is not int or not 0 <= i < len(unique) for i in index):
        raise BundleError(f"the manifest's layers name a layout that it does not hold. {_ASK}")
    return ModelIdentity(
        value["id"], value["family"], value["weights"], value["tokenizer"], CacheLayout(tuple(unique[i] for i in index))
    )


def _layer_from_json(value: object) -> LayerLayout:
    if not isinstance(value, dict) or set(value) != set(_LAYER_TYPES):
        raise BundleError(f"a layer layout must have just the fields {', '.join(_LAYER_TYPES)}. {_ASK}")
    for name, kind in _LAYER_TYPES.items():
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise BundleError(f"a layer layout's {name} is {str(value[name])[:80]!r}. {_ASK}")
    if not all(low <= value[name] <= high for name, (low, high) in _LAYER_RANGES.items()):
        raise BundleError(f"a layer layout's number is out of range: {str(value)[:200]}. {_ASK}")
    return LayerLayout(**value)
