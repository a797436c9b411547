"""Receipt, Generation, Stream's result: what a call did, in figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from avp.segment import Exactness

if TYPE_CHECKING:
    from avp.context import Context

MODES = ("kv", "tokens", "text")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a hand-over, or a generation from a context, did.

    `positions_computed` is counted by a hook on the model's forward pass. `seconds` are wall times by stage.
    """

    mode: str
    exactness: Exactness
    bytes_sent: int = 0
    bytes_reused: int = 0
    tokens_reused: int = 0
    positions_computed: int = 0
    seconds: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    reasons: tuple[str, ...] = ()


def receipt_to_json(receipt: Receipt) -> dict[str, object]:
    """The fields of a receipt, as they travel and as `--json` prints them."""
    return {
        "mode": receipt.mode,
        "exactness": receipt.exactness.label,
        "bytes_sent": receipt.bytes_sent,
        "bytes_reused": receipt.bytes_reused,
        "tokens_reused": receipt.tokens_reused,
        "positions_computed": receipt.positions_computed,
        "seconds": dict(receipt.seconds),
        "reasons": list(receipt.reasons),
    }


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one generation: of the whole prompt, `cached_tokens` came with the context and were not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation(str):
    """The text of a turn, with its token ids, the state after it, and the receipt."""

    __slots__ = ("context", "finish_reason", "receipt", "tokens", "usage")

    tokens: tuple[int, ...]  # sampled ids, the end-of-sequence token included
    context: Context  # state after this turn, ready to hand on
    usage: Usage
    receipt: Receipt
    finish_reason: str  # "eos", "stop" or "length"

    def __new__(
        cls, text: str, *, tokens: tuple[int, ...], context: Context, usage: Usage, receipt: Receipt, finish_reason: str
    ) -> Generation:
        """A string with what made it."""
        generation = super().__new__(cls, text)
        generation.tokens = tokens
        generation.context = context
        generation.usage = usage
        generation.receipt = receipt
        generation.finish_reason = finish_reason
        return generation
