"""Paged decode attention: one query token a row against its paged K and V, split over the whole GPU (Flash-Decoding).

Work is counted in tiles of 64 tokens of one (row, KV head).  All tiles of the batch form one line, ordered by row, then
head, then position, and every worker takes an equal stretch of it (the split of Stream-K, Osama et al. 2023):

    row 0 head 0      row 0 head 1      row 1 head 0  …
    |t0 t1 t2 t3 t4   |t0 t1 t2 t3 t4   |t0 …
    |---- worker 0 ------|---- worker 1 ------|---- …

The grid is a fixed multiple of the multiprocessors, so a captured CUDA graph stays right, and balanced, whatever the
lengths become.  `plan_paged_decode` finds the start of each worker once a step, on the device, for all layers.  A
worker that covers all tiles of a (row, head) writes the output itself; otherwise it leaves a partial result (sum,
maximum, normaliser), of which it has at most two: one at the start of its stretch and one at the end.  A second,
small kernel adds those up; for most rows of a large batch it finds nothing to do.

The query heads that share a KV head are the rows of `tl.dot`, padded to 16 (also for MHA: faster than `tl.sum`).  The
softmax scale is applied here and nowhere else, folded with log2(e) into `exp2`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import num_buffers, num_multiprocessors

TILE = 64  # tokens
WORKERS_PER_MULTIPROCESSOR = 2
NUM_WARPS = 4
LOG2E = 1.4426950408889634


@triton.jit
def _num_tiles(seq_len, TILE: tl.constexpr):
    return tl.maximum(tl.cdiv(seq_len, TILE), 1)  # an empty row has one tile, all masked, so that its output is written


@triton.jit(do_not_specialize=["num_rows"])
def _plan_kernel(
    seq_lens, starts, row_tiles, num_rows, NUM_WORKERS: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Worker w: starts[w] = (row, head, tile, number of tiles).  row_tiles[r] = tiles before row r; its last entry =
    tiles a worker takes."""
    worker = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    tiles = tl.where(rows < num_rows, _num_tiles(tl.load(seq_lens + rows, rows < num_rows, 0), TILE), 0)
    ends = tl.cumsum(tiles, 0) * HEADS
    total = tl.sum(tiles, 0) * HEADS
    share = tl.cdiv(total, NUM_WORKERS)
    start = worker * share
    count = tl.maximum(tl.minimum(share, total - start), 0)
    row = tl.sum((ends <= start).to(tl.int32), 0)
    row = tl.minimum(row, num_rows - 1)
    in_row = start - tl.sum(tl.where(rows < row, tiles, 0), 0) * HEADS
    row_num_tiles = tl.maximum(tl.sum(tl.where(rows == row, tiles, 0), 0), 1)
    tl.store(starts + worker * 4, row)
    tl.store(starts + worker * 4 + 1, in_row // row_num_tiles)
    tl.store(starts + worker * 4 + 2, in_row % row_num_tiles)
    tl.store(starts + worker * 4 + 3, count)
    if worker == 0:
        tl.store(row_tiles + rows, ends // HEADS - tiles, rows < num_rows)
        tl.store(row_tiles + num_rows, share)


@triton.jit
def _decode_kernel(
    q, k_cache, v_cache, out, block_tables, seq_lens, starts, partial, partial_ml, scale_log2e,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_bt,
    stride_ot, stride_oh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    worker = tl.program_id(0)
    row = tl.load(starts + worker * 4)
    head = tl.load(starts + worker * 4 + 1)
    tile = tl.load(starts + worker * 4 + 2)
    left = tl.load(starts + worker * 4 + 3)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_md = (offs_m[:, None] < GROUP) & mask_d[None, :]
    k_offs = offs_n[:, None] * stride_kt + offs_d[None, :]
    v_offs = offs_n[:, None] * stride_vt + offs_d[None, :]
    piece = tl.full((), 0, tl.int32)
    while left > 0:
        seq_len = tl.load(seq_lens + row)
        row_num_tiles = _num_tiles(seq_len, TILE)
        count = tl.minimum(row_num_tiles - tile, left)
        q_heads = head * GROUP + offs_m
        q_tile = tl.load(
            q + row.to(tl.int64) * stride_qt + q_heads[:, None] * stride_qh + offs_d[None, :], mask_md, 0.0
        )
        table = block_tables + row.to(tl.int64) * stride_bt
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for t in tl.range(tile, tile + count, num_stages=STAGES):
            tokens = t * TILE + offs_n
            valid = tokens < seq_len
            if BLOCK_SIZE % TILE == 0:  # a tile lies in one block: one scalar load
                block = tl.load(table + (t * TILE) // BLOCK_SIZE).to(tl.int64)
                first = (t * TILE) % BLOCK_SIZE
                k_ptrs = k_cache + (block * stride_kb + first * stride_kt + head * stride_kh) + k_offs
                v_ptrs = v_cache + (block * stride_vb + first * stride_vt + head * stride_vh) + v_offs
            else:
                blocks = tl.load(table + tokens // BLOCK_SIZE, valid, 0).to(tl.int64)
                within = tokens % BLOCK_SIZE
                k_rows = blocks * stride_kb + within * stride_kt + head * stride_kh
                v_rows = blocks * stride_vb + within * stride_vt + head * stride_vh
                k_ptrs = k_cache + k_rows[:, None] + offs_d[None, :]
                v_ptrs = v_cache + v_rows[:, None] + offs_d[None, :]
            mask = valid[:, None] & mask_d[None, :]
            k = tl.load(k_ptrs, mask, 0.0)
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2e
            scores = tl.where(valid[None, :], scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # an empty row: no NaN
            p = tl.exp2(scores - m_safe[:, None])
            alpha = tl.exp2(m - m_safe)
            v = tl.load(v_ptrs, mask, 0.0)
            l = l * alpha + tl.sum(p, 1)  # noqa: E741
            acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = m_new
        if count == row_num_tiles:
            result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
            o = out + row.to(tl.int64) * stride_ot + q_heads[:, None] * stride_oh + offs_d[None, :]
            tl.store(o, result.to(out.dtype.element_ty), mask_md)
        else:
            place = (worker * 2 + tl.minimum(piece, 1)) * GROUP + offs_m
            tl.store(partial + place[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :], acc, mask_md)
            tl.store(partial_ml + place * 2, m, offs_m < GROUP)
            tl.store(partial_ml + place * 2 + 1, l, offs_m < GROUP)
        left -= count
        piece += 1
        tile = tl.full((), 0, tl.int32)
        next_row = head + 1 == HEADS
        head = tl.where(next_row, 0, head + 1)
        row += next_row.to(tl.int32)


@triton.jit(do_not_specialize=["num_rows"])
def _reduce_kernel(
    out, seq_lens, row_tiles, partial, partial_ml, stride_ot, stride_oh, num_rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of one (row, query head), if it was split."""
    row = tl.program_id(0)
    q_head = tl.program_id(1)
    share = tl.load(row_tiles + num_rows)
    row_num_tiles = _num_tiles(tl.load(seq_lens + row), TILE)
    first_tile = tl.load(row_tiles + row) * HEADS + (q_head // GROUP) * row_num_tiles
    first = first_tile // share
    last = (first_tile + row_num_tiles - 1) // share
    if first == last:
        return
    offs_d = tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, PIECES)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last + 1, PIECES):
        worker = start + offs_p
        # Only the first worker can have begun before this (row, head): then the piece is its second.
        second = (worker == first) & (first_tile != first * share)
        place = (worker * 2 + second.to(tl.int32)) * GROUP + q_head % GROUP
        mask = worker <= last
        piece_m = tl.load(partial_ml + place * 2, mask, float("-inf"))
        piece_l = tl.load(partial_ml + place * 2 + 1, mask, 0.0)
        piece = tl.load(
            partial + place[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :],
            mask[:, None] & (offs_d[None, :] < HEAD_DIM), 0.0,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(piece_m, 0))
        weight = tl.exp2(piece_m - m_new)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(piece_l * weight, 0)  # noqa: E741
        acc = acc * alpha + tl.sum(piece * weight[:, None], 0)
        m = m_new
    o = out + row.to(tl.int64) * stride_ot + q_head * stride_oh + offs_d
    tl.store(o, (acc / l).to(out.dtype.element_ty), offs_d < HEAD_DIM)


@dataclass(slots=True)
class DecodePlan:
    """Who computes what in one step, and the room for partial results; the same for all layers."""

    num_workers: int
    starts: torch.Tensor  # [workers, 4] int32: row, KV head, tile, number of tiles
    row_tiles: torch.Tensor  # [rows + 1] int32: tiles (of one head) before each row; last: tiles a worker takes
    partial: torch.Tensor  # [workers, 2, group, head_dim] float32
    partial_ml: torch.Tensor  # [workers, 2, group, 2] float32: maximum (base 2), normaliser


def plan_paged_decode(
    q: torch.Tensor, k_cache: torch.Tensor, block_tables: torch.Tensor, seq_lens: torch.Tensor
) -> DecodePlan:
    """Cut a decode step into equal stretches.  Arguments as for `paged_attention_decode`; no synchronisation."""
    num_rows, num_heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    device = q.device
    num_workers = WORKERS_PER_MULTIPROCESSOR * num_multiprocessors(device)
    group = num_heads // kv_heads
    plan = DecodePlan(
        num_workers,
        torch.empty(num_workers, 4, dtype=torch.int32, device=device),
        torch.empty(num_rows + 1, dtype=torch.int32, device=device),
        torch.empty(num_workers, 2, group, head_dim, dtype=torch.float32, device=device),
        torch.empty(num_workers, 2, group, 2, dtype=torch.float32, device=device),
    )
    _plan_kernel[(num_workers,)](
        seq_lens, plan.starts, plan.row_tiles, num_rows, NUM_WORKERS=num_workers, HEADS=kv_heads, TILE=TILE,
        ROWS=max(512, triton.next_power_of_2(num_rows)), num_warps=1,
    )  # fmt: skip
    return plan


def paged_attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    plan: DecodePlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for one query token a row.

    q: [rows, heads, head_dim]; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim], any strides but the last
    dimension contiguous, block_size 16, 32 or a multiple of 64; block_tables: [rows, columns] int32; seq_lens: [rows]
    int32, 0 giving an output of zeros; plan: of `plan_paged_decode`, made here if absent.  Returns [rows, heads,
    head_dim] in q's dtype.
    """
    num_rows, num_heads, head_dim = q.shape
    kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // kv_heads
    if plan is None:
        plan = plan_paged_decode(q, k_cache, block_tables, seq_lens)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # The workers of a multiprocessor share its memory.  A tile in flight takes two stages of Triton's pipeline: its
    # block number is loaded before it.
    tile_bytes = 2 * TILE * block_d * q.element_size()
    buffers = num_buffers(q.device, WORKERS_PER_MULTIPROCESSOR * tile_bytes, 20 << 10, most=2)
    _decode_kernel[(plan.num_workers,)](
        q, k_cache, v_cache, out, block_tables, seq_lens, plan.starts, plan.partial, plan.partial_ml, scale * LOG2E,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        out.stride(0), out.stride(1),
        HEADS=kv_heads, GROUP=group, BLOCK_M=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim,
        BLOCK_D=block_d, BLOCK_SIZE=block_size, TILE=TILE, STAGES=1 + 2 * buffers, num_warps=NUM_WARPS,
    )  # fmt: skip
    _reduce_kernel[(num_rows, num_heads)](
        out, seq_lens, plan.row_tiles, plan.partial, plan.partial_ml, out.stride(0), out.stride(1), num_rows,
        HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, TILE=TILE, PIECES=8, num_warps=1,
    )  # fmt: skip
    return out
