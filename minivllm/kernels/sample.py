"""Greedy sampling, and sampling from softmax(logits / temperature).

The vocabulary is cut into splits of SPLIT_SIZE tokens.  A first kernel finds the maximum of each split and, for rows
that are drawn, the sum of exp((logit − maximum) / temperature) over it.  A second one draws the split by these sums,
and then the token inside it: so the logits are read once, and one split of them twice.  Both are drawn as the argmax of
log weight + Gumbel noise (Gumbel 1954), which a rounding error in the logits seldom changes.

With tensor parallelism each rank has the logits of some of the splits.  The best split of a row is the best of the
ranks' best ones, so each draws a token from its own, and the ranks exchange these with their scores.

Randomness is stateless: noise is a hash of (seed, output position, id), so a request draws the same tokens alone or in
a batch, and again after preemption.  The hash is made of a 32-bit mixer (Wellons, "Prospecting for Hash Functions");
`backends/torch_backend.py` computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm.backends.base import SPLIT_SIZE
from minivllm.kernels.device import launch_options, wait_for_inputs
from minivllm.kernels.inbox import Inbox, places_of_turn, receive, send

NO_TOKEN = tl.constexpr(0x7FFFFFFF)
LOG2E = tl.constexpr(1.4426950408889634)
FIRST_SPLIT = tl.constexpr(1 << 30)  # ids of the noise of splits


@dataclass(frozen=True)
class VocabShare:
    """Of which token ids a rank has the logits: those from `first_id`, a multiple of SPLIT_SIZE, on."""

    first_id: int
    inbox: Inbox  # of at least as many rows as are drawn for, int32 of width 4


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
    a = _mix((seed & 0xFFFFFFFF).to(tl.uint32) ^ 0x9E3779B9)
    b = _mix(((seed >> 32) & 0xFFFFFFFF).to(tl.uint32) + a)
    place = position.to(tl.uint32)
    bits = _mix(_mix(_mix(a + place) ^ ids.to(tl.uint32)) + _mix(b ^ _mix(place ^ 0x85EBCA6B))) >> 1
    u = (bits.to(tl.float32) + 0.5) * 4.656612873077393e-10  # in (0, 1), fine near 0, where the winners are
    exponential = tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - tl.minimum(u, 0.9999999)))
    return -tl.log(exponential)


@triton.jit
def _weights(value, top, temperature):
    """exp((value − top) / temperature); 1 at the top, also where that is infinite."""
    return tl.where(value == top, 1.0, tl.exp2((value - top) * (LOG2E / temperature)))


@triton.jit(do_not_specialize=["vocab_size"])
def _sample_split_kernel(
    logits, temperature, split_top, split_id, split_mass, stride, vocab_size,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    split = tl.program_id(1)
    ids = split * SPLIT + tl.arange(0, SPLIT)
    wait_for_inputs(PDL)
    temp = tl.load(temperature + row)
    value = tl.load(logits + row.to(tl.int64) * stride + ids, ids < vocab_size, float("-inf")).to(tl.float32)
    top = tl.max(value, 0)
    is_top = (value == top) & (ids < vocab_size)  # nowhere, if all are NaN
    place = row * SPLITS + split
    tl.store(split_top + place, top)
    tl.store(split_id + place, tl.min(tl.where(is_top, ids, NO_TOKEN), 0))  # of equals, the lowest
    if temp > 0:
        tl.store(split_mass + place, tl.sum(tl.where(ids < vocab_size, _weights(value, top, temp), 0.0), 0))


@triton.jit
def _best_of_ranks(
    token, top, score, temp, row, places, addresses, turns, rank, RANKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token of the rank with the best one.  `top`: the greatest logit of this rank; `score`: of its token, drawn
    relative to it.  Of equals, the lowest token."""
    turn = tl.load(turns + row)
    start = places_of_turn(row, turn, 4, RANKS)
    words = tl.arange(0, 4)
    own = tl.where(words == 0, top.to(tl.int32, bitcast=True), score.to(tl.int32, bitcast=True))
    own = tl.where(words == 2, token, own)
    for peer in tl.static_range(RANKS):
        send(own, addresses, peer, start + rank * 4 + words, words < 3)
    ranks = tl.arange(0, BLOCK)
    place = places + start + ranks * 4
    tops = receive(place, ranks < RANKS).to(tl.float32, bitcast=True)
    scores = receive(place + 1, ranks < RANKS).to(tl.float32, bitcast=True)
    tokens = receive(place + 2, ranks < RANKS)
    tl.store(turns + row, turn + 1)  # behind the barrier in `receive`: all warps have read it
    best = tl.where(ranks < RANKS, tops, float("-inf"))
    if temp > 0:
        top = tl.max(best, 0)
        best = tl.where(best == top, 0.0, (best - top) / temp) + tl.where(ranks < RANKS, scores, float("-inf"))
    return tl.min(tl.where((best == tl.max(best, 0)) & (ranks < RANKS), tokens, NO_TOKEN), 0)


