"""RMSNorm (Zhang & Sennrich 2019), alone and fused with the residual addition before it.  One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, wait_for_inputs


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, residual_out, stride_x, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    w = tl.load(weight + offs, mask, 0.0)
    wait_for_inputs(PDL)
    value = tl.load(x + row * stride_x + offs, mask, 0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + row * SIZE + offs, mask, 0.0)).to(value.dtype)
        tl.store(residual_out + row * SIZE + offs, value, mask)
    value32 = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value32 * value32, 0) / SIZE + eps)
    tl.store(out + row * SIZE + offs, (value32 * scale).to(value.dtype) * w, mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) · weight.  x: [rows, size], rows may be strided; returns [rows, size], contiguous, in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [rows, size]; `residual` is overwritten with the sum."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, out, residual, eps, add=True)
    return out, residual


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    eps: float,
    *,
    add: bool,
) -> None:
    rows, size = x.shape
    _rms_norm_kernel[(rows,)](
        x, residual, weight, out, residual_out, x.stride(0), eps,
        SIZE=size, BLOCK=triton.next_power_of_2(size), ADD=add, num_warps=8 if size > 2048 else 4,
        **launch_options(x.device),
    )  # fmt: skip
