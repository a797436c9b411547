"""VLLMConnector against a real `vllm serve`, over HTTP, with the store that both share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import avp
from avp.segment import Exactness

from .engines import served

pytestmark = pytest.mark.real
LONG = [
    {"role": "system", "content": "You are a careful assistant. " * 60},
    {"role": "user", "content": "Name a colour."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def url(vllm_python: str, model: Path, folder: Path) -> Iterator[str]:
    extra = {"store": f"disk:{folder}/store", "tenant": "red", "secret": "one", "accept": "bounded"}
    with served(vllm_python, model, extra, folder / "log") as found:
        yield found


@pytest.fixture(scope="module")
def connector(url: str, model: Path, folder: Path) -> Iterator[avp.VLLMConnector]:
    made = avp.VLLMConnector.from_pretrained(model, url=url, store=f"disk:{folder}/store", tenant="red", secret="one")
    yield made
    made.close()


def test_the_identity_is_that_of_transformers(
    connector: avp.VLLMConnector, transformer: avp.HuggingFaceConnector
) -> None:
    assert connector.identity.same_weights(transformer.identity)
    assert connector.identity.same_tokenizer(transformer.identity)
    assert (connector.engine, connector.dtype, connector.max_positions) == ("vllm", "float32", 1536)


def test_a_prefilled_context_holds_all_of_its_positions(connector: avp.VLLMConnector) -> None:
    context = connector.prefill(LONG)
    assert len(context) == len(context.tokens) == len(connector.tokenize(LONG))
    assert context.exactness is Exactness.EXACT
    assert {segment.engine for segment in context.segments} == {"vllm"}
    again = avp.Context.from_bytes(context.to_bytes())
    assert again.tokens == context.tokens


def test_a_continuation_computes_only_what_is_new(
    connector: avp.VLLMConnector, transformer: avp.HuggingFaceConnector
) -> None:
    context = connector.prefill(LONG)
    one = connector.generate("And a bird.", context=context, max_new_tokens=8)
    full = len(context) // 32 * 32
    assert one.receipt.mode == "kv"
    assert one.receipt.exactness is Exactness.EXACT
    assert one.receipt.tokens_reused == one.usage.cached_tokens >= full
    assert one.receipt.positions_computed == one.usage.prompt_tokens - one.receipt.tokens_reused + len(one.tokens) - 1
    assert [connector.generate("And a bird.", context=context, max_new_tokens=8).tokens for _ in range(2)] == [
        one.tokens
    ] * 2
    theirs = transformer.generate("And a bird.", context=transformer.prefill(LONG), max_new_tokens=8)
    assert one.tokens == theirs.tokens
    assert len(one.context) == (one.usage.prompt_tokens + len(one.tokens) - 1) // 32 * 32


def test_a_stream_says_the_same_in_pieces(connector: avp.VLLMConnector) -> None:
    context = connector.prefill(LONG)
    whole = connector.generate("And a tree.", context=context, max_new_tokens=8)
    with connector.stream("And a tree.", context=context, max_new_tokens=8) as stream:
        pieces = list(stream)
    assert len(pieces) > 1
    assert stream.result.tokens == whole.tokens
    assert "".join(pieces).strip() == str(whole).strip()
    assert stream.result.receipt.mode == "kv"
    assert stream.result.receipt.tokens_reused >= len(context) // 32 * 32


def test_a_closed_stream_ends_the_request(connector: avp.VLLMConnector) -> None:
    stream = connector.stream("Count to a thousand.", max_new_tokens=400, min_new_tokens=400)
    next(iter(stream))
    stream.close()
    with pytest.raises(avp.UsageError, match="closed before its end"):
        _ = stream.result
    assert connector.generate("Name a fish.", max_new_tokens=2).tokens


def test_a_stop_string_stays_in_the_text(connector: avp.VLLMConnector) -> None:
    said = connector.generate("Write a long story.", max_new_tokens=60, stop=" ")
    assert said.finish_reason == "stop"
    assert " " in str(said)
    assert len(said.tokens) < 60


def test_a_context_of_transformers_is_continued_in_vllm_as_bounded(
    connector: avp.VLLMConnector, transformer: avp.HuggingFaceConnector
) -> None:
    conversation = [{"role": "user", "content": "The rain fell on the hills for days. " * 40}]
    context = transformer.prefill(conversation)
    said = connector.generate("Where did it fall?", context=context, max_new_tokens=8)
    assert said.receipt.mode == "kv"
    assert said.receipt.exactness is Exactness.BOUNDED
    assert said.receipt.tokens_reused == len(context) // 32 * 32
    assert said.tokens == transformer.generate("Where did it fall?", context=context, max_new_tokens=8).tokens


def test_a_conversation_goes_from_vllm_to_transformers_and_back(
    connector: avp.VLLMConnector, transformer: avp.HuggingFaceConnector
) -> None:
    first = connector.generate("Tell me of a lighthouse. " * 20, max_new_tokens=12)
    second = transformer.generate("Go on, and say more. " * 20, context=first.context, max_new_tokens=12)
    assert second.receipt.tokens_reused == len(first.context) > 0
    third = connector.generate("And then?", context=second.context, max_new_tokens=4)
    assert third.receipt.tokens_reused == len(second.context) // 32 * 32 > len(first.context)
    assert third.receipt.exactness is Exactness.BOUNDED


def test_thinking_is_refused_with_the_reason(connector: avp.VLLMConnector) -> None:
    with pytest.raises(avp.UsageError, match="gives no hidden state to others"):
        connector.think("Think.", steps=4)


def test_latent_positions_are_refused_or_read_as_text(
    connector: avp.VLLMConnector, transformer: avp.HuggingFaceConnector
) -> None:
    thought = transformer.think("What is green?", steps=2)
    with pytest.raises(avp.UsageError, match="latent positions"):
        connector.generate("Say it.", context=thought)
    said = connector.generate("Say it.", context=thought, max_new_tokens=2, accept="text")
    assert said.receipt.mode == "text"


def test_too_long_a_prompt_is_refused_before_anything_is_sent(connector: avp.VLLMConnector) -> None:
    with pytest.raises(avp.ContextTooLong, match="the engine has 1536"):
        connector.prefill([7] * 1536)


def test_another_secret_or_tenant_is_refused(url: str, model: Path, folder: Path) -> None:
    with pytest.raises(avp.UsageError, match="for another tenant or secret"):
        avp.VLLMConnector.from_pretrained(model, url=url, store=f"disk:{folder}/store", tenant="red", secret="two")


def test_a_store_that_the_server_does_not_use_is_noticed(url: str, model: Path, tmp_path: Path) -> None:
    other = avp.VLLMConnector.from_pretrained(model, url=url, store=f"disk:{tmp_path}", tenant="red", secret="one")
    with pytest.raises(avp.SegmentMissing, match="the store holds 0"):
        other.prefill("A prompt that is computed, and saved elsewhere.")
    other.close()


def test_an_agent_serves_it(connector: avp.VLLMConnector, transformer: avp.HuggingFaceConnector) -> None:
    context = transformer.prefill("The boat left the harbour at dawn. " * 20)
    with (
        avp.Agent(transformer, name="transformers", accept="bounded") as sender,
        avp.Agent(connector, name="vllm", accept="bounded") as agent,
        avp.serve(agent, "http://127.0.0.1:0") as server,
        avp.connect(server.url) as remote,
    ):
        handle = sender.hand_over(context, to=server.url)
        said = remote.generate("When did it leave?", context=handle, max_new_tokens=6)
    assert said.receipt.tokens_reused >= len(context) // 32 * 32
    assert said.receipt.exactness is Exactness.BOUNDED
