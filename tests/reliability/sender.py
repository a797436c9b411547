"""A process that hands `payload(SEED)` over and says what became of it: `python sender.py URL SEED [AFTER PID]`.

Without more it waits to be killed. After AFTER segments it kills the process PID, or, where that is 0, itself.
"""

import os
import signal
import sys

from payloads import payload

from avp.blob import Blob
from avp.errors import AVPError
from avp.network import connect
from avp.remote import Own
from avp.stores.memory import MemoryStore


class Trap(MemoryStore):
    """A store that kills somebody when it is given the segment of that number."""

    def __init__(self, after: int, pid: int) -> None:
        super().__init__()
        self._after, self._pid = after, pid

    def put(self, blob: Blob, *, tenant: str) -> None:
        """See `Store.put`."""
        if self._after == 0:
            os.kill(self._pid or os.getpid(), signal.SIGKILL)
        self._after -= 1
        super().put(blob, tenant=tenant)


def main(url: str, seed: int, after: int = -1, pid: int = 0) -> None:
    with connect(url, own=Own(store=Trap(after, pid))) as remote:
        try:
            print(remote.hand_over(payload(seed), timeout=60))
        except AVPError as error:
            print(type(error).__name__)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
