"""One run of llama.cpp over a sequence: compute, draw, decode; and the stream of its pieces."""

from __future__ import annotations

import threading
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from time import perf_counter

import numpy as np

from avp.connectors.llamacpp_engine import BATCH, Drawing, Engine, Floats, Sampler
from avp.connectors.llamacpp_memory import Run
from avp.connectors.llamacpp_text import LlamaText
from avp.connectors.options import Sampling
from avp.errors import UsageError
from avp.receipt import Generation
from avp.segment import LATENT


class Pass:
    """A run that grows; `positions` counts what the library was given to compute."""

    def __init__(self, engine: Engine, run: Run, vector: Floats | None) -> None:
        """`vector` stands for the first position to compute, should that be a latent one."""
        self.engine = engine
        self.run = run
        self.positions = 0
        self._vector = vector

    @property
    def length(self) -> int:
        """Positions that the sequence holds."""
        return self.run.length

    def feed(self, ids: Sequence[int], *, every: bool = False) -> None:
        """Compute ids, in batches that end where segments do; logits are those after the last, or, with `every`, after
        each of the last batch.
        """
        rest = list(ids)
        while rest:
            size = 1 if rest[0] == LATENT else BATCH - self.length % BATCH
            with self.engine.lock:
                self._compute(rest[:size], every)
            rest = rest[size:]

    def feed_vector(self, vector: Floats) -> None:
        """Compute one latent position."""
        with self.engine.lock:
            self._count(self.engine.decode_vector(vector, sequence=self.run.number, start=self.length))

    def _compute(self, ids: list[int], every: bool) -> None:
        sequence, start = self.run.number, self.length
        if ids[0] != LATENT:
            self._count(self.engine.decode(ids, sequence=sequence, start=start, every=every))
        elif self._vector is not None:
            self._count(self.engine.decode_vector(self._vector, sequence=sequence, start=start))
        else:
            raise UsageError(
                "the context ends in a latent position whose input vector it does not hold. Fix: pass a prompt."
            )

    def _count(self, positions: int) -> None:
        self.run.length += positions
        self.positions += positions


def write(
    going: Pass, text: LlamaText, ids: Sequence[int], sampling: Sampling, stream: Stream | None
) -> tuple[tuple[int, ...], float]:
    """Compute `ids`, then draw to the end of the turn; the new ids, and the clock when the first came."""
    engine, first, said = going.engine, 0.0, ""
    new: list[int] = []
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    drawing = Drawing(sampling.temperature, sampling.top_p, sampling.seed)
    with engine.sampler(drawing) as sampler:
        ahead = list(ids)
        while True:
            going.feed(ahead)
            token = _draw(engine, text, sampler, sampling.min_new_tokens > len(new))
            first = first or perf_counter()
            new.append(token)
            ahead = [token]
            piece = decoder.decode(text.piece(token))
            said += piece
            if stream is not None:
                stream.put(piece)
            if _done(token, new, said, piece, text, sampling) or (stream is not None and stream.cancelled.is_set()):
                break
    if stream is not None:
        stream.put(decoder.decode(b"", final=True))
    return tuple(new), first


def _draw(engine: Engine, text: LlamaText, sampler: Sampler, forbid_end: bool) -> int:
    if forbid_end:
        engine.logits()[list(text.ends)] = -np.inf
    return sampler.draw()


def _done(token: int, new: Sequence[int], said: str, piece: str, text: LlamaText, sampling: Sampling) -> bool:
    if text.engine.ends(token) or len(new) >= sampling.max_new_tokens:
        return True
    return any(each in said[-len(each) - len(piece) :] for each in sampling.stop)


class Stream:
    """The pieces of a generation as they come; `result` is the whole, after the last. Close it to end the run early."""

    def __init__(self, run: Callable[[Stream], Generation]) -> None:
        self.cancelled = threading.Event()
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._run = run
        self._result: Generation | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="avp-stream", daemon=True)
        self._thread.start()

    def put(self, piece: str) -> None:
        """Show a piece to the reader."""
        if piece:
            self._pieces.put(piece)

    def _work(self) -> None:
        try:
            self._result = self._run(self)
        except BaseException as error:  # noqa: BLE001 - handed to the reader of the stream, in its own thread
            self._error = error
        finally:
            self._pieces.put(None)

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # whoever reads again finds the end
        self._settle()

    @property
    def result(self) -> Generation:
        """The whole generation; waits for its end.

        Raises:
            what `generate` raises.
        """
        self._settle()
        if self._result is None:
            raise UsageError("the stream ended without a result. Fix: read it before closing it.")
        return self._result

    def close(self) -> None:
        """End the run at its next token and wait for it."""
        self.cancelled.set()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def _settle(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error
