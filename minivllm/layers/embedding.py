"""Token embedding and LM head; with tied weights the head is a part of the embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.parallel import ALONE, Parts, TensorParallel


class Embedding(nn.Module):
    """A row for each token id: [vocab_size, hidden]."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
    ) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = torch.tensor(scale, dtype=dtype).item()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [tokens] -> [tokens, hidden]."""
        x = F.embedding(token_ids, self.weight)
        return x if self.scale == 1 else x * self.scale

    def targets(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight.data}


class LMHead(nn.Module):
    """A row for each token id of this worker's range."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.whole_shape = vocab_size, hidden_size
        self.ids = tp.vocab_range(vocab_size)
        weight = torch.empty(len(self.ids), hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def targets(self, name: str) -> dict[str, torch.Tensor | Parts]:
        weight = self.weight.data
        if len(weight) == self.whole_shape[0]:
            return {f"{name}.weight": weight}
        rows = slice(self.ids.start, self.ids.stop), slice(None)
        return {f"{name}.weight": Parts(self.whole_shape, ((rows, weight),))}
