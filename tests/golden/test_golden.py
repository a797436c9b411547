"""The golden bundles: read as what they were, written again byte for byte, opened by stock safetensors."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from avp.blob import open_bundle
from avp.context import Context
from avp.manifest import Limits

from .make import HERE, bundles, decoded, vector, written

VECTORS = {each["name"]: each for each in json.loads((HERE / "vectors.json").read_text(encoding="utf-8"))}
BUNDLES = bundles()


def _plain(context: Context) -> tuple[object, ...]:
    hidden = context.hidden and (context.hidden.dtype, context.hidden.shape, context.hidden.tobytes())
    turns = [(dict(turn.message), turn.opaque) for turn in context.turns]
    segments = [
        (each.start, each.tokens, each.parent, each.pages, each.dtype, each.engine, each.exactness)
        for each in context.segments
    ]
    head = (context.kind, context.model, context.tokens, context.length, turns, dict(context.template), hidden)
    return (*head, segments, context.exactness)


def _read(data: bytes) -> Context:
    """A context, or a segment in the form in which `alone` has it."""
    found = open_bundle(data, limits=Limits())
    if isinstance(found, Context):
        return found
    part = found.verify().segment
    return Context("segment", found.model, part.tokens, len(part), segments=(part,), exactness=part.exactness)


def test_files_vectors_and_contexts_are_the_same_set_and_small() -> None:
    files = {path.name: path.stat().st_size for path in HERE.glob("*.avp")}
    assert set(files) == set(VECTORS) == set(BUNDLES)
    assert sum(files.values()) + (HERE / "vectors.json").stat().st_size < 200_000


@pytest.mark.parametrize("name", BUNDLES)
class TestEveryGoldenBundle:
    def test_it_reads_as_the_context_that_was_written(self, name: str) -> None:
        context, _ = BUNDLES[name]
        found = _read((HERE / name).read_bytes())
        assert _plain(found) == _plain(context)
        assert decoded(found) == decoded(context)

    def test_it_is_what_the_vector_says(self, name: str) -> None:
        context, codec = BUNDLES[name]
        assert vector(name, context, codec, (HERE / name).read_bytes()) == VECTORS[name]

    def test_it_is_written_again_byte_for_byte(self, name: str) -> None:
        context, codec = BUNDLES[name]
        if codec == "lossless":  # zstd's frames may differ between its versions; what they hold may not
            assert decoded(_read(written(context, codec))) == VECTORS[name]["decoded"]
        else:
            assert written(context, codec) == (HERE / name).read_bytes()

    def test_stock_safetensors_opens_it(self, name: str) -> None:
        with safe_open(HERE / name, framework="np") as stock:
            assert set(stock.metadata()) == {"avp", "format"}
            found = {each: stock.get_slice(each).get_shape() for each in stock.keys()}  # noqa: SIM118
        assert found == {each["name"]: each["shape"] for each in VECTORS[name]["tensors"]}
