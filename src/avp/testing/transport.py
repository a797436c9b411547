"""The laws of a transport, as tests that any transport inherits.

```python
class TestMine(TransportConformance):
    def transport(self): return TRANSPORT
    def address(self, tmp_path): return "mine://127.0.0.1:0"
```
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import MappingProxyType

from avp import errors
from avp.blob import Blob
from avp.context import text_context
from avp.errors import AccessDenied, AVPError, Busy, ConnectionFailed, LimitExceeded, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Event, Item, Listener, Meter, Transport
from avp.security import Security, Tenant
from avp.testing.echo import EchoEndpoint, as_bytes, ask, ask_with, blobs_of, failure, large_blob, sending
from avp.testing.synthetic import synthetic_context

_PATIENCE = 30.0  # seconds that a law may take; a call that hangs breaks it
_EVENTS: Sequence[Event] = ({}, {"text": 'żółw 亀 🐢 "\\\n\0'}, {"a": {"b": [1, -2.5, None, True, {"c": []}]}, "": ""})


class TransportConformance:
    """Subclass it and say what to test; every `test_…` is a law."""

    moves_bytes = True  # all that is sent goes through a socket and is counted
    lead = 24  # blobs of 1 MiB that may be under way to a reader that is slow

    def transport(self) -> Transport:
        """The transport under test."""
        raise NotImplementedError

    def address(self, tmp_path: Path) -> str:
        """Where to listen."""
        raise NotImplementedError

    def security(self) -> tuple[Security, Security]:
        """What the server and the client bring, apart from tokens."""
        return Security(), Security()

    @asynccontextmanager
    async def open(
        self,
        tmp_path: Path,
        *,
        tokens: dict[str, Tenant] | None = None,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> AsyncIterator[tuple[EchoEndpoint, Channel, Listener]]:
        """An endpoint that is being served, and a channel to it."""
        server, client = self.security()
        server = replace(server, tokens=MappingProxyType(tokens or {}))
        endpoint = EchoEndpoint(security=server, limits=limits)
        listener = await self.transport().serve(endpoint, self.address(tmp_path), security=server)
        channel = self.transport().connect(listener.url, security=replace(client, token=token))
        try:
            yield endpoint, channel, listener
        finally:
            await channel.close()
            await listener.close()

    def run(self, scenario: Coroutine[object, object, None]) -> None:
        """Carry out a law in a loop of its own, in bounded time."""

        async def bounded() -> None:
            async with asyncio.timeout(_PATIENCE):
                await scenario

        asyncio.run(bounded())

    def test_items_come_back_as_they_were_sent(self, tmp_path: Path) -> None:
        async def law() -> None:
            small, tall = synthetic_context(tokens=300), synthetic_context(tokens=40, dtype="float32", layers=5)
            contexts = [text_context("héllo"), small[:0], replace(tall, segments=(), length=0, turns=())]
            items: list[Item] = [*_EVENTS, *blobs_of(small), *contexts, *blobs_of(tall), {"last": 1}]
            async with self.open(tmp_path) as (_, channel, _):
                back = await ask(channel, "echo", *items)
            assert [type(item) for item in back] == [dict if isinstance(i, dict) else type(i) for i in items]
            assert [as_bytes(item) for item in back] == [as_bytes(item) for item in items]
            assert all(item.verify() for item in back if isinstance(item, Blob))

        self.run(law())

    def test_a_call_may_carry_nothing_both_ways(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (_, channel, _):
                assert await ask(channel, "echo") == []
                assert await ask(channel, "count") == [{"items": 0, "blobs": 0, "bytes": 0}]

        self.run(law())

    def test_many_blobs_go_both_ways_in_order(self, tmp_path: Path) -> None:
        async def law() -> None:
            blobs = blobs_of(synthetic_context(layers=4, kv_heads=4, tokens=2000, head_dim=64))
            async with self.open(tmp_path) as (_, channel, _):
                back = await ask(channel, "echo", *blobs, *blobs)
                total = 2 * sum(blob.nbytes for blob in blobs)
                assert await ask(channel, "count", *blobs, *blobs) == [{"items": 16, "blobs": 16, "bytes": total}]
            assert [as_bytes(item) for item in back] == 2 * [as_bytes(blob) for blob in blobs]

        self.run(law())

    def test_every_error_arrives_as_what_it_was(self, tmp_path: Path) -> None:
        async def law() -> None:
            kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AVPError)]
            async with self.open(tmp_path) as (_, channel, _):
                for kind in kinds:
                    event = {"type": kind.__name__, "message": f"{kind.__name__} ż. Fix: none.", "retry_after": 2.5}
                    error = await failure(ask(channel, "fail", event))
                    assert (type(error), str(error)) == (kind, event["message"])
                    assert not isinstance(error, Busy) or error.retry_after == 2.5

        self.run(law())

    def test_an_error_late_in_an_answer_comes_after_the_items_before_it(self, tmp_path: Path) -> None:
        async def law() -> None:
            got: list[Item] = []

            async def read(channel: Channel) -> None:
                items = sending({"n": 1}, {"n": 2}, {"type": "SegmentMissing", "message": "gone"}, {"n": 3})
                async with channel.call("fail-late", items, meter=Meter()) as answer:
                    async for item in answer:
                        got.append(item)

            async with self.open(tmp_path) as (_, channel, _):
                error = await failure(read(channel))
            assert (type(error), str(error), got) == (errors.SegmentMissing, "gone", [{"n": 1}, {"n": 2}])

        self.run(law())

    def test_an_error_of_the_callers_own_items_ends_the_call(self, tmp_path: Path) -> None:
        async def broken() -> AsyncIterator[Item]:
            yield {"n": 1}
            raise errors.HandleExpired("the handle is gone. Fix: none.")

        async def law() -> None:
            async with self.open(tmp_path) as (_, channel, _):
                error = await failure(ask_with(channel, "count", broken()))
                assert (type(error), str(error)) == (errors.HandleExpired, "the handle is gone. Fix: none.")
                assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]

        self.run(law())

    def test_a_fault_of_the_endpoint_arrives_without_its_text(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (_, channel, _):
                error = await failure(ask(channel, "crash", {"text": "a private prompt"}))
                assert isinstance(error, ConnectionFailed)
                assert "private" not in str(error)
                assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]

        self.run(law())

    def test_a_verb_that_the_endpoint_does_not_know_is_its_own_error(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (_, channel, _):
                error = await failure(ask(channel, "dance"))
                assert (type(error), str(error)) == (UsageError, "there is no verb 'dance'. Fix: use echo.")

        self.run(law())

    def test_a_caller_that_leaves_early_ends_the_call_at_the_far_end(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (endpoint, channel, _):
                async with channel.call("blobs", sending({"n": 10**6}), meter=Meter()) as answer:
                    assert isinstance(await anext(answer), Blob)
                assert await asyncio.to_thread(endpoint.left.wait, 10)
                assert endpoint.given < 200
                assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]

        self.run(law())

    def test_a_timeout_around_a_call_ends_it_at_both_ends(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (endpoint, channel, _):
                ended: type[BaseException] | None = None
                try:
                    async with asyncio.timeout(0.3):
                        await ask(channel, "hang")
                except TimeoutError as error:
                    ended = type(error)
                assert ended is TimeoutError
                assert endpoint.started.is_set()
                assert await asyncio.to_thread(endpoint.left.wait, 10)

        self.run(law())

    def test_calls_run_side_by_side(self, tmp_path: Path) -> None:
        async def law() -> None:
            blobs = [blobs_of(synthetic_context(tokens=64, seed=n))[0] for n in range(16)]
            async with self.open(tmp_path) as (_, channel, _):
                answers = await asyncio.gather(*(ask(channel, "echo", {"n": n}, blobs[n]) for n in range(16)))
            for number, answer in enumerate(answers):
                assert [as_bytes(item) for item in answer] == [as_bytes({"n": number}), as_bytes(blobs[number])]

        self.run(law())

    def test_an_endpoint_that_reads_slowly_slows_the_caller(self, tmp_path: Path) -> None:
        async def law() -> None:
            blob, leads = large_blob(), [0]

            async def many(endpoint: EchoEndpoint) -> AsyncIterator[Item]:
                for number in range(60):
                    leads.append(number - endpoint.taken)
                    yield blob

            async with self.open(tmp_path) as (endpoint, channel, _):
                answer = await ask_with(channel, "slow", many(endpoint))
            assert answer == [{"taken": 60}]
            assert max(leads) <= self.lead, f"{max(leads)} blobs of 1 MiB were under way"

        self.run(law())

    def test_a_caller_that_reads_slowly_slows_the_endpoint(self, tmp_path: Path) -> None:
        async def law() -> None:
            leads: list[int] = []
            async with (
                self.open(tmp_path) as (endpoint, channel, _),
                channel.call("blobs", sending({"n": 60}), meter=Meter()) as answer,
            ):
                async for _ in answer:
                    await asyncio.sleep(0.01)
                    leads.append(endpoint.given - len(leads))
            assert len(leads) == 60
            assert max(leads) <= self.lead, f"{max(leads)} blobs of 1 MiB were under way"

        self.run(law())

    def test_a_token_says_whose_call_it_is(self, tmp_path: Path) -> None:
        async def law() -> None:
            tokens = {"one": Tenant.named("a"), "two": Tenant.named("b")}
            async with self.open(tmp_path, tokens=tokens, token="two") as (_, channel, _):
                answer = (await ask(channel, "who"))[0]
                assert isinstance(answer, dict)
                assert answer["tenant"] == "b"
                assert answer["address"]

        self.run(law())

    def test_a_wrong_token_or_none_is_denied_before_the_endpoint_is_asked(self, tmp_path: Path) -> None:
        async def law() -> None:
            for token in ("three", "", None):
                async with self.open(tmp_path, tokens={"one": Tenant.named("a")}, token=token) as (
                    endpoint,
                    channel,
                    _,
                ):
                    assert isinstance(await failure(ask(channel, "who", large_blob(), large_blob())), AccessDenied)
                    assert not endpoint.started.is_set()

        self.run(law())

    def test_what_exceeds_the_endpoints_limits_is_refused_and_the_server_lives(self, tmp_path: Path) -> None:
        async def law() -> None:
            limits = Limits(header=2**15, bytes=2**17)
            async with self.open(tmp_path, limits=limits) as (_, channel, _):
                for item in ({"text": "x" * 2**16}, large_blob()):
                    assert isinstance(await failure(ask(channel, "count", item, item)), LimitExceeded)
                    assert await ask(channel, "echo", {"n": 2}) == [{"n": 2}]

        self.run(law())

    def test_where_nobody_listens_a_call_fails_at_once(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (_, channel, listener):
                assert await ask(channel, "echo", {"n": 1}) == [{"n": 1}]
                await listener.close()
                began = monotonic()
                assert isinstance(await failure(ask(channel, "echo", {"n": 1})), ConnectionFailed)
                assert monotonic() - began < 5

        self.run(law())

    def test_closing_a_listener_ends_the_calls_under_way(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (endpoint, channel, listener):
                call = asyncio.create_task(failure(ask(channel, "hang")))
                assert await asyncio.to_thread(endpoint.started.wait, 10)
                await listener.close()
                assert isinstance(await call, ConnectionFailed)
                assert await asyncio.to_thread(endpoint.left.wait, 10)

        self.run(law())

    def test_a_call_under_way_may_end_while_the_listener_closes(self, tmp_path: Path) -> None:
        async def law() -> None:
            async with self.open(tmp_path) as (endpoint, channel, listener):
                call = asyncio.create_task(ask(channel, "slow", *({"n": n} for n in range(5))))
                assert await asyncio.to_thread(endpoint.started.wait, 10)
                await listener.close()
                assert await call == [{"taken": 5}]

        self.run(law())

    def test_a_server_may_run_in_another_thread(self, tmp_path: Path) -> None:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        endpoint, (server, client) = EchoEndpoint(), self.security()
        serving = self.transport().serve(endpoint, self.address(tmp_path), security=server)
        listener = asyncio.run_coroutine_threadsafe(serving, loop).result(10)

        async def law() -> None:
            channel = self.transport().connect(listener.url, security=client)
            answers = await asyncio.gather(*(ask(channel, "echo", {"n": n}, large_blob()) for n in range(4)))
            assert [answer[0] for answer in answers] == [{"n": n} for n in range(4)]
            async with channel.call("hang", sending(), meter=Meter()):
                assert await asyncio.to_thread(endpoint.started.wait, 10)
            assert await asyncio.to_thread(endpoint.left.wait, 10)
            await channel.close()

        try:
            self.run(law())
        finally:
            asyncio.run_coroutine_threadsafe(listener.close(), loop).result(10)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def test_the_meter_counts_what_goes_through_the_socket(self, tmp_path: Path) -> None:
        async def law() -> None:
            blobs, meter = [large_blob() for _ in range(4)], Meter()
            payload = sum(len(as_bytes(blob)) for blob in blobs)
            async with self.open(tmp_path) as (_, channel, _):
                await ask(channel, "echo", *blobs, meter=meter)
            for counted in (meter.sent, meter.received):
                if self.moves_bytes:
                    assert payload < counted <= payload * 1.01 + 4096
                else:
                    assert counted < payload / 10

        self.run(law())
