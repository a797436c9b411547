"""Writes the golden bundles and `vectors.json` beside itself: `python tests/golden/make.py`.

A changed vector is a changed format: raise the version in `avp.manifest`, and say why in docs/decisions.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from avp.blob import seal
from avp.buffers import Buffer
from avp.bundle import header_size
from avp.context import Context, Turn, text_context
from avp.identity import CacheLayout, LayerLayout, ModelIdentity
from avp.segment import LATENT, Exactness, cut_segments
from avp.testing import synthetic_context

HERE = Path(__file__).parent
LAYERS = (LayerLayout(2, 4, rope='{"theta":10000.0}'), LayerLayout(1, 2, window=16, softcap=50.0, scale=0.0625))
MODEL = ModelIdentity("golden/model", "golden", "ab" * 32, "cd" * 32, CacheLayout(LAYERS))
CODECS = ("raw", "lossless")


@dataclass(frozen=True)
class _Counting:
    """float32 KV that counts: value = position + layer / 8, negative for V."""

    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        row = np.arange(self.start, self.stop, dtype=np.float32) + layer / 8
        array: npt.NDArray[np.float32] = row if part == "k" else -row
        heads, dim = LAYERS[layer].kv_heads, LAYERS[layer].head_dim
        return Buffer("float32", np.ascontiguousarray(np.broadcast_to(array[None, :, None], (heads, len(row), dim))))


def _grade(ids: Sequence[int]) -> Callable[[int], Exactness]:
    return lambda stop: Exactness.APPROXIMATE if LATENT in ids[:stop] else Exactness.EXACT


def _counting(
    ids: Sequence[int], pending: Sequence[int], turns: tuple[Turn, ...], template: Mapping[str, object]
) -> Context:
    segments = cut_segments(MODEL, ids, dtype="float32", engine="golden", tensors=_Counting, grade=_grade(ids))
    return Context("kv", MODEL, (*ids, *pending), len(ids), turns, template, segments, None, _grade(ids)(len(ids)))


def _conversation() -> Context:
    turns = (
        Turn({"role": "system", "content": "Réponds brièvement. 🌍"}),
        Turn({"role": "user", "content": 'quotes " and \\ and\nlines', "name": "a"}),
    )
    return _counting(range(100, 140), (7, 8), turns, {"tools": [{"name": "f", "a": 1}], "enable_thinking": False})


def _latent() -> Context:
    turns = (Turn({"role": "user", "content": "x"}), Turn({"role": "assistant", "content": ""}, (33, 36)))
    return _counting([*range(33), LATENT, LATENT, LATENT, 5, 6], (9,), turns, {})


def _hidden(dtype: str) -> Context:
    words = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype]
    hidden = Buffer(dtype, np.arange(24).astype(words).reshape(3, 8))
    turns = (Turn({"role": "user", "content": "x"}),)
    return Context("hidden", MODEL, (1, 2, 3), 0, turns, hidden=hidden, exactness=Exactness.APPROXIMATE)


def contexts() -> dict[str, Context]:
    """Every golden context, by name."""
    small = {"layers": 2, "kv_heads": 2, "head_dim": 4, "tokens": 40}
    long = synthetic_context(layers=1, kv_heads=1, head_dim=2, tokens=300)
    return {
        "tiny": synthetic_context(layers=1, kv_heads=1, head_dim=2, tokens=2, dtype="float32"),
        "empty": synthetic_context(layers=1, kv_heads=1, head_dim=2, tokens=0),
        **{dtype: synthetic_context(**small, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")},
        "long": long,
        "subset": replace(long, segments=long.segments[1:]),
        "conversation": _conversation(),
        "latent": _latent(),
        **{f"hidden-{dtype}": _hidden(dtype) for dtype in ("float32", "float16", "bfloat16")},
        "tokens": Context("tokens", MODEL, (1, 2, 2**31 - 1), 0, exactness=Exactness.TEXT),
        "text": text_context('héllo 🌍\n\x00 \\ "'),
    }


def alone() -> dict[str, Context]:
    """Every golden segment, by name: a context that holds its tokens and nothing else."""
    long = contexts()["long"]
    latent = contexts()["latent"]
    parts = {
        "segment-256": (long, long.segments[1]),
        "segment-96": (long, long.segments[0].cut(96, 140)),
        "segment-latent": (latent, latent.segments[0]),
    }
    return {
        name: Context("segment", whole.model, part.tokens, len(part), segments=(part,), exactness=part.exactness)
        for name, (whole, part) in parts.items()
    }


def bundles() -> dict[str, tuple[Context, str]]:
    """File name -> context and codec; those without KV are the same under any codec."""
    named: dict[str, tuple[Context, str]] = {}
    for name, context in (contexts() | alone()).items():
        for codec in CODECS if context.segments else CODECS[:1]:
            named[f"{name}.{codec}.avp"] = (context, codec)
    return named


def written(context: Context, codec: str) -> bytes:
    """The bundle."""
    if context.kind != "segment":
        return context.to_bytes(codec=codec)
    assert context.model is not None
    return b"".join(seal(context.model, context.segments[0], codec=codec).runs)


def decoded(context: Context) -> dict[str, str]:
    """xxh3-128 of K and V after the codec, by segment and layer."""
    layers = range(len(context.model.layout.layers)) if context.model else ()
    return {
        f"{number}/{layer}/{part}": xxhash.xxh3_128_hexdigest(segment.read(layer, part).tobytes())
        for number, segment in enumerate(context.segments)
        for layer in layers
        for part in ("k", "v")
    }


def vector(name: str, context: Context, codec: str, data: bytes) -> dict[str, object]:
    """What a reader must find in a bundle."""
    size = header_size(data[:8])
    table = json.loads(data[8:size])
    del table["__metadata__"]
    return {
        "name": name,
        "codec": codec,
        "bytes": len(data),
        "header": size,
        "blake3": blake3(data).hexdigest(),
        "kind": context.kind,
        "tokens": list(context.tokens),
        "length": context.length,
        "exactness": context.exactness.label,
        "text": context.text,
        "segments": [
            {"start": each.start, "count": len(each), "parent": each.parent, "engine": each.engine}
            for each in context.segments
        ],
        "pages": [page for segment in context.segments for page in segment.pages],
        "tensors": [
            {
                "name": each,
                "dtype": entry["dtype"],
                "shape": entry["shape"],
                "xxh3_128": xxhash.xxh3_128_hexdigest(
                    data[size + entry["data_offsets"][0] : size + entry["data_offsets"][1]]
                ),
            }
            for each, entry in table.items()
        ],
        "decoded": decoded(context),
    }


def main() -> None:
    """Write everything."""
    vectors = []
    for name, (context, codec) in bundles().items():
        data = written(context, codec)
        (HERE / name).write_bytes(data)
        vectors.append(vector(name, context, codec, data))
    rows = ",\n".join(json.dumps(each, ensure_ascii=False) for each in vectors)
    (HERE / "vectors.json").write_text(f"[\n{rows}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
