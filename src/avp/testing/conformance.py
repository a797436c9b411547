"""The laws of a connector (DESIGN, section 5), as tests that any engine's connector inherits.

```python
class TestMine(ConnectorConformance):
    def connector(self): return MyConnector(...)       # built once, or each time
    def stranger(self): return MyConnector(...)        # other weights of the same shape
    def engine(self): return MyReference(...)          # the engine's own cache, without AVP
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from avp.context import Context
from avp.errors import ContextTooLong, IdentityMismatch
from avp.protocols import Connector, Prompt
from avp.receipt import Generation


class Continuing(Connector, Protocol):
    """A connector with all that the laws use: `Connector` is what an endpoint needs of it."""

    def generate(
        self,
        prompt: Prompt = "",
        *,
        context: Context | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        accept: str = "exact",
    ) -> Generation:
        """As `Connector`; no end of a turn before `min_new_tokens`."""
        ...

    def score(self, ids: Sequence[int], *, context: Context | None = None) -> Iterable[float]:
        """Log-probability of each id."""
        ...


class Engine(Protocol):
    """One sequence in the engine's own cache, without AVP."""

    def run(self, ids: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        """Add `ids` to the sequence and decode greedily, never ending early; the new ids stay in the sequence."""
        ...


class ConnectorConformance:
    """Subclass it and say what to test; every `test_…` is a law."""

    first: Sequence[int] = tuple(range(5, 60))
    then: Sequence[int] = tuple(range(70, 85))
    new_tokens = 12

    def connector(self) -> Continuing:
        """The connector under test."""
        raise NotImplementedError

    def stranger(self) -> Continuing:
        """A connector of other weights in the same shapes."""
        raise NotImplementedError

    def engine(self) -> Engine:
        """The engine alone, over the same weights."""
        raise NotImplementedError

    def go(self, connector: Continuing, context: Context, ids: Sequence[int] | None = None) -> tuple[int, ...]:
        """Greedy tokens after `ids`, exactly `new_tokens` of them."""
        found = connector.generate(
            list(self.then if ids is None else ids),
            context=context,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
        )
        return found.tokens

    def test_a_context_survives_three_generations(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        before = context.to_bytes()
        runs = [self.go(connector, context) for _ in range(3)]
        assert runs[0] == runs[1] == runs[2]
        assert context.to_bytes() == before

    def test_two_forks_do_not_see_each_other(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        one = connector.prefill(list(self.then), context=context)
        other = connector.prefill(list(reversed(self.then)), context=context)
        expected = [connector.prefill([*self.first, *tail]).tokens for tail in (self.then, tuple(reversed(self.then)))]
        assert [one.tokens, other.tokens] == expected
        assert self.go(connector, one) == self.go(connector, one)
        alone = connector.prefill(list(self.then), context=connector.prefill(list(self.first)))
        assert self.go(connector, one) == self.go(connector, alone)
        assert one.to_bytes() == alone.to_bytes()

    def test_threads_may_generate_from_one_context(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        expected = [self.go(connector, context, self.then[i:]) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: self.go(connector, context, self.then[i:]), range(4)))
        assert found == expected

    def test_a_context_is_the_same_after_the_wire(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        received = Context.from_bytes(context.to_bytes())
        assert received.tokens == context.tokens
        assert self.go(connector, received) == self.go(connector, context)

    def test_a_continuation_equals_the_engines_own(self) -> None:
        connector, engine = self.connector(), self.engine()
        engine.run(self.first, 0)
        assert self.go(connector, connector.prefill(list(self.first))) == engine.run(self.then, self.new_tokens)

    def test_a_chain_with_hand_overs_equals_the_engines_own_conversation(self) -> None:
        connector, engine = self.connector(), self.engine()
        context = connector.prefill(list(self.first))
        engine.run(self.first, 0)
        for hop in range(4):
            ids = list(self.then[hop:])
            received = Context.from_bytes(context.to_bytes())
            found = connector.generate(
                ids, context=received, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
            )
            assert found.tokens == engine.run(ids, self.new_tokens), f"hop {hop}"
            context = found.context

    def test_other_weights_are_refused(self) -> None:
        context = self.connector().prefill(list(self.first))
        stranger = self.stranger()
        for call in (stranger.prefill, stranger.generate, stranger.think, stranger.score):
            assert _raised(lambda call=call: call(list(self.then), context=context)) is IdentityMismatch  # type: ignore[misc]

    def test_a_continuation_computes_only_what_is_new(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        found = connector.generate(
            list(self.then), context=context, max_new_tokens=self.new_tokens, min_new_tokens=self.new_tokens
        )
        assert found.receipt.positions_computed == len(self.then) + self.new_tokens - 1
        assert found.receipt.tokens_reused == len(context) == len(self.first)
        assert len(found.context) == len(self.first) + len(self.then) + self.new_tokens - 1
        again = connector.generate(list(self.then), context=found.context, max_new_tokens=2, min_new_tokens=2)
        assert again.receipt.positions_computed == 1 + len(self.then) + 1

    def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        too_long = [5] * connector.max_positions
        assert _raised(lambda: connector.generate(too_long, context=context)) is ContextTooLong
        assert _raised(lambda: connector.prefill(too_long, context=context)) is ContextTooLong

    def test_a_cut_context_continues_as_a_shorter_one(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        assert self.go(connector, context[:40]) == self.go(connector, connector.prefill(list(self.first[:40])))

    def test_a_stream_is_its_result(self) -> None:
        connector = self.connector()
        context = connector.prefill(list(self.first))
        stream = connector.stream(list(self.then), context=context, max_new_tokens=self.new_tokens)
        pieces = list(stream)
        assert "".join(pieces) == stream.result
        assert (
            stream.result.tokens
            == connector.generate(list(self.then), context=context, max_new_tokens=self.new_tokens).tokens
        )


def _raised(call: Callable[[], object]) -> type[BaseException] | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the type is what the law is about
        return type(error)
    return None
