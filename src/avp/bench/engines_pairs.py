"""Pairs of engines, and what was measured of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from types import MappingProxyType

from avp.bench.results import wilson
from avp.errors import UsageError

Said = Mapping[str, object]  # the answer of one of the processes

# The engine, and which file its weights come from, by the name in a pair.
SEATS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "vllm": ("vllm", "Q4_1"),
        "transformers": ("transformers", "Q4_1"),
        "llamacpp": ("llamacpp", "Q4_1"),
        "transformers-f32": ("transformers", "F32"),
        "llamacpp-f32": ("llamacpp", "F32"),
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """What a pair is to reach: shares at least, KL at most; None: it is only reported."""

    agreement: float | None = None
    identical: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The sender computes a context, the receiver goes on from it."""

    sender: str
    receiver: str

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.sender}>{self.receiver}"

    @property
    def target(self) -> Target:
        """What it is to reach."""
        both = {self.sender, self.receiver}
        if both == {"transformers", "vllm"}:
            return Target(agreement=0.995, identical=0.95)
        if both == {"transformers", "llamacpp"}:
            return Target(agreement=0.985, identical=0.65, kl=0.001)
        return Target(agreement=0.995) if both == {"transformers-f32", "llamacpp-f32"} else Target()

    @classmethod
    def parse(cls, text: str) -> Pair:
        """`sender>receiver`.

        Raises:
            UsageError: no such pair.
        """
        sender, _, receiver = text.strip().partition(">")
        if not {sender, receiver} <= set(SEATS) or sender == receiver or SEATS[sender][1] != SEATS[receiver][1]:
            raise UsageError(
                f"{text!r} is no pair of engines with equal weights. Fix: use sender>receiver with two of "
                f"{', '.join(SEATS)}; those that end in -f32 go with each other only."
            )
        return cls(sender, receiver)


PAIRS = tuple(Pair(a, b) for a in SEATS for b in SEATS if a != b and SEATS[a][1] == SEATS[b][1])


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many, with the 95 % Wilson interval."""

    hits: int
    n: int

    def to_json(self) -> dict[str, object]:
        """With share and interval; without them where there were none."""
        if not self.n:
            return asdict(self)
        low, high = wilson(self.hits, self.n)
        return {**asdict(self), "share": self.hits / self.n, "low": low, "high": high}


def record(
    pair: Pair, after: Said, control: Said, owns: Mapping[str, Said], apart: Said, *, judged: int
) -> dict[str, object]:
    """The record of a pair: the receiver after the sender's KV, after its own KV over the same wire, and the two
    engines' own passes beside each other. `judged` positions in each window.
    """
    best = [flat(owns[name]["best"]) for name in (pair.receiver, pair.sender)]
    answers = [rows(owns[name]["answers"]) for name in (pair.receiver, pair.sender)]
    found = _figures(after, judged)
    return {
        "pair": pair.name,
        "kind": "engines",
        "class": "bounded",
        "sender": pair.sender,
        "receiver": pair.receiver,
        "weights": SEATS[pair.sender][1],
        **found,
        "target": asdict(pair.target),
        "reached": reached(pair.target, found),
        "control": _figures(control, judged),
        "own_passes": {
            "agreement": Share(sum(a == b for a, b in zip(*best, strict=True)), len(best[0])).to_json(),
            "kl": mean(floats(apart["kl"])),
            "identical": Share(sum(a == b for a, b in zip(*answers, strict=True)), len(answers[0])).to_json(),
        },
        "by_window": {"agreed": after["agreed"], "kl": after["kl"]},
        "first_difference": after["first_difference"],
    }


def _figures(said: Said, judged: int) -> dict[str, object]:
    agreed, same = floats(said["agreed"]), floats(said["same"])
    plain = {name: said[name] for name in ("plain", "plain_same", "plain_verdicts_equal")}
    return {
        "agreement": Share(int(sum(agreed)), len(agreed) * judged).to_json(),
        "kl": mean(floats(said["kl"])),
        "identical": Share(int(sum(same)), len(same)).to_json(),
        "loaded": said["loads"],
        "without_draft": plain,
        "seconds": said["seconds"],
    }


def reached(target: Target, found: Said) -> dict[str, bool]:
    """Target by target."""
    shares = {name: _share(found[name]) for name in ("agreement", "identical")}
    verdicts = {
        "agreement": target.agreement is None or shares["agreement"] >= target.agreement,
        "identical": target.identical is None or shares["identical"] >= target.identical,
        "kl": target.kl is None or float(str(found["kl"])) < target.kl,
    }
    return {name: verdict for name, verdict in verdicts.items() if asdict(target)[name] is not None}


def _share(value: object) -> float:
    return float(value["share"]) if isinstance(value, dict) else 0.0


def rows(value: object) -> list[list[int]]:
    """A list of lists of ids, out of JSON."""
    return [[int(each) for each in row] for row in value] if isinstance(value, list) else []


def flat(value: object) -> list[int]:
    """The same, in one row."""
    return [each for row in rows(value) for each in row]


def floats(value: object) -> Sequence[float]:
    """A list of numbers, out of JSON."""
    return [float(each) for each in value] if isinstance(value, list) else []
