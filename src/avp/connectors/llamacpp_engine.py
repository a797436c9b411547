"""llama.cpp's C library, as much of it as AVP uses; every call of it is here.

One context of the library with one unified KV cache: sequences are numbered, share cells, and are copied without
copying KV. Whoever computes, copies, reads or writes sequences holds `Engine.lock` over the call and over the use of
what it returns: logits are a view of the library's memory, good until the next `decode`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np
import numpy.typing as npt

from avp.errors import AVPError, ModelNotFound, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BATCH = 256  # tokens of one call of llama_decode
TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
_NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"
_OPENING = threading.Lock()  # the environment is one
_LOG = logging.getLogger("avp.llamacpp")


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes | None, user_data: int | None) -> None:
    """What the library would print; its failures come as exceptions as well."""
    if _LOG.isEnabledFor(logging.DEBUG):
        _LOG.debug("%s", (text or b"").decode(errors="replace").rstrip())


llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


@dataclass(frozen=True, slots=True)
class Drawing:
    """How the next token is drawn; temperature 0 is greedy, seed None is the library's own random one."""

    temperature: float
    top_p: float
    seed: int | None


class Engine:
    """A model, and one context of it with `positions` cells and `sequences` sequences."""

    def __init__(
        self, path: Path, *, positions: int, sequences: int, cache: str, threads: int | None = None, gpu: bool = False
    ) -> None:
        """`cache` is the type of the KV: "float32", "float16" or "q8_0".

        Raises:
            ModelNotFound: the library cannot load the file. UsageError: no such cache type.
        """
        if cache not in TYPES:
            raise UsageError(f"dtype {cache!r} is not supported. Fix: use one of {', '.join(TYPES)}.")
        llama_cpp.llama_backend_init()
        self.lock = threading.RLock()
        self.cache = cache
        self.positions, self.sequences = positions, sequences
        self.computed = 0  # positions that went through llama_decode
        self.bytes_read = 0  # bytes of state that left the engine
        self.bytes_written = 0  # bytes of state that came in
        self._model = _load(path, gpu)
        self._context = _open(self._model, positions, sequences, TYPES[cache], threads)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary = int(llama_cpp.llama_vocab_n_tokens(self.vocab))
        self.width = int(llama_cpp.llama_model_n_embd(self._model))
        self.window = int(llama_cpp.llama_model_n_swa(self._model))
        self._tokens = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._vectors = llama_cpp.llama_batch_init(1, self.width, 1)
        weakref.finalize(self, _free, self._context, self._model, (self._tokens, self._vectors))

    # --- computing

    def decode(self, ids: Sequence[int], *, sequence: int, start: int, every: bool = False) -> int:
        """Compute at most `BATCH` ids at positions from `start` on; logits after the last, or after each. How many
        positions the library was given.

        Raises:
            AVPError: the library refused.
        """
        batch, count = self._tokens, len(ids)
        np.ctypeslib.as_array(batch.token, (count,))[:] = ids
        return self._decode(batch, count, sequence, start, every)

    def decode_vector(self, vector: Floats, *, sequence: int, start: int) -> int:
        """Compute one position from its input vector, [hidden]. Raises as `decode`."""
        np.ctypeslib.as_array(self._vectors.embd, (self.width,))[:] = vector
        return self._decode(self._vectors, 1, sequence, start, False)

    def _decode(self, batch: llama_cpp.llama_batch, count: int, sequence: int, start: int, every: bool) -> int:
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.pos, (count,))[:] = np.arange(start, start + count)
        np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (count,))[:] = every
        batch.logits[count - 1] = 1
        first = self._owners(sequence)[0]
        for i in range(count):
            batch.seq_id[i][0] = first
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise AVPError(
                f"llama_decode of {count} positions from {start} on ended with status {status}. "
                'Fix: log "avp.llamacpp" at DEBUG to see what the library says.'
            )
        if self.window:
            self.copy(sequence, sequence, start=start, stop=start + count)
        self.computed += batch.n_tokens
        return int(batch.n_tokens)

    def logits(self, index: int = -1) -> Floats:
        """Logits after the position `index` of the last batch, [vocabulary]: the library's memory, to be written to."""
        found = llama_cpp.llama_get_logits_ith(self._context, index)
        return np.ctypeslib.as_array(found, (self.vocabulary,))

    @contextmanager
    def hidden_states(self) -> Iterator[None]:
        """Within it, `hidden` is there after a `decode`; every position of a batch then costs logits."""
        llama_cpp.llama_set_embeddings(self._context, True)
        try:
            yield
        finally:
            llama_cpp.llama_set_embeddings(self._context, False)

    def hidden(self) -> Floats:
        """The hidden state after the final norm at the last position of the last batch, [hidden]."""
        found = llama_cpp.llama_get_embeddings_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self.width,)).copy()

    # --- sequences

    def copy(self, source: int, target: int, *, start: int, stop: int) -> None:
        """Let `target` share the positions [start, stop) of `source`; no KV is copied."""
        for each in self._owners(target):
            llama_cpp.llama_memory_seq_cp(self._memory, self._owners(source)[0], each, start, stop)

    def drop(self, sequence: int) -> None:
        """Forget a sequence; cells that no other one shares are free."""
        for each in self._owners(sequence):
            llama_cpp.llama_memory_seq_rm(self._memory, each, -1, -1)

    def clear(self) -> None:
        """Forget all sequences."""
        llama_cpp.llama_memory_clear(self._memory, False)

    def read(self, sequence: int, start: int, stop: int) -> Bytes:
        """The state blob of the positions [start, stop), at most a window of them: behind it the library leaves out
        what its own sequences no longer need.
        """
        number = self._owners(self._scratch)[0]
        self.copy(sequence, self._scratch, start=start, stop=stop)
        try:
            size = llama_cpp.llama_state_seq_get_size(self._context, number)
            blob = np.empty(size, np.uint8)
            target = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            done = llama_cpp.llama_state_seq_get_data(self._context, target, size, number)
        finally:
            self.drop(self._scratch)
        if done != size or not size:
            raise AVPError(f"llama.cpp gave {done} of {size} bytes of state. Fix: report it, with the model's name.")
        self.bytes_read += size
        return blob

    def write(self, sequence: int, blob: Bytes, *, start: int, stop: int) -> None:
        """Add the positions [start, stop), which are those of a state blob, to a sequence; they take the next cells.

        Raises:
            AVPError: the library refused it.
        """
        source = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        number = self._owners(self._scratch)[0]
        try:
            if llama_cpp.llama_state_seq_set_data(self._context, source, blob.size, number) != blob.size:
                raise AVPError(
                    f"llama.cpp refused {blob.size} bytes of state of {stop - start} positions. "
                    'Fix: log "avp.llamacpp" at DEBUG to see why.'
                )
            self.copy(self._scratch, sequence, start=start, stop=stop)
        finally:
            self.drop(self._scratch)
        self.bytes_written += blob.size

    def bury(self, blob: Bytes, *, length: int) -> None:
        """Take the next `length` cells, for nobody."""
        self.write(self._grave, blob, start=0, stop=length)

    def bury_sequence(self, sequence: int, start: int, stop: int) -> None:
        """Keep the cells of positions [start, stop) taken when the sequence is dropped."""
        self.copy(sequence, self._grave, start=start, stop=stop)

    def _owners(self, sequence: int) -> tuple[int, ...]:
        """The library's numbers of a sequence. A cell of one owner counts as free once it is behind the window, though
        contexts still hold it: there each has two.
        """
        return (2 * sequence, 2 * sequence + 1) if self.window else (sequence,)

    @property
    def _scratch(self) -> int:
        return self.sequences

    @property
    def _grave(self) -> int:
        return self.sequences + 1

    # --- text

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text in which special tokens may be spelled out; `special`: with the BOS that the model wants."""
        data = text.encode()
        room = len(data) + 8
        while True:
            ids = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self.vocab, data, len(data), ids, room, special, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, room, 0, False)
            if count >= 0:
                return bytes(buffer.raw[:count])
            room = -count

    def spelling(self, token: int) -> str:
        """A token as the vocabulary spells it."""
        return bytes(llama_cpp.llama_vocab_get_text(self.vocab, token) or b"").decode(errors="replace")

    def ends(self, token: int) -> bool:
        """Whether the token ends a turn."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    # --- drawing

    @contextmanager
    def sampler(self, drawing: Drawing) -> Iterator[Sampler]:
        """llama.cpp's sampler chain for one run."""
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        if drawing.temperature:
            seed = llama_cpp.LLAMA_DEFAULT_SEED if drawing.seed is None else drawing.seed % llama_cpp.LLAMA_DEFAULT_SEED
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(drawing.temperature))
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(drawing.top_p, 1))
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(seed))
        else:
            llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        try:
            yield Sampler(chain, self._context)
        finally:
            llama_cpp.llama_sampler_free(chain)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A chain of one run."""

    chain: ctypes.c_void_p
    context: ctypes.c_void_p

    def draw(self) -> int:
        """A token by the logits after the last position of the last batch; what follows knows that it was taken."""
        return int(llama_cpp.llama_sampler_sample(self.chain, self.context, -1))


def offloads() -> bool:
    """Whether the library was built for a GPU that is here."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def _load(path: Path, gpu: bool) -> ctypes.c_void_p:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = -1 if gpu else 0
    model: ctypes.c_void_p | None = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ModelNotFound(
            f"llama.cpp cannot load {path}. Fix: check that the file is whole, or get a newer llama-cpp-python; "
            '"avp.llamacpp" logged at DEBUG says what it lacks.'
        )
    return model


