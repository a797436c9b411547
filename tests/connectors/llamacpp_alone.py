"""llama.cpp through its own API, without AVP: one sequence in its cache, greedy."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
UBATCH = 256


class LlamaAlone:
    """A context of one sequence; batches end at multiples of 256, as AVP's do."""

    def __init__(self, path: Path, *, positions: int = 2048, sequence: int = 0) -> None:
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = positions, UBATCH, UBATCH, 1
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.swa_full = params.kv_unified = True
        self.context = llama.llama_init_from_model(self.model, params)
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.size = llama.llama_vocab_n_tokens(self.vocab)
        self.ends = [token for token in range(self.size) if llama.llama_vocab_is_eog(self.vocab, token)]
        self.sequence = sequence
        self.length = 0
        self.pending: list[int] = []
        weakref.finalize(self, free, self.context, self.model)

    def feed(self, ids: Sequence[int]) -> None:
        rest = list(ids)
        while rest:
            now, rest = rest[: UBATCH - self.length % UBATCH], rest[UBATCH - self.length % UBATCH :]
            batch = llama.llama_batch_init(len(now), 0, 1)
            batch.n_tokens = len(now)
            for i, token in enumerate(now):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.length + i, 1
                batch.seq_id[i][0], batch.logits[i] = self.sequence, i == len(now) - 1
            assert llama.llama_decode(self.context, batch) == 0
            llama.llama_batch_free(batch)
            self.length += len(now)

    def logits(self) -> np.ndarray:
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, -1), (self.size,)).copy()

    def run(self, ids: Sequence[int], max_new_tokens: int) -> tuple[int, ...]:
        self.feed([*self.pending, *ids])
        self.pending, new = [], []
        for _ in range(max_new_tokens):
            if self.pending:
                self.feed(self.pending)
            logits = self.logits()
            logits[self.ends] = -np.inf
            self.pending = [int(logits.argmax())]
            new += self.pending
        return tuple(new)

    def state(self) -> np.ndarray:
        """The blob of the whole sequence."""
        blob = np.empty(llama.llama_state_seq_get_size(self.context, self.sequence), np.uint8)
        target = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        assert llama.llama_state_seq_get_data(self.context, target, blob.size, self.sequence) == blob.size
        return blob


def free(context: object, model: object) -> None:
    llama.llama_free(context)
    llama.llama_model_free(model)


def changed(path: Path, target: Path) -> Path:
    """A copy of a GGUF file with one byte of one matrix changed: other weights in the same shapes."""
    from avp.connectors.gguf_header import read_header

    data = bytearray(path.read_bytes())
    place = read_header(path).tensors["blk.1.ffn_down.weight"]
    data[place.offset + 20] ^= 0x11
    target.write_bytes(data)
    return target
