"""`avp explain`: what is possible between two agents, mode by mode, and which would be taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import click

from avp.cli.connection import CLASSES, connection_options
from avp.cli.source import Source, source_of
from avp.cli.words import document, facts, say, table
from avp.errors import NoAgreement
from avp.handshake import MODES, POLICIES, Agreement, Hello, Verdict, judge, negotiate
from avp.identity import identity_to_json
from avp.segment import Exactness

_TOKENS = 1000
_RATES = (1, 10, 100)  # Gb/s
_GIGABIT = 1e9 / 8  # bytes a second


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The verdict on every mode, the seconds of each at each rate, and what would be taken, or why nothing."""

    verdicts: tuple[Verdict, ...]
    seconds: Mapping[str, tuple[float | None, ...]]
    agreement: Agreement | None
    refusal: str


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--tokens", type=click.IntRange(min=0), help="Length of the context; by default A's own, else 1000.")
@click.option("--bandwidth", type=click.FloatRange(min=0, min_open=True), metavar="GBPS", help="Gb/s between the two.")
@click.option(
    "--prefill", type=click.FloatRange(min=0, min_open=True), metavar="RATE", help="Tokens/s that B computes."
)
@click.option("--accept", type=CLASSES, default="exact", show_default=True, help="What models and files put up with.")
@click.option(
    "--policy", type=click.Choice(POLICIES), default="best", show_default=True, help="The best mode, or the fastest."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@connection_options(timeout=30.0)
def explain(
    a: str,
    b: str,
    *,
    tokens: int | None,
    bandwidth: float | None,
    prefill: float | None,
    accept: str,
    policy: str,
    as_json: bool,
) -> None:
    """Show how A could hand a context over to B.

    A and B are models (a built-in name, folder, .gguf file or hub id), saved contexts (.avp) or agents (a URL). For
    each mode: whether it is possible or why not, what class it would be, and what it costs. Nothing is sent, and that
    nothing is possible is an answer too: exit code 0.
    """
    sender, receiver = (source_of(name, accept=Exactness.parse(accept)) for name in (a, b))
    count = tokens if tokens is not None else sender.tokens if sender.tokens is not None else _TOKENS
    ours, theirs = replace(sender.hello, policy=policy), receiver.hello
    if bandwidth is not None:
        ours = replace(ours, bandwidth=bandwidth * _GIGABIT)
    if prefill is not None:
        theirs = replace(theirs, prefill=prefill)
    outcome = _judged(ours, theirs, count)
    if as_json:
        document(_to_json(outcome, (replace(sender, hello=ours), replace(receiver, hello=theirs)), count))
    else:
        _show(outcome, (sender, receiver), count)


def _judged(sender: Hello, receiver: Hello, tokens: int) -> _Outcome:
    verdicts = judge(sender, receiver, tokens=tokens)
    by_rate = [
        judge(replace(sender, bandwidth=rate * _GIGABIT), replace(receiver, bandwidth=None), tokens=tokens)
        for rate in _RATES
    ]
    seconds = {mode: tuple(row[index].seconds for row in by_rate) for index, mode in enumerate(MODES)}
    try:
        return _Outcome(verdicts, seconds, negotiate(sender, receiver, tokens=tokens), "")
    except NoAgreement as error:
        return _Outcome(verdicts, seconds, None, str(error))


def _show(outcome: _Outcome, sources: Sequence[Source], tokens: int) -> None:
    names = ("A", "B")
    facts([*((name, _about(source)) for name, source in zip(names, sources, strict=True)), ("tokens", f"{tokens:,}")])
    click.echo()
    headings = ("MODE", "POSSIBLE", "CLASS", "CODEC", "BYTES", *(f"{rate} Gb/s" for rate in _RATES), "WHY NOT")
    rows = [_row(verdict, outcome) for verdict in outcome.verdicts]
    table(headings, rows, right=headings[4:-1])
    click.echo()
    if outcome.agreement is None:
        click.echo("taken: none. No mode is possible that both accept.")
        say("Fix: load equal weights at both ends, or accept less (--accept text).")
        return
    taken = outcome.agreement.taken
    click.echo(f"taken: {taken.mode}, {taken.exactness.label}" + (f", codec {taken.codec}" if taken.codec else ""))
    if any(each.seconds is None and not each.refused for each in outcome.verdicts if not each.codec):
        say("Where B computes again, the time that this takes is not in it: its rate is not known (--prefill).")


def _row(verdict: Verdict, outcome: _Outcome) -> tuple[str, ...]:
    agreement = outcome.agreement
    taken = agreement is not None and agreement.mode == verdict.mode
    possible = "taken" if taken else "no" if verdict.refused else "yes"
    if verdict.refused and not verdict.bytes:
        return (verdict.mode, possible, verdict.exactness.label, "", "", *("" for _ in _RATES), verdict.refused)
    costs = (
        _seconds(seconds, verdict.bytes / (rate * _GIGABIT))
        for rate, seconds in zip(_RATES, outcome.seconds[verdict.mode], strict=True)
    )
    codec = verdict.codec or ""
    return (verdict.mode, possible, verdict.exactness.label, codec, f"{verdict.bytes:,}", *costs, verdict.refused)


def _seconds(seconds: float | None, sending: float) -> str:
    return f"{sending:.3g} s + prefill" if seconds is None else f"{seconds:.3g} s"


def _about(source: Source) -> str:
    hello = source.hello
    about = [source.kind, hello.agent]
    if hello.model is None:
        about.append("no model: takes and keeps whatever comes")
    else:
        about += [hello.model.describe(), f"{hello.engine} {hello.dtype}"]
    return ", ".join([*about, f"accepts {hello.accept.label}"])


def _to_json(outcome: _Outcome, sources: Sequence[Source], tokens: int) -> dict[str, object]:
    taken = outcome.agreement
    return {
        "tokens": tokens,
        **{name: _source_to_json(source) for name, source in zip(("a", "b"), sources, strict=True)},
        "modes": [
            {
                "mode": verdict.mode,
                "possible": not verdict.refused,
                "reason": verdict.refused,
                "exactness": verdict.exactness.label,
                "codec": verdict.codec,
                "bytes": verdict.bytes,
                "seconds": dict(zip(map(str, _RATES), outcome.seconds[verdict.mode], strict=True)),
            }
            for verdict in outcome.verdicts
        ],
        "taken": taken.mode if taken else None,
        "reasons": list(taken.reasons) if taken else [outcome.refusal],
    }


def _source_to_json(source: Source) -> dict[str, object]:
    hello = source.hello
    return {
        "kind": source.kind,
        "agent": hello.agent,
        "model": identity_to_json(hello.model) if hello.model else None,
        "engine": hello.engine,
        "dtype": hello.dtype,
        "accept": hello.accept.label,
        "bandwidth": hello.bandwidth,
        "prefill": hello.prefill,
    }
