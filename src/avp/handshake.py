"""The handshake: two agents say what they run and accept; both compute from it, alike, how state goes over.

`negotiate` is pure: the same two hellos and the same count of tokens give the same Agreement at both ends. A mode is
possible between two agents, or refused with a reason; of the possible ones the first in the order of `MODES` is taken,
or, with the policy "fastest", the one after which the receiver can go on soonest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from avp import registry
from avp.errors import NoAgreement
from avp.identity import ModelIdentity
from avp.manifest import Limits
from avp.segment import PAGE, Exactness, worst

PROTOCOL = 1
MODES = ("kv", "translated", "projected", "tokens", "text")
POLICIES = ("best", "fastest")
_ID_BYTES = 4  # of a token that travels as its id; text takes about as much


@dataclass(frozen=True, slots=True)
class Floor:
    """What a receiver asks of a lossy codec's record."""

    perplexity: float = 0.005  # largest relative change
    top1: float = 0.97  # least share of positions with the same best token
    continuations: float = 0.90  # least share of greedy 32-token continuations that stay the same


@dataclass(frozen=True, slots=True)
class Record:
    """What a lossy codec did to one model's KV, measured; worth nothing for other weights."""

    weights: str
    perplexity: float
    top1: float
    continuations: float

    def meets(self, floor: Floor) -> bool:
        """Whether it is good enough."""
        return (
            abs(self.perplexity) <= floor.perplexity
            and self.top1 >= floor.top1
            and self.continuations >= floor.continuations
        )


@dataclass(frozen=True, slots=True)
class CodecOffer:
    """A codec that an agent can write and read; `ratio` is bytes after over bytes before, `rate` bytes a second."""

    name: str
    exactness: Exactness = Exactness.EXACT
    ratio: float = 1.0
    rate: float | None = None
    records: tuple[Record, ...] = ()


@dataclass(frozen=True, slots=True)
class Hello:
    """What an agent says of itself, and what it asks for.

    model None: it computes nothing, only keeps (a file, a store). modes: those it can send, or take. accept: the worst
    class it puts up with. codecs: in order of preference. bandwidth (bytes a second) and prefill (positions a second)
    are measured; None: not yet.
    """

    agent: str
    model: ModelIdentity | None = None
    engine: str = ""
    dtype: str = ""
    vocabulary: str = ""  # BLAKE3 of the vocabulary, to ask for it by
    modes: tuple[str, ...] = MODES
    codecs: tuple[CodecOffer, ...] = (CodecOffer("raw"),)
    projections: tuple[str, ...] = ()
    transports: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    page: int = PAGE
    tenant: str = ""
    bandwidth: float | None = None
    prefill: float | None = None
    accept: Exactness = Exactness.EXACT
    floor: Floor = field(default_factory=Floor)
    policy: str = "best"
    version: int = PROTOCOL


@dataclass(frozen=True, slots=True)
class Verdict:
    """One mode between two agents: possible, or not and why. Bytes and seconds are estimates; None: not known."""

    mode: str
    exactness: Exactness
    refused: str = ""  # the reason; "": possible
    codec: str | None = None
    bytes: int = 0
    seconds: float | None = None  # until the receiver can go on


@dataclass(frozen=True, slots=True)
class Agreement:
    """How state goes from one agent to the other: the mode that was taken, and the verdict on every mode."""

    taken: Verdict
    verdicts: tuple[Verdict, ...]
    tokens: int
    reasons: tuple[str, ...]  # why not a better one

    @property
    def mode(self) -> str:
        """One of `MODES`."""
        return self.taken.mode

    @property
    def exactness(self) -> Exactness:
        """What the hand-over makes of the state, at worst."""
        return self.taken.exactness

    @property
    def codec(self) -> str | None:
        """The codec of KV; None where none travels."""
        return self.taken.codec


def offers(known: Sequence[CodecOffer] = ()) -> tuple[CodecOffer, ...]:
    """All codecs that are installed: those that lose nothing first, raw before the others.

    known: what is said of some of them, records, ratio and rate; the class is the codec's own.
    """
    told = {offer.name: offer for offer in known}
    every = (
        replace(told.get(name, CodecOffer(name)), exactness=registry.codec(name).exactness)
        for name in registry.names("avp.codecs")
    )
    return tuple(sorted(every, key=lambda each: (each.exactness, each.name != "raw")))


