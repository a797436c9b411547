"""One hook for what happens and how long it takes: spans, for logs, traces and metrics.

`with span("send", segment=3): …` costs a clock reading when nobody listens. A listener is any callable that takes a
`Span`; `Trace` is one, whose file opens in chrome://tracing and Perfetto. No span holds prompt text, tokens or handles.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

Listener = Callable[["Span"], None]
logger = logging.getLogger("avp")


@dataclass(frozen=True, slots=True)
class Span:
    """Something that was done; seconds of `time.perf_counter`, which is one clock for all processes of a machine."""

    name: str
    start: float
    stop: float
    attributes: Mapping[str, object]
    thread: int

    def overlaps(self, other: Span) -> bool:
        """Whether both were under way at one time."""
        return self.start < other.stop and other.start < self.stop


class _Listeners:
    """Who is told; changed under a lock, read without."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.all: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        with self._lock:
            self.all = (*self.all, listener)

    def remove(self, listener: Listener) -> None:
        with self._lock:
            self.all = tuple(each for each in self.all if each is not listener)


_LISTENERS = _Listeners()


@contextmanager
def span(name: str, **attributes: object) -> Iterator[None]:
    """Tell the listeners, when the block ends, that it was done."""
    start = perf_counter()
    try:
        yield
    finally:
        if _LISTENERS.all:
            done = Span(name, start, perf_counter(), attributes, threading.get_ident())
            for listener in _LISTENERS.all:
                listener(done)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have a listener told of all that happens in this process while the block runs."""
    _LISTENERS.add(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def log_spans(done: Span) -> None:
    """A listener that writes each span to the logger "avp" at level DEBUG."""
    logger.debug("%s %.3f ms %s", done.name, 1e3 * (done.stop - done.start), dict(done.attributes))


class Trace:
    """A listener that keeps all spans; `save` writes them in the Chrome trace format."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __call__(self, done: Span) -> None:
        """Keep one."""
        self.spans.append(done)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        events = [
            {
                "name": done.name,
                "ph": "X",
                "ts": 1e6 * done.start,
                "dur": 1e6 * (done.stop - done.start),
                "pid": os.getpid(),
                "tid": done.thread,
                "args": {name: str(value) for name, value in done.attributes.items()},
            }
            for done in self.spans
        ]
        Path(path).write_text(json.dumps({"traceEvents": events}))
