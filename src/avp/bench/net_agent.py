"""The receiving agent of `avp bench net`, in a process of its own, and what can be asked of that process."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from avp.agent import Agent, serve
from avp.bench.net_far import Far, Given, answer_calls, running
from avp.bench.perf_figure import Clock
from avp.bench.perf_memory import status
from avp.context import Context
from avp.handle import Handle
from avp.network import Remote

TRANSPORTS = ("unix", "http", "grpc")


@dataclass(frozen=True, slots=True)
class Receiver:
    """The process, and the connections of an agent of this process to it, by transport."""

    far: Far
    agent: Agent
    remotes: Mapping[str, Remote]

    def hand_over(self, context: Context, transport: str) -> Handle:
        """One hand-over."""
        return self.agent.hand_over(context, to=self.remotes[transport])

    def forget(self, *handles: Handle) -> None:
        """Neither end holds anything any more."""
        for handle in handles:
            next(iter(self.remotes.values())).revoke(handle)
        self.far.ask("forget")
        clear(self.agent)

    def clock(self, context: Context, transport: str) -> Clock:
        """A clock of a hand-over to an agent that knows nothing of the context."""

        def once() -> float:
            started = perf_counter()
            handle = self.hand_over(context, transport)
            seconds = perf_counter() - started
            self.forget(handle)
            return seconds

        return once


@contextmanager
def receiving(*, model: str | None = None, agent: Agent | None = None) -> Iterator[Receiver]:
    """The process, with the model if one is named; the sessions with it are open.

    Raises:
        FarFailed: it did not come up.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="avp-net-"))
        command = [sys.executable, "-m", "avp.bench.net_agent", folder, *([model] if model else [])]
        far = stack.enter_context(running(command))
        urls = json.loads(str(far.ready["urls"]))
        near = agent or stack.enter_context(Agent(None, name="near"))
        yield Receiver(far, near, {name: stack.enter_context(near.connect(urls[name])) for name in TRANSPORTS})


def clear(agent: Agent) -> None:
    """Empty an agent's store."""
    for entry in list(agent.store.entries()):
        agent.store.remove(entry.page, tenant=entry.tenant)


# --- the process


class _Process:
    """The calls."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._before = 0

    def forget(self, given: Given) -> Given:
        clear(self._agent)
        gc.collect()
        return {}

    def watch(self, given: Given) -> Given:
        """The peak of resident memory starts anew from here."""
        self._before = status()["VmRSS"]
        Path("/proc/self/clear_refs").write_text("5")
        return {}

    def growth(self, given: Given) -> Given:
        """Bytes by which resident memory was larger at its peak than when `watch` was called."""
        return {"value": status()["VmHWM"] - self._before}


def _main(folder: str, model: str | None) -> None:
    connector = None
    if model is not None:
        from avp.connectors.huggingface import HuggingFaceConnector

        connector = HuggingFaceConnector.from_pretrained(model, dtype="float32")
    with Agent(connector, name="far") as agent, ExitStack() as stack:
        named = {"unix": f"unix:{folder}/agent.sock", "http": "http://127.0.0.1:0", "grpc": "grpc://127.0.0.1:0"}
        urls = {name: stack.enter_context(serve(agent, url)).url for name, url in named.items()}
        process = _Process(agent)
        calls = {"forget": process.forget, "watch": process.watch, "growth": process.growth}
        answer_calls({"urls": json.dumps(urls)}, calls)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
