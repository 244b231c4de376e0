"""RMSNorm (Zhang & Sennrich 2019), alone and fused with what comes before it: the residual addition, and with tensor
parallelism the sum over the ranks.  One program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, wait_for_inputs
from minivllm.kernels.inbox import Inbox, exchange_sum

OWNED_BYTES = 1 << 18  # of a step's rows, beyond which each is added up by one of more than two ranks


@triton.jit(do_not_specialize=["rank"])
def _rms_norm_kernel(
    x, residual, weight, out, residual_out, addends, places, addresses, turns, rank, stride_x, stride_addends, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, ADDENDS: tl.constexpr, RANKS: tl.constexpr,
    OWNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < SIZE
    w = tl.load(weight + offs, mask, 0.0)
    wait_for_inputs(PDL)
    value = tl.load(x + row * stride_x + offs, mask, 0.0)
    dtype = value.dtype
    before = tl.load(residual + row * SIZE + offs, mask, 0.0) if ADD else tl.zeros([BLOCK], dtype)
    if RANKS > 1:
        value = exchange_sum(value, before, places, addresses, turns, row, rank, offs, mask, SIZE, RANKS, OWNED)
    else:
        value = value.to(tl.float32)
        for i in tl.static_range(ADDENDS):
            value += tl.load(addends + i * stride_addends + row * SIZE + offs, mask, 0.0)
        value = (value + before).to(dtype)
    if ADD or ADDENDS > 0 or RANKS > 1:
        tl.store(residual_out + row * SIZE + offs, value, mask)
    value32 = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value32 * value32, 0) / SIZE + eps)
    tl.store(out + row * SIZE + offs, (value32 * scale).to(value.dtype) * w, mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) · weight.  x: [rows, size], rows may be strided; returns [rows, size], contiguous, in x's dtype."""
    return _launch(x, None, x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), both [rows, size]; `residual` is overwritten with the sum."""
    return _launch(x, residual, residual, weight, eps), residual


def sum_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, addends: torch.Tensor | Inbox
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the sum of all ranks' x, without a residual or with one: (normed, what was normed).  x: [rows, size],
    contiguous; `residual`, or x without one, is overwritten.  `addends`: the others' x [ranks − 1, rows, size], or
    the inbox where they come, of at least as many rows; then every rank must call it."""
    total = x if residual is None else residual
    return _launch(x, residual, total, weight, eps, addends), total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    addends: torch.Tensor | Inbox | None = None,
) -> torch.Tensor:
    rows, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ranks, exchange = 1, (weight, weight, weight, 0)  # no exchange
    if isinstance(addends, Inbox):
        ranks, exchange, addends = addends.size, addends.arguments, None
    given = x[None] if addends is None else addends
    _rms_norm_kernel[(rows,)](
        x, x if residual is None else residual, weight, out, residual_out, given, *exchange,
        x.stride(0), given.stride(0), eps,
        SIZE=size, BLOCK=triton.next_power_of_2(size), ADD=residual is not None,
        ADDENDS=0 if addends is None else len(addends), RANKS=ranks, OWNED=ranks > 2 and x.nbytes > OWNED_BYTES,
        num_warps=8 if size > 2048 else 4, **launch_options(x.device),
    )  # fmt: skip
    return out
