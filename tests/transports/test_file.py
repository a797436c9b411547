"""A file as the other end: hand-over to it, fetch from it, and what is no file."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import avp
from avp.agent import Agent
from avp.connectors.huggingface import HuggingFaceConnector
from avp.context import Context
from avp.errors import AVPError, HandleExpired, NoAgreement, StoreFailed, UsageError
from avp.security import Security
from avp.segment import Exactness
from avp.testing.tiny import tiny_connector
from avp.transports.file import TRANSPORT, FileTransport

IDS = [(7 * number) % 200 + 5 for number in range(300)]


@cache
def connector(*, seed: int = 0) -> HuggingFaceConnector:
    return tiny_connector("llama", seed=seed)


def pages(context: Context) -> list[str]:
    return [page for segment in context.segments for page in segment.pages]


@pytest.fixture
def agent() -> Iterator[Agent]:
    with Agent(connector(), name="a") as made:
        yield made


def test_what_is_handed_over_to_a_file_is_a_bundle_that_anybody_loads(agent: Agent, tmp_path: Path) -> None:
    path = tmp_path / "with space.avp"
    context = agent.prefill(IDS)
    handle = agent.hand_over(context, to=f"file:{tmp_path}/with%20space.avp")
    assert (str(handle), len(handle), handle.exactness) == (str(path), 300, Exactness.EXACT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it holds the prompt
    loaded = Context.load(path)
    assert pages(loaded) == pages(context)
    near = agent.generate([4], context=context, max_new_tokens=4)
    assert agent.generate([4], context=loaded, max_new_tokens=4).tokens == near.tokens
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_file_is_fetched_again_and_again_and_nothing_is_held_for_it(agent: Agent, tmp_path: Path) -> None:
    context = agent.prefill(IDS)
    url = f"file:{tmp_path}/a.avp"
    handle = agent.hand_over(context, to=url)
    with avp.connect(url) as remote:
        for _ in range(3):
            back, done = remote.receive(handle)
            assert (back.tokens, done.exactness) == (context.tokens, Exactness.EXACT)
            assert pages(back) == pages(context)
        kept = remote._remote._channel._endpoint._inner.desk.handles  # type: ignore[attr-defined]
        assert (len(kept), kept.memory()) == (0, 0)


def test_a_file_written_by_save_is_fetched_alike(agent: Agent, tmp_path: Path) -> None:
    context = agent.think("Plan.", steps=3)
    context.save(tmp_path / "b.avp", codec="lossless")
    back = agent.connect(f"file:{tmp_path}/b.avp").fetch("whatever")
    assert back.exactness is Exactness.APPROXIMATE
    assert agent.generate([], context=back, max_new_tokens=3).tokens == (
        agent.generate([], context=context, max_new_tokens=3).tokens
    )


def test_a_longer_context_replaces_the_file(agent: Agent, tmp_path: Path) -> None:
    url = f"file:{tmp_path}/a.avp"
    agent.hand_over(agent.prefill(IDS[:100]), to=url)
    handle = agent.hand_over(agent.prefill(IDS), to=url)
    assert handle.receipt is not None
    assert handle.receipt.bytes_reused > 0
    assert len(Context.load(tmp_path / "a.avp")) == 300


def test_other_weights_get_nothing_out_of_a_file_but_text_if_they_ask_for_it(agent: Agent, tmp_path: Path) -> None:
    url = f"file:{tmp_path}/a.avp"
    agent.hand_over(agent.prefill("Plan the work."), to=url)
    with Agent(connector(seed=1), name="other") as other:
        with pytest.raises(NoAgreement, match="other weights"):
            other.connect(url).fetch("x")
        back, done = other.connect(url).receive("x", accept="text")
        assert (back.kind, done.mode, done.exactness) == ("tokens", "tokens", Exactness.TEXT)


@pytest.mark.parametrize("name", ["nothing.avp", "folder", "damaged.avp", "empty.avp"])
def test_what_is_no_bundle_is_an_error_of_ours(agent: Agent, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.avp").write_bytes(b"x" * 100)
    (tmp_path / "empty.avp").write_bytes(b"")
    with pytest.raises(AVPError, match="Fix:") as caught:
        agent.connect(f"file:{tmp_path}/{name}").fetch("x")
    assert isinstance(caught.value, HandleExpired) == (name == "nothing.avp")


def test_a_folder_that_is_not_there_is_an_error_of_ours_and_nothing_is_left(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="Fix: see that its folder is there"):
        agent.hand_over(agent.prefill(IDS[:40]), to=f"file:{tmp_path}/no/a.avp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["file:", "file:/", "file://far.example/a.avp", "file:/a/", "file:/a#b.avp", "file:/a?b.avp", "file:/a%00b"]
)
def test_a_url_that_names_no_file_of_this_machine_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="Fix: write file:"):
        TRANSPORT.connect(url, security=Security())


def test_nothing_is_served_as_a_file(agent: Agent, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing listens"):
        asyncio.run(FileTransport().serve(agent.endpoint, f"file:{tmp_path}/a", security=Security()))
    with pytest.raises(UsageError, match="nothing listens"):
        avp.serve(agent, f"file:{tmp_path}/a")


def test_a_file_generates_nothing_and_keeps_no_handle(agent: Agent, tmp_path: Path) -> None:
    url = f"file:{tmp_path}/a.avp"
    handle = agent.hand_over(agent.prefill(IDS[:40]), to=url)
    with agent.connect(url) as remote:
        with pytest.raises(UsageError, match="has no model"):
            remote.generate("hi")
        with pytest.raises(HandleExpired):
            remote.renew(handle)
        assert remote.hello().agent == f"file:{tmp_path}/a.avp"
