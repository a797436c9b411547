"""Sessions and handles: what an endpoint keeps for others, for how long, and how much of it.

A session is opened by a handshake and belongs to a tenant. A context that was received, or made for a caller, gets a
handle: 32 random bytes that say nothing of it. Any caller of the tenant may go on from a handle, any number of times. A
handle ends with its time, with its session, when it is revoked, or when its tenant's quota needs the room: then the one
that was used longest ago goes first. KV that several handles share is counted once.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from avp.context import Context
from avp.errors import Busy, HandleExpired
from avp.handshake import Hello
from avp.security import Tenant
from avp.segment import PAGE

_RETRY = 1.0  # seconds after which a caller that found no room may ask again


@dataclass(frozen=True, slots=True)
class Quota:
    """How much an endpoint keeps. memory: bytes of KV under handles or on their way in, of all tenants; tenant: of one
    (None: the same). ttl: seconds that a session or handle lives after its last use. running: generations at once;
    waiting: how many more may queue. idle: seconds that a caller may be silent in the middle of a call.
    """

    memory: int = 8 << 30
    tenant: int | None = None
    ttl: float = 3600.0
    running: int = 2
    waiting: int = 64
    sessions: int = 10_000
    idle: float = 30.0


@dataclass(slots=True)
class Session:
    """What a handshake opened."""

    id: str
    tenant: Tenant
    hello: Hello | None  # the caller's
    own: Hello | None  # what it was answered
    expires: float


@dataclass(slots=True, eq=False)
class _Held:
    context: Context
    session: Session
    expires: float
    sizes: dict[str, int]  # bytes by page, or by the handle itself for what is no KV
    used: float = 0.0
    running: int = 0


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for bytes that are on their way in; released once."""

    tenant: str
    nbytes: int
    handles: Handles = field(repr=False)

    def release(self) -> None:
        """Give the room back; a second time does nothing."""
        self.handles.give_back(self)


