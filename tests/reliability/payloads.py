"""What is handed over in these tests."""

from dataclasses import replace
from functools import lru_cache

from avp.context import Context, Turn
from avp.testing.synthetic import synthetic_context

TEXT = "The planner plans, the critic reads the plan and the solver answers. " * 8


@lru_cache(8)
def payload(seed: int, *, tokens: int = 1024, head_dim: int = 64) -> Context:
    """A context with text, of a model of its own; 1024 tokens are 2 MiB in four segments."""
    context = synthetic_context(layers=4, kv_heads=2, head_dim=head_dim, tokens=tokens, seed=seed)
    return replace(context, turns=(Turn({"role": "user", "content": f"{seed}: {TEXT}"}, (0, tokens)),))
