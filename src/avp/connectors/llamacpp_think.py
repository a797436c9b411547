"""Latent steps in llama.cpp: the embedding tables of the GGUF file, and projections over them, made at first use."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

import numpy as np

from avp import registry
from avp.connectors.llamacpp_engine import Floats
from avp.connectors.llamacpp_model import ModelFile
from avp.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from avp.protocols import Step

_INPUT, _OUTPUT = "token_embd.weight", "output.weight"


class FileTables:
    """`w_in` and `w_out`, [vocabulary, hidden], and the factor that the model's input layer puts on a row."""

    def __init__(self, model: ModelFile) -> None:
        self.w_in: torch.Tensor = _table(model, _INPUT)
        tied = _OUTPUT not in model.header.tensors
        self.w_out: torch.Tensor = self.w_in if tied else _table(model, _OUTPUT)
        self.scale = float(self.w_in.shape[-1]) ** 0.5 if model.family == "gemma3" else 1.0


class Stepper:
    """The latent steps of one model, by method."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self._tables: FileTables | None = None
        self._steps: dict[str, Step] = {}
        self._lock = threading.Lock()

    def tables(self) -> FileTables:
        """The tables, read at the first use."""
        self._tables = self._tables or FileTables(self._model)
        return self._tables

    def step(self, method: str) -> Callable[[Floats], Floats]:
        """Hidden state, [hidden], to the next input vector, [hidden].

        Raises:
            UsageError: no such method. MissingExtra: torch or gguf is not installed.
        """
        with self._lock:
            if method not in self._steps:
                projection = registry.projection(method)
                self._steps[method] = projection.fit(self.tables(), self.tables())
            fitted = self._steps[method]
        return lambda hidden: _apply(fitted, hidden)


def _apply(step: Step, hidden: Floats) -> Floats:
    import torch

    with torch.no_grad():
        vector: Floats = step(torch.from_numpy(hidden[None]))[0].numpy()
    return vector


def _table(model: ModelFile, name: str) -> torch.Tensor:
    """A tensor of the file, dequantised to float32."""
    try:
        import gguf
        import torch
    except ImportError as error:
        raise registry.missing_extra(error, feature="think") from error
    place = model.header.tensors.get(name)
    if place is None or len(place.shape) != 2:
        raise UsageError(f"{model.path} has no table {name}, which latent steps need. Fix: hand over text.")
    wide, rows = place.shape
    kind = gguf.GGMLQuantizationType(place.kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    with model.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        raw = np.frombuffer(blob[place.offset : place.offset + rows * wide // block * size], np.uint8)
    return torch.from_numpy(np.asarray(gguf.dequantize(raw, kind), np.float32).reshape(rows, wide))
