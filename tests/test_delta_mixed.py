"""A context whose KV two engines computed, in two dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avp.blob import seal
from avp.delta import assemble, check_piece, pieces
from avp.errors import BundleError
from avp.segment import Exactness

from .samples import kv_bytes, kv_context
from .test_delta import EXACT, LONG, blob_of, outlined, through


def test_a_context_of_two_engines_and_dtypes_is_the_same_bytes_out_of_what_was_sent() -> None:
    assert LONG.model is not None
    foreign = kv_context(range(600), dtype="float16").segments[0]
    first = replace(foreign, engine="llamacpp", exactness=Exactness.BOUNDED)
    mixed = replace(LONG, segments=(first, *LONG.segments[1:]), exactness=Exactness.BOUNDED)
    told, segments = outlined(mixed)
    assert [(each.page, each.engine, each.dtype) for each in told.grades] == [
        (0, "llamacpp", "float16"),
        (8, "synthetic", "float32"),
    ]
    assert told.nbytes(((0, 19),)) == mixed.nbytes < LONG.nbytes
    blobs = [seal(LONG.model, piece) for piece in pieces(segments, ((0, 19),))]
    came = {page: blob for blob in blobs for page in blob.segment.pages}
    for blob in blobs:
        check_piece(blob, through(told), least=EXACT)
    back = assemble(through(told), lambda page, want: came[page], least=EXACT)
    assert kv_bytes(back) == kv_bytes(mixed)
    with pytest.raises(BundleError, match="another engine"):
        check_piece(blob_of(LONG, 0, 1), told, least=EXACT)
