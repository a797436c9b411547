"""The one-line API, on a tiny checkpoint in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import avp
from avp import oneline
from avp.errors import BundleError, ModelNotFound, UsageError
from avp.segment import Exactness
from avp.testing.tiny import tiny_model, tiny_tokenizer

HELLO = "Plan the work: 12 apples and 7 pears."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("model") / str(seed)
        tiny_model(seed=seed).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        folders.append(str(folder))
    yield folders[0], folders[1]
    avp.clear_cache()


def test_a_message_without_a_model_is_text() -> None:
    message = avp.pack("Hello")
    assert str(message) == "Hello"
    assert avp.unpack(bytes(message)) == avp.unpack(message) == avp.unpack("Hello") == "Hello"
    assert message.context.kind == "text"
    assert len(message) == len(bytes(message)) < 600


def test_a_message_with_a_model_carries_its_identity_and_token_ids(models: tuple[str, str]) -> None:
    message = avp.pack(HELLO, model=models[0])
    context = avp.Context.from_bytes(bytes(message))
    assert (context.kind, len(context)) == ("tokens", 0)
    assert context.model == oneline.connector(models[0]).identity
    assert context.tokens == oneline.connector(models[0]).prefill(HELLO).tokens
    assert str(message) == HELLO
    answer = avp.unpack(bytes(message), model=models[0], max_new_tokens=6)
    assert isinstance(answer, avp.Generation)
    assert answer.receipt.mode == "tokens"
    assert answer.tokens == avp.generate(HELLO, model=models[0], max_new_tokens=6).tokens


def test_a_message_with_latent_steps_carries_the_context_and_the_text(models: tuple[str, str]) -> None:
    message = avp.pack(HELLO, model=models[0], think_steps=4)
    assert str(message) == HELLO
    assert avp.unpack(bytes(message)) == HELLO
    answer = avp.unpack(bytes(message), model=models[0], max_new_tokens=6)
    assert isinstance(answer, avp.Generation)
    assert (answer.receipt.mode, answer.receipt.exactness) == ("kv", Exactness.APPROXIMATE)
    thought = avp.think(HELLO, model=models[0], steps=4)
    assert answer.tokens == avp.generate("", model=models[0], context=thought, max_new_tokens=6).tokens


def test_a_message_of_other_weights_is_read_as_text_and_the_receipt_says_why(models: tuple[str, str]) -> None:
    message = avp.pack(HELLO, model=models[0], think_steps=4)
    answer = avp.unpack(bytes(message), model=models[1], max_new_tokens=6)
    assert isinstance(answer, avp.Generation)
    assert (answer.receipt.mode, answer.receipt.exactness, answer.receipt.tokens_reused) == ("text", Exactness.TEXT, 0)
    assert "no KV was used" in answer.receipt.reasons[0]
    assert answer.tokens == avp.generate(HELLO, model=models[1], max_new_tokens=6).tokens


def test_a_message_may_go_on_from_a_context(models: tuple[str, str]) -> None:
    before = avp.think(HELLO, model=models[0], steps=2)
    message = avp.pack("Check it.", model=models[0], context=before)
    assert message.context.kind == "kv"
    assert message.context.tokens[: len(before)] == before.tokens
    both = avp.pack("Check it.", model=models[0], context=before, think_steps=2)
    assert len(both.context) > len(message.context)


def test_a_reply_may_be_sent_on(models: tuple[str, str]) -> None:
    reply = avp.generate(HELLO, model=models[0], max_new_tokens=6)
    message = avp.pack("Check it.", model=models[0], context=reply.context)
    answer = avp.unpack(bytes(message), model=models[0], max_new_tokens=4)
    assert isinstance(answer, avp.Generation)
    assert answer.tokens == avp.generate("Check it.", model=models[0], context=reply.context, max_new_tokens=4).tokens


def test_connectors_made_by_name_are_kept_until_the_cache_is_cleared(models: tuple[str, str]) -> None:
    first = oneline.connector(models[0])
    assert oneline.connector(models[0]) is first
    avp.clear_cache()
    assert oneline.connector(models[0]) is not first


def test_what_cannot_be_packed_or_unpacked_is_a_clear_error(models: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="need a model"):
        avp.pack("Hello", think_steps=3)
    with pytest.raises(BundleError):
        avp.unpack(b"not a bundle, but long enough for a header")
    with pytest.raises(ModelNotFound):
        avp.pack("Hello", model="nobody/nothing")


def test_a_file_goes_from_one_model_to_another_process_of_it(models: tuple[str, str], tmp_path: Path) -> None:
    context = avp.think(HELLO, model=models[0], steps=0)
    context.save(tmp_path / "a.avp")
    loaded = avp.Context.load(tmp_path / "a.avp")
    assert avp.generate("Check it.", model=models[0], context=loaded, max_new_tokens=4).tokens == (
        avp.generate("Check it.", model=models[0], context=context, max_new_tokens=4).tokens
    )
