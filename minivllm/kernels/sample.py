"""Greedy and Gumbel-max sampling (argmax of logits / temperature + Gumbel noise draws from the softmax; Gumbel 1954).

Randomness is stateless: the noise of a token is a hash of (seed, output position, token id), so a request draws the
same tokens alone or in a batch, and again after preemption.  The hash is two rounds of a 32-bit mixer (Wellons,
"Prospecting for Hash Functions"); `backends/torch_backend.py` computes the same noise bit for bit.

The vocabulary is cut into SPLITS parts a row; a second kernel picks the best of them, and of equals the lowest id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, wait_for_inputs

SPLIT_SIZE = 8192


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _gumbel(seed, position, ids):
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(_mix(low ^ 0x9E3779B9) + position.to(tl.uint32))
    second = _mix(key + high)
    bits = _mix(_mix(ids.to(tl.uint32) ^ key) + second) >> 1
    u = (bits.to(tl.float32) + 0.5) * 4.656612873077393e-10  # in (0, 1), fine near 0, where the winners are
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - tl.minimum(u, 0.9999999)))
    return -tl.log(exponential)


@triton.jit(do_not_specialize=["vocab_size"])
def _sample_split_kernel(
    logits, temperature, seeds, positions, best_value, best_id, stride, vocab_size,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    wait_for_inputs(PDL)
    temp = tl.load(temperature + row)
    inverse = tl.div_rn(1.0, tl.where(temp > 0, temp, 1.0))
    seed = tl.load(seeds + row)
    position = tl.load(positions + row)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_ids = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, SPLIT, BLOCK):
        ids = split * SPLIT + start + tl.arange(0, BLOCK)
        value = tl.load(logits + row.to(tl.int64) * stride + ids, ids < vocab_size, float("-inf")).to(tl.float32)
        if temp > 0:
            value = value * inverse + _gumbel(seed, position, ids)
        better = (value > best) & (ids < vocab_size)
        best = tl.where(better, value, best)
        best_ids = tl.where(better, ids, best_ids)
    top = tl.max(best, 0)
    tl.store(best_value + row * SPLITS + split, top)
    tl.store(best_id + row * SPLITS + split, tl.min(tl.where(best == top, best_ids, 0x7FFFFFFF), 0))


@triton.jit
def _sample_pick_kernel(
    best_value, best_id, tokens, last_token, slots, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    value = tl.load(best_value + row * SPLITS + offs, offs < SPLITS, float("-inf"))
    ids = tl.load(best_id + row * SPLITS + offs, offs < SPLITS, 0x7FFFFFFF)
    token = tl.min(tl.where(value == tl.max(value, 0), ids, 0x7FFFFFFF), 0)
    token = tl.where(token == 0x7FFFFFFF, 0, token)  # a row of NaN has no maximum
    tl.store(tokens + row, token)
    tl.store(last_token + tl.load(slots + row), token)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    last_token: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Draw a token a row, and write it where the next step reads it: last_token[slots[row]].

    logits: [rows, vocab_size]; temperature: [rows] float32, 0 being greedy; seeds: [rows] int64; positions: [rows]
    int32, of the token in the output; last_token: [slots] int32; slots: [rows] int32.  Returns [rows] int32.
    """
    rows, vocab_size = logits.shape
    splits = triton.cdiv(vocab_size, SPLIT_SIZE)
    best_value = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    best_id = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    options = launch_options(logits.device)
    _sample_split_kernel[(rows, splits)](
        logits, temperature, seeds, positions, best_value, best_id, logits.stride(0), vocab_size,
        SPLITS=splits, SPLIT=SPLIT_SIZE, BLOCK=1024, num_warps=4,
        **options,
    )  # fmt: skip
    _sample_pick_kernel[(rows,)](
        best_value, best_id, tokens, last_token, slots, SPLITS=splits, BLOCK=triton.next_power_of_2(splits),
        num_warps=1, **options,
    )  # fmt: skip
    return tokens