@triton.jit(do_not_specialize=["vocab_size", "first_id", "rank"])
def _sample_pick_kernel(
    logits, temperature, seeds, positions, split_top, split_id, split_mass, tokens, last_token, slots,
    inbox, addresses, turns, rank, stride, vocab_size, first_id,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    splits = tl.arange(0, BLOCK)
    places = row * SPLITS + splits
    wait_for_inputs(PDL)
    temp = tl.load(temperature + row)
    tops = tl.load(split_top + places, splits < SPLITS, float("-inf"))
    ids = tl.load(split_id + places, splits < SPLITS, NO_TOKEN)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, ids, NO_TOKEN), 0)
    best_score = tl.full((), float("-inf"), tl.float32)
    if temp > 0:
        seed = tl.load(seeds + row)
        position = tl.load(positions + row)
        mass = tl.load(split_mass + places, splits < SPLITS, 0.0) * _weights(tops, top, temp)
        score = tl.log(mass) + _gumbel(seed, position, splits + first_id // SPLIT + FIRST_SPLIT)
        score = tl.where(mass > 0, score, float("-inf"))
        best_score = tl.max(score, 0)
        split = tl.min(tl.where(score == best_score, splits, BLOCK - 1), 0)
        split_best = tl.max(tl.where(splits == split, tops, float("-inf")), 0)
        inside = split * SPLIT + tl.arange(0, SPLIT)
        value = tl.load(logits + row.to(tl.int64) * stride + inside, inside < vocab_size, float("-inf")).to(tl.float32)
        score = tl.where(value == split_best, 0.0, (value - split_best) / temp)
        score += _gumbel(seed, position, inside + first_id)
        score = tl.where(inside < vocab_size, score, float("-inf"))
        drawn = tl.min(tl.where((score == tl.max(score, 0)) & (inside < vocab_size), inside, NO_TOKEN), 0)
        token = tl.where(drawn == NO_TOKEN, token, drawn)
    if RANKS > 1:
        token = tl.where(token == NO_TOKEN, NO_TOKEN, token + first_id)
        token = _best_of_ranks(token, top, best_score, temp, row, inbox, addresses, turns, rank, RANKS, BLOCK_RANKS)
    token = tl.where(token == NO_TOKEN, 0, token)  # a row of NaN has no maximum
    tl.store(tokens + row, token)
    tl.store(last_token + tl.load(slots + row), token)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    last_token: torch.Tensor,
    slots: torch.Tensor,
    share: VocabShare | None = None,
) -> torch.Tensor:
    """Draw a token a row, and write it where the next step reads it: last_token[slots[row]].

    logits: [rows, vocab_size]; temperature: [rows] float32, 0 being greedy; seeds: [rows] int64; positions: [rows]
    int32, of the token in the output; last_token: [slots] int32; slots: [rows] int32.  Returns [rows] int32.

    `share`: which token ids' logits these are, if not all.  Every rank must call it, and gets the same tokens.
    """
    rows, vocab_size = logits.shape
    first_id = 0 if share is None else share.first_id
    assert first_id % SPLIT_SIZE == 0 or not vocab_size
    splits = triton.cdiv(vocab_size, SPLIT_SIZE)
    split_top = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    split_id = torch.empty(rows, splits, dtype=torch.int32, device=logits.device)
    split_mass = torch.empty(rows, splits, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    ranks, exchange = (1, (tokens, tokens, tokens, 0)) if share is None else (share.inbox.size, share.inbox.arguments)
    options = launch_options(logits.device)
    if splits:  # a rank may have no logits
        _sample_split_kernel[(rows, splits)](
            logits, temperature, split_top, split_id, split_mass, logits.stride(0), vocab_size,
            SPLITS=splits, SPLIT=SPLIT_SIZE, num_warps=4, **options,
        )  # fmt: skip
    _sample_pick_kernel[(rows,)](
        logits, temperature, seeds, positions, split_top, split_id, split_mass, tokens, last_token, slots,
        *exchange, logits.stride(0), vocab_size, first_id,
        SPLITS=splits, BLOCK=triton.next_power_of_2(max(1, splits)), SPLIT=SPLIT_SIZE, RANKS=ranks,
        BLOCK_RANKS=triton.next_power_of_2(ranks),
        num_warps=16 if ranks == 1 else 4,  # a third of the time to compile; fewer that wait for other ranks
        **options,
    )  # fmt: skip
    return tokens