class Handles:
    """The sessions and handles of one endpoint; threads may use it at once."""

    def __init__(self, quota: Quota | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.quota = quota or Quota()
        self._clock = clock
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}
        self._unnamed: dict[Tenant, Session] = {}  # of callers that shook no hands
        self._held: dict[str, _Held] = {}
        self._uses: Counter[tuple[str, str]] = Counter()  # handles by (tenant, page)
        self._bytes: Counter[str] = Counter()  # by tenant
        self._reserved: set[int] = set()

    # --- sessions

    def open(self, tenant: Tenant, *, hello: Hello | None = None, own: Hello | None = None) -> Session:
        """A new session; raises Busy where there are too many."""
        with self._lock:
            self._sweep()
            if len(self._sessions) >= self.quota.sessions:
                raise Busy(
                    f"{len(self._sessions)} sessions are open, as many as this endpoint takes. Fix: try again later.",
                    retry_after=_RETRY,
                )
            session = Session(secrets.token_urlsafe(32), tenant, hello, own, self._clock() + self.quota.ttl)
            self._sessions[session.id] = session
            return session

    def unnamed(self, tenant: Tenant) -> Session:
        """The one session of all callers of a tenant that shook no hands. Raises as `open`."""
        with self._lock:
            self._sweep()
            session = self._unnamed.get(tenant)
            if session is None or session.id not in self._sessions:
                session = self._unnamed[tenant] = self.open(tenant)
            session.expires = self._clock() + self.quota.ttl
            return session

    def session(self, name: str, tenant: Tenant) -> Session:
        """The session of that id, with its time begun again.

        Raises:
            HandleExpired: unknown, expired, or another tenant's.
        """
        with self._lock:
            self._sweep()
            session = self._sessions.get(name)
            if session is None or session.tenant != tenant:
                raise HandleExpired(
                    "the session is not known here, or its time is over. Fix: shake hands again (avp.connect does it)."
                )
            session.expires = self._clock() + self.quota.ttl
            return session

    # --- handles

    def keep(self, context: Context, session: Session) -> tuple[str, float]:
        """A handle for a context, and the seconds it lives.

        Raises:
            Busy: the tenant's quota is full of contexts that are in use.
        """
        with self._lock:
            self._sweep()
            name = secrets.token_hex(32)  # no dash, which a command line would take for an option
            sizes = _sizes(context, name)
            tenant = session.tenant.name
            self._make_room(tenant, sum(sizes.values()), sizes)
            now = self._clock()
            session.expires = now + self.quota.ttl
            self._sessions[session.id] = session  # a call of it is under way: its time is not over
            self._held[name] = _Held(context, session, now + self.quota.ttl, sizes, now)
            for page, size in sizes.items():
                if not self._uses[tenant, page]:
                    self._bytes[tenant] += size
                self._uses[tenant, page] += 1
            return name, self.quota.ttl

    @contextmanager
    def use(self, name: str, tenant: Tenant) -> Iterator[Context]:
        """The context of a handle; while it is in use it is not evicted. Its time begins again.

        Raises:
            HandleExpired: see there.
        """
        with self._lock:
            held = self._find(name, tenant)
            held.running += 1
            self._touch(held)
        try:
            yield held.context
        finally:
            with self._lock:
                held.running -= 1

    def renew(self, name: str, tenant: Tenant) -> float:
        """Begin the handle's time again; the seconds it lives now. Raises as `use`."""
        with self._lock:
            self._touch(self._find(name, tenant))
            return self.quota.ttl

    def revoke(self, name: str, tenant: Tenant) -> None:
        """End a handle. Raises as `use`."""
        with self._lock:
            self._find(name, tenant)
            self._drop(name)

    # --- room

    def reserve(self, tenant: Tenant, nbytes: int) -> Reservation:
        """Room for bytes that are about to come.

        Raises:
            Busy: there is none, even without the handles that nobody is using.
        """
        with self._lock:
            self._sweep()
            self._make_room(tenant.name, nbytes, {})
            self._bytes[tenant.name] += nbytes
            reservation = Reservation(tenant.name, nbytes, self)
            self._reserved.add(id(reservation))
            return reservation

    def give_back(self, reservation: Reservation) -> None:
        """See `Reservation.release`."""
        with self._lock:
            if id(reservation) in self._reserved:
                self._reserved.discard(id(reservation))
                self._bytes[reservation.tenant] -= reservation.nbytes

    def memory(self, tenant: str | None = None) -> int:
        """Bytes that are counted, of one tenant or of all."""
        with self._lock:
            return self._bytes.total() if tenant is None else self._bytes[tenant]

    def __len__(self) -> int:
        with self._lock:
            self._sweep()
            return len(self._held)

    # --- inside the lock

    def _find(self, name: str, tenant: Tenant) -> _Held:
        self._sweep()
        held = self._held.get(name)
        if held is None or held.session.tenant != tenant:
            raise HandleExpired(
                "the handle is not known here: its time is over, it was revoked or evicted, or it is another tenant's. "
                "Fix: hand the context over again; only segments that are not here any more will travel."
            )
        return held

    def _touch(self, held: _Held) -> None:
        held.used = self._clock()
        held.expires = held.session.expires = held.used + self.quota.ttl

    def _drop(self, name: str) -> None:
        held = self._held.pop(name)
        tenant = held.session.tenant.name
        for page, size in held.sizes.items():
            self._uses[tenant, page] -= 1
            if not self._uses[tenant, page]:
                del self._uses[tenant, page]
                self._bytes[tenant] -= size

    def _sweep(self) -> None:
        now = self._clock()
        for session in [each for each in self._sessions.values() if each.expires <= now]:
            del self._sessions[session.id]
        for name in [
            name
            for name, held in self._held.items()
            if not held.running and (held.expires <= now or held.session.id not in self._sessions)
        ]:
            self._drop(name)

    def _make_room(self, tenant: str, nbytes: int, sizes: Mapping[str, int]) -> None:
        """Evict until `nbytes` more fit the tenant's quota and the whole memory; those of `sizes` that are held already
        need no room, as long as what holds them stays.
        """
        own = self.quota.memory if self.quota.tenant is None else min(self.quota.tenant, self.quota.memory)
        if nbytes > own:
            raise Busy(
                f"{nbytes} bytes of KV are more than the {own} that this endpoint keeps for a tenant. "
                "Fix: hand over a shorter context, or raise the endpoint's --memory.",
                retry_after=self.quota.ttl,
            )

        def shared() -> int:
            return sum(size for page, size in sizes.items() if self._uses[tenant, page])

        while self._bytes[tenant] + nbytes - shared() > own:
            self._evict(tenant)
        while self._bytes.total() + nbytes - shared() > self.quota.memory:
            self._evict(None)

    def _evict(self, tenant: str | None) -> None:
        idle = [
            (held.used, name)
            for name, held in self._held.items()
            if not held.running and tenant in (None, held.session.tenant.name)
        ]
        if not idle:
            raise Busy(
                "the endpoint's memory is full of contexts that are in use or on their way. "
                f"Fix: try again in {_RETRY:g} s, or raise the endpoint's --memory.",
                retry_after=_RETRY,
            )
        self._drop(min(idle)[1])


def _sizes(context: Context, name: str) -> dict[str, int]:
    """Bytes of each page of KV, of which there may be several of one id; of all else in one sum."""
    if context.model is None or not context.segments:
        return {name: context.nbytes}
    layout = context.model.layout
    return {
        f"{page} {segment.dtype} {segment.engine} {segment.exactness}": size * min(PAGE, len(segment) - index * PAGE)
        for segment in context.segments
        for size in [layout.bytes_per_token(segment.dtype)]
        for index, page in enumerate(segment.pages)
    }
