"""norm: the hidden state itself, at the length of an input embedding (LatentMAS, arXiv:2511.20639, without its matrix).

e = h · mean‖E‖ / ‖h‖
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from avp.protocols import Embeddings, Projection, Step


@dataclass(frozen=True, slots=True)
class Norm:
    """Needs equal hidden sizes."""

    name: str = "norm"

    def fit(self, source: Embeddings, target: Embeddings) -> Step:
        """Takes the mean length of the target's input embeddings, its factor included."""
        length = mean_norm(target)

        def step(hidden: torch.Tensor) -> torch.Tensor:
            return rescale(hidden, length)

        return step


def mean_norm(embeddings: Embeddings) -> torch.Tensor:
    """Mean length of an input embedding as the model sees it, a scalar tensor in the model's dtype."""
    length: torch.Tensor = embeddings.w_in.norm(dim=-1).mean() * embeddings.scale
    return length


def rescale(vectors: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Vectors [n, hidden] at that length."""
    scaled: torch.Tensor = vectors * (length / vectors.norm(dim=-1, keepdim=True))
    return scaled


PROJECTION: Projection = Norm()
