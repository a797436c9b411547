"""Hand-over with a codec that loses something."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from avp import registry
from avp.agent import Agent
from avp.blob import seal
from avp.context import Context
from avp.errors import BundleError, NoAgreement
from avp.handshake import CodecOffer, Floor, Record
from avp.security import Tenant
from avp.segment import Exactness

from .callers import announce, ask
from .peers import IDS, connector, positions, run, tapped

PLUGIN = """
import numpy as np
from avp.buffers import Buffer
from avp.segment import Exactness


class Coarse:
    name = "coarse8"
    exactness = Exactness.BOUNDED

    def parts(self, dtype, shape):
        return {"": ("int8", shape), ".scale": ("float32", (1, 1, 1))}

    def encode(self, tensor):
        scale = np.full((1, 1, 1), max(np.abs(tensor.array).max(), 1e-9) / 127, np.float32)
        return {"": Buffer("int8", np.rint(tensor.array / scale).astype(np.int8)), ".scale": Buffer("float32", scale)}

    def decode(self, parts, dtype, shape):
        return Buffer("float32", parts[""].array.astype(np.float32) * parts[".scale"].array)


CODEC = Coarse()
"""


@pytest.fixture
def coarse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "coarse_plugin.py").write_text(PLUGIN)
    info = tmp_path / "coarse_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coarse-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[avp.codecs]\ncoarse8 = coarse_plugin:CODEC\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "coarse8"
    registry.load.cache_clear()
    sys.modules.pop("coarse_plugin", None)


def test_after_a_lossy_hand_over_an_exact_one_transfers_again(coarse: str) -> None:
    async def scenario() -> None:
        with Agent(connector(0), name="a", codecs=known) as a, Agent(connector(1), name="b", accept="bounded") as b:
            remote, channel = tapped(a, b)
            lossy = await remote.hand_over(context, codec=coarse, accept="bounded")
            assert lossy.exactness is Exactness.BOUNDED
            assert positions(channel.sent) == 300
            assert sum(blob.nbytes for blob in channel.sent) < 0.5 * context.nbytes
            with b.endpoint.desk.handles.use(lossy.id, Tenant()) as there:
                assert there.exactness is Exactness.BOUNDED
            await remote.hand_over(context, codec=coarse, accept="bounded")
            assert positions(channel.sent) == 300  # the lossy form will do for who asks for no more
            exact = await remote.hand_over(context)
            assert positions(channel.sent) == 600
            assert exact.exactness is Exactness.EXACT
            assert exact.receipt is not None
            assert exact.receipt.bytes_reused == 0
            far = await remote.stream([4, 5], context=exact, max_new_tokens=8).result()
            assert far.tokens == connector(0).generate([4, 5], context=context, max_new_tokens=8).tokens

    context = connector(0).prefill(IDS)
    known = [CodecOffer(coarse, ratio=0.25, records=(Record(weights_of(context), 0.001, 0.99, 0.95),))]
    run(scenario())


@pytest.mark.parametrize(
    ("record", "floor"),
    [
        (None, Floor()),
        (Record("f" * 64, 0.0, 1.0, 1.0), Floor()),  # of other weights
        (Record("", 0.001, 0.99, 0.95), Floor(continuations=0.96)),
        (Record("", 0.001, 0.96, 0.95), Floor()),
    ],
    ids=["none", "other-weights", "a-higher-floor", "too-low"],
)
def test_without_a_record_that_meets_the_receivers_floor_a_lossy_codec_is_refused(
    coarse: str, record: Record | None, floor: Floor
) -> None:
    async def scenario() -> None:
        with (
            Agent(connector(0), name="a", codecs=known) as a,
            Agent(connector(1), name="b", accept="bounded", floor=floor) as b,
        ):
            remote, channel = tapped(a, b)
            with pytest.raises(NoAgreement, match="no record for these weights"):
                await remote.hand_over(context, codec=coarse, accept="bounded")
            assert not channel.sent
            assert (await remote.hand_over(context)).exactness is Exactness.EXACT

    context = connector(0).prefill(IDS)
    weights = weights_of(context)
    records = () if record is None else (replace(record, weights=record.weights or weights),)
    known = [CodecOffer(coarse, records=records)]
    run(scenario())


def weights_of(context: Context) -> str:
    assert context.model is not None
    return context.model.weights


def test_a_lossy_segment_that_claims_to_be_exact_is_refused(coarse: str) -> None:
    async def scenario() -> None:
        with Agent(connector(1), name="b") as b:
            reply, blobs = await announce(b, context)
            assert context.model is not None
            lossy = seal(context.model, blobs[0].segment, codec=coarse)
            assert lossy.segment.exactness is Exactness.BOUNDED
            forged = replace(lossy, segment=replace(lossy.segment, exactness=Exactness.EXACT))
            with pytest.raises(BundleError, match="engine, dtype or class"):
                await ask(b, "receive", {"transfer": reply["transfer"]}, forged)
            assert not list(b.store.entries())

    context = connector(0).prefill(IDS[:64])
    run(scenario())
