"""Which contexts llama.cpp holds, as sequences of its one cache, and which wait in host memory.

llama.cpp adds up over cells in blocks, so that the same KV in other cells gives other last bits, and with quantised
activations other tokens. Here position p always lies in a cell that is p modulo 32, and in order: what a sequence
computes does not depend on what else is in the cache. To that end runs go one at a time, each writes at the end of the
used cells, a fork copies the page that it divides (at most 31 positions) and shares all before, and cells of the dead
stay taken, until the cache is full or mostly dead; then every context goes to host memory and comes back at its next
use.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from avp.buffers import Buffer
from avp.connectors.llamacpp_engine import Engine
from avp.connectors.llamacpp_state import Layer, StateShape, filler, from_canonical, to_canonical
from avp.errors import AVPError, ContextTooLong
from avp.segment import PAGE, SEGMENT, Segment

ROOM = 2048  # cells of which any share may be dead


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Cells in a row: position p, from `start` on, is in cell `cell + p - start`."""

    cell: int
    start: int


Shares = tuple[tuple[Extent, int], ...]  # extents, and up to which position each is used


@dataclass(slots=True, eq=False)
class Place:
    """A sequence of the engine, or none; the cells it uses."""

    number: int | None
    shares: Shares

    @property
    def end(self) -> int:
        """The cell after its last one."""
        return max((extent.cell + stop - extent.start for extent, stop in self.shares), default=0)


@dataclass(slots=True, eq=False)
class Run:
    """A sequence that is being computed, `length` positions so far."""

    place: Place
    number: int
    length: int


class Held:
    """The first `length` positions of a sequence: in the engine, in host memory, or both. Never changes."""

    def __init__(self, memory: Memory, place: Place, length: int) -> None:
        self.memory = memory
        self.place = place
        self.length = length
        self.chunks: dict[tuple[int, int], tuple[Layer, ...]] = {}
        self.used = 0

    def chunk(self, start: int, stop: int) -> tuple[Layer, ...]:
        """K and V of every layer for the positions of a segment; read once, then kept."""
        found = self.chunks.get((start, stop))
        return self.memory.fetch(self, start, stop) if found is None else found


@dataclass(frozen=True, slots=True, eq=False)
class HeldTensors:
    """The KV of a segment of a held context; read from the engine at the first use."""

    held: Held
    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        """K or V of a layer, [kv_heads, stop - start, head_dim]."""
        array = self.held.chunk(self.start, self.stop)[layer][part == "v"]
        return Buffer(self.held.memory.shape.dtype, array)


