"""Linear layers in 8-bit floats (e4m3), made from loaded ones: half the memory, and half the bytes to read a step.

A weight has one scale for each output, its largest magnitude over that of e4m3 (448). Inputs are rounded the same way,
one scale a token, worked out when they come (W8A8), except where the backend multiplies them as they are. The
embedding and the LM head stay as they were.
"""

from __future__ import annotations

import torch
from torch import nn

from minivllm.backends import Backend
from minivllm.backends.base import quantize_rows
from minivllm.layers.linear import Linear
from minivllm.parallel import Rows, RowShare

MAX_ROWS = 4096  # of a weight that are quantized at once: what that takes beside the weight stays small


class Fp8Linear(nn.Module):
    """x Wᵀ + b, W = weight · scale: weight [out, in] float8_e4m3fn, scale [out] float32."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.backend: Backend = linear.backend
        self.bias = linear.bias
        original = linear.weight.data
        self.weight = torch.empty(original.shape, dtype=torch.float8_e4m3fn, device=original.device)
        self.scale = torch.empty(original.shape[0], dtype=torch.float32, device=original.device)
        for start in range(0, original.shape[0], MAX_ROWS):
            rows = slice(start, start + MAX_ROWS)
            self.weight[rows], self.scale[rows] = quantize_rows(original[rows])

    def forward(self, x: Rows) -> torch.Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        if isinstance(x, RowShare):
            return x.product(lambda part, out: out.copy_(self.forward(part)), self.weight.shape[0])
        return self.backend.fp8_linear(x, self.weight, self.scale, self.bias)


def quantize_linears(model: nn.Module) -> None:
    """Replace every linear layer inside `model`, once loaded; those directly in it stay, as a head would."""
    places = [
        (parent, name)
        for parent in model.modules()
        if parent is not model
        for name, child in parent.named_children()
        if isinstance(child, Linear)
    ]  # no list of the layers themselves: each is to be freed as soon as it is replaced
    for parent, name in places:
        setattr(parent, name, Fp8Linear(getattr(parent, name)))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # or smaller tensors settle where the old weight was, and waste the rest
