"""A plain socket copy, the ceiling: `sendall` here, `recv_into` fresh memory in another process, then one byte back.

Fresh memory is what numpy gives (huge pages, where the system grants them; what AVP receives into), or what the
allocator gives a `bytes` of that size (pages of 4 KiB).
"""

from __future__ import annotations

import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from time import perf_counter

import numpy as np

from avp.bench.net_far import answer_calls, running
from avp.bench.perf_figure import Clock

_HEAD = struct.Struct("<cQ")
MEMORIES = {"huge": b"h", "pages": b"p"}


class Copies:
    """The near end; made by `copying`."""

    def __init__(self, path: str, port: int) -> None:
        self._path, self._port = path, port

    def clock(self, kind: str, memory: str, runs: Sequence[bytes | memoryview]) -> Clock:
        """A clock of one copy over "unix" or "tcp" into memory of a kind; connecting counts, as it does for AVP."""
        count = sum(map(len, runs))

        def once() -> float:
            started = perf_counter()
            with self._connect(kind) as connected:
                connected.sendall(_HEAD.pack(MEMORIES[memory], count))
                for run in runs:
                    connected.sendall(run)
                if connected.recv(1) != b"k":
                    raise ConnectionError("the plain copy broke off")
                return perf_counter() - started

        return once

    def _connect(self, kind: str) -> socket.socket:
        if kind == "tcp":
            return socket.create_connection(("127.0.0.1", self._port))
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(self._path)
        return connected


@contextmanager
def copying() -> Iterator[Copies]:
    """The process that receives.

    Raises:
        FarFailed: it did not come up.
    """
    with tempfile.TemporaryDirectory(prefix="avp-net-") as folder:
        path = str(Path(folder) / "copy.sock")
        with running([sys.executable, "-m", "avp.bench.net_copy", path]) as far:
            yield Copies(path, int(str(far.ready["port"])))


def _receive_all(listening: socket.socket) -> None:
    while True:
        connected, _ = listening.accept()
        with connected:
            kind, count = _HEAD.unpack(connected.recv(_HEAD.size, socket.MSG_WAITALL))
            memory = np.empty(count, np.uint8) if kind == b"h" else mmap(-1, count)
            rest = memoryview(memory)  # type: ignore[arg-type]  # any buffer
            while rest:
                rest = rest[connected.recv_into(rest) :]
            connected.sendall(b"k")


def _main(path: str) -> None:
    near, far = socket.socket(socket.AF_UNIX), socket.create_server(("127.0.0.1", 0))
    near.bind(path)
    near.listen()
    for listening in (near, far):
        threading.Thread(target=_receive_all, args=(listening,), daemon=True).start()
    answer_calls({"port": far.getsockname()[1]}, {})


if __name__ == "__main__":
    _main(sys.argv[1])