def judge(sender: Hello, receiver: Hello, *, tokens: int = 0) -> tuple[Verdict, ...]:
    """Every mode between two agents, possible or not."""
    return tuple(_judge(mode, sender, receiver, tokens) for mode in MODES)


def negotiate(sender: Hello, receiver: Hello, *, tokens: int = 0) -> Agreement:
    """How `sender` hands a context of `tokens` positions to `receiver`.

    Raises:
        NoAgreement: no mode is possible that both accept; the message has a reason for each.
    """
    verdicts = judge(sender, receiver, tokens=tokens)
    possible = [verdict for verdict in verdicts if not verdict.refused]
    if not possible:
        refused = "; ".join(f"{verdict.mode}: {verdict.refused}" for verdict in verdicts)
        raise NoAgreement(
            f"{sender.agent} cannot hand over to {receiver.agent}. {refused}. "
            'Fix: load equal weights, or accept less (accept="text" always works between models).'
        )
    taken = possible[0]
    reasons = [f"{each.mode}: {each.refused}" for each in verdicts[: MODES.index(taken.mode)]]
    if "fastest" in (sender.policy, receiver.policy):
        fastest = min(possible, key=lambda each: (each.seconds is None, each.seconds or 0.0))
        reasons.append(_why_fastest(fastest, taken))
        taken = fastest
    return Agreement(taken, verdicts, tokens, tuple(reasons))


def _why_fastest(fastest: Verdict, best: Verdict) -> str:
    if best.seconds is None:
        return f"fastest: bandwidth or prefill rate is not measured, so {best.mode} was not compared"
    if fastest is best:
        return f"fastest: {best.mode} in {best.seconds:.3g} s, {best.bytes} bytes"
    return (
        f"fastest: {fastest.mode} in {fastest.seconds:.3g} s ({fastest.bytes} bytes) against {best.mode} in "
        f"{best.seconds:.3g} s ({best.bytes} bytes)"
    )


def _judge(mode: str, sender: Hello, receiver: Hello, tokens: int) -> Verdict:
    verdict = {"kv": _kv, "tokens": _tokens, "text": _text}.get(mode, _between)(mode, sender, receiver, tokens)
    floor = min(sender.accept, receiver.accept)
    refused = verdict.refused or _common(mode, sender, receiver, tokens)
    if not refused and verdict.exactness > floor:
        strict = sender if sender.accept == floor else receiver
        refused = f"{strict.agent} accepts {floor.label}, this would be {verdict.exactness.label}"
    return Verdict(verdict.mode, verdict.exactness, refused, verdict.codec, verdict.bytes, verdict.seconds)


def _common(mode: str, sender: Hello, receiver: Hello, tokens: int) -> str:
    if sender.version != receiver.version:
        return f"{sender.agent} speaks version {sender.version}, {receiver.agent} version {receiver.version}"
    for hello, does in ((sender, "send"), (receiver, "take")):
        if mode not in hello.modes:
            return f"{hello.agent} does not {does} it"
    if tokens > receiver.limits.tokens:
        return f"{tokens} tokens are more than the {receiver.limits.tokens} that {receiver.agent} takes"
    return ""


def _kv(mode: str, sender: Hello, receiver: Hello, tokens: int) -> Verdict:
    if sender.model is None:
        return Verdict(mode, Exactness.EXACT, f"{sender.agent} holds no KV")
    keeps = receiver.model is None
    if receiver.model is not None and not sender.model.same_weights(receiver.model):
        return Verdict(mode, Exactness.EXACT, _weights(sender.model, receiver.model))
    if sender.page != receiver.page:
        return Verdict(mode, Exactness.EXACT, f"pages of {sender.page} and of {receiver.page} positions")
    own = keeps or (sender.engine == receiver.engine and sender.dtype == receiver.dtype)
    grade = Exactness.EXACT if own else Exactness.BOUNDED
    if grade > min(sender.accept, receiver.accept):
        ours, theirs = f"{sender.engine} in {sender.dtype}", f"{receiver.engine} in {receiver.dtype}"
        return Verdict(mode, grade, f"KV of {ours} is {grade.label} to {theirs}")
    size = tokens * sender.model.layout.bytes_per_token(sender.dtype) if sender.dtype else 0
    codecs, refused = _codecs(sender, receiver, grade)
    if not codecs:
        return Verdict(mode, grade, "no codec: " + "; ".join(refused))
    bandwidth = _slowest(sender.bandwidth, receiver.bandwidth)
    codec = codecs[0] if bandwidth is None else min(codecs, key=lambda each: _send(each, size, bandwidth))
    seconds = None if bandwidth is None else _send(codec, size, bandwidth)
    return Verdict(mode, worst([grade, codec.exactness]), "", codec.name, int(size * codec.ratio), seconds)


