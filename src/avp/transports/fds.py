"""Frames of `unix:`: those of `avp.wire`, and three of its own for KV that is passed as a file descriptor.

`M`, five numbers, and a bundle's header: a blob that lies in a shared arena. The first number is that of the arena's
file; its descriptor comes with the first frame that says it. `F`: a bundle that is the whole of a sealed file, whose
descriptor comes with it. `A`: `WINDOW // 2` more items were taken. A descriptor comes with the first byte of its frame.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import struct
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from mmap import MAP_PRIVATE, PROT_READ, mmap
from typing import Final, Literal, TypeAlias

from avp.blob import Blob, open_bundle, open_shared
from avp.buffers import IOV_MAX, drop, write_runs
from avp.bundle import peek
from avp.context import Context
from avp.errors import AccessDenied, BundleError, Busy, ConnectionFailed, LimitExceeded, TruncatedBundle
from avp.identity import CacheLayout
from avp.manifest import Limits
from avp.protocols import Item
from avp.shared import MemoryFile, SharedTensors
from avp.wire import Decoder, encode_item

if sys.platform == "linux":
    from fcntl import F_ADD_SEALS, F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, fcntl

WINDOW = 8  # items on the way that the reader has not taken
INLINE = 1 << 16  # bundles of fewer bytes go through the socket
FILES = 64  # shared files that one end may show in a call
REQUEST = Limits(header=1 << 16)  # of the first frame, before it is known who calls
ANCILLARY = 4  # descriptors that are taken from the socket at once; one comes with each frame
_SHARED, _FILE, _TAKEN = b"M", b"F", b"A"
_OURS = (_SHARED, _FILE, _TAKEN) if sys.platform == "linux" else (_TAKEN,)  # elsewhere no file can be sealed
_NUMBERS = struct.Struct("<IIQQQ")  # file number, bytes of the header, capacity, start, stop


class Signal(Enum):
    """What a frame says that carries no item."""

    TAKEN = "the other end took WINDOW // 2 more items"


TAKEN: Final = Signal.TAKEN
Got: TypeAlias = Item | Literal[Signal.TAKEN]


@dataclass(slots=True)
class Packet:
    """A frame to be written; owns its descriptor."""

    runs: deque[memoryview]
    fd: int | None = None

    def close(self) -> None:
        """Let go of the descriptor."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def packet(*runs: bytes | memoryview, fd: int | None = None) -> Packet:
    """A frame of these bytes."""
    return Packet(deque(memoryview(run).cast("B") for run in runs if len(run)), fd)


def taken() -> Packet:
    """The frame that lets the other end send on."""
    return packet(_TAKEN)


def peer_is_us(connected: socket.socket) -> bool:
    """Whether the other end of a unix socket runs as our own user."""
    if sys.platform != "linux":
        return False
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())


@dataclass(slots=True)
class Outbox:
    """Items of one direction of a call, as frames."""

    trusted: bool  # the other end is our own user: it may have a descriptor of memory that we write on
    files: dict[MemoryFile, int] = field(default_factory=dict)

    def copies(self, item: Item) -> bool:
        """Whether `pack` copies so much that a thread should do it."""
        if isinstance(item, Blob):
            return item.nbytes >= INLINE and not self._may_refer(item)
        return isinstance(item, Context) and bool(item.segments or item.hidden)

    def pack(self, item: Item) -> Packet:
        """The frame of an item: KV in shared memory as a reference, other large bundles copied into a sealed file.

        Raises:
            Busy: this process has no memory, or no descriptor, left.
        """
        if isinstance(item, Blob) and isinstance(item.segment.tensors, SharedTensors) and self._may_refer(item):
            return self._reference(item.header, item.segment.tensors)
        runs = list(encode_item(item))
        small = not isinstance(item, Blob | Context) or sum(map(len, runs)) < INLINE
        if small or sys.platform != "linux":
            return packet(*runs)
        with _making():
            return packet(_FILE, fd=_sealed(_without_tag(runs)))

    def _may_refer(self, blob: Blob) -> bool:
        tensors = blob.segment.tensors
        if not self.trusted or not isinstance(tensors, SharedTensors) or blob.entry.codec != "raw":
            return False
        known = tensors.file in self.files or len(self.files) < FILES
        return known and _seals(tensors.file.fd) & F_SEAL_SHRINK != 0

    def _reference(self, header: memoryview, tensors: SharedTensors) -> Packet:
        new = tensors.file not in self.files
        number = self.files.setdefault(tensors.file, len(self.files))
        numbers = _NUMBERS.pack(number, len(header), tensors.capacity, tensors.start, tensors.stop)
        with _making():
            fd = os.open(f"/proc/self/fd/{tensors.file.fd}", os.O_RDONLY | os.O_CLOEXEC) if new else None
        return packet(_SHARED + numbers, header, fd=fd)


