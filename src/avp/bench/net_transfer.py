"""Hand-overs of a context between two processes, against a plain socket copy of the same bytes; and what is known."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter

from avp.bench.net_agent import TRANSPORTS, Receiver, receiving
from avp.bench.net_context import in_arena
from avp.bench.net_copy import copying
from avp.bench.peer import Shape
from avp.bench.perf_figure import Clock, Figure, Target, compare, rounds, speed
from avp.bench.perf_memory import NO_LINUX
from avp.bench.perf_wire import synthetic
from avp.blob import seal
from avp.context import Context
from avp.shared import SharedTensors

NEW = 64  # positions that the receiver does not know in the second hand-over
ROOM = 20e6  # bytes of memory that receiving may take beyond the context: the unit of that figure
_COPY = "plain copy over a {kind} socket into fresh memory ({memory}), its time / time of the hand-over"
_HUGE, _PAGES = "numpy's: huge pages", "the allocator's: pages of 4 KiB"
_PASSED = "; the memory file is passed, digests are checked by the receiver"
_FIRST = "; the sender hashes too: it never handed this context over before"
UNIX = Target(_COPY.format(kind="unix", memory=_PAGES) + _PASSED, at_least=3.0)
UNIX_HUGE = Target(_COPY.format(kind="unix", memory=_HUGE) + _PASSED, at_least=3.0)
UNIX_FIRST = Target(_COPY.format(kind="unix", memory=_PAGES) + _FIRST)
UNIX_COPIED = Target(_COPY.format(kind="unix", memory=_HUGE) + "; the KV lies in ordinary memory and must be copied")
HTTP = Target(_COPY.format(kind="TCP", memory=_HUGE), at_least=0.3)
GRPC = Target(_COPY.format(kind="TCP", memory=_HUGE), at_least=0.25)
DELTA = f"a first hand-over; a second one of which all but {NEW} positions are known, its "
DELTA_BYTES = Target(DELTA + "bytes on the socket / the first's", at_most=0.03)
DELTA_TIME = Target(DELTA + "time / the first's", at_most=0.1)
MEMORY = Target("20 MB; the receiver's peak of resident memory beyond the bytes of the context / it", at_most=1.0)


def unix(shape: Shape, *, n: int) -> list[Figure]:
    """`unix:` where the context's memory is passed, and where it must be copied."""
    shared, plain = in_arena(shape), synthetic(shape)
    data = wire_bytes(shared)
    with receiving() as receiver, copying() as copies:
        clocks = {
            "known": receiver.clock(shared, "unix"),
            "first": _unhashed(shared, receiver.clock(shared, "unix")),
            "copied": receiver.clock(plain, "unix"),
            "pages": copies.clock("unix", "pages", [data]),
            "huge": copies.clock("unix", "huge", [data]),
        }
        seconds = rounds(clocks, n)
    detail = _detail(len(data), seconds)
    return [
        compare("unix", seconds["pages"], seconds["known"], UNIX, **detail),
        compare("unix_huge_pages", seconds["huge"], seconds["known"], UNIX_HUGE, **detail),
        compare("unix_first", seconds["pages"], seconds["first"], UNIX_FIRST, **detail),
        compare("unix_copied", seconds["huge"], seconds["copied"], UNIX_COPIED, **detail),
    ]


def tcp(shape: Shape, *, n: int) -> list[Figure]:
    """HTTP/1.1 and gRPC."""
    context = in_arena(shape)
    data = wire_bytes(context)
    with receiving() as receiver, copying() as copies:
        clocks = {name: receiver.clock(context, name) for name in ("http", "grpc")}
        clocks |= {memory: copies.clock("tcp", memory, [data]) for memory in ("huge", "pages")}
        seconds = rounds(clocks, n)
    detail = _detail(len(data), seconds)
    return [
        compare("http", seconds["huge"], seconds["http"], HTTP, **detail),
        compare("grpc", seconds["huge"], seconds["grpc"], GRPC, **detail),
    ]


def delta(shape: Shape, *, n: int) -> list[Figure]:
    """A second hand-over of a context that is mostly known, over HTTP and gRPC."""
    context = in_arena(shape)
    known = context[: len(context) - NEW]
    figures: list[Figure] = []
    with receiving() as receiver:
        for transport in ("http", "grpc"):
            rows: list[tuple[int, float, int, float]] = []
            for _ in range(n + 1):
                rows.append((*_timed(receiver, known, transport), *_timed(receiver, context, transport)))
                receiver.forget()
            first_bytes, first, second_bytes, second = zip(*rows[1:], strict=True)  # the first round is a warm one
            detail = {"first_bytes": first_bytes[0], "second_bytes": second_bytes[0]}
            times = {"first_seconds": median(first), "second_seconds": median(second)}
            figures += [
                compare(f"delta_bytes_{transport}", second_bytes, first_bytes, DELTA_BYTES, **detail),
                compare(f"delta_time_{transport}", second, first, DELTA_TIME, **times),
            ]
    return figures


def memory(shape: Shape, *, n: int) -> list[Figure]:
    """What receiving takes beyond the context itself, at its peak, in `n` new processes for each transport."""
    if sys.platform != "linux":
        return [Figure(f"memory_{each}", MEMORY, not_measured=NO_LINUX) for each in TRANSPORTS]
    context = in_arena(shape)
    figures: list[Figure] = []
    for transport in TRANSPORTS:
        extra = [_growth(context, transport) - context.nbytes for _ in range(n)]
        detail = {"context_bytes": context.nbytes, "extra_bytes": median(extra)}
        ratios = tuple(each / ROOM for each in extra)
        figures.append(Figure(f"memory_{transport}", MEMORY, ratios, detail))
    return figures


def _growth(context: Context, transport: str) -> int:
    """Bytes by which a new process grew at its peak, while it received; it had received something small before."""
    with receiving() as receiver:
        receiver.forget(receiver.hand_over(context[:1], transport))
        receiver.far.ask("watch")
        receiver.hand_over(context, transport)
        return int(receiver.far.number("growth"))


def wire_bytes(context: Context) -> bytes:
    """The bytes of a context as they travel, raw."""
    if context.model is None:
        raise AssertionError("a synthetic context has a model")
    return b"".join(run for segment in context.segments for run in seal(context.model, segment).runs)


def _unhashed(context: Context, clock: Clock) -> Clock:
    """The clock, of a context whose digests are not known yet."""

    def once() -> float:
        for segment in context.segments:
            if isinstance(segment.tensors, SharedTensors):
                segment.tensors.file.digests.clear()
        return clock()

    return once


def _timed(receiver: Receiver, context: Context, transport: str) -> tuple[int, float]:
    """Bytes on the socket and seconds of a hand-over."""
    started = perf_counter()
    handle = receiver.hand_over(context, transport)
    seconds = perf_counter() - started
    return 0 if handle.receipt is None else handle.receipt.bytes_sent, seconds


def _detail(size: int, seconds: Mapping[str, Sequence[float]]) -> dict[str, object]:
    medians = {f"{name}_seconds": median(values) for name, values in seconds.items()}
    return {"bytes": size, **medians, **{f"{name}_GB_per_s": speed(size, values) for name, values in seconds.items()}}
