"""Between arenas and contexts: what a run left becomes a context; the segments of a received one fill an arena."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from avp.buffers import Buffer
from avp.connectors.arena import SLACK, Arena, Shape, Snapshot
from avp.connectors.chat import Plan
from avp.context import Context
from avp.errors import UsageError
from avp.identity import ModelIdentity
from avp.protocols import Tensors
from avp.segment import LATENT, Exactness, Want, cut_segments, worst
from avp.shared import SharedTensors

ENGINE = "transformers"
_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32", "float16" or "bfloat16".

    Raises:
        UsageError: another one.
    """
    found = next((name for name, each in _TORCH.items() if each == dtype), None)
    if found is None:
        raise UsageError(
            f"the model computes in {dtype}, which AVP does not carry. Fix: load it in {', '.join(_TORCH)}."
        )
    return found


@dataclass(frozen=True, slots=True, eq=False)
class ArenaTensors:
    """The KV of the positions [start, stop) of an arena; read in place on the CPU, copied to the host from a device."""

    arena: Arena
    start: int
    stop: int

    def read(self, layer: int, part: str) -> Buffer:
        """K or V of a layer, [kv_heads, stop - start, head_dim]."""
        rows = self.arena.keys[layer] if part == "k" else self.arena.values[layer]
        return to_buffer(rows[0, :, self.start : self.stop])


def _tensors(arena: Arena, start: int, stop: int) -> Tensors:
    """Positions of an arena, in such a form that another process can map them where that is possible."""
    if arena.file is None:
        return ArenaTensors(arena, start, stop)
    dtype = dtype_name(arena.shape.dtype)
    return SharedTensors.of(arena.file, arena.shape.layout, dtype, arena.capacity, start, stop)


def to_buffer(tensor: torch.Tensor) -> Buffer:
    """A tensor as a buffer; a view if it is on the CPU."""
    host = tensor.detach().cpu()
    name = dtype_name(host.dtype)
    array = host.view(torch.uint16).numpy() if name == "bfloat16" else host.numpy()
    array.flags.writeable = False
    return Buffer(name, array)


def to_tensor(buffer: Buffer, device: torch.device) -> torch.Tensor:
    """A buffer as a tensor of its own."""
    tensor = torch.from_numpy(np.array(buffer.array))
    return (tensor.view(torch.bfloat16) if buffer.dtype == "bfloat16" else tensor).to(device)


def make_context(
    identity: ModelIdentity, snapshot: Snapshot, plan: Plan, base: Context | None, *, hidden: Buffer | None = None
) -> Context:
    """The context of what a run computed: `plan.ids`, of which the snapshot holds the KV."""
    arena, length = snapshot.arena, snapshot.length
    segments = cut_segments(
        identity,
        plan.ids[:length],
        dtype=dtype_name(arena.shape.dtype),
        engine=ENGINE,
        tensors=lambda start, stop: _tensors(arena, start, stop),
        grade=_grades(plan, base, dtype_name(arena.shape.dtype)),
    )
    exactness = worst(segment.exactness for segment in segments)
    return Context("kv", identity, plan.ids, length, plan.turns, plan.template, segments, hidden, exactness)


def _grades(plan: Plan, base: Context | None, dtype: str) -> Callable[[int], Exactness]:
    """Exactness up to a position: that of the base where it was reused, and no better behind latent positions."""
    latent = next((i for i, token in enumerate(plan.ids) if token == LATENT), len(plan.ids))
    old = base.segments if base is not None and plan.reuse else ()
    want = Want(ENGINE, dtype)

    def grade(stop: int) -> Exactness:
        parts = [want.grade(segment) for segment in old if segment.start < min(stop, plan.reuse)]
        return worst([*parts, Exactness.APPROXIMATE if latent < stop else Exactness.EXACT])

    return grade


def from_segments(context: Context, shape: Shape) -> Snapshot:
    """An arena filled from a context's segments; one copy of the KV, into the device's memory.

    Raises:
        UsageError: segments are missing. DigestMismatch: their bytes are not those that were written.
    """
    covered = 0
    for segment in context.segments:
        if segment.start != covered:
            break
        covered = segment.stop
    if covered != len(context):
        raise UsageError(f"the context lacks the KV from position {covered} on. Fix: fetch the missing segments first.")
    adopted = _adopt(context, shape)
    if adopted is not None:
        return adopted
    arena = Arena.empty(shape, len(context) + SLACK)

    def fill_layer(layer: int) -> None:
        for segment in context.segments:
            for part, rows in (("k", arena.keys[layer]), ("v", arena.values[layer])):
                _fill(rows[0, :, segment.start : segment.stop], segment.read(layer, part))

    # First writes wait for the kernel to hand out pages; two threads wait half as long.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill_layer, range(len(shape.layout.layers))))
    arena.used = len(context)
    return Snapshot(arena, len(context))


def _adopt(context: Context, shape: Shape) -> Snapshot | None:
    """The arena in which all segments already lie, if there is one and this process can map it; nothing is copied."""
    first = context.segments[0].tensors if context.segments else None
    if not isinstance(first, SharedTensors) or shape.device.type != "cpu":
        return None
    if (first.layout, first.dtype) != (shape.layout, dtype_name(shape.dtype)):
        return None
    for segment in context.segments:
        tensors = segment.tensors
        if not isinstance(tensors, SharedTensors) or tensors.file is not first.file:
            return None
        if (tensors.capacity, tensors.start, tensors.stop) != (first.capacity, segment.start, segment.stop):
            return None
    return Snapshot(Arena.adopt(shape, first.file, first.capacity, len(context)), len(context))


def _fill(rows: torch.Tensor, buffer: Buffer) -> None:
    """Copy a buffer into a view of the arena, cast where the dtypes differ."""
    if rows.device.type == "cpu" and _TORCH[buffer.dtype] == rows.dtype:
        host = rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
        np.copyto(host, buffer.array)
    else:
        rows.copy_(to_tensor(buffer, rows.device))
