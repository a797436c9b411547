"""The embeddings of a transformers model, as a projection sees them."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


class Tables:
    """`w_in` and `w_out`, [vocabulary, hidden], and the factor that the model's input layer puts on a row."""

    def __init__(self, model: PreTrainedModel) -> None:
        embed = model.get_input_embeddings()
        self.w_in: torch.Tensor = embed.weight
        self.w_out: torch.Tensor = model.get_output_embeddings().weight
        row = int(self.w_in[:64].abs().sum(-1).argmax())
        seen = embed(torch.tensor([row], device=self.w_in.device))[0]
        self.scale = float((seen.float().norm() / self.w_in[row].float().norm()).item())