def _open(model: ctypes.c_void_p, positions: int, sequences: int, cache: int, threads: int | None) -> ctypes.c_void_p:
    """A context. A quantised V needs flash attention, and is not to be rotated: its rows would not be V."""
    quantised = cache == llama_cpp.GGML_TYPE_Q8_0
    windowed = bool(llama_cpp.llama_model_n_swa(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = positions
    params.n_batch = params.n_ubatch = BATCH
    params.n_seq_max = (sequences + 2) * (2 if windowed else 1)
    params.n_threads = params.n_threads_batch = threads or len(os.sched_getaffinity(0))
    params.type_k = params.type_v = cache
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if quantised else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    params.swa_full = params.kv_unified = True
    params.no_perf = True
    with _OPENING:
        before = os.environ.get(_NO_ROTATION)
        os.environ[_NO_ROTATION] = "1"
        try:
            context: ctypes.c_void_p | None = llama_cpp.llama_init_from_model(model, params)
        finally:
            if before is None:
                del os.environ[_NO_ROTATION]
            else:
                os.environ[_NO_ROTATION] = before
    if not context:
        raise AVPError(
            f"llama.cpp cannot make a context of {positions} positions. Fix: ask for fewer, or for a smaller dtype; "
            '"avp.llamacpp" logged at DEBUG says why.'
        )
    return context


def _free(
    context: ctypes.c_void_p, model: ctypes.c_void_p, batches: tuple[llama_cpp.llama_batch, llama_cpp.llama_batch]
) -> None:
    for batch in batches:
        llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
