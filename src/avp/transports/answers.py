"""What both ends of every transport do with errors."""

from __future__ import annotations

import logging
import traceback
from asyncio import Task
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from avp.direct import ended
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
    try:
        async with ended(endpoint.answer(verb, items, caller=caller)) as answer:
            async for item in answer:
                yield item
    except AVPError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the server lives on
        raise fault(verb, error) from None


def fault(verb: str, error: Exception) -> ConnectionFailed:
    """What the caller of a verb is told of a fault of ours; the log has where."""
    frames = traceback.extract_tb(error.__traceback__)[-5:]
    place = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    log.error("%.40s failed: %s at %s", ascii(verb)[1:-1], type(error).__name__, place)
    return ConnectionFailed("the other end failed at this call by a fault of its own. Fix: look at its log.")


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
