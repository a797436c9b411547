"""A receipt is figures; a generation is text with its figures."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from avp.context import text_context
from avp.receipt import MODES, Generation, Receipt, Usage
from avp.segment import Exactness


def _generation(text: str) -> Generation:
    return Generation(
        text,
        tokens=(1, 2),
        context=text_context("x"),
        usage=Usage(3, 2, 5),
        receipt=Receipt("kv", Exactness.EXACT),
        finish_reason="eos",
    )


def test_a_receipt_claims_nothing_that_was_not_measured() -> None:
    receipt = Receipt("text", Exactness.TEXT)
    assert receipt.mode in MODES
    assert (receipt.bytes_sent, receipt.bytes_reused, receipt.tokens_reused, receipt.positions_computed) == (0, 0, 0, 0)
    assert (dict(receipt.seconds), receipt.reasons) == ({}, ())


def test_a_receipt_does_not_change() -> None:
    receipt = Receipt("kv", Exactness.EXACT)
    with pytest.raises(FrozenInstanceError):
        receipt.mode = "text"  # type: ignore[misc]
    with pytest.raises(TypeError):
        receipt.seconds["prefill"] = 1.0  # type: ignore[index]


def test_a_generation_is_its_text() -> None:
    found = _generation("hello")
    assert found == "hello"
    assert found.upper() == "HELLO"
    assert f"{found}!" == "hello!"
    assert {found: 1}["hello"] == 1


def test_a_generation_carries_what_made_it() -> None:
    found = _generation("hello")
    assert (found.tokens, found.finish_reason, found.usage.cached_tokens) == ((1, 2), "eos", 5)
    assert found.receipt.exactness is Exactness.EXACT
    assert found.context.text == "x"
