"""The processes of the benchmark of engines: who makes contexts, who keeps them, who goes on from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import avp
from avp.agent import Agent, serve
from avp.bench.engines_pairs import SEATS, Pair, Said, record
from avp.bench.engines_task import Task
from avp.bench.net_far import Far, running

_PATIENCE = 3600.0  # seconds for one answer, which may be 100 continuations on a busy machine


@dataclass(frozen=True, slots=True)
class Desk:
    """What a group of pairs is measured with. `places`: Python and model of each engine; `answers`: greedy answers of
    engines that ran before.
    """

    stack: ExitStack
    folder: Path
    task: Path
    places: Mapping[str, tuple[str, str]]
    plain: int
    threads: int
    step: Callable[[str], None]
    answers: dict[str, object]


@dataclass(slots=True)
class Found:
    """Records of pairs, and what their engines are."""

    records: list[dict[str, object]] = field(default_factory=list)
    engines: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Seat:
    far: Far
    keeper: str
    made: Said
    own: Said

    @property
    def about(self) -> dict[str, object]:
        """What the document says of it."""
        return {
            "versions": self.far.ready["versions"],
            "make_seconds": self.made["seconds"],
            "own_seconds": self.own["seconds"],
            "bytes_sent": self.made["bytes"],
        }


def measure_group(pairs: Sequence[Pair], desk: Desk, *, keep: Callable[[Found], None]) -> None:
    """All pairs of one kind of weights; every record is handed to `keep` at once."""
    names = [name for name in SEATS if any(name in (pair.sender, pair.receiver) for pair in pairs)]
    seats = {name: _seat(name, desk) for name in names}
    judged = Task.load(desk.task).sizes.judged
    for receiver in names:
        senders = [pair.sender for pair in pairs if pair.receiver == receiver]
        if not senders:
            continue
        desk.step(f"{receiver} after its own KV")
        control = _after(seats[receiver], seats[receiver], desk)
        for sender in senders:
            desk.step(f"{receiver} after KV of {sender}")
            after = _after(seats[receiver], seats[sender], desk)
            apart = seats[receiver].far.ask("apart", {"folder": str(desk.folder / sender)})
            owns = {name: seats[name].own for name in (sender, receiver)}
            found = record(Pair(sender, receiver), after, control, owns, apart, judged=judged)
            keep(Found([found], {name: seats[name].about for name in (sender, receiver)}))


def _seat(name: str, desk: Desk) -> _Seat:
    """An engine's process, after it handed its contexts over and said what it says after them."""
    desk.step(f"{name} starts")
    keeper = desk.stack.enter_context(Agent(None, name=f"keeper of {name}", accept="bounded"))
    url = desk.stack.enter_context(serve(keeper, f"unix:{desk.folder}/{name}.sock")).url
    python, model = desk.places[name]
    source = Path(avp.__file__).parents[1]
    # Threads that spin for one another stand still where another process has one of the cores.
    variables = [f"OMP_NUM_THREADS={desk.threads}", "OMP_WAIT_POLICY=passive", "HF_HUB_OFFLINE=1"]
    command = ["env", f"PYTHONPATH={source}", *variables, python, "-m", "avp.bench.engines_side"]
    command += [SEATS[name][0], model, str(desk.task), str(desk.folder / name)]
    far = desk.stack.enter_context(running(command, bare=True, timeout=_PATIENCE))
    desk.step(f"{name} makes contexts and hands them over")
    made = far.ask("make", {"keeper": url})
    desk.step(f"{name} after its own contexts")
    own = far.ask("own", {"drafts": desk.answers.get("transformers") or desk.answers.get("vllm")})
    desk.answers[name] = own["answers"]
    return _Seat(far, url, made, own)


def _after(receiver: _Seat, sender: _Seat, desk: Desk) -> Said:
    given = {"keeper": sender.keeper, "handles": sender.made["handles"], "plain": desk.plain}
    return receiver.far.ask("after", given)
