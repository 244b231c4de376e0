"""Linear layers, single or merged: several checkpoint tensors side by side in one weight, for one matrix product."""

from __future__ import annotations

import torch
from torch import nn

from minivllm.backends import Backend


class Linear(nn.Module):
    """x Wᵀ + b, weight [out, in]."""

    def __init__(
        self, in_size: int, out_size: int, bias: bool, backend: Backend, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.backend = backend
        self.weight: torch.Tensor = nn.Parameter(
            torch.empty(out_size, in_size, dtype=dtype, device=device), requires_grad=False
        )
        self.bias = (
            nn.Parameter(torch.empty(out_size, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        return self.backend.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Once loaded: keep the weight in the layout that the backend likes best."""
        packed = self.backend.pack(self.weight.data)
        del self.weight
        self.weight = packed

    def targets(self, name: str) -> dict[str, torch.Tensor]:
        found = {f"{name}.weight": self.weight.data}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias.data
        return found


class MergedLinear(Linear):
    """The projections `parts` (name in the checkpoint: output size) of one input, concatenated in that order."""

    def __init__(
        self,
        in_size: int,
        parts: dict[str, int],
        bias: bool,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(in_size, sum(parts.values()), bias, backend, dtype, device)
        self.parts = parts

    def targets(self, name: str) -> dict[str, torch.Tensor]:
        parent = name.rpartition(".")[0]
        found = {}
        for suffix, whole in super().targets("").items():
            for part, view in zip(self.parts, whole.split(list(self.parts.values())), strict=True):
                found[f"{parent}.{part}{suffix}"] = view
        return found
