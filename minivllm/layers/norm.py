"""RMSNorm, with the residual addition before it."""

from __future__ import annotations

import torch
from torch import nn

from minivllm.backends import Backend
from minivllm.parallel import Rows, RowShare, Summand


class RMSNorm(nn.Module):
    """With `zero_centered`, the checkpoint's weight is the true one minus 1; it is kept in float32, to lose nothing."""

    def __init__(
        self,
        size: int,
        eps: float,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        zero_centered: bool = False,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.eps = eps
        self.zero_centered = zero_centered
        dtype = torch.float32 if zero_centered else dtype
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Rows | Summand, residual: Rows | None) -> tuple[Rows, Rows]:
        """(norm of x + residual, x + residual), both [tokens, size]; without a residual, x is the first one."""
        if isinstance(x, RowShare):
            own = residual.value if isinstance(residual, RowShare) else None if residual is None else residual[x.rows]
            normed, total = self._norm(x.value if x.addends is None else Summand(x.value, x.addends), own)
            return x.with_value(normed), x.with_value(total)
        assert not isinstance(residual, RowShare)
        return self._norm(x, residual)

    def _norm(self, x: torch.Tensor | Summand, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(x, Summand):
            return self.backend.sum_rms_norm(x, residual, self.weight, self.eps)
        if residual is None:
            return self.backend.rms_norm(x, self.weight, self.eps), x
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)

    def finish_loading(self) -> None:
        """Once loaded."""
        if self.zero_centered:
            self.weight.data += 1

    def targets(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight.data}
