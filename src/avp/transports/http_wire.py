"""The client's side of a socket: TCP or TLS, both ways at once, every byte counted.

An HTTP client that sends the whole request before it reads the answer stops for ever where an endpoint answers while
it still reads, as ours do; so the socket is driven here and not by such a client.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from typing import TypeVar, cast

from avp.errors import AccessDenied, AVPError, ConnectionFailed, TimedOut
from avp.protocols import Meter

T = TypeVar("T")

_PIECE = 1 << 18  # bytes that are encrypted or decrypted at once
_READ = 1 << 20  # bytes that are read at once
_AHEAD = 1 << 20  # bytes that wait for the reader before the socket is left alone
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Have the kernel ask, after half a minute of silence, whether the other end still exists."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        option = vars(socket).get(name)  # not on every system
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def spare_mmap() -> None:
    """Have glibc keep freed blocks of up to 8 MiB, as it does once it has seen one.

    Otherwise each chunk of 128 KiB and more is mapped and unmapped: 0.7 instead of 1.9 GB/s on loopback.
    """
    bytearray(8 << 20).clear()


class Wire(asyncio.BufferedProtocol):
    """A connection. `meter` is the call whose bytes go over it now: encrypted ones, where there is TLS."""

    def __init__(self, *, meter: Meter, tls: ssl.SSLContext | None, host: str) -> None:
        self.meter: Meter | None = meter
        self.closed = False  # no more bytes come
        self._host = host
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=host) if tls else None
        self._shaking = tls is not None
        self._failure: AVPError | None = None
        self._memory = memoryview(bytearray(_READ))
        self._pieces: deque[bytes] = deque()
        self._waiting = 0  # bytes in `_pieces`
        self._paused = False  # reading is
        self._heard = False  # something that was not the handshake's
        self._arrived, self._writable = asyncio.Event(), asyncio.Event()
        self._transport: asyncio.Transport

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport)
        self._writable.set()
        if self._tls:
            self._shake()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: D102
        return self._memory

    def buffer_updated(self, nbytes: int) -> None:  # noqa: D102
        data = bytes(self._memory[:nbytes])
        if self.meter:
            self.meter.received += nbytes
        if self._tls is None:
            self._keep(data)
        else:
            self._incoming.write(data)
            if self._shaking:
                self._shake()
            if not self._shaking:
                self._decrypt()
        self._arrived.set()

    def eof_received(self) -> None:  # noqa: D102
        self._end()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._end()
        self._writable.set()

    def pause_writing(self) -> None:  # noqa: D102
        self._writable.clear()

    def resume_writing(self) -> None:  # noqa: D102
        self._writable.set()

    # What a call uses.

    @property
    def http2(self) -> bool:
        """Whether TLS agreed on HTTP/2."""
        return self._tls is not None and self._tls.selected_alpn_protocol() == "h2"

    @property
    def parting(self) -> str:
        """That the server ended the connection, and a guess why."""
        if self._tls is None or self._heard:
            return "the server ended the connection"
        return "the server ended the connection, maybe because it wants a client certificate (cert and key)"

    async def handshake(self) -> None:
        """Wait until TLS is up.

        Raises:
            AccessDenied: a certificate is not trusted. ConnectionFailed: no TLS came about.
        """
        while self._shaking:
            if self._failure:
                raise self._failure
            if self.closed:
                raise ConnectionFailed(
                    f"{self._host} ended the connection during the TLS handshake. Fix: check that it speaks https, "
                    "and the client certificate if it wants one."
                )
            self._arrived.clear()
            await self._arrived.wait()

    async def read(self) -> bytes:
        """Some bytes; none at the end.

        Raises:
            AccessDenied: the other end does not trust our certificate.
        """
        while not self._pieces:
            if self._failure:
                raise self._failure
            if self.closed:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        piece = self._pieces.popleft()
        self._waiting -= len(piece)
        if self._paused and self._waiting < _AHEAD // 2 and not self.closed:
            self._paused = False
            self._transport.resume_reading()
        return piece

    async def write(self, *pieces: bytes | memoryview) -> None:
        """Send the pieces; returns when there is room for more.

        Raises:
            ConnectionFailed: the connection is gone.
        """
        for piece in pieces:
            for part in self._encrypt(piece):
                if self.closed:
                    raise self._failure or ConnectionFailed(
                        f"{self._host} ended the connection while it was sent something. Fix: call again."
                    )
                if self.meter:
                    self.meter.sent += len(part)
                self._transport.write(part)
                if not self._writable.is_set():
                    await self._writable.wait()

    def send(self, data: bytes) -> None:
        """Send without waiting for room."""
        if not self.closed:
            for part in self._encrypt(data):
                if self.meter:
                    self.meter.sent += len(part)
                self._transport.write(part)

    async def drain(self) -> None:
        """Wait for room."""
        await self._writable.wait()

    def close(self) -> None:
        """End the connection; what was sent is still delivered."""
        self._transport.close()
        self._end()

    def abort(self) -> None:
        """End the connection at once; what already left the process still arrives."""
        waiting = self._transport.get_write_buffer_size()
        if waiting:
            if self.meter:
                self.meter.sent -= waiting
            self._transport.abort()
        else:
            self._transport.close()
        self._end()

    def _end(self) -> None:
        self.closed = True
        self._arrived.set()
        self._writable.set()

    def _keep(self, data: bytes) -> None:
        self._heard = True
        self._pieces.append(data)
        self._waiting += len(data)
        if self._waiting > _AHEAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _encrypt(self, piece: bytes | memoryview) -> Iterator[bytes | memoryview]:
        if self._tls is None:
            yield piece
            return
        view = memoryview(piece)
        for start in range(0, len(view), _PIECE):
            try:
                self._tls.write(view[start : start + _PIECE])
            except ssl.SSLError as error:
                raise _refused(error, self._host) from error
            yield self._outgoing.read()

    def _decrypt(self) -> None:
        assert self._tls is not None
        try:
            while data := self._tls.read(_PIECE):
                self._keep(data)
            self._end()  # the other end said good-bye
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        except ssl.SSLError as error:
            self._fail(error)
        self._flush()

    def _shake(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
            self._shaking = False
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._flush()  # tell the other end why
            self._fail(error)
            return
        self._flush()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self._transport.is_closing():
            if self.meter:
                self.meter.sent += len(data)
            self._transport.write(data)

    def _fail(self, error: ssl.SSLError) -> None:
        self._failure = _refused(error, self._host)
        self._transport.close()
        self._end()


def _refused(error: ssl.SSLError, host: str) -> AVPError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return AccessDenied(
            f"the certificate of {host} is not trusted: {error.verify_message}. "
            "Fix: give the authority that signed it as ca, and connect to a name that stands in it."
        )
    reason = str(error.reason or error)
    if "CERTIFICATE" in reason or "UNKNOWN_CA" in reason:
        return AccessDenied(
            f"{host} does not accept our certificate ({reason}). "
            "Fix: give a client certificate as cert and key that its authority signed."
        )
    return ConnectionFailed(f"TLS with {host} failed ({reason}). Fix: check that it speaks https.")


async def connect(
    host: str, port: int, *, meter: Meter, tls: ssl.SSLContext | None = None, seconds: float = 10.0
) -> Wire:
    """A new connection; what setting it up sends is counted by `meter`.

    Raises:
        AccessDenied: a certificate is not trusted. TimedOut: it took too long.
        ConnectionFailed: nobody listens there, or not with TLS.
    """
    wire = Wire(meter=meter, tls=tls, host=host)
    try:
        async with asyncio.timeout(seconds):
            await asyncio.get_running_loop().create_connection(lambda: wire, host, port)
            try:
                await wire.handshake()
            except BaseException:
                wire.abort()
                raise
    except TimeoutError as error:
        if isinstance(error, AVPError):
            raise
        raise TimedOut(
            f"{host}:{port} did not answer within {seconds:g} s. Fix: check the address and the network."
        ) from error
    except OSError as error:
        if isinstance(error, AVPError):
            raise
        raise ConnectionFailed(
            f"{host}:{port} cannot be reached: {error.strerror or error}. Fix: check the address; is a server there?"
        ) from error
    return wire
