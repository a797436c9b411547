"""Serialisation: `to_bytes`, `from_bytes` and `load` against a plain copy of the same bytes, and against the peer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

from avp.bench.peer import Peer, PeerUnavailable, Shape, running
from avp.bench.perf_figure import Clock, Figure, Target, compare, rounds, speed, timed
from avp.context import Context
from avp.testing.synthetic import synthetic_context

Tell = Callable[[str], object]
_COPY = "bytes(memoryview) of the same bytes into fresh memory, time of the copy / time of ours"
_PEER = "the same call of avp==0.6.2 on KV of the same shape, in its own process, its time / ours"
TO_BYTES = Target(_COPY, at_least=0.6)
TO_BYTES_PEER = Target(_PEER, at_least=2.0)
MAPPED = Target(_COPY, at_least=20.0)
VERIFIED = Target(_COPY, at_least=1.0)
FROM_BYTES_PEER = Target(_PEER, at_least=3.0)


def synthetic(shape: Shape) -> Context:
    """A bfloat16 context of that shape."""
    return synthetic_context(
        layers=shape.layers, kv_heads=shape.kv_heads, tokens=shape.tokens, head_dim=shape.head_dim, dtype="bfloat16"
    )


def to_bytes(shape: Shape, *, n: int, peer: str | None, tell: Tell) -> list[Figure]:
    """`Context.to_bytes` with digests; `peer` is the reason not to measure the peer, None to measure it."""
    context = synthetic(shape)
    data = context.to_bytes()
    seconds = rounds({"avp": timed(context.to_bytes), "copy": timed(lambda: bytes(memoryview(data)))}, n)
    own = compare("to_bytes", seconds["copy"], seconds["avp"], TO_BYTES, **_detail(len(data), seconds))
    return [own, _against_peer("to_bytes", timed(context.to_bytes), len(data), shape, TO_BYTES_PEER, n, peer, tell)]


def from_bytes(shape: Shape, *, n: int, peer: str | None, tell: Tell) -> list[Figure]:
    """`Context.from_bytes` and `Context.load`, with each way to verify."""
    data = synthetic(shape).to_bytes()
    with tempfile.TemporaryDirectory(prefix="avp-perf-") as folder:
        path = Path(folder) / "context.avp"
        path.write_bytes(data)
        calls: dict[str, tuple[Callable[[], object], Target]] = {
            "from_bytes": (lambda: Context.from_bytes(data, verify="use"), MAPPED),
            "load": (lambda: Context.load(path, verify="use"), MAPPED),
            "from_bytes_verified": (lambda: Context.from_bytes(data, verify="now"), VERIFIED),
            "load_verified": (lambda: Context.load(path, verify="now"), VERIFIED),
        }
        clocks = {name: timed(call, times=5) for name, (call, _) in calls.items()}
        seconds = rounds({"copy": timed(lambda: bytes(memoryview(data))), **clocks}, n)
    figures = []
    for name, (_, target) in calls.items():
        pair = {"copy": seconds["copy"], "avp": seconds[name]}
        figures.append(compare(name, seconds["copy"], seconds[name], target, **_detail(len(data), pair)))
    verified = timed(lambda: Context.from_bytes(data, verify="now"))
    return [*figures, _against_peer("from_bytes", verified, len(data), shape, FROM_BYTES_PEER, n, peer, tell)]


def _against_peer(
    call: str, ours: Clock, size: int, shape: Shape, target: Target, n: int, peer: str | None, tell: Tell
) -> Figure:
    """Ours and the peer's, by turns; the peer's process lives only here."""
    name = f"{call}_peer"
    if peer is not None:
        return Figure(name, target, not_measured=peer)
    try:
        with running(shape, tell=tell) as other:
            seconds = rounds({"avp": ours, "peer": _clock(other, call)}, n)
            detail = {**_detail(size, seconds), "peer_bytes": other.nbytes, "shape": asdict(shape)}
    except PeerUnavailable as error:
        return Figure(name, target, not_measured=str(error))
    return compare(name, seconds["peer"], seconds["avp"], target, **detail)


def _clock(peer: Peer, call: str) -> Clock:
    return lambda: peer.seconds(call)


def _detail(size: int, seconds: dict[str, tuple[float, ...]]) -> dict[str, object]:
    medians = {f"{name}_seconds": median(values) for name, values in seconds.items()}
    return {"bytes": size, **medians, **{f"{name}_GB_per_s": speed(size, values) for name, values in seconds.items()}}
