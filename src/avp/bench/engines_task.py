"""What engines are compared on: windows of a text, and prompts; and how two sets of logits differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from avp.errors import UsageError

Floats = npt.NDArray[np.float32]
_ROWS = 50  # rows of logits at once, in float64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Positions that are handed over, and positions that are judged after them; whole pages are handed over, so that
    vLLM can load all of them.
    """

    window: int = 256
    judged: int = 100
    prompt: int = 96
    question: int = 8
    answer: int = 32


@dataclass(frozen=True, slots=True)
class Task:
    """Token ids out of a text that no engine has seen in training; windows and prompts do not overlap."""

    windows: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    sizes: Sizes = Sizes()

    @property
    def contexts(self) -> Iterator[tuple[int, ...]]:
        """The ids that are handed over: of the windows, then of the prompts."""
        yield from (ids[: self.sizes.window] for ids in self.windows)
        yield from (ids[: self.sizes.prompt] for ids in self.prompts)

    def save(self, path: Path) -> Path:
        """Write it for another process."""
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def load(cls, path: Path) -> Task:
        """What `save` wrote."""
        said = json.loads(path.read_text())
        windows, prompts = (tuple(tuple(ids) for ids in said[name]) for name in ("windows", "prompts"))
        return cls(windows, prompts, Sizes(**said["sizes"]))


def cut(ids: Sequence[int], *, positions: int, prompts: int, sizes: Sizes) -> Task:
    """Spread windows for `positions` judged positions, and `prompts` prompts, over a text.

    Raises:
        UsageError: the text is too short.
    """
    count = -(-positions // sizes.judged)
    lengths = [sizes.window + sizes.judged] * count + [sizes.prompt + sizes.question] * prompts
    room = len(ids) - sum(lengths)
    if room < 0:
        raise UsageError(
            f"the text has {len(ids)} tokens and {sum(lengths)} are needed. Fix: give a longer --data, or ask for less."
        )
    gap, at, pieces = room // max(len(lengths), 1), 0, []
    for length in lengths:
        pieces.append(tuple(ids[at : at + length]))
        at += length + gap
    return Task(tuple(pieces[:count]), tuple(pieces[count:]), sizes)


def best(rows: Floats) -> list[int]:
    """The likeliest token of each row of logits."""
    return [int(token) for token in rows.argmax(axis=1)]


def divergence(own: Floats, other: Floats) -> float:
    """The mean over the rows of KL(own || other), in nats, over the whole vocabulary."""
    total = 0.0
    for start in range(0, len(own), _ROWS):
        one, two = _logs(own[start : start + _ROWS]), _logs(other[start : start + _ROWS])
        total += float((np.exp(one) * (one - two)).sum())
    return total / len(own)


def _logs(rows: Floats) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    logs: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return logs
