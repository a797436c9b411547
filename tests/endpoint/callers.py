"""A caller who knows the verbs, and says what it likes with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from avp.agent import Agent
from avp.blob import Blob, seal
from avp.context import Context
from avp.delta import outline, outline_to_items, pieces, ranges_from_json
from avp.direct import DirectChannel
from avp.greeting import hello_to_json
from avp.handshake import Hello
from avp.protocols import Event, Item, Meter
from avp.security import Caller, Tenant

ANNA, BERT = Tenant.named("anna"), Tenant.named("bert")


async def ask(agent: Agent, verb: str, *items: Item, caller: Caller | None = None) -> list[Item]:
    async def sent() -> AsyncIterator[Item]:
        for item in items:
            yield item

    channel = DirectChannel(agent.endpoint, caller=caller)
    async with channel.call(verb, sent(), meter=Meter()) as answer:
        return [item async for item in answer]


async def event_of(agent: Agent, verb: str, *items: Item, caller: Caller | None = None) -> Event:
    (event,) = await ask(agent, verb, *items, caller=caller)
    assert isinstance(event, Mapping)
    return event


def hello_of(context: Context, **changes: object) -> Hello:
    return replace(Hello("one", context.model, "transformers", "float32"), **changes)  # type: ignore[arg-type]


async def shake(agent: Agent, hello: Hello, caller: Caller | None = None) -> Event:
    return await event_of(agent, "hello", {"hello": hello_to_json(hello)}, caller=caller)


async def announce(agent: Agent, context: Context, *, caller: Caller | None = None) -> tuple[Event, list[Blob]]:
    """What `have` answers, and the blobs that it asks for."""
    event = await shake(agent, hello_of(context), caller)
    told, segments = outline(context, "kv", salt=bytes.fromhex(str(event["salt"])))
    about, skeleton = outline_to_items(told)
    reply = await event_of(agent, "have", {**about, "session": event["session"]}, skeleton, caller=caller)
    assert context.model is not None
    due = ranges_from_json(reply["missing"], len(told.pages))
    return reply, [seal(context.model, piece) for piece in pieces(segments, due)]
