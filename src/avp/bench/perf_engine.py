"""Engine figures: first token, decoding and fan-out from one context, against transformers' own DynamicCache."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from avp.bench.perf_figure import Clock, Figure, Target, compare, rounds
from avp.bench.perf_memory import NO_LINUX, kv_pages, resident
from avp.connectors.huggingface import HuggingFaceConnector
from avp.connectors.state import to_tensor
from avp.context import Context

_PREFILL = "prefill of all ids and the first token, its time / time of continuing from the context; "
TTFT = Target(_PREFILL + "by the connector without a context", at_least=12.0)
TTFT_ENGINE = Target(_PREFILL + "by transformers with an empty DynamicCache", at_least=12.0)
TTFT_BYTES = Target(_PREFILL + "by transformers; the context arrives as bytes, verified, on our clock", at_least=12.0)
DECODE = Target(
    "transformers' generate with its own DynamicCache of the same KV, our time per token / its", at_most=1.02
)
GROWTH = Target("decode ratio at the shortest context: ratio at the longest / it", at_most=1.05)
FANOUT = Target(
    "bytes of the context once and of each generation's own positions; KV pages in memory / it", at_most=1.15
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Positions and tokens of the engine figures."""

    context: int = 1000
    prompt: int = 20
    new_tokens: int = 64
    lengths: tuple[int, ...] = (200, 1000, 2000, 4000)
    short: int = 24  # tokens decoded at each of the lengths
    forks: int = 16
    fork_tokens: int = 32
    fork_prompts: tuple[int, ...] = (20, 1)


def ttft(connector: HuggingFaceConnector, ids: Sequence[int], sizes: Sizes, *, n: int) -> list[Figure]:
    """First token after a prompt: from the context, from its bytes, and by prefill of everything."""
    start, prompt, whole = (
        ids[: sizes.context],
        ids[sizes.context :][: sizes.prompt],
        ids[: sizes.context + sizes.prompt],
    )
    context = connector.prefill(list(start))
    data = context.to_bytes()
    seen: dict[str, set[tuple[int, ...]]] = {"context": set(), "bytes": set(), "prefill": set(), "transformers": set()}

    def ours(name: str, given: Callable[[], Context | None], asked: Sequence[int]) -> Clock:
        def run() -> float:
            started = perf_counter()
            reply = connector.generate(list(asked), context=given(), max_new_tokens=1)
            seconds = perf_counter() - started
            seen[name].add(reply.tokens)
            return seconds

        return run

    def theirs() -> float:
        started = perf_counter()
        tokens, _ = _transformers(connector, whole, DynamicCache(), 1)
        seconds = perf_counter() - started
        seen["transformers"].add(tokens)
        return seconds

    clocks = {
        "context": ours("context", lambda: context, prompt),
        "bytes": ours("bytes", lambda: Context.from_bytes(data), prompt),
        "prefill": ours("prefill", lambda: None, whole),
        "transformers": theirs,
    }
    seconds = rounds(clocks, n)
    detail: dict[str, object] = {f"{name}_seconds": median(values) for name, values in seconds.items()}
    detail |= {"context_tokens": len(start), "prompt_tokens": len(prompt), "bytes": len(data)}
    detail["same_first_token"] = len(set.union(*seen.values())) == 1
    overhead = [a / b for a, b in zip(seconds["prefill"], seconds["transformers"], strict=True)]
    detail["prefill_over_transformers"] = median(overhead)
    return [
        compare("ttft", seconds["prefill"], seconds["context"], TTFT, **detail),
        compare("ttft_transformers", seconds["transformers"], seconds["context"], TTFT_ENGINE, **detail),
        compare("ttft_bytes", seconds["transformers"], seconds["bytes"], TTFT_BYTES, **detail),
    ]


