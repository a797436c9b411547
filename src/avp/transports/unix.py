"""`unix:/path/to.sock`: an endpoint in another process of this machine; KV goes over as memory, not as bytes.

Each call is a connection of its own. Its first frame is the event `{"call": verb, "token": …}`. Frames: see `fds`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from avp.blob import Blob
from avp.context import Context
from avp.errors import AccessDenied, AVPError, ConnectionFailed, TimedOut, UsageError
from avp.manifest import Limits
from avp.protocols import Channel, Endpoint, Item, Listener, Meter
from avp.security import Security
from avp.transports.answers import answers, log, read_answer
from avp.transports.line import Line

_LONGEST = 107  # bytes of a path that the kernel takes
_FULL = 5.0  # seconds for which a caller tries while the server's queue of connections is full


class UnixListener:
    """An endpoint at a path."""

    def __init__(
        self, endpoint: Endpoint, path: str, listening: socket.socket, *, patience: float, grace: float
    ) -> None:
        self._endpoint, self._patience, self._grace = endpoint, patience, grace
        self._path, self._file, self._socket = os.path.abspath(path), _identity(path), listening
        self._url = f"unix:{self._path if len(os.fsencode(self._path)) <= _LONGEST else path}"
        self._calls: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    @property
    def url(self) -> str:
        """Where."""
        return self._url

    async def close(self) -> None:
        """Remove the socket file; end the calls under way, after a few seconds by force."""
        self._accepting.cancel()
        await asyncio.gather(self._accepting, return_exceptions=True)
        self._socket.close()
        if _identity(self._path) == self._file:
            os.unlink(self._path)
        if self._calls:
            await asyncio.wait(self._calls, timeout=self._grace)
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    async def _accept(self) -> None:
        loop, told = asyncio.get_running_loop(), False
        while True:
            try:
                connected, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                if not told:
                    log.error("no connection can be taken at %s for now: %s", self.url, error.strerror)
                told = True
                await asyncio.sleep(0.1)  # too many open files: some may be closed soon
                continue
            told = False
            call = asyncio.create_task(self._serve(connected))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _serve(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        line = Line(connected, limits=self._endpoint.limits, meter=Meter(), greeting=True)
        answer = asyncio.create_task(self._answer(line))
        try:
            await asyncio.wait([answer, line.reader], return_when=asyncio.FIRST_COMPLETED)
        finally:
            answer.cancel()
            for fault in await asyncio.gather(answer, return_exceptions=True):
                if isinstance(fault, Exception):
                    log.error("a call at %s ended with a fault: %s", self.url, type(fault).__name__)
            await line.close()

    async def _answer(self, line: Line) -> None:
        """Answer one call. A stranger is logged once, and only by what was wrong: a message may quote what was sent."""
        error: AVPError | None = None
        stranger = True
        try:
            verb, token = await self._request(line)
            caller = self._endpoint.admit(token, address=self.url)
            stranger = False
            async with aclosing(answers(self._endpoint, verb, line, caller=caller)) as found:
                async for item in found:
                    await line.send(item)
        except AVPError as raised:
            error = raised
            if stranger:
                log.warning("a connection to %s was refused: %s", self.url, type(error).__name__)
        await line.end(error)

    async def _request(self, line: Line) -> tuple[str, str | None]:
        try:
            async with asyncio.timeout(self._patience):
                request = await anext(line)
        except TimeoutError:
            raise TimedOut(
                f"no request came within {self._patience:g} s. Fix: send it at once after connecting."
            ) from None
        if isinstance(request, Blob | Context) or not isinstance(request.get("call"), str):
            raise ConnectionFailed("a connection did not begin with a request. Fix: connect with AVP.")
        token = request.get("token")
        return str(request["call"]), token if isinstance(token, str) else None


class UnixChannel:
    """The near end of calls to a path."""

    def __init__(self, path: str, security: Security) -> None:
        self._path, self._security = path, security
        self._lines: set[Line] = set()

    @asynccontextmanager
    async def call(self, verb: str, items: AsyncIterable[Item], *, meter: Meter) -> AsyncIterator[AsyncIterator[Item]]:
        """See `Channel.call`; the meter counts the bytes on the socket, and nothing of what passes as memory."""
        line = Line(await _connect(self._path), limits=Limits(), meter=meter)
        self._lines.add(line)
        sender = asyncio.create_task(self._send(line, verb, items))
        try:
            yield read_answer(line, sender=sender)
        finally:
            self._lines.discard(line)
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            await line.close()

    async def close(self) -> None:
        """End the calls under way."""
        for line in tuple(self._lines):
            await line.close()

    async def _send(self, line: Line, verb: str, items: AsyncIterable[Item]) -> None:
        await line.send({"call": verb, "token": self._security.token})
        await line.send_all(items)


@dataclass(frozen=True, slots=True)
class UnixTransport:
    """Endpoints of other processes of this machine.

    patience: seconds in which a connection must bring its request. grace: seconds that calls under way get when a
    listener closes.
    """

    patience: float = 10.0
    grace: float = 3.0

    def connect(self, url: str, *, security: Security) -> Channel:
        """The near end; the socket need not be there yet.

        Raises:
            UsageError: not `unix:/path`, or a path that is too long.
        """
        return UnixChannel(path_of(url), security)

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """Listen at a path that only this user can open; `endpoint.admit` says who may call.

        Raises:
            UsageError: the path is too long, being served, or no place for a socket.
        """
        path = path_of(url)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listening.setblocking(False)
            _bind(listening, path)
            os.chmod(path, 0o600)  # nobody can connect before `listen`
            listening.listen(512)
            return UnixListener(endpoint, path, listening, patience=self.patience, grace=self.grace)
        except BaseException:
            listening.close()
            raise


def path_of(url: str) -> str:
    """The path in `unix:/path`, `unix:///path` or `unix:relative`.

    Raises:
        UsageError: there is none, or it is too long.
    """
    scheme, _, path = url.partition(":")
    if path.startswith("///"):
        path = path[2:]
    if scheme != "unix" or not path or path.startswith("//") or "\0" in path:
        raise UsageError(f"{url!r} is no unix socket. Fix: write unix:/path/to.sock.")
    if len(os.fsencode(path)) > _LONGEST:
        raise UsageError(
            f"the path of {url!r} has {len(os.fsencode(path))} bytes; a unix socket's has at most {_LONGEST}. "
            "Fix: choose a shorter one, as in unix:/tmp/avp.sock, or a relative one."
        )
    return path


def _identity(path: str) -> tuple[int, int] | None:
    """Which file lies at the path, if any."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _bind(listening: socket.socket, path: str) -> None:
    """Take the path; what a dead server left there is replaced."""
    for last in (False, True):
        try:
            listening.bind(path)
            return
        except OSError as error:
            if last or _identity(path) is None:
                raise UsageError(
                    f"no socket can be made at {path}: {error.strerror}. Fix: choose a folder that exists and is yours."
                ) from error
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise UsageError(f"{path} exists and is no socket. Fix: choose another path, or remove it.")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                continue
            except BlockingIOError:
                pass  # alive: its queue of connections is full
            except OSError as error:
                raise UsageError(
                    f"{path} belongs to somebody else: {error.strerror}. Fix: choose another path."
                ) from error
        raise UsageError(f"unix:{path} is being served already. Fix: choose another path, or stop that server.")


async def _connect(path: str) -> socket.socket:
    """A connection to whoever listens at the path.

    Raises:
        ConnectionFailed: nobody does. AccessDenied: the socket is another user's.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.setblocking(False)
    tried = monotonic()
    try:
        while True:
            try:
                connected.connect(path)
                return connected
            except BlockingIOError:  # its queue of connections is full
                if monotonic() - tried > _FULL:
                    raise
                await asyncio.sleep(0.01)
    except BaseException as error:
        connected.close()
        if isinstance(error, PermissionError):
            raise AccessDenied(f"the socket {path} is another user's. Fix: run both ends as one user.") from error
        if isinstance(error, OSError):
            raise ConnectionFailed(
                f"nobody answers at unix:{path}: {error.strerror}. Fix: start the server, or check the path."
            ) from error
        raise


TRANSPORT = UnixTransport()
