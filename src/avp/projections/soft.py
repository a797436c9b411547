"""soft: the expected next embedding, by the model's own distribution over its vocabulary.

e = softmax(h · W_outᵀ) · W_in, brought to the mean length of an input embedding: an average of many rows is short.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from avp.projections.norm import mean_norm, rescale
from avp.protocols import Embeddings, Projection, Step


@dataclass(frozen=True, slots=True)
class Soft:
    """Needs the two models to share a vocabulary."""

    name: str = "soft"

    def fit(self, source: Embeddings, target: Embeddings) -> Step:
        """Nothing to fit but the length."""
        length = mean_norm(target)

        def step(hidden: torch.Tensor) -> torch.Tensor:
            mixed = torch.softmax(hidden @ source.w_out.T, dim=-1) @ target.w_in
            return rescale(mixed, length)

        return step


PROJECTION: Projection = Soft()
