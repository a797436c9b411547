"""A figure of `avp bench perf`: a ratio within one run on one machine, with what it is measured against."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

Clock = Callable[[], float]  # does something once and returns the seconds that count


@dataclass(frozen=True, slots=True)
class Target:
    """The control of a figure and the ratio to reach; a figure without a limit is only reported."""

    control: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> float | None:
        """The ratio to reach, whichever side is the good one."""
        return self.at_least if self.at_least is not None else self.at_most

    def reached(self, value: float) -> bool | None:
        """Whether `value` is on the good side; None where there is no limit."""
        if self.at_least is not None:
            return value >= self.at_least
        return None if self.at_most is None else value <= self.at_most


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of `ratios`, or the reason why there are none."""

    name: str
    target: Target
    ratios: tuple[float, ...] = ()
    detail: Mapping[str, object] = field(default_factory=dict)
    not_measured: str = ""

    @property
    def value(self) -> float | None:
        """The median ratio; None if it was not measured."""
        return median(self.ratios) if self.ratios else None

    @property
    def reached(self) -> bool | None:
        """Whether the target was reached; None if there is none, or nothing was measured."""
        return None if self.value is None else self.target.reached(self.value)

    @property
    def spread(self) -> tuple[float | None, float | None]:
        """The smallest and the largest ratio of one round."""
        return (min(self.ratios), max(self.ratios)) if self.ratios else (None, None)

    def to_json(self) -> dict[str, object]:
        """One entry of the document's results."""
        return {
            "name": self.name,
            "value": self.value,
            "target": self.target.limit,
            "bound": "at least" if self.target.at_least is not None else "at most",
            "unit": "ratio",
            "reached": self.reached,
            "n": len(self.ratios),
            "low": self.spread[0],
            "high": self.spread[1],
            "control": self.target.control,
            "detail": dict(self.detail),
            "not_measured": self.not_measured or None,
        }


def timed(call: Callable[[], object], *, times: int = 1) -> Clock:
    """A clock of `call`; its result is thrown away after the clock has stopped.

    Calls of a few milliseconds are done several `times` in a row: their median is one round.
    """

    def once() -> float:
        started = perf_counter()
        result = call()
        seconds = perf_counter() - started
        del result
        return seconds

    return lambda: median(once() for _ in range(times))


def rounds(clocks: Mapping[str, Clock], n: int, *, warm: int = 1) -> dict[str, tuple[float, ...]]:
    """`n` rounds over all clocks, in turning order, after `warm` rounds that do not count; seconds by name."""
    names = list(clocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for index in range(-warm, n):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            taken = clocks[name]()
            if index >= 0:
                seconds[name].append(taken)
    return {name: tuple(values) for name, values in seconds.items()}


def compare(name: str, over: Sequence[float], under: Sequence[float], target: Target, **detail: object) -> Figure:
    """The figure `over` / `under`, round by round."""
    return Figure(name, target, tuple(one / other for one, other in zip(over, under, strict=True)), detail)


def speed(count: int, seconds: Sequence[float]) -> float:
    """Bytes per second, in GB, at the median."""
    return count / median(seconds) / 1e9
