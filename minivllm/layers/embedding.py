"""Token embedding; with tied weights it is the LM head too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Embedding(nn.Module):
    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = torch.tensor(scale, dtype=dtype).item()
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [tokens] -> [tokens, hidden]."""
        x = F.embedding(token_ids, self.weight)
        return x if self.scale == 1 else x * self.scale

    def targets(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight.data}
