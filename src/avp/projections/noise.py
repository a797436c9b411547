"""noise: random vectors of the length of an input embedding. The control: what a latent step must beat to mean
anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from avp.projections.norm import mean_norm, rescale
from avp.protocols import Embeddings, Projection, Step


@dataclass(frozen=True, slots=True)
class Noise:
    """Draws from torch's global generator."""

    name: str = "noise"

    def fit(self, source: Embeddings, target: Embeddings) -> Step:
        """Nothing to fit but the length."""
        length = mean_norm(target)
        width = target.w_in.shape[-1]

        def step(hidden: torch.Tensor) -> torch.Tensor:
            drawn = torch.randn(hidden.shape[0], width, dtype=hidden.dtype, device=hidden.device)
            return rescale(drawn, length)

        return step


PROJECTION: Projection = Noise()
