"""What a benchmark measures, as values; and the one JSON document that it writes."""

from __future__ import annotations

import json
import os
import platform
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median


@dataclass(frozen=True, slots=True)
class Hop:
    """One agent's turn. `positions` are counted in the model's forward passes; times in seconds, sizes in bytes."""

    agent: str
    prompt_tokens: int
    positions: int
    new_tokens: int
    latent_steps: int
    bytes: int  # size of what was handed over to this agent: text, or state
    ttft: float
    seconds: float
    kv_bytes: int  # KV that this agent holds at the end of its turn
    text: str
    tokens: tuple[int, ...]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One chain on one question in one mode."""

    mode: str
    agents: int
    question: str
    exactness: str
    hops: tuple[Hop, ...]
    same_as_prefix: bool | None = None

    @property
    def positions(self) -> int:
        """Positions computed by all agents."""
        return sum(hop.positions for hop in self.hops)

    @property
    def seconds(self) -> float:
        """Wall time of all turns."""
        return sum(hop.seconds for hop in self.hops)

    def to_json(self) -> dict[str, object]:
        """The run with its totals."""
        return {
            "mode": self.mode,
            "agents": self.agents,
            "question": self.question,
            "exactness": self.exactness,
            "positions": self.positions,
            "prompt_tokens": sum(hop.prompt_tokens for hop in self.hops),
            "new_tokens": sum(hop.new_tokens for hop in self.hops),
            "latent_steps": sum(hop.latent_steps for hop in self.hops),
            "bytes": sum(hop.bytes for hop in self.hops),
            "seconds": self.seconds,
            "ttft": [hop.ttft for hop in self.hops],
            "kv_peak_bytes": max(hop.kv_bytes for hop in self.hops),
            "same_as_prefix": self.same_as_prefix,
            "answer": self.hops[-1].text,
            "hops": [asdict(hop) for hop in self.hops],
        }


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % bootstrap interval over `n` questions."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of `values` and its percentile bootstrap interval (2,000 resamples)."""
    drawn = random.Random(seed)
    means = sorted(mean(drawn.choices(values, k=len(values))) for _ in range(2000))
    return Interval(mean(values), means[49], means[1949], len(values))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share."""
    z, share = 1.959964, hits / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
    return middle - half, middle + half


def summarize(runs: Sequence[Run]) -> list[dict[str, object]]:
    """For each mode and number of agents: positions saved and speed-up against text on the same questions."""
    text = {(run.agents, run.question): run for run in runs if run.mode == "text"}
    rows: list[dict[str, object]] = []
    for agents, mode in dict.fromkeys((run.agents, run.mode) for run in runs):
        pairs = [
            (run, text[agents, run.question])
            for run in runs
            if (run.agents, run.mode) == (agents, mode) and (agents, run.question) in text
        ]
        if not pairs:
            continue
        compared = [run.same_as_prefix for run, _ in pairs if run.same_as_prefix is not None]
        rows.append(
            {
                "agents": agents,
                "mode": mode,
                "positions": mean(run.positions for run, _ in pairs),
                "positions_saved": asdict(interval([1 - run.positions / base.positions for run, base in pairs])),
                "speed_up": asdict(interval([base.seconds / run.seconds for run, base in pairs])),
                "last_ttft": median(run.hops[-1].ttft for run, _ in pairs),
                "kv_peak_bytes": max(hop.kv_bytes for run, _ in pairs for hop in run.hops),
                "same_as_prefix": [sum(compared), len(compared)] if compared else None,
            }
        )
    return rows


def environment() -> dict[str, object]:
    """Versions, hardware and command of this run."""
    found = {}
    for package in ("avp", "torch", "transformers", "numpy", "safetensors", "zstandard"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": " ".join(["avp", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": found,
    }


def write_json(document: dict[str, object], path: Path | None, *, echo: Callable[[str], object]) -> None:
    """The document to a file, or to standard output."""
    text = json.dumps(document, indent=1)
    if path is None:
        echo(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a chain is run."""

    model: str
    max_new_tokens: int
    steps: int = 20
    fixed_length: bool = False
    wire: bool = False
    modes: tuple[str, ...] = field(default=("text", "prefix", "exact", "latent"))

    @property
    def min_new_tokens(self) -> int:
        """With a fixed length the end of sequence is suppressed until the last token."""
        return self.max_new_tokens if self.fixed_length else 0
