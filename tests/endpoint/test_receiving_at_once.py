"""Segments that come are verified and stored two at a time: neither one after the other, nor all at once."""

from __future__ import annotations

import threading

from avp.agent import Agent
from avp.blob import Blob
from avp.stores.memory import MemoryStore
from avp.testing.synthetic import synthetic_context

SEGMENTS = 6


class MeetingStore(MemoryStore):
    """Each `put` waits for a second one to come beside it, and notes how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._inside = 0
        self._count = threading.Lock()
        self._meeting = threading.Barrier(2)

    def put(self, blob: Blob, *, tenant: str) -> None:
        with self._count:
            self._inside += 1
            self.most = max(self.most, self._inside)
        self._meeting.wait(timeout=30)
        super().put(blob, tenant=tenant)
        with self._count:
            self._inside -= 1


def test_two_segments_are_stored_side_by_side() -> None:
    store = MeetingStore()
    context = synthetic_context(tokens=256 * SEGMENTS)
    with Agent(None, name="near") as near, Agent(None, name="far", store=store) as far:
        handle = near.hand_over(context, to=far)
        assert handle.length == len(context)
        assert len(list(store.entries())) == SEGMENTS
    assert store.most == 2
