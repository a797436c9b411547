"""LlamaCppConnector beyond the laws: endings, sampling, thinking, memory; on a tiny random GGUF."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avp import Context
from avp.errors import ContextTooLong, IdentityMismatch, UsageError
from avp.segment import PAGE, Exactness, with_salt

from .llamacpp_alone import changed
from .test_gguf import write_gguf

LlamaCppConnector = pytest.importorskip("avp.connectors.llamacpp").LlamaCppConnector

FIRST, THEN = list(range(5, 60)), list(range(70, 85))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def connector(tiny: Path) -> LlamaCppConnector:
    return LlamaCppConnector.from_pretrained(tiny, threads=1)


def go(connector: LlamaCppConnector, context: Context | None, ids: list[int] = THEN) -> tuple[int, ...]:
    return connector.generate(ids, context=context, max_new_tokens=8, min_new_tokens=8).tokens


def kv(context: Context) -> bytes:
    return context.to_bytes()


# --- endings


def test_the_last_token_is_pending_and_the_next_turn_computes_it(connector: LlamaCppConnector) -> None:
    found = connector.generate(FIRST, max_new_tokens=5, min_new_tokens=5)
    assert found.context.pending == found.tokens[-1:]
    assert found.receipt.positions_computed == len(FIRST) + 4 == len(found.context)
    assert found.finish_reason == "length"


def test_a_stop_string_ends_the_turn_with_the_token_that_completed_it(connector: LlamaCppConnector) -> None:
    whole = connector.generate(FIRST, max_new_tokens=8, min_new_tokens=8)
    stop = str(whole)[1:3]
    found = connector.generate(FIRST, max_new_tokens=8, min_new_tokens=8, stop=stop)
    assert found.finish_reason == "stop"
    assert stop in found
    assert found.tokens == whole.tokens[: len(found.tokens)]
    assert stop not in connector.tokenizer.decode(found.tokens[:-1])


def test_an_end_of_turn_ends_it_but_not_before_min_new_tokens(connector: LlamaCppConnector) -> None:
    runs = [connector.generate(FIRST, temperature=3.0, seed=seed, max_new_tokens=200) for seed in range(6)]
    ended = next(run for run in runs if run.finish_reason == "eos")
    assert ended.tokens[-1] in connector.tokenizer.ends
    assert not set(ended.tokens[:-1]) & set(connector.tokenizer.ends)
    longer = connector.generate(FIRST, temperature=3.0, seed=runs.index(ended), max_new_tokens=200, min_new_tokens=190)
    assert len(longer.tokens) >= 190
    assert not set(longer.tokens[:190]) & set(connector.tokenizer.ends)


def test_max_new_tokens_is_cut_to_the_room_and_the_receipt_says_so(connector: LlamaCppConnector) -> None:
    found = connector.generate([5] * (connector.max_positions - 3), max_new_tokens=50, min_new_tokens=50)
    assert len(found.tokens) == 3
    assert "max_new_tokens cut to 3" in found.receipt.reasons[-1]


# --- sampling


def test_a_seed_draws_the_same_again_and_another_draws_otherwise(connector: LlamaCppConnector) -> None:
    def drawn(seed: int | None) -> tuple[int, ...]:
        found = connector.generate(FIRST, temperature=1.0, seed=seed, max_new_tokens=20, min_new_tokens=20)
        return found.tokens

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(2**63 - 1) == drawn(2**63 - 1)
    assert drawn(None) != drawn(None)


def test_top_p_near_zero_is_greedy(connector: LlamaCppConnector) -> None:
    greedy = connector.generate(FIRST, max_new_tokens=8, min_new_tokens=8)
    found = connector.generate(FIRST, max_new_tokens=8, min_new_tokens=8, temperature=1.0, top_p=1e-6, seed=1)
    assert found.tokens == greedy.tokens


def test_arguments_out_of_range_are_refused(connector: LlamaCppConnector) -> None:
    with pytest.raises(UsageError, match="temperature"):
        connector.generate(FIRST, temperature=-1)
    with pytest.raises(UsageError, match="no token id"):
        connector.generate([10**6])
    with pytest.raises(UsageError, match="cannot be projected"):
        connector.generate(FIRST, source=connector)


# --- streams


def test_a_closed_stream_ends_early_and_its_result_goes_on(connector: LlamaCppConnector) -> None:
    stream = connector.stream(FIRST, max_new_tokens=150, min_new_tokens=150)
    pieces = iter(stream)
    next(pieces)
    stream.close()
    assert len(stream.result.tokens) <= 150
    assert go(connector, stream.result.context)
    assert "".join([*stream, *stream]) in stream.result


def test_the_error_of_a_stream_reaches_its_reader(connector: LlamaCppConnector) -> None:
    stream = connector.stream([5] * 1000)
    with pytest.raises(ContextTooLong):
        list(stream)
    with pytest.raises(ContextTooLong):
        _ = stream.result


# --- prefill


def test_prefill_by_steps_ends_where_prefill_does(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    ids = [5 + i % 200 for i in range(255)]
    parts = list(model.prefill_steps(ids[:200], context=model.prefill(ids[:55])))
    assert [len(part) for part in parts] == [55, 255]
    assert parts[0].pending == tuple(ids[:200])
    assert kv(parts[-1]) == kv(model.prefill(ids[:200], context=model.prefill(ids[:55])))
    first = next(iter(model.prefill_steps(ids)))
    assert (len(first), first.pending) == (0, tuple(ids))


def test_scores_are_those_of_the_whole(connector: LlamaCppConnector) -> None:
    whole = connector.score(FIRST)
    assert np.isnan(whole[0])
    assert np.isfinite(whole[1:]).all()
    rest = connector.score(FIRST[30:], context=connector.prefill(FIRST[:30]))
    assert np.allclose(rest, whole[30:], atol=0.02)
    assert connector.score([7], context=connector.generate(FIRST, max_new_tokens=2).context).shape == (1,)


def test_a_turn_of_messages_goes_on(connector: LlamaCppConnector) -> None:
    said = connector.generate("12 apples", max_new_tokens=6, min_new_tokens=6)
    again = connector.generate("and pears", context=said.context, max_new_tokens=6, min_new_tokens=6)
    assert [turn.role for turn in again.context.turns] == ["user", "assistant", "user", "assistant"]
    assert again.receipt.tokens_reused > 0
    assert connector.tokenize("12 apples") == connector.prefill("12 apples").tokens


# --- thinking


@pytest.mark.parametrize("method", ["norm", "soft", "ridge", "noise"])
def test_thinking_adds_latent_positions_that_one_can_go_on_from(connector: LlamaCppConnector, method: str) -> None:
    thought = connector.think(FIRST, steps=3, method=method)
    assert (len(thought), thought.tokens[-3:], thought.exactness) == (58, (-1, -1, -1), Exactness.APPROXIMATE)
    assert thought.hidden is not None
    assert thought.hidden.shape == (1, 32)
    reply = connector.generate(context=thought, max_new_tokens=4, min_new_tokens=4)
    again = connector.generate(context=Context.from_bytes(thought.to_bytes()), max_new_tokens=4, min_new_tokens=4)
    assert reply.tokens == again.tokens
    assert reply.receipt.positions_computed == 4
    assert connector.score([7, 8], context=thought).shape == (2,)


def test_an_input_vector_is_the_same_as_its_token(connector: LlamaCppConnector) -> None:
    engine, memory = connector.memory.engine, connector.memory
    table = connector._stepper.tables().w_in.numpy()
    found = []
    for vector in (False, True):
        with memory.run(None, reuse=0, need=8) as run:
            engine.decode(FIRST[:4], sequence=run.number, start=0)
            if vector:
                engine.decode_vector(table[9], sequence=run.number, start=4)
            else:
                engine.decode([9], sequence=run.number, start=4)
            found.append(engine.logits().copy())
            run.length = 5
    assert np.array_equal(found[0], found[1])


def test_an_unknown_method_is_refused(connector: LlamaCppConnector) -> None:
    with pytest.raises(UsageError, match="no projection is named 'magic'"):
        connector.think(FIRST, method="magic")
    with pytest.raises(UsageError, match="steps is -1"):
        connector.think(FIRST, steps=-1)
    assert connector.think(FIRST, steps=0).exactness is Exactness.EXACT


# --- identity


def test_other_weights_are_refused_and_text_is_the_fallback(
    connector: LlamaCppConnector, tiny: Path, tmp_path: Path
) -> None:
    stranger = LlamaCppConnector.from_pretrained(changed(tiny, tmp_path / "changed.gguf"), threads=1)
    context = connector.prefill("12 apples")
    with pytest.raises(IdentityMismatch):
        stranger.generate("and pears", context=context)
    before = stranger.memory.engine.computed
    found = stranger.generate("and pears", context=context, max_new_tokens=2, accept="text")
    assert found.receipt.mode == "tokens"
    assert found.receipt.exactness is Exactness.TEXT
    assert stranger.memory.engine.computed - before == found.receipt.positions_computed


def test_a_context_without_all_of_its_kv_is_refused(connector: LlamaCppConnector) -> None:
    context = replace(Context.from_bytes(kv(connector.prefill(FIRST))), segments=())
    with pytest.raises(UsageError, match="lacks the KV from position 0 on"):
        go(connector, context)


@pytest.mark.parametrize("bad", [{"device": "tpu"}, {"dtype": "int4"}, {"sequences": 1}, {"positions": 0}])
def test_settings_out_of_range_are_refused(tiny: Path, bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Fix:"):
        LlamaCppConnector.from_pretrained(tiny, **bad)


def test_without_the_library_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['llama_cpp'] = None; import avp; avp.LlamaCppConnector"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "avp.errors.MissingExtra: connector 'llamacpp' needs llama_cpp" in done.stderr
    assert 'pip install "avp[llamacpp]"' in done.stderr


def test_the_connector_needs_no_transformers(tiny: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['torch'] = None; import avp; "
        f"c = avp.LlamaCppConnector.from_pretrained({str(tiny)!r}, threads=1); "
        "print(len(c.generate('12 apples', max_new_tokens=3, min_new_tokens=3).tokens))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


# --- memory


def test_a_fork_copies_at_most_the_page_that_it_divides(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    engine = model.memory.engine
    context = model.prefill(FIRST)
    go(model, context)
    first = model.prefill(THEN, context=context)
    assert (engine.bytes_written, engine.bytes_read) == (0, 0)  # in place: nothing came after the context
    model.prefill(THEN[::-1], context=context)
    page = (len(FIRST) % PAGE) * model.identity.layout.bytes_per_token(model.dtype)
    assert page <= engine.bytes_read < page + 2000
    assert len(first) == 70


def test_what_else_is_in_the_cache_changes_nothing(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1, sequences=8)
    expected = go(model, model.prefill(FIRST)), kv(model.prefill(FIRST))
    rng = np.random.default_rng(3)
    held: list[Context] = []
    for round_ in range(40):
        base = held[rng.integers(len(held))] if held and rng.random() < 0.6 else None
        ids = [int(token) for token in rng.integers(3, 250, rng.integers(1, 60))]
        if base is None or len(base) + len(ids) + 9 < 250:
            made = model.prefill(ids, context=base)
            held.append(made if rng.random() < 0.5 else Context.from_bytes(kv(made)))
        if len(held) > 12 or rng.random() < 0.3:
            del held[int(rng.integers(len(held)))]
        context = model.prefill(FIRST)
        assert (go(model, context), kv(context)) == expected, f"round {round_}"


def test_contexts_beyond_the_sequences_wait_in_host_memory_and_come_back(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1, sequences=3)
    contexts = [model.prefill([*FIRST, 100 + i]) for i in range(6)]
    assert model.memory.resident <= 3
    expected = [go(model, None, [*FIRST, 100 + i, *THEN]) for i in range(6)]
    assert [go(model, context) for context in contexts] == [
        go(model, Context.from_bytes(kv(context))) for context in contexts
    ]
    assert len(expected) == 6
    assert model.memory.engine.bytes_written > 0


def test_contexts_beyond_the_cells_wait_in_host_memory_and_come_back(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1, positions=512)
    contexts = [model.prefill([5 + i] * 200) for i in range(6)]
    before = [kv(context) for context in contexts]
    assert model.memory.resident < 6
    answers = [go(model, context) for context in contexts]
    assert [kv(context) for context in contexts] == before
    assert answers == [go(model, Context.from_bytes(data)) for data in before]


def test_a_context_that_nobody_holds_gives_its_sequence_back(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1, sequences=4)
    for i in range(20):
        model.generate([*FIRST, i + 5], max_new_tokens=3)
    gc.collect()
    assert model.memory.resident == 0
    assert model.memory.engine.bytes_read == 0  # nothing had to be saved


def test_a_context_outlives_its_connector(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    context = model.prefill(FIRST)
    expected = go(model, context)
    del model
    gc.collect()
    other = LlamaCppConnector.from_pretrained(tiny, threads=1)
    assert go(other, context) == expected


def test_the_same_segments_in_another_context_are_not_copied(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    context = model.prefill(FIRST)
    salted = replace(context, segments=with_salt(model.identity, context.segments, b"a tenant"))
    assert go(model, salted) == go(model, context[:55])
    assert (model.memory.engine.bytes_written, model.memory.engine.bytes_read) == (0, 0)
    whole = model.memory.engine.bytes_written
    assert go(model, context[:40]) == go(model, model.prefill(FIRST[:40]))
    assert model.memory.engine.bytes_written > whole  # a context that is cut is written anew


def test_a_run_that_fails_leaves_the_others_as_they_were(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    context = model.prefill(FIRST)
    expected = go(model, context)
    thought = model.think(FIRST, steps=2)
    blind = Context.from_bytes(model.think(FIRST, steps=2).to_bytes())
    object.__setattr__(blind, "hidden", None)
    with pytest.raises(UsageError, match="latent position whose input vector"):
        model.generate(context=blind, max_new_tokens=2)
    assert go(model, context) == expected
    assert model.generate(context=thought, max_new_tokens=2, min_new_tokens=2)


def test_bytes_can_be_read_while_another_thread_generates(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    context = model.prefill(FIRST)
    expected = kv(Context.from_bytes(kv(model.prefill(FIRST))))
    done: list[tuple[int, ...]] = []
    thread = threading.Thread(target=lambda: done.append(go(model, context)))
    thread.start()
    found = kv(context)
    thread.join()
    assert found == expected
    assert len(done[0]) == 8


def test_bytes_can_be_read_while_a_run_lasts(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1)
    context, found = model.prefill(FIRST), []
    with model.memory.run(None, reuse=0, need=8) as run:
        model.memory.engine.decode([5, 6], sequence=run.number, start=0)
        run.length = 2
        thread = threading.Thread(target=lambda: found.append(kv(context)))
        thread.start()
        thread.join(60)
        assert found, "the reader waited for the run"
    assert found == [kv(model.prefill(FIRST))]


def test_a_float32_cache_keeps_float32(tiny: Path) -> None:
    model = LlamaCppConnector.from_pretrained(tiny, threads=1, dtype="float32")
    context = model.prefill(FIRST)
    assert (model.dtype, context.segments[0].dtype, context.exactness) == ("float32", "float32", Exactness.EXACT)
    assert go(model, Context.from_bytes(kv(context))) == go(model, context)
    half = LlamaCppConnector.from_pretrained(tiny, threads=1)
    other = half.generate(THEN, context=context, max_new_tokens=2)
    assert (other.receipt.mode, other.receipt.exactness) == ("kv", Exactness.BOUNDED)