@contextmanager
def _making() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Busy(
            f"no file in memory can be made to pass KV in: {error.strerror}. Fix: let go of contexts that are no "
            "longer used, or raise `ulimit -n`, and try again."
        ) from error


def _without_tag(runs: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    first = memoryview(runs[0])[1:]
    return [run for run in (first, *runs[1:]) if len(run)]


def _sealed(runs: Sequence[bytes | memoryview]) -> int:
    """A new file in RAM with these bytes, which nobody can change again; the only copy on the way."""
    fd = os.memfd_create("avp-bundle", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_runs(fd, runs)
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seals(fd: int) -> int:
    """The seals of a file in RAM; none of what cannot be sealed."""
    try:
        return fcntl(fd, F_GET_SEALS)
    except OSError:
        return 0


def send(connected: socket.socket, going: Packet) -> int:
    """Write of a frame what the socket takes now; the bytes written, of which the frame is rid.

    Raises:
        BlockingIOError: it takes nothing. OSError: the connection broke.
    """
    runs = list(islice(going.runs, IOV_MAX))
    if going.fd is None:
        count = connected.sendmsg(runs)
    else:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [going.fd]))
        count = connected.sendmsg(runs, [rights])
        going.close()
    drop(going.runs, count)
    return count


def receive(connected: socket.socket, buffer: memoryview) -> tuple[int, list[int]]:
    """Bytes that came, and the descriptors with them, which are the caller's to close.

    Raises:
        BlockingIOError: nothing is there yet. OSError: the connection broke.
        ConnectionFailed: more descriptors came than may, or than this process can hold.
    """
    if sys.platform != "linux":
        return connected.recv_into(buffer), []
    room = socket.CMSG_SPACE(ANCILLARY * array.array("i").itemsize)
    count, ancillary, flags, _ = connected.recvmsg_into([buffer], room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise ConnectionFailed(
            "file descriptors that came with KV could not all be taken: this process has too many open files, or the "
            "other end sent more than one with a frame. Fix: raise `ulimit -n`, or let go of received contexts."
        )
    return count, list(fds)


def close_all(fds: Sequence[int] | array.array[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class _Arena:
    """A shared file that came, and how its KV lies in it."""

    file: MemoryFile
    layout: CacheLayout
    dtype: str


class Inbox:
    """Items out of the bytes and descriptors of one direction of a call."""

    def __init__(self, *, limits: Limits, trusted: bool, greeting: bool) -> None:
        self._limits, self._trusted, self._greeting = limits, trusted, greeting
        self._decoder = Decoder(REQUEST if greeting else limits)
        self._frame = bytearray()  # of the frame of our own that is under way
        self._fds: deque[int] = deque()
        self._arenas: list[_Arena] = []

    @property
    def ended(self) -> bool:
        """Whether the other end said that no more items come."""
        return self._decoder.ended

    def finish(self) -> None:
        """Say that no more bytes come; raises as `Decoder.finish`."""
        self._decoder.finish()

    def feed(self, piece: memoryview, fds: Sequence[int]) -> Iterator[Got]:
        """What is complete with these bytes; the descriptors are the inbox's from here on. Raises as `Decoder.feed`.

        Raises:
            AccessDenied: shared memory of another user. ConnectionFailed: descriptors that belong to no frame.
        """
        self._fds.extend(fds)
        while piece:
            got, piece = self._take(piece)
            if got is not None:
                yield got
        if len(self._fds) > bool(self._frame):
            raise ConnectionFailed("a file descriptor came that no frame speaks of. Fix: use one version of AVP.")

    def close(self) -> None:
        """Close descriptors that nothing was made of."""
        close_all(self._fds)
        self._fds.clear()

    def _take(self, piece: memoryview) -> tuple[Got | None, memoryview]:
        tag = bytes(self._frame[:1] or piece[:1])
        if self._greeting:
            return self._read_greeting(piece)
        if not self._decoder.idle or tag not in _OURS:
            return self._decoder.take(piece)
        if tag == _TAKEN:
            return TAKEN, piece[1:]
        if self._decoder.ended:
            raise ConnectionFailed("an item came after the end. Fix: use one version of AVP at both ends.")
        if tag == _FILE:
            return self._open_file(), piece[1:]
        return self._read_reference(piece)

    def _read_greeting(self, piece: memoryview) -> tuple[Got | None, memoryview]:
        if self._decoder.idle and bytes(piece[:1]) != b"J":
            raise ConnectionFailed("a connection did not begin with a request. Fix: connect with AVP.")
        got, piece = self._decoder.take(piece)
        if got is not None:
            self._greeting, self._decoder = False, Decoder(self._limits)
        return got, piece

    def _read_reference(self, piece: memoryview) -> tuple[Got | None, memoryview]:
        fixed = 1 + _NUMBERS.size
        for _ in range(2):  # first the numbers, then the header whose size they tell
            need = fixed
            if len(self._frame) >= fixed:
                size = _NUMBERS.unpack_from(self._frame, 1)[1]
                if size > self._limits.header + 8:
                    raise LimitExceeded(
                        f"a header of {size} bytes comes; at most {self._limits.header} are allowed. "
                        "Fix: raise Limits.header."
                    )
                need += size
            count = max(need - len(self._frame), 0)
            self._frame += piece[:count]
            piece = piece[count:]
            if len(self._frame) < need:
                return None, piece
        frame, self._frame = bytes(self._frame), bytearray()
        number, _, capacity, start, stop = _NUMBERS.unpack_from(frame, 1)
        return self._open_reference(frame[fixed:], number, capacity, start, stop), piece

    def _open_reference(self, header: bytes, number: int, capacity: int, start: int, stop: int) -> Blob:
        if not self._trusted:
            raise AccessDenied(
                "shared memory came from a process of another user, which could change it while it is read. "
                "Fix: run both as one user, or hand over through http://127.0.0.1."
            )
        arena = self._arena(number, header)
        size = len(header) + max(stop - start, 0) * arena.layout.bytes_per_token(arena.dtype)
        self._check_size(size)
        tensors = SharedTensors.of(arena.file, arena.layout, arena.dtype, capacity, start, stop)
        return open_shared(header, tensors, limits=self._limits)

    def _arena(self, number: int, header: bytes) -> _Arena:
        """What lies in file `number`: told by the header that comes first; the later ones are held against it."""
        if number < len(self._arenas):
            return self._arenas[number]
        if number > len(self._arenas) or number >= FILES:
            raise ConnectionFailed(f"shared file {number} was never shown. Fix: use one version of AVP at both ends.")
        file = MemoryFile.adopt(self._next_fd())
        _require(file.fd, F_SEAL_SHRINK, "it could be cut while it is mapped")
        manifest = peek(header, limits=self._limits)
        if manifest.model is None or len(manifest.segments) != 1:
            raise BundleError("the header that came with shared memory is none of a segment. Fix: send a segment.")
        self._arenas.append(_Arena(file, manifest.model.layout, manifest.segments[0].dtype))
        return self._arenas[number]

    def _check_size(self, size: int) -> None:
        if size > self._limits.bytes:
            raise LimitExceeded(
                f"a bundle of {size} bytes comes; at most {self._limits.bytes} are allowed. "
                "Fix: raise Limits.bytes, or send smaller segments."
            )

    def _open_file(self) -> Item:
        fd = self._next_fd()
        try:
            _require(fd, F_SEAL_SHRINK | F_SEAL_WRITE, "it could be changed while it is read")
            size = os.fstat(fd).st_size  # sealed: it stays so, and `open_bundle` holds it against the header
            if size == 0:
                raise TruncatedBundle("an empty file came for a bundle. Fix: send the whole bundle.")
            self._check_size(size)
            return open_bundle(_mapped(fd, size), limits=self._limits)
        finally:
            os.close(fd)

    def _next_fd(self) -> int:
        if not self._fds:
            raise ConnectionFailed("a file descriptor that a frame speaks of did not come. Fix: hand over again.")
        return self._fds.popleft()


def _require(fd: int, seals: int, danger: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode) or _seals(fd) & seals != seals:
        raise BundleError(f"a file came that is not sealed: {danger}. Fix: use one version of AVP at both ends.")


def _mapped(fd: int, size: int) -> memoryview:
    """The file's bytes. Private, since older kernels do not map a write-sealed file shared, even to read."""
    if sys.version_info >= (3, 13):
        return memoryview(mmap(fd, size, flags=MAP_PRIVATE, prot=PROT_READ, trackfd=False))
    return memoryview(mmap(fd, size, flags=MAP_PRIVATE, prot=PROT_READ))
