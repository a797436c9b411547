"""Text in 0.4: the message of its text route, and frames of mode JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.context import text_context
from avp.errors import BundleError, LimitExceeded
from avp.identity import LayerLayout
from avp.interop.avp04 import read_frame
from avp.interop.avp04_context import (
    context_from_frame,
    context_from_message,
    frame_from_context,
    message_from_context,
)
from avp.interop.avp04_proto import Mode
from avp.manifest import Limits
from avp.segment import Exactness

from .wire import model


@settings(deadline=None)
@given(st.text())
def test_text_survives_a_frame_and_a_message(content: str) -> None:
    context = text_context(content)
    frame = read_frame(frame_from_context(context, model_hash="", session_id="s", source_agent_id="a"))
    assert frame.metadata.mode is Mode.JSON
    found = context_from_frame(frame, model=model(LayerLayout(1, 4)), trust_model_hash="")
    assert (found.kind, found.text, found.exactness) == ("text", content, Exactness.TEXT)
    message = json.loads(message_from_context(context, session_id="s", source_agent_id="a", target_agent_id="b"))
    assert message == {
        "avp_version": "0.4",
        "session_id": "s",
        "source_agent_id": "a",
        "target_agent_id": "b",
        "content": content,
    }


@pytest.mark.parametrize(
    "body", [b"", b"text", b"[]", b"{}", b'{"content": 1}', b'{"content": "\\ud800"}', b"\xff", b"[" * 100_000]
)
def test_a_message_without_content_is_refused(body: bytes) -> None:
    with pytest.raises(BundleError, match="Fix: ask the sender for a valid message"):
        context_from_message(body)


def test_a_message_larger_than_the_limit_is_refused() -> None:
    body = message_from_context(text_context("x" * 100))
    assert context_from_message(body, limits=Limits(header=len(body))).text == "x" * 100
    with pytest.raises(LimitExceeded, match=r"Fix: raise Limits\.header"):
        context_from_message(body, limits=Limits(header=len(body) - 1))
