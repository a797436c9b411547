"""Handle: names a context that an agent keeps; whoever has it may go on from it there, or fetch it."""

from __future__ import annotations

from dataclasses import dataclass, field

from avp.receipt import Generation, Receipt
from avp.segment import Exactness


@dataclass(frozen=True, slots=True)
class Handle:
    """`str(handle)` is its id, which is a secret of the tenant; `url` is where it is kept."""

    id: str = field(repr=False)
    url: str
    length: int  # positions whose KV is there
    exactness: Exactness
    ttl: float  # seconds it lives after its last use
    receipt: Receipt | None = None  # of the hand-over that made it

    def __str__(self) -> str:
        return self.id

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True


class RemoteGeneration(Generation):
    """A generation that another agent made: its `context` is a handle, since the state is there."""

    __slots__ = ()

    context: Handle  # type: ignore[assignment]  # what is kept there stands for what would be kept here

    @property
    def handle(self) -> Handle:
        """The same as `context`."""
        return self.context