class Memory:
    """The sequences of one engine."""

    def __init__(self, engine: Engine, shape: StateShape) -> None:
        self.engine = engine
        self.shape = shape
        self._free = list(range(engine.sequences))
        self._dead: deque[Place] = deque()  # of contexts that are gone; a finalizer takes no lock
        self._held: weakref.WeakSet[Held] = weakref.WeakSet()
        self._places: set[Place] = set()  # of contexts, those that are gone but not given back included
        self._top = 0  # cells before it are taken, cells from it on are free
        self._turn = threading.RLock()  # of runs; reading a context waits only for `engine.lock`
        self._busy = False
        self._broken = False  # a run ended in an error: which cells it took is not known
        self._clock = 0

    # --- runs

    @contextmanager
    def run(self, base: Held | None, *, reuse: int, need: int) -> Iterator[Run]:
        """A sequence that shares the first `reuse` positions of `base`, with room for `need`; nobody else's meanwhile.

        Raises:
            ContextTooLong: the engine has no such room.
        """
        with self._turn:
            if self._busy:
                raise AVPError("a run began within another of the same thread. Fix: report it.")
            self._busy = True
            try:
                with self.engine.lock:
                    run = self._start(base if reuse else None, reuse, need)
                try:
                    yield run
                except BaseException:
                    self._broken = True
                    raise
                finally:
                    with self.engine.lock:
                        self._settle(run)
                        self._release(run.place)
            finally:
                self._busy = False

    def keep(self, run: Run, *, base: Held | None, reuse: int) -> Held:
        """What a run has computed, as a context holds it; the run is over."""
        with self.engine.lock:
            self._settle(run)
            place = Place(run.place.number, run.place.shares)
            run.place.number = None
            held = self._hold(place, run.length)
        chunks = base.chunks if base is not None else {}
        held.chunks = {span: layers for span, layers in chunks.items() if span[1] <= min(reuse, run.length)}
        return held

    def adopt(self, segments: Sequence[Segment], length: int) -> Held:
        """A context from elsewhere: its segments, which cover it without a gap, written into a sequence."""
        if not length:
            with self.engine.lock:
                return self._hold(Place(None, ()), 0)
        blob = from_canonical(
            lambda layer, part: ((segment.start, segment.read(layer, part)) for segment in segments),
            shape=self.shape,
            count=length,
        )
        with self.run(None, reuse=0, need=length) as run:
            with self.engine.lock:
                self.engine.write(run.number, blob, start=0, stop=length)
            run.length = length
            return self.keep(run, base=None, reuse=0)

    def touch(self, held: Held) -> None:
        """Note that the context is in use."""
        with self.engine.lock:
            self._clock += 1
            held.used = self._clock

    @property
    def resident(self) -> int:
        """How many contexts are in the engine."""
        with self.engine.lock:
            self._sweep()
            return len(self._resident())

    def fetch(self, held: Held, start: int, stop: int) -> tuple[Layer, ...]:
        """Positions of a context as host arrays, from the engine or out of what is here."""
        with self.engine.lock:
            if (start, stop) not in held.chunks and held.place.number is not None:
                held.chunks[start, stop] = self._read(held.place.number, start, stop)
            return held.chunks[start, stop]  # what is not in the engine is here whole

    # --- inside, with the lock held

    def _start(self, base: Held | None, reuse: int, need: int) -> Run:
        self._sweep()
        if self._broken or self._mostly_dead() or not self._fits(base, reuse, need):
            self._collect()
        while len(self._free) < 1 + (base is not None and base.place.number is None):
            others = [held for held in self._resident() if held is not base]
            self._evict(min(others, key=lambda held: held.used))
        if base is not None and base.place.number is None and self._fits(base, reuse, need):
            self._restore(base)
        place = Place(self._free.pop(), ())
        run = Run(place, place.number or 0, reuse)
        try:
            self._share(run, base, reuse, need)
        except BaseException:
            self._release(place)
            raise
        return run

    def _settle(self, run: Run) -> None:
        """Of the cells reserved for a run, those that it wrote."""
        run.place.shares = _clipped(run.place.shares, run.length)
        self._top = max(self._top, run.place.end)

    def _share(self, run: Run, base: Held | None, reuse: int, need: int) -> None:
        """Give a run the first `reuse` positions of `base`, and the cells behind them."""
        engine = self.engine
        if base is None or base.place.number is None:
            self._align()
            self._check(need)
            run.place.shares = ((Extent(self._top, 0), need),)
            if base is not None:
                engine.write(run.number, self._blob(base, reuse), start=0, stop=reuse)
                self._top += reuse
            return
        shares = _clipped(base.place.shares, reuse)
        if Place(None, shares).end == self._top:
            engine.copy(base.place.number, run.number, start=0, stop=reuse)
            run.place.shares = (*shares, (Extent(self._top, reuse), need))
            return
        whole = reuse // PAGE * PAGE
        self._align()
        engine.copy(base.place.number, run.number, start=0, stop=whole)
        run.place.shares = (*_clipped(shares, whole), (Extent(self._top, whole), need))
        if reuse > whole:
            engine.write(run.number, engine.read(base.place.number, whole, reuse), start=whole, stop=reuse)
            self._top += reuse - whole

    def _fits(self, base: Held | None, reuse: int, need: int) -> bool:
        """Whether the run's cells are free, with those to bring its base back and to fill up pages."""
        back = base.length + PAGE if base is not None and base.place.number is None else 0
        return self._top + back + 2 * PAGE + need - reuse <= self.engine.positions

    def _check(self, need: int) -> None:
        if self._top + need > self.engine.positions:
            raise ContextTooLong(
                f"{need} positions are needed and the engine has {self.engine.positions}. Fix: shorten the prompt."
            )

    def _align(self) -> None:
        """Take cells up to the next page."""
        gap = -self._top % PAGE
        if gap:
            self.engine.bury(filler(self.shape, gap), length=gap)
            self._top += gap

    def _live(self) -> dict[Extent, int]:
        """Of each extent, up to which position it is used."""
        upto: dict[Extent, int] = {}
        for place in self._places:
            for extent, stop in place.shares:
                upto[extent] = max(stop, upto.get(extent, 0))
        return upto

    def _mostly_dead(self) -> bool:
        alive = sum(stop - extent.start for extent, stop in self._live().items())
        return self._top > max(ROOM, 2 * alive)

    def _collect(self) -> None:
        """Send every context to host memory and begin again with an empty cache."""
        for held in self._resident():
            self._fill(held)
            self._free.append(held.place.number or 0)
            held.place.number, held.place.shares = None, ()
        self._places.clear()
        self.engine.clear()
        self._top, self._broken = 0, False

    def _evict(self, held: Held) -> None:
        self._fill(held)
        self._release(held.place)

    def _resident(self) -> list[Held]:
        return [held for held in self._held if held.place.number is not None]

    def _fill(self, held: Held) -> None:
        """Copy a context to host memory."""
        for span in _spans(held.length):
            held.chunk(*span)

    def _restore(self, held: Held) -> None:
        """Write a context from host memory into a sequence again."""
        self._align()
        number = self._free.pop()
        self.engine.write(number, self._blob(held, held.length), start=0, stop=held.length)
        held.place.number, held.place.shares = number, ((Extent(self._top, 0), held.length),)
        self._places.add(held.place)
        self._top += held.length

    def _blob(self, held: Held, length: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The state of the first positions of a context that is in host memory."""
        dtype = self.shape.dtype
        return from_canonical(
            lambda layer, part: (
                (span[0], Buffer(dtype, held.chunks[span][layer][part == "v"][:, : length - span[0]]))
                for span in _spans(held.length)
                if span[0] < length
            ),
            shape=self.shape,
            count=length,
        )

    def _read(self, number: int, start: int, stop: int) -> tuple[Layer, ...]:
        step = min(SEGMENT, self.shape.window or SEGMENT)
        pieces: list[tuple[Layer, ...]] = []
        for at in range(start, stop, step):
            end = min(at + step, stop)
            pieces.append(to_canonical(self.engine.read(number, at, end), shape=self.shape, start=at, stop=end))
        return _joined(pieces)

    def _hold(self, place: Place, length: int) -> Held:
        held = Held(self, place, length)
        self._held.add(held)
        self._places.add(place)
        weakref.finalize(held, self._dead.append, place).atexit = False
        self.touch(held)
        return held

    def _sweep(self) -> None:
        while self._dead:
            self._release(self._dead.popleft())

    def _release(self, place: Place) -> None:
        """Give a sequence back. Of the cells that nobody else uses, those at the end of all are free again; others stay
        taken, so that no run falls into a gap.
        """
        if place.number is None:
            return
        number, shares = place.number, place.shares
        place.number, place.shares = None, ()
        self._places.discard(place)
        live = self._live()
        ending = True
        for extent, stop in reversed(shares):
            start = min(max(live.get(extent, 0), extent.start), stop)
            ending = ending and extent.cell + stop - extent.start == self._top
            if ending:
                self._top = extent.cell + start - extent.start
                ending = start == extent.start
            elif start < stop:
                self.engine.bury_sequence(number, start, stop)
        self.engine.drop(number)
        self._free.append(number)


def _spans(length: int) -> list[tuple[int, int]]:
    """The segments of so many positions."""
    return [(start, min(start + SEGMENT, length)) for start in range(0, length, SEGMENT)]


def _clipped(shares: Shares, length: int) -> Shares:
    """Of the cells, those of the first `length` positions."""
    return tuple((extent, min(stop, length)) for extent, stop in shares if extent.start < length)


def _joined(pieces: list[tuple[Layer, ...]]) -> tuple[Layer, ...]:
    """Runs of positions as one; arrays that nobody writes to."""
    if len(pieces) == 1:
        layers = pieces[0]
    else:
        layers = tuple(
            (np.concatenate([k for k, _ in each], axis=1), np.concatenate([v for _, v in each], axis=1))
            for each in zip(*pieces, strict=True)
        )
    for pair in layers:
        for array in pair:
            array.flags.writeable = False
    return layers
