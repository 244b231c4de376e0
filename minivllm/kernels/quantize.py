"""Rounding of activations to 8-bit floats (e4m3), one scale a row.  One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, wait_for_inputs


@triton.jit
def _quantize_rows_kernel(
    x, out, scales, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    wait_for_inputs(PDL)
    value = tl.load(x + row * stride + offs, mask, 0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), 0), 1e-12) / LARGEST
    rounded = tl.clamp(value / scale, -LARGEST, LARGEST).to(out.dtype.element_ty)
    tl.store(out + row * SIZE + offs, rounded, mask)
    tl.store(scales + row, scale)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [rows, size], rows may be strided.  Returns (x / scale in float8_e4m3fn, [rows, size] contiguous; scale [rows]
    float32, the largest magnitude of a row / 448)."""
    rows, size = x.shape
    out = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    _quantize_rows_kernel[(rows,)](
        x, out, scales, x.stride(0), SIZE=size, BLOCK=triton.next_power_of_2(size), LARGEST=torch.finfo(out.dtype).max,
        num_warps=8 if size > 2048 else 4, **launch_options(x.device),
    )  # fmt: skip
    return out, scales
