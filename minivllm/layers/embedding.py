"""Token embedding; with tied weights it is the LM head too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minivllm.parallel import ALONE, Parts, TensorParallel


class VocabWeight(nn.Module):
    """A row for each token id of this worker's range, [rows_of_vocab, hidden]: an LM head as it is."""

    def __init__(
        self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        self.tp = tp
        self.ids = tp.vocab_range(vocab_size)
        self.shape = vocab_size, hidden_size
        rows = tp.rows_of_vocab(vocab_size)
        weight = torch.zeros(rows, hidden_size, dtype=dtype, device=device)  # the last worker may have fewer
        self.weight = nn.Parameter(weight, requires_grad=False)

    def targets(self, name: str) -> dict[str, torch.Tensor | Parts]:
        weight = self.weight.data
        if self.tp.size == 1:
            return {f"{name}.weight": weight}
        rows = slice(self.ids.start, self.ids.stop), slice(None)
        return {f"{name}.weight": Parts(self.shape, ((rows, weight[: len(self.ids)]),))}


class Embedding(VocabWeight):
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 1.0,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__(vocab_size, hidden_size, dtype, device, tp)
        self.scale = torch.tensor(scale, dtype=dtype).item()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [tokens] -> [tokens, hidden]."""
        if self.tp.size == 1:
            x = F.embedding(token_ids, self.weight)
        else:
            own = token_ids - self.ids.start
            others = (own < 0) | (own >= len(self.ids))
            x = F.embedding(own.masked_fill(others, 0), self.weight).masked_fill(others[:, None], 0)
            x = self.tp.all_reduce(x)
        return x if self.scale == 1 else x * self.scale
