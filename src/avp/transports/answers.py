"""What both ends of every transport do with errors."""

from __future__ import annotations

import logging
import traceback
from asyncio import Task
from collections.abc import AsyncGenerator, AsyncIterator

from avp.errors import AVPError, ConnectionFailed
from avp.protocols import Endpoint, Item
from avp.security import Caller

log = logging.getLogger("avp")


async def answers(
    endpoint: Endpoint, verb: str, items: AsyncIterator[Item], *, caller: Caller
) -> AsyncGenerator[Item, None]:
    """What the endpoint answers; it is closed however this ends.

    Raises:
        AVPError: what the endpoint raised. ConnectionFailed: a fault of its own; the log has where, and never the
        message, which may quote a prompt.
    """
    answer = endpoint.answer(verb, items, caller=caller)
    try:
        async for item in answer:
            yield item
    except AVPError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the server lives on
        place = "".join(traceback.format_tb(error.__traceback__))
        log.error("the endpoint failed at %.40r with %s\n%s", verb, type(error).__name__, place)
        raise ConnectionFailed(
            "the other end failed at this call by a fault of its own. Fix: look at its log."
        ) from None
    finally:
        if isinstance(answer, AsyncGenerator):
            await answer.aclose()


async def read_answer(answer: AsyncIterator[Item], *, sender: Task[None]) -> AsyncIterator[Item]:
    """The answer to a call; where it ends because making the caller's own items failed, it ends with that failure."""
    try:
        async for item in answer:
            yield item
    except AVPError as error:
        own = sender.exception() if sender.done() and not sender.cancelled() else None
        if own is not None:
            raise own from error
        raise
