"""The sockets under the HTTP client: every byte counted, TLS included, and an early refusal seen."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterable

import anyio
import httpcore2
from anyio.abc import ByteStream
from anyio.streams.tls import TLSAttribute, TLSStream

from avp.errors import AccessDenied, AVPError, Busy, ConnectionFailed, TimedOut
from avp.protocols import Meter
from avp.transports.http_ends import keep_alive

_PIECE = 1 << 20  # bytes that are read or written at once
_GONE = (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)
_HEADERS, _SHIFTED = 1, 0x28  # HTTP/2: a frame's type; flags that put something before the fields
_OK = 0x88  # HPACK: the status is 200


class Counted(ByteStream):
    """A TCP connection that counts. It reads more at once than a transport of asyncio, and keeps nothing."""

    def __init__(self, sock: socket.socket, net: Net) -> None:
        self._sock, self._net = sock, net
        self._loop = asyncio.get_running_loop()

    async def receive(self, max_bytes: int = _PIECE) -> bytes:
        """What came, up to 1 MiB."""
        data = await self._loop.sock_recv(self._sock, max(max_bytes, _PIECE))
        self._net.meter.received += len(data)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        """Send all of it."""
        whole = memoryview(item)
        for start in range(0, len(whole), _PIECE):
            piece = whole[start : start + _PIECE]
            await self._loop.sock_sendall(self._sock, piece)
            self._net.meter.sent += len(piece)

    async def send_eof(self) -> None:
        """Send no more."""
        self._sock.shutdown(socket.SHUT_WR)

    async def aclose(self) -> None:
        """End it."""
        self._sock.close()

    @property
    def readable(self) -> bool:
        """Whether something came, or the end."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True


class Wire(httpcore2.AsyncNetworkStream):
    """A connection as httpcore uses it. From a request's first byte on it reads one piece ahead."""

    def __init__(self, counted: Counted, host: str, *, http2: bool) -> None:
        self._counted, self._host, self._http2 = counted, host, http2
        self._stream: ByteStream = counted
        self._ahead: asyncio.Task[bytes] | None = None
        self._frames = _Frames()
        self.heard = False  # something that was not the handshake's

    @property
    def refused(self) -> bool:
        """Whether the server will not read the rest of a request: it refused it, or the connection is at its end."""
        if self._ahead is None or not self._ahead.done():
            return self._frames.refused
        if self._ahead.cancelled() or self._ahead.exception() is not None or not self._ahead.result():
            return True
        return self._frames.refused if self._http2 else self._ahead.result()[9:10] not in (b"1", b"2")

    def begin(self) -> None:
        """A request begins."""
        self._frames.found = self._frames.refused = False

    @property
    def quiet(self) -> bool:
        """Whether nothing came since the last answer, not even the connection's end."""
        return not (self._ahead is not None and self._ahead.done()) and not self._counted.readable

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What came, also more than `max_bytes`; nothing at the end."""
        ahead, self._ahead = self._ahead, None
        return await (self._receive() if ahead is None else ahead)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of it."""
        if not buffer:
            return
        if self._ahead is None:
            self._ahead = asyncio.create_task(self._receive())
        try:
            await self._stream.send(buffer)
        except _GONE as error:
            raise httpcore2.WriteError(str(error)) from error

    async def aclose(self) -> None:
        """End it."""
        if self._ahead is not None:
            self._ahead.cancel()
            await asyncio.wait([self._ahead])
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Wire:
        """The same connection, encrypted; raises AccessDenied for a certificate that is not trusted."""
        try:
            with anyio.fail_after(timeout):
                tls = await TLSStream.wrap(
                    self._stream,
                    server_side=False,
                    hostname=server_hostname,
                    ssl_context=ssl_context,
                    standard_compatible=False,
                )
        except BaseException as error:
            await self._stream.aclose()
            if isinstance(error, ssl.SSLError):
                raise _refused(error, self._host) from error
            if isinstance(error, TimeoutError):
                raise _late(self._host) from error
            if isinstance(error, (anyio.EndOfStream, *_GONE)):
                raise ConnectionFailed(
                    f"{self._host} ended the connection during the TLS handshake. Fix: check that it speaks https, "
                    "and the client certificate if it wants one."
                ) from error
            raise
        self._stream = tls
        ssl_object = self.get_extra_info("ssl_object")
        self._http2 = isinstance(ssl_object, ssl.SSLObject) and ssl_object.selected_alpn_protocol() == "h2"
        return self

    def get_extra_info(self, info: str) -> object:
        """What httpcore asks: whether something came, and the TLS object."""
        if info == "ssl_object":
            return self._stream.extra(TLSAttribute.ssl_object, None)
        return self._counted.readable if info == "is_readable" else None

    async def _receive(self) -> bytes:
        try:
            data = await self._stream.receive(_PIECE)
        except anyio.EndOfStream:
            return b""
        except ssl.SSLError as error:
            raise _refused(error, self._host) from error
        except _GONE as error:
            raise httpcore2.ReadError(str(error)) from error
        if self._http2:
            if not self.heard and data.startswith(b"HTTP/1."):
                raise _no_http2(data)
            self._frames.feed(data)
        self.heard = True
        return data


