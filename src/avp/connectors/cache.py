"""Our transformers cache: layers over an arena, a frozen prefix and a growing tail. Batch of one.

`update` writes the new positions into the arena and returns views of all of them: nothing is concatenated. Layers
with a
sliding window keep every position too; the model's mask does the sliding, exactly (eager and SDPA attention).
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from avp.connectors.arena import Arena
from avp.errors import UnsupportedCache


class ArenaLayer(CacheLayerMixin):  # type: ignore[misc]
    """One attention layer of a run."""

    is_sliding = False
    is_croppable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        super().__init__()
        self.arena_keys, self.arena_values, self.length = keys, values, length
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The arena is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, kv_heads, n, head_dim]; returns views of all positions."""
        count = key_states.shape[-2]
        stop = self.length + count
        _, heads, capacity, dim = self.arena_keys.shape
        if key_states.shape != (1, heads, count, dim) or value_states.shape != key_states.shape or stop > capacity:
            raise UnsupportedCache(
                f"an attention layer caches {list(key_states.shape)} and {list(value_states.shape)} where the "
                f"layout says "
                f"[1, {heads}, n, {dim}] with room for {capacity} positions. Fix: use batch 1 and a model that "
                f"AVP supports."
            )
        self.arena_keys[:, :, self.length : stop].copy_(key_states)
        self.arena_values[:, :, self.length : stop].copy_(value_states)
        self.length = stop
        self.keys, self.values = self.arena_keys[:, :, :stop], self.arena_values[:, :, :stop]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions of this run, given as a negative count."""
        self.length -= abs(tokens_to_remove)
        self.keys, self.values = self.arena_keys[:, :, : self.length], self.arena_values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All positions and the new ones, from position 0."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class RunCache(Cache):  # type: ignore[misc]
    """The cache of one run over a claimed arena; `positions` counts what the model's forward passes computed."""

    def __init__(self, arena: Arena, length: int, *, counter: PositionCounter | None = None) -> None:
        layers = [ArenaLayer(keys, values, length) for keys, values in zip(arena.keys, arena.values, strict=True)]
        super().__init__(layers=layers)
        self.arena = arena
        self.counter = counter
        self.kept = length  # positions that stay when the run ends; what a failed run wrote is forgotten
        self.positions = 0

    @property
    def length(self) -> int:
        """Positions that every layer holds."""
        return int(min(layer.length for layer in self.layers))


class PositionCounter:
    """Forward pre-hook of the base model: adds the positions of a pass to its `RunCache`, if it is this connector's."""

    def __call__(self, module: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Count one pass."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, RunCache) and cache.counter is self:
            given = kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if given is None else given
            given = args[0] if given is None and args else given
            if isinstance(given, torch.Tensor):
                cache.positions += given.shape[1]
