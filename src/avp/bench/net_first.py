"""A hand-over over `unix:` and the first token after it, against the receiver's own prefill of the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from time import perf_counter

from avp.agent import Agent
from avp.bench.net_agent import receiving
from avp.bench.perf_figure import Figure, Target, compare, rounds
from avp.connectors.huggingface import HuggingFaceConnector

FIRST = Target(
    "the receiver's own prefill of the same ids and its first token, its time / hand-over over unix: and first token; "
    "two processes, float32",
    at_least=8.0,
)


def first_token(
    connector: HuggingFaceConnector, model: str, ids: Sequence[int], *, prompt: int, n: int
) -> list[Figure]:
    """The context is all of `ids` but the last `prompt`; both ends load `model`."""
    start, rest = list(ids[:-prompt]), list(ids[-prompt:])
    seen: set[tuple[int, ...]] = set()
    with Agent(connector, name="near") as agent, receiving(model=model, agent=agent) as receiver:
        context = connector.prefill(start)
        remote = receiver.remotes["unix"]

        def handed() -> float:
            started = perf_counter()
            handle = receiver.hand_over(context, "unix")
            reply = remote.generate(rest, context=handle, max_new_tokens=1)
            seconds = perf_counter() - started
            seen.add(reply.tokens)
            receiver.forget(handle, reply.context)
            return seconds

        def again() -> float:
            started = perf_counter()
            reply = remote.generate([*start, *rest], max_new_tokens=1)
            seconds = perf_counter() - started
            seen.add(reply.tokens)
            receiver.forget(reply.context)
            return seconds

        seconds = rounds({"handed": handed, "prefill": again}, n)
    detail: dict[str, object] = {f"{name}_seconds": median(values) for name, values in seconds.items()}
    detail |= {"context_tokens": len(start), "prompt_tokens": prompt, "context_bytes": context.nbytes}
    detail["same_first_token"] = len(seen) == 1
    return [compare("ttft", seconds["prefill"], seconds["handed"], FIRST, **detail)]