def _send(codec: CodecOffer, size: int, bandwidth: float) -> float:
    return size * codec.ratio / bandwidth + (size / codec.rate if codec.rate else 0.0)


def _weights(ours: ModelIdentity, theirs: ModelIdentity) -> str:
    if ours.weights != theirs.weights:
        return f"other weights: {ours.describe()} and {theirs.describe()}"
    return f"equal weights in another cache layout (rope, window, softcap or scale): {ours.describe()}"


def _codecs(sender: Hello, receiver: Hello, grade: Exactness) -> tuple[list[CodecOffer], list[str]]:
    """Codecs that both have and the receiver's floor allows, in the sender's order; the others' reasons."""
    known = {codec.name: codec.exactness for codec in receiver.codecs}
    floor = min(sender.accept, receiver.accept)
    good: list[CodecOffer] = []
    refused: list[str] = []
    for offer in sender.codecs:
        if offer.name not in known:
            refused.append(f"{receiver.agent} does not read {offer.name}")
            continue
        codec = replace(offer, exactness=worst([offer.exactness, known[offer.name]]))  # no better than either says
        if worst([grade, codec.exactness]) > floor:
            refused.append(f"{codec.name} is {codec.exactness.label}")
        elif codec.exactness is not Exactness.EXACT and not _proven(codec, sender, receiver.floor):
            refused.append(f"{codec.name} has no record for these weights that meets {receiver.agent}'s floor")
        else:
            good.append(codec)
    return good, refused or ["none was offered"]


def _proven(codec: CodecOffer, sender: Hello, floor: Floor) -> bool:
    weights = sender.model.weights if sender.model else ""
    return any(record.weights == weights and record.meets(floor) for record in codec.records)


def _between(mode: str, sender: Hello, receiver: Hello, tokens: int) -> Verdict:
    """Other weights: a projection is needed, with a record of what it is worth."""
    del tokens
    if sender.model is None or receiver.model is None:
        return Verdict(mode, Exactness.APPROXIMATE, "one side has no model")
    if sender.model.same_weights(receiver.model):
        return Verdict(mode, Exactness.APPROXIMATE, "not needed between equal weights")
    return Verdict(mode, Exactness.APPROXIMATE, "no projection with a record for this pair of models")


def _tokens(mode: str, sender: Hello, receiver: Hello, tokens: int) -> Verdict:
    if sender.model is None:
        return Verdict(mode, Exactness.TEXT, f"{sender.agent} has no tokenizer")
    if receiver.model is not None and not sender.model.same_tokenizer(receiver.model):
        return Verdict(mode, Exactness.TEXT, "other tokenizers")
    return _prefilled(mode, sender, receiver, tokens)


def _text(mode: str, sender: Hello, receiver: Hello, tokens: int) -> Verdict:
    return _prefilled(mode, sender, receiver, tokens)


def _prefilled(mode: str, sender: Hello, receiver: Hello, tokens: int) -> Verdict:
    """A mode in which the receiver computes all positions again."""
    bandwidth = _slowest(sender.bandwidth, receiver.bandwidth)
    size = tokens * _ID_BYTES
    seconds = None
    if bandwidth is not None and receiver.prefill is not None:
        seconds = size / bandwidth + tokens / receiver.prefill
    return Verdict(mode, Exactness.TEXT, "", None, size, seconds)


def _slowest(*rates: float | None) -> float | None:
    return min((rate for rate in rates if rate), default=None)
