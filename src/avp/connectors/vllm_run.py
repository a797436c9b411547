"""One generation by a vLLM engine: its pieces as they come, and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from time import perf_counter

from avp.connectors.vllm_engine import Answer, Ask, Engine
from avp.errors import UsageError
from avp.receipt import Generation
from avp.segment import PAGE, Exactness


@dataclass(slots=True)
class Run:
    """What came so far of an answer, and when."""

    started: float = field(default_factory=perf_counter)
    first: float = 0.0
    answer: Answer = field(default_factory=Answer)

    def take(self, piece: Answer) -> None:
        """One more piece."""
        if piece.ids and not self.first:
            self.first = perf_counter()
        self.answer = replace(
            self.answer,
            text=self.answer.text + piece.text,
            ids=self.answer.ids + piece.ids,
            ended=piece.ended or self.answer.ended,
            report=piece.report or self.answer.report,
            cached=self.answer.cached if piece.cached is None else piece.cached,
        )

    def seconds(self) -> dict[str, float]:
        """Wall times up to now, by stage."""
        now = perf_counter()
        stages = {"ttft": self.first - self.started, "decode": now - self.first} if self.first else {}
        return {**stages, "total": now - self.started}

    @property
    def exactness(self) -> Exactness:
        """The class of the KV that was used, as far as the plug-in was heard."""
        return Exactness.parse(str(self.answer.report.get("exactness", "exact")))

    def counts(self, prompt: int, reuse: int) -> tuple[int, int, tuple[str, ...]]:
        """Positions that came from a cache, positions that were computed, and what there is to say; `reuse` of the
        prompt's positions were there to be taken.
        """
        report, decoded = self.answer.report, max(len(self.answer.ids) - 1, 0)
        if report:
            cached, computed = _number(report, "local") + _number(report, "loaded"), _number(report, "computed")
            said = report.get("reasons")
            reasons = tuple(str(each) for each in said) if isinstance(said, list) else ()
        elif self.answer.cached is not None:
            cached, reasons = self.answer.cached, ()
            computed = prompt - cached + decoded
        else:
            cached, computed = 0, prompt + decoded
            reasons = ("vLLM does not say what it took from its cache (serve with --enable-prompt-tokens-details)",)
        if cached < reuse // PAGE * PAGE:
            reasons = (*reasons, f"vLLM took {cached} of {reuse} positions from its cache and the store")
        return cached, computed, reasons


def _number(report: Mapping[str, object], name: str) -> int:
    found = report.get(name)
    return found if isinstance(found, int) else 0


def complete(engine: Engine, ask: Ask) -> Run:
    """The whole at once; when its first token came is not known."""
    run = Run()
    run.answer = engine.complete(ask)
    return run


class VLLMStream:
    """The pieces of a generation as vLLM sends them; `result` is the whole. Close it to end the run early."""

    def __init__(self, engine: Engine, ask: Ask, finish: Callable[[Run], Generation]) -> None:
        self._run = Run()
        self._pieces = engine.stream(ask)
        self._finish = finish
        self._result: Generation | None = None
        self._closed = False

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self._run.take(piece)
            if piece.text:
                yield piece.text

    @property
    def result(self) -> Generation:
        """The whole generation; reads what is left of it.

        Raises:
            UsageError: it was closed before its end. ConnectionFailed: vLLM went away.
        """
        if self._result is None:
            for piece in self._pieces:
                self._run.take(piece)
            if self._closed and not self._run.answer.ended:
                raise UsageError("the stream was closed before its end. Fix: read it before closing it.")
            self._result = self._finish(self._run)
        return self._result

    def close(self) -> None:
        """End the request at the server."""
        self._closed = True
        self._pieces.close()

    def __enter__(self) -> VLLMStream:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()
