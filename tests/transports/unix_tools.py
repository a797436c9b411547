"""What tests of unix sockets share: KV in one arena, and a served endpoint that leaks no descriptor."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np

from avp.buffers import STORAGE
from avp.context import Context
from avp.manifest import Limits
from avp.protocols import Channel
from avp.security import Security
from avp.segment import Exactness, cut_segments
from avp.shared import MemoryFile, SharedTensors, arena_bytes
from avp.testing.echo import EchoEndpoint
from avp.testing.synthetic import synthetic_context
from avp.transports.unix import UnixTransport

QUICK = UnixTransport(patience=0.2, grace=1.0)


def shared_context(*, tokens: int = 600, seed: int = 0) -> tuple[Context, MemoryFile]:
    """A context whose KV lies in one arena with slack, as a connector leaves it."""
    plain = synthetic_context(layers=3, kv_heads=2, tokens=tokens, head_dim=32, seed=seed)
    assert plain.model is not None
    layout, capacity = plain.model.layout, tokens + 100
    file = MemoryFile.create(arena_bytes(layout, "bfloat16", capacity))
    whole = SharedTensors.of(file, layout, "bfloat16", capacity, 0, tokens)
    for layer in range(3):
        for part in ("k", "v"):
            rows = np.zeros((2, capacity, 32), STORAGE["bfloat16"])
            for segment in plain.segments:
                rows[:, segment.start : segment.stop] = segment.read(layer, part).array
            os.pwrite(file.fd, rows.tobytes(), whole.offsets[layer][part == "v"])
    segments = cut_segments(
        plain.model,
        plain.tokens,
        dtype="bfloat16",
        engine="synthetic",
        tensors=lambda start, stop: SharedTensors.of(file, layout, "bfloat16", capacity, start, stop),
        grade=lambda _stop: Exactness.EXACT,
    )
    return Context("kv", plain.model, plain.tokens, tokens, segments=segments), file


def open_files() -> list[str]:
    """What this process has open, apart from event loops."""
    gc.collect()
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if name.startswith(("/memfd:", "socket:")))


@asynccontextmanager
async def opened(tmp_path: Path, *, limits: Limits | None = None) -> AsyncIterator[tuple[EchoEndpoint, Channel, str]]:
    """A served endpoint, a channel and the path; afterwards no descriptor is open that was not before."""
    before = open_files()
    endpoint, path = EchoEndpoint(limits=limits), f"{tmp_path}/a.sock"
    listener = await QUICK.serve(endpoint, f"unix:{path}", security=Security())
    channel = QUICK.connect(listener.url, security=Security())
    try:
        yield endpoint, channel, path
    finally:
        await channel.close()
        await listener.close()
    async with asyncio.timeout(5):
        while open_files() != before:  # a thread may still be busy with a copy that nobody wants any more
            await asyncio.sleep(0.01)
