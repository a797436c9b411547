"""The handshake, over all kinds of pairs: both ends compute the same, and never better than both accept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avp.errors import NoAgreement
from avp.greeting import agreement_to_json, hello_from_json, hello_to_json
from avp.handshake import MODES, Agreement, CodecOffer, Floor, Hello, Record, Verdict, negotiate
from avp.identity import CacheLayout, LayerLayout, ModelIdentity, canonical_json
from avp.manifest import Limits
from avp.segment import Exactness

WEIGHTS = ("a" * 64, "b" * 64)
LAYOUTS = (CacheLayout((LayerLayout(2, 8),)), CacheLayout((LayerLayout(2, 8, window=16),)))
MODELS = [
    ModelIdentity("some/model", "some", weights, tokenizer, layout)
    for weights in WEIGHTS
    for tokenizer in ("c" * 64, "d" * 64)
    for layout in LAYOUTS
]
shares = st.sampled_from([0.0, 0.003, 0.95, 0.99])
records = st.builds(Record, st.sampled_from(WEIGHTS), shares, shares, shares)
offers = st.builds(
    CodecOffer,
    st.sampled_from(["raw", "lossless", "int8", "int4"]),
    st.sampled_from(Exactness),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([None, 1e6, 1e9]),
    st.lists(records, max_size=2).map(tuple),
)
rates = st.sampled_from([None, 1e3, 1e6, 12.5e9])
hellos = st.builds(
    Hello,
    st.sampled_from(["one", "two"]),
    st.sampled_from([None, *MODELS]),
    st.sampled_from(["transformers", "vllm"]),
    st.sampled_from(["float32", "bfloat16"]),
    modes=st.sets(st.sampled_from(MODES), min_size=3).map(lambda modes: tuple(m for m in MODES if m in modes)),
    codecs=st.lists(offers, max_size=3, unique_by=lambda offer: offer.name).map(tuple),
    limits=st.sampled_from([Limits(), Limits(tokens=100)]),
    page=st.sampled_from([32, 32, 32, 64]),
    bandwidth=rates,
    prefill=rates,
    accept=st.sampled_from(Exactness),
    floor=st.builds(Floor, shares, shares, shares),
    policy=st.sampled_from(["best", "fastest"]),
    version=st.sampled_from([1, 1, 1, 2]),
)
tokens = st.sampled_from([0, 1, 100, 101, 5000])
many = settings(max_examples=80, deadline=None)

ONE = Hello("one", MODELS[0], "transformers", "float32")
TWO = replace(ONE, agent="two")
MEASURED = Record(WEIGHTS[0], 0.003, 0.99, 0.95)
INT8 = CodecOffer("int8", Exactness.BOUNDED, 0.25, records=(MEASURED,))


def outcome(sender: Hello, receiver: Hello, count: int) -> Agreement | str:
    try:
        return negotiate(sender, receiver, tokens=count)
    except NoAgreement as error:
        return str(error)


def travelled(hello: Hello) -> Hello:
    return hello_from_json(json.loads(canonical_json(hello_to_json(hello))), limits=Limits())


def verdict(agreement: Agreement, mode: str) -> Verdict:
    return next(each for each in agreement.verdicts if each.mode == mode)


@many
@given(hellos, hellos, tokens)
def test_both_ends_compute_the_same_from_what_travelled(sender: Hello, receiver: Hello, count: int) -> None:
    assert travelled(sender) == sender
    here = outcome(sender, receiver, count)
    assert here == outcome(travelled(sender), receiver, count) == outcome(sender, travelled(receiver), count)
    if isinstance(here, Agreement):
        text = canonical_json(agreement_to_json(here))
        assert json.loads(text) == agreement_to_json(here)


@many
@given(hellos, hellos, tokens)
def test_what_is_taken_is_possible_and_no_worse_than_both_accept(sender: Hello, receiver: Hello, count: int) -> None:
    found = outcome(sender, receiver, count)
    if isinstance(found, str):
        assert all(f"{mode}: " in found for mode in MODES)
        assert "Fix:" in found
        return
    assert [each.mode for each in found.verdicts] == list(MODES)
    assert found.taken in found.verdicts
    assert not found.taken.refused
    assert found.mode in sender.modes
    assert found.mode in receiver.modes
    assert found.exactness <= min(sender.accept, receiver.accept)
    assert count <= receiver.limits.tokens
    better = found.verdicts[: MODES.index(found.mode)]
    if "fastest" not in (sender.policy, receiver.policy):
        assert found.reasons == tuple(f"{each.mode}: {each.refused}" for each in better)
        assert all(each.refused for each in better)


@many
@given(hellos, hellos, tokens)
def test_kv_moves_only_between_equal_weights_and_by_a_codec_that_is_proven(
    sender: Hello, receiver: Hello, count: int
) -> None:
    found = outcome(sender, receiver, count)
    if isinstance(found, str) or found.mode != "kv":
        return
    assert sender.model is not None
    if receiver.model is not None:
        assert (sender.model.weights, sender.model.layout) == (receiver.model.weights, receiver.model.layout)
        if (sender.engine, sender.dtype) != (receiver.engine, receiver.dtype):
            assert found.exactness >= Exactness.BOUNDED
    assert sender.page == receiver.page
    ours = next(offer for offer in sender.codecs if offer.name == found.codec)
    theirs = next(offer for offer in receiver.codecs if offer.name == found.codec)
    assert found.exactness >= max(ours.exactness, theirs.exactness)
    if max(ours.exactness, theirs.exactness) > Exactness.EXACT:
        proven = [record for record in ours.records if record.weights == sender.model.weights]
        assert any(record.meets(receiver.floor) for record in proven)


@many
@given(hellos, hellos, tokens)
def test_fastest_takes_what_takes_least_time_of_what_is_measured(sender: Hello, receiver: Hello, count: int) -> None:
    found = outcome(replace(sender, policy="fastest"), receiver, count)
    if isinstance(found, str):
        return
    possible = [each for each in found.verdicts if not each.refused]
    measured = [each.seconds for each in possible if each.seconds is not None]
    if measured:
        assert found.taken.seconds == min(measured)
    else:
        assert found.taken == possible[0]
    assert found.reasons[-1].startswith("fastest: ")


def test_fastest_says_the_figures_of_what_it_compared() -> None:
    slow = replace(ONE, policy="fastest", accept=Exactness.TEXT, bandwidth=1e3)
    taker = replace(TWO, accept=Exactness.TEXT, prefill=1e4)
    found = negotiate(slow, taker, tokens=1000)
    assert found.mode == "tokens"
    assert verdict(found, "kv").bytes == 1000 * MODELS[0].layout.bytes_per_token("float32") == 128000
    assert found.reasons[-1] == "fastest: tokens in 4.1 s (4000 bytes) against kv in 128 s (128000 bytes)"
    fast = negotiate(replace(slow, bandwidth=1e9), taker, tokens=1000)
    assert (fast.mode, fast.reasons) == ("kv", ("fastest: kv in 0.000128 s, 128000 bytes",))


def test_what_is_not_measured_is_not_compared_and_the_best_is_taken() -> None:
    found = negotiate(replace(ONE, policy="fastest"), TWO, tokens=1000)
    assert found.mode == "kv"
    assert "not measured" in found.reasons[-1]
    assert verdict(found, "kv").seconds is None


def test_fastest_weighs_the_time_of_a_codec_against_what_it_saves() -> None:
    codecs = (CodecOffer("raw"), CodecOffer("lossless", ratio=0.5, rate=1e6))
    sender, taker = replace(ONE, codecs=codecs), replace(TWO, codecs=codecs)
    assert negotiate(replace(sender, bandwidth=1e3), taker, tokens=1000).codec == "lossless"
    assert negotiate(replace(sender, bandwidth=1e9), taker, tokens=1000).codec == "raw"
    assert negotiate(sender, taker, tokens=1000).codec == "raw"


def test_a_lossy_codec_needs_a_record_that_meets_the_receivers_floor_not_the_senders() -> None:
    strict, lax = Floor(perplexity=0.001), Floor(perplexity=0.01)
    sender = replace(ONE, codecs=(INT8,), accept=Exactness.BOUNDED)
    taker = replace(TWO, codecs=(INT8,), accept=Exactness.BOUNDED)
    found = negotiate(replace(sender, floor=strict), replace(taker, floor=lax))
    assert (found.mode, found.codec, found.exactness) == ("kv", "int8", Exactness.BOUNDED)
    with pytest.raises(NoAgreement, match="int8 has no record for these weights that meets two's floor"):
        negotiate(replace(sender, floor=lax), replace(taker, floor=strict))
    other = replace(INT8, records=(replace(MEASURED, weights=WEIGHTS[1]),))
    with pytest.raises(NoAgreement, match="has no record for these weights"):
        negotiate(replace(sender, codecs=(other,)), replace(taker, floor=lax))


@pytest.mark.parametrize(
    "change", [{"perplexity": 0.006}, {"perplexity": -0.006}, {"top1": 0.96}, {"continuations": 0}]
)
def test_a_record_is_measured_by_every_figure_of_the_floor(change: dict[str, float]) -> None:
    assert MEASURED.meets(Floor())
    assert not replace(MEASURED, **change).meets(Floor())


def test_a_codec_is_no_better_than_the_receiver_knows_it_to_be() -> None:
    claimed = replace(INT8, exactness=Exactness.EXACT)
    with pytest.raises(NoAgreement, match="int8 is bounded"):
        negotiate(replace(ONE, codecs=(claimed,)), replace(TWO, codecs=(INT8,)))
    both = {"accept": Exactness.BOUNDED}
    found = negotiate(replace(ONE, codecs=(claimed,), **both), replace(TWO, codecs=(INT8,), **both))  # type: ignore[arg-type]
    assert found.exactness is Exactness.BOUNDED


def test_another_engine_or_dtype_makes_kv_bounded() -> None:
    for other in (replace(TWO, engine="vllm"), replace(TWO, dtype="bfloat16")):
        with pytest.raises(
            NoAgreement,
            match=r"kv: KV of transformers in float32 is bounded to (vllm|transformers) in (bfloat16|float32)",
        ):
            negotiate(ONE, other)
        found = negotiate(replace(ONE, accept=Exactness.BOUNDED), replace(other, accept=Exactness.BOUNDED))
        assert (found.mode, found.exactness) == ("kv", Exactness.BOUNDED)


def test_a_receiver_without_a_model_keeps_kv_as_it_is() -> None:
    found = negotiate(ONE, Hello("file"), tokens=10)
    assert (found.mode, found.exactness) == ("kv", Exactness.EXACT)
    with pytest.raises(NoAgreement, match="file holds no KV"):
        negotiate(Hello("file"), TWO)


@pytest.mark.parametrize(
    ("sender", "receiver", "reason"),
    [
        (ONE, replace(TWO, model=MODELS[4]), "other weights"),
        (ONE, replace(TWO, model=MODELS[1]), "another cache layout"),
        (replace(ONE, version=2), TWO, "one speaks version 2, two version 1"),
        (ONE, replace(TWO, page=64), "pages of 32 and of 64"),
        (replace(ONE, modes=("text",)), TWO, "kv: one does not send it"),
        (ONE, replace(TWO, modes=("text",)), "kv: two does not take it"),
        (ONE, replace(TWO, limits=Limits(tokens=9)), "10 tokens are more than the 9 that two takes"),
        (ONE, replace(TWO, codecs=()), "two does not read raw"),
        (replace(ONE, codecs=()), TWO, "none was offered"),
        (ONE, replace(TWO, model=MODELS[6]), "tokens: other tokenizers"),
    ],
)
def test_each_refusal_says_why(sender: Hello, receiver: Hello, reason: str) -> None:
    with pytest.raises(NoAgreement) as caught:
        negotiate(sender, receiver, tokens=10)
    assert reason in str(caught.value)
    assert "text: " in str(caught.value)  # exact is asked for: text is refused too


def test_a_fallback_names_why_nothing_better_was_possible() -> None:
    lax = {"accept": Exactness.TEXT}
    found = negotiate(replace(ONE, **lax), replace(TWO, model=MODELS[4], **lax), tokens=5)  # type: ignore[arg-type]
    assert (found.mode, found.exactness, found.codec) == ("tokens", Exactness.TEXT, None)
    assert [reason.partition(":")[0] for reason in found.reasons] == ["kv", "translated", "projected"]