def decode(connector: HuggingFaceConnector, ids: Sequence[int], sizes: Sizes, *, n: int) -> list[Figure]:
    """Time per token after a context, and whether it grows with the context more than the engine's own."""
    longest = connector.prefill(list(ids[: max(sizes.lengths)]))
    context = longest[: sizes.context]
    seconds, same = _decode_rounds(connector, {"": context}, ids, sizes.new_tokens, n)
    detail: dict[str, object] = {f"{name}_seconds_per_token": median(values) for name, values in seconds.items()}
    detail |= {"context_tokens": len(context), "new_tokens": sizes.new_tokens, "same_tokens": same}
    figure = compare("decode", seconds["avp"], seconds["transformers"], DECODE, **detail)
    few = max(3, n // 2)
    cuts = {f" {length}": longest[:length] for length in sizes.lengths}
    seconds, same = _decode_rounds(connector, cuts, ids, sizes.short, few)
    rows = [
        {
            "context_tokens": length,
            "avp_seconds_per_token": median(seconds[f"avp {length}"]),
            "transformers_seconds_per_token": median(seconds[f"transformers {length}"]),
            "ratio": median(_divide(seconds[f"avp {length}"], seconds[f"transformers {length}"])),
        }
        for length in sizes.lengths
    ]
    first, last = sizes.lengths[0], sizes.lengths[-1]
    over = _divide(seconds[f"avp {last}"], seconds[f"transformers {last}"])
    under = _divide(seconds[f"avp {first}"], seconds[f"transformers {first}"])
    growth = compare("decode_growth", over, under, GROWTH, lengths=rows, new_tokens=sizes.short, same_tokens=same)
    return [figure, growth]


def _divide(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(over, under, strict=True)]


def _decode_rounds(
    connector: HuggingFaceConnector, contexts: dict[str, Context], ids: Sequence[int], new_tokens: int, n: int
) -> tuple[dict[str, tuple[float, ...]], bool]:
    """Seconds per token by name ("avp" or "transformers", and the key), and whether both gave the same tokens."""
    tokens: dict[str, set[tuple[int, ...]]] = {}
    clocks: dict[str, Clock] = {}
    for key, context in contexts.items():
        prompt = list(ids[len(context) - 1 : len(context)])  # any one token
        cache = _dynamic(connector, context)
        whole = [*context.tokens, *prompt]

        def ours(key: str = key, context: Context = context, prompt: list[int] = prompt) -> float:
            reply = connector.generate(prompt, context=context, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            tokens.setdefault(key, set()).add(reply.tokens)
            return reply.receipt.seconds["decode"] / (new_tokens - 1)

        def theirs(key: str = key, cache: DynamicCache = cache, whole: list[int] = whole) -> float:
            own = copy.deepcopy(cache)
            reply, times = _transformers(connector, whole, own, new_tokens)
            tokens.setdefault(key, set()).add(reply)
            return (times[1] - times[0]) / (new_tokens - 1)

        clocks |= {f"avp{key}": ours, f"transformers{key}": theirs}
    seconds = rounds(clocks, n)
    return seconds, all(len(found) == 1 for found in tokens.values())


def _dynamic(connector: HuggingFaceConnector, context: Context) -> DynamicCache:
    """transformers' own cache with the context's KV."""
    cache = DynamicCache()
    for layer in range(len(connector.identity.layout.layers)):
        keys, values = (
            torch.cat([to_tensor(part.read(layer, name), connector.model.device) for part in context.segments], dim=1)[
                None
            ]
            for name in ("k", "v")
        )
        cache.update(keys, values, layer)
    return cache


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when the first and the latest token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _transformers(
    connector: HuggingFaceConnector, ids: Sequence[int], cache: DynamicCache, new_tokens: int
) -> tuple[tuple[int, ...], tuple[float, float]]:
    """transformers' own greedy `generate`; the new ids, and when it gave the first and returned from the last."""
    model, clock = connector.model, _Clock()
    eos = model.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens if new_tokens > 1 else None,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    with torch.no_grad():
        output = model.generate(
            torch.tensor([list(ids)], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            past_key_values=cache,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return tuple(output[0, len(ids) :].tolist()), (clock.times[0], perf_counter())


def fanout(connector: HuggingFaceConnector, ids: Sequence[int], sizes: Sizes) -> list[Figure]:
    """KV in memory of many generations from one context, all kept, against one context and their tails.

    One figure for each length of the prompt: the shorter the tail, the more the pages that it fills in part weigh.
    """
    names = ["fanout" if index == 0 else f"fanout_{prompt}" for index, prompt in enumerate(sizes.fork_prompts)]
    if sys.platform != "linux":
        return [Figure(name, FANOUT, not_measured=NO_LINUX) for name in names]
    return [
        _fanout(connector, ids, sizes, name, prompt) for name, prompt in zip(names, sizes.fork_prompts, strict=True)
    ]


def _fanout(connector: HuggingFaceConnector, ids: Sequence[int], sizes: Sizes, name: str, prompt: int) -> Figure:
    gc.collect()
    before = kv_pages()
    context = connector.prefill(list(ids[: sizes.context]))
    count = sizes.fork_tokens
    kept = [
        connector.generate(list(asked), context=context, max_new_tokens=count, min_new_tokens=count).context
        for asked in (ids[sizes.context + i :][:prompt] for i in range(sizes.forks))
    ]
    after = kv_pages()
    pages = {key: after[key] - before[key] for key in after}
    ideal = context.nbytes + sum(one.nbytes - context.nbytes for one in kept)
    copies = _deep_copies(connector, context, [len(one) - len(context) for one in kept])
    detail: dict[str, object] = {f"{key}_bytes": found for key, found in pages.items()}
    detail |= {"context_bytes": context.nbytes, "ideal_bytes": ideal, "forks": len(kept), "prompt_tokens": prompt}
    detail |= {"own_positions": len(kept[0]) - len(context), **copies}
    detail["times_less_than_deep_copies"] = copies["deep_copies_tensor_bytes"] / pages["mapped"]
    return Figure(name, FANOUT, (pages["mapped"] / ideal,), detail)


def _deep_copies(connector: HuggingFaceConnector, context: Context, tails: Sequence[int]) -> dict[str, int]:
    """What the same takes with a deep copy of a DynamicCache for each generation; tails are zeros, not computed."""
    cache = _dynamic(connector, context)
    before = resident()
    copies = [copy.deepcopy(cache) for _ in tails]
    for one, tail in zip(copies, tails, strict=True):
        for index, layer in enumerate(connector.identity.layout.layers):
            new = torch.zeros(1, layer.kv_heads, tail, layer.head_dim, dtype=connector.model.dtype)
            one.update(new, new, index)
    tensors = [part for one in [cache, *copies] for layer in one.layers for part in (layer.keys, layer.values)]
    size = sum(part.untyped_storage().nbytes() for part in tensors)
    own = sum(part.untyped_storage().nbytes() for part in tensors[: 2 * len(cache.layers)])
    return {"deep_copies_tensor_bytes": size, "deep_copies_resident_bytes": resident() - before + own}