class _Frames:
    """Finds among the frames of HTTP/2 the answer that refuses a request."""

    def __init__(self) -> None:
        self.found = self.refused = False
        self._rest = b""  # of a frame's head
        self._skip = 0  # bytes of a frame that are still to come

    def feed(self, data: bytes) -> None:
        """Frames, cut anywhere. Of each its head is read, and of the first one with fields the status."""
        data, at = self._rest + data, self._skip
        while at + 9 <= len(data):
            fields = data[at + 3] == _HEADERS
            if fields and at + 9 == len(data):
                break
            if fields and not self.found:
                self.found = True
                self.refused = not data[at + 4] & _SHIFTED and data[at + 9] != _OK
            at += 9 + int.from_bytes(data[at : at + 3], "big")
        self._rest, self._skip = data[at:], max(at - len(data), 0)


class Net(httpcore2.AsyncNetworkBackend):
    """Makes the connections of one client, which makes one call at a time."""

    def __init__(self, *, http2: bool) -> None:
        self.meter = Meter()  # of the call under way
        self.wire: Wire | None = None
        self._http2 = http2  # without TLS

    @property
    def refused(self) -> bool:
        """See `Wire`."""
        return self.wire is not None and self.wire.refused

    def begin(self, meter: Meter) -> None:
        """A call begins."""
        self.meter = meter
        if self.wire is not None:
            self.wire.begin()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[object] | None = None,
    ) -> Wire:
        """A TCP connection.

        Raises:
            TimedOut: it took too long. ConnectionFailed: nobody listens there.
        """
        try:
            async with asyncio.timeout(timeout):
                sock = await _connect(host, port)
        except TimeoutError as error:
            raise _late(f"{host}:{port}") from error
        except OSError as error:
            raise ConnectionFailed(
                f"{host}:{port} cannot be reached: {error.strerror or error}. "
                "Fix: check the address; is a server there?"
            ) from error
        keep_alive(sock)
        self.wire = Wire(Counted(sock, self), host, http2=self._http2)
        return self.wire


async def _connect(host: str, port: int) -> socket.socket:
    """A connection to the first address of the host that answers."""
    loop = asyncio.get_running_loop()
    failure = OSError("the name has no address")
    for family, kind, proto, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure


def _late(place: str) -> TimedOut:
    return TimedOut(f"{place} did not answer in time. Fix: check the address and the network.")


def _no_http2(data: bytes) -> AVPError:
    if data[9:12] == b"503":
        return Busy("the server has too many connections. Fix: try again later.")
    return ConnectionFailed("the server speaks HTTP/1.1 only. Fix: connect without http2=True.")


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
