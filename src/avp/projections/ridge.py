"""ridge: the linear map that takes output embeddings to input embeddings, for models that do not tie them.

A = (W_outᵀ W_out + λI)⁻¹ W_outᵀ W_in, as in LatentMAS (arXiv:2511.20639); e = h · A at the mean length of an input
embedding. With tied embeddings A is close to the identity and this is `norm`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from avp.projections.norm import mean_norm, rescale
from avp.protocols import Embeddings, Projection, Step


@dataclass(frozen=True, slots=True)
class Ridge:
    """`strength` is λ as a share of the mean diagonal of W_outᵀ W_out."""

    name: str = "ridge"
    strength: float = 1e-3

    def fit(self, source: Embeddings, target: Embeddings) -> Step:
        """Solves once, in float32 on the device."""
        w_out, w_in = source.w_out.float(), target.w_in.float()
        gram = w_out.T @ w_out
        gram.diagonal().add_(self.strength * gram.diagonal().mean())
        matrix = torch.linalg.solve(gram, w_out.T @ w_in).to(source.w_out.dtype)
        length = mean_norm(target)

        def step(hidden: torch.Tensor) -> torch.Tensor:
            mapped = hidden @ matrix
            return rescale(mapped, length)

        return step


PROJECTION: Projection = Ridge()
