"""min_p, top_k and top_p without sorting the vocabulary.

All three keep the tokens above some logit, so a row needs one threshold.  Floats order like integers once the bits of
negative ones are flipped; the threshold is found as such an integer, two bits a pass over the row from the highest
down: the largest number such that the tokens at or above it are still top_k many, or still have a share top_p of the
probability.  Equal logits are kept or dropped together.  One program a row; after the first pass a row lies in the L2.

Sixteen passes over a whole row are too many.  The first pass therefore keeps the maximum of each of BLOCK columns, and
the threshold among those is looked for first: it cannot be above that of the row, since the maxima are tokens of the
row too.  What reaches it, usually a few hundred tokens, is copied together, and the sixteen passes are over the copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, wait_for_inputs

BLOCK = 8192
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _key(value):
    """Unsigned integers in the order of the floats."""
    bits = value.to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def _block(row, start, vocab_size, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    return tl.load(row + ids, ids < vocab_size, float("-inf"))


@triton.jit
def _highest_threshold(row, vocab_size, lowest, target, top, scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key such that what lies at or above it and `lowest` comes to `target` at least, counted in tokens or
    in exp2((logit − top) · scale)."""
    threshold = tl.zeros([], tl.uint32)
    for step in range(16):
        unit = tl.full([], 1, tl.uint32) << (30 - 2 * step)
        sum1 = tl.zeros([BLOCK], tl.float32)
        sum2 = tl.zeros([BLOCK], tl.float32)
        sum3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            value = _block(row, start, vocab_size, BLOCK)
            key = _key(value)
            weight = tl.exp2((value - top) * scale) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            weight = tl.where(key >= lowest, weight, 0.0)
            sum1 += tl.where(key >= threshold + unit, weight, 0.0)
            sum2 += tl.where(key >= threshold + 2 * unit, weight, 0.0)
            sum3 += tl.where(key >= threshold + 3 * unit, weight, 0.0)
        more = (
            (tl.sum(sum1, 0) >= target).to(tl.uint32)
            + (tl.sum(sum2, 0) >= target).to(tl.uint32)
            + (tl.sum(sum3, 0) >= target).to(tl.uint32)
        )
        threshold += more * unit
    return threshold


@triton.jit
def _copy_from(row, target, vocab_size, lowest, BLOCK: tl.constexpr):
    """Copy what lies at or above `lowest` to `target`, in order; returns how much it is."""
    count = 0
    for start in range(0, vocab_size, BLOCK):
        value = _block(row, start, vocab_size, BLOCK)
        kept = ((_key(value) >= lowest) & (start + tl.arange(0, BLOCK) < vocab_size)).to(tl.int32)
        tl.store(target + count + tl.cumsum(kept, 0) - 1, value, kept > 0)
        count += tl.sum(kept, 0)
    tl.debug_barrier()  # the whole program is to see it
    return count


@triton.jit
def _mass(row, size, lowest, top, scale, BLOCK: tl.constexpr):
    """The sum of exp2((logit − top) · scale) over what lies at or above `lowest`."""
    masses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        value = _block(row, start, size, BLOCK)
        masses += tl.where(_key(value) >= lowest, tl.exp2((value - top) * scale), 0.0)
    return tl.sum(masses, 0)


@triton.jit(do_not_specialize=["vocab_size", "stride_scratch"])
def _truncate_kernel(
    logits, scratch, temperature, top_k, top_p, min_p, stride, stride_scratch, vocab_size,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = logits + tl.program_id(0).to(tl.int64) * stride
    rest = scratch + tl.program_id(0).to(tl.int64) * stride_scratch
    wait_for_inputs(PDL)
    k = tl.load(top_k + tl.program_id(0))
    p = tl.load(top_p + tl.program_id(0))
    least = tl.load(min_p + tl.program_id(0))
    temp = tl.load(temperature + tl.program_id(0))
    temp = tl.where(temp > 0, temp, 1.0)
    scale = LOG2E / temp
    by_count = (k > 0) & (k < vocab_size)
    tops = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        tops = tl.maximum(tops, _block(row, start, vocab_size, BLOCK))
    top = tl.max(tops, 0)
    lowest = tl.zeros([], tl.uint32)
    if least > 0:  # p < min_p · p_top  <=>  logit < top + temperature · log(min_p)
        lowest = _key(top + temp * tl.log(least))
    if by_count | (p < 1):
        tl.store(rest + tl.arange(0, BLOCK), tops)
        tl.debug_barrier()
        mass = 0.0
        if by_count:
            bound = _highest_threshold(rest, BLOCK, lowest, k, top, scale, False, BLOCK)
        else:
            mass = _mass(row, vocab_size, lowest, top, scale, BLOCK)
            bound = _highest_threshold(rest, BLOCK, lowest, p * mass, top, scale, True, BLOCK)
        tl.debug_barrier()
        size = vocab_size
        bound = tl.maximum(lowest, bound)
        if bound > 0:
            size = _copy_from(row, rest, vocab_size, bound, BLOCK)
        else:
            rest = row
        if by_count:
            lowest = tl.maximum(lowest, _highest_threshold(rest, size, lowest, k, top, scale, False, BLOCK))
            mass = _mass(rest, size, lowest, top, scale, BLOCK)
        if p < 1:
            target = tl.maximum(p * mass, 1e-30)  # the most likely is always kept
            lowest = tl.maximum(lowest, _highest_threshold(rest, size, lowest, target, top, scale, True, BLOCK))
    for start in range(0, vocab_size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        value = _block(row, start, vocab_size, BLOCK)
        tl.store(row + ids, float("-inf"), (ids < vocab_size) & (_key(value) < lowest))


def truncate(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """Set to −inf, in place, what min_p, then top_k, then top_p (Holtzman et al. 2020) rule out.

    logits: [rows, vocab_size] float32; temperature, top_p, min_p: [rows] float32; top_k: [rows] int32.  top_k ≤ 0,
    top_p ≥ 1 and min_p = 0 mean off; a temperature of 0 counts as 1.
    """
    rows, vocab_size = logits.shape
    scratch = torch.empty(rows, max(BLOCK, vocab_size), dtype=torch.float32, device=logits.device)
    _truncate_kernel[(rows,)](
        logits, scratch, temperature, top_k, top_p, min_p, logits.stride(0), scratch.stride(0), vocab_size,
        BLOCK=BLOCK, num_warps=16, **launch_options(logits.device),
    )  # fmt: skip
