"""What `generate` is asked for, checked once for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avp.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn and when the turn ends; temperature 0 is greedy."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int | None

    @classmethod
    def of(
        cls, most: int, least: int, temperature: float, top_p: float, stop: str | Sequence[str], seed: int | None
    ) -> Sampling:
        """From the arguments of `generate`.

        Raises:
            UsageError: one of them is out of range.
        """
        return cls(most, least, temperature, top_p, (stop,) if isinstance(stop, str) else tuple(stop), seed)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not self.min_new_tokens >= 0:
            raise UsageError(
                f"max_new_tokens is {self.max_new_tokens}, min_new_tokens {self.min_new_tokens}. Fix: at least 1 and 0."
            )
        if "" in self.stop or (self.seed is not None and not 0 <= self.seed < 2**63):
            raise UsageError(f"stop is {self.stop}, seed {self.seed}. Fix: no empty stop string; 0 <= seed < 2**63.")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise UsageError(
                f"temperature is {self.temperature}, top_p {self.top_p}. Fix: temperature >= 0, 0 < top_p <= 1."
            )
