"""Paged decode attention: one query token a row against its paged K and V, split over the whole GPU (Flash-Decoding).

Work is counted in tiles of 64 tokens.  All tiles of the batch form one line, by row and position, which is cut into
equal pieces (the split of Stream-K, Osama et al. 2023); a worker takes one piece for one KV head:

    row 0          row 1             row 2       …
    |t0 t1 t2 t3 t4|t0 t1 t2 t3 t4 t5|t0 t1 …
    |---- piece 0 ------|---- piece 1 ------|---- …     × KV heads

The workers of a piece run side by side over the same tokens, and what they read lies side by side in memory too: the
heads of a token.  (Stretches of one head after the other, as long, take longer on an H100.)

The grid is a fixed multiple of the multiprocessors, so a captured CUDA graph stays right, and balanced, whatever the
lengths become.  `plan_paged_decode` lists the tiles once a step, on the device, for all layers and heads.  A worker
runs one loop over its piece, across rows, so that the loads of the next row are in flight while this one ends: short
rows would otherwise leave the memory idle between them.  It writes the output of each row that lies within its piece;
of the two at its ends it leaves partial results (sum, maximum, normaliser), which a second, small kernel adds up.

The query heads that share a KV head are the rows of `tl.dot`, padded to 16 (also for MHA: faster than `tl.sum`).  The
softmax scale is applied here and nowhere else, folded with log2(e) into `exp2`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import dot_type, launch_options, num_buffers, num_multiprocessors, softcap, wait_for_inputs

TILE = 64  # tokens
WORKERS_PER_MULTIPROCESSOR = 2
NUM_WARPS = 4
NO_WINDOW = 1 << 30
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_rows", "window"])
def _plan_kernel(
    seq_lens, block_tables, tiles, total, num_rows, window, stride_bt,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """List the tiles of one row."""
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    lens = tl.load(seq_lens + rows, rows < num_rows, -1)
    skipped = tl.maximum(lens - window, 0) // TILE  # tiles before the window
    # An empty row has one tile, all masked, so that its output is written; a row of length −1 has none.
    counts = tl.where(lens < 0, 0, tl.maximum(tl.cdiv(lens, TILE) - skipped, 1))
    first = tl.sum(tl.where(rows < row, counts, 0), 0)
    count = tl.sum(tl.where(rows == row, counts, 0), 0)
    seq_len = tl.sum(tl.where(rows == row, lens, 0), 0)
    begin = tl.sum(tl.where(rows == row, skipped, 0), 0)
    if row == 0:
        tl.store(total, tl.sum(counts, 0))
    for start in range(0, count, CHUNK):
        t = start + tl.arange(0, CHUNK)
        token = (begin + t) * TILE
        if BLOCK_SIZE % TILE == 0:  # a tile lies in one block: its place in the cache
            block = tl.load(block_tables + row.to(tl.int64) * stride_bt + token // BLOCK_SIZE, t < count, 0)
            place = block * BLOCK_SIZE + token % BLOCK_SIZE
        else:
            place = token
        tile = tiles + (first + t) * 4
        tl.store(tile, row + tl.zeros_like(t), t < count)
        tl.store(tile + 1, t, t < count)
        tl.store(tile + 2, place, t < count)
        tl.store(tile + 3, seq_len - token, t < count)


@triton.jit
def _plan_settled_kernel(PDL: tl.constexpr):
    """Nothing, but between the plan and its readers: they may read it before they wait, for it has ended by then (past
    the L1, which only a wait is sure to clear)."""
    wait_for_inputs(PDL)


@triton.jit
def _share(num_pieces, num_tiles):
    """Tiles of a piece.  Rounded up: rows of equal length are then often cut at their ends."""
    return tl.maximum(tl.cdiv(num_tiles, num_pieces), 1)


@triton.jit(do_not_specialize=["window"])
def _decode_kernel(
    q, k_cache, v_cache, out, block_tables, tiles, total, partial, partial_ml, scale_log2e, cap_log2e, window,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_bt,
    stride_ot, stride_oh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    piece = tl.program_id(1)
    num_tiles = tl.load(total, cache_modifier=".cg")
    share = _share(tl.num_programs(1), num_tiles)
    i = piece * share
    count = tl.minimum(share, num_tiles - i)
    wait_for_inputs(PDL)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_md = (offs_m[:, None] < GROUP) & mask_d[None, :]
    k_offs = offs_n[:, None] * stride_kt + offs_d[None, :]
    v_offs = offs_n[:, None] * stride_vt + offs_d[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in tl.range(0, count, num_stages=STAGES):
        row = tl.load(tiles + i * 4).to(tl.int64)
        t = tl.load(tiles + i * 4 + 1)
        place = tl.load(tiles + i * 4 + 2)
        left = tl.load(tiles + i * 4 + 3)  # tokens from this tile on
        q_heads = head * GROUP + offs_m
        q_tile = tl.load(q + row * stride_qt + q_heads[:, None] * stride_qh + offs_d[None, :], mask_md, 0.0).to(
            DOT_TYPE
        )
        valid = (offs_n < left) & (offs_n >= left - window)
        mask = valid[:, None] & mask_d[None, :]
        if BLOCK_SIZE % TILE == 0:  # a tile lies in one block
            block = (place // BLOCK_SIZE).to(tl.int64)
            first = place % BLOCK_SIZE
            k_ptrs = k_cache + (block * stride_kb + first * stride_kt + head * stride_kh) + k_offs
            v_ptrs = v_cache + (block * stride_vb + first * stride_vt + head * stride_vh) + v_offs
        else:
            tokens = place + offs_n
            blocks = tl.load(block_tables + row * stride_bt + tokens // BLOCK_SIZE, valid, 0).to(tl.int64)
            k_rows = blocks * stride_kb + tokens % BLOCK_SIZE * stride_kt + head * stride_kh
            v_rows = blocks * stride_vb + tokens % BLOCK_SIZE * stride_vt + head * stride_vh
            k_ptrs = k_cache + k_rows[:, None] + offs_d[None, :]
            v_ptrs = v_cache + v_rows[:, None] + offs_d[None, :]
        k = tl.load(k_ptrs, mask, 0.0).to(DOT_TYPE)
        scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee") * scale_log2e
        if SOFTCAP:
            scores = softcap(scores, cap_log2e)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        m = tl.where(t == 0, float("-inf"), m)  # a new row
        m_new = tl.maximum(m, tl.max(scores, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # an empty row: no NaN
        p = tl.exp2(scores - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        v = tl.load(v_ptrs, mask, 0.0).to(DOT_TYPE)
        l = tl.where(t == 0, 0.0, l * alpha) + tl.sum(p, 1)  # noqa: E741
        acc = tl.where(t == 0, 0.0, acc * alpha[:, None])
        acc = tl.dot(p.to(DOT_TYPE), v, acc, input_precision="ieee")
        m = m_new
        if (left <= TILE) & (t <= j):  # the row ends here, and began in this piece
            result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
            o = out + row * stride_ot + q_heads[:, None] * stride_oh + offs_d[None, :]
            tl.store(o, result.to(out.dtype.element_ty), mask_md)
        elif (left <= TILE) | (j == count - 1):
            spot = ((piece * HEADS + head) * 2 + (t <= j).to(tl.int32)) * GROUP + offs_m
            tl.store(partial + spot[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :], acc, mask_md)
            tl.store(partial_ml + spot * 2, m, offs_m < GROUP)
            tl.store(partial_ml + spot * 2 + 1, l, offs_m < GROUP)
        i += 1


@triton.jit
def _reduce_kernel(
    out, tiles, total, partial, partial_ml, stride_ot, stride_oh,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    PIECES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the results of the row that began in a piece and went on in others, if any, for one query head."""
    head = tl.program_id(0)
    piece = tl.program_id(1)
    member = tl.program_id(2)
    num_tiles = tl.load(total, cache_modifier=".cg")
    share = _share(tl.num_programs(1), num_tiles)
    final = (piece + 1) * share - 1  # the piece's last tile
    in_line = final < num_tiles
    row = tl.load(tiles + final * 4, in_line, 0, cache_modifier=".cg").to(tl.int64)
    t = tl.load(tiles + final * 4 + 1, in_line, 0, cache_modifier=".cg")
    left = tl.load(tiles + final * 4 + 3, in_line, 0, cache_modifier=".cg")
    wait_for_inputs(PDL)
    if (left <= TILE) | (t >= share):
        return
    last = (final + tl.cdiv(left, TILE) - 1) // share
    offs_d = tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, PIECES)
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(piece, last + 1, PIECES):
        pieces = start + offs_p
        spot = ((pieces * HEADS + head) * 2 + (pieces == piece).to(tl.int32)) * GROUP + member
        mask = pieces <= last
        part_m = tl.load(partial_ml + spot * 2, mask, float("-inf"))
        part_l = tl.load(partial_ml + spot * 2 + 1, mask, 0.0)
        part = tl.load(
            partial + spot[:, None].to(tl.int64) * HEAD_DIM + offs_d[None, :],
            mask[:, None] & (offs_d[None, :] < HEAD_DIM), 0.0,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(part_m, 0))
        weight = tl.exp2(part_m - m_new)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(part_l * weight, 0)  # noqa: E741
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m = m_new
    o = out + row * stride_ot + (head * GROUP + member) * stride_oh + offs_d
    tl.store(o, (acc / l).to(out.dtype.element_ty), offs_d < HEAD_DIM)


@dataclass(slots=True)
class DecodePlan:
    """The tiles of one step, and the room for partial results; the same for all layers."""

    tiles: torch.Tensor  # [tiles, 4] int32: row, number in the row, place in the cache, tokens of the row from here on
    total: torch.Tensor  # [1] int32: number of tiles
    partial: torch.Tensor  # [pieces, KV heads, 2, group, head_dim] float32
    partial_ml: torch.Tensor  # [pieces, KV heads, 2, group, 2] float32: maximum (base 2), normaliser
    window: int  # tokens of a row that are attended to, at its end


def plan_paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int | None = None,
) -> DecodePlan:
    """List the tiles of a decode step.  Arguments as for `paged_attention_decode`; no synchronisation.

    window: attend only to the last so many tokens of a row.
    """
    window = window or NO_WINDOW
    num_rows, num_heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    device = q.device
    num_pieces = max(1, WORKERS_PER_MULTIPROCESSOR * num_multiprocessors(device) // kv_heads)
    group = num_heads // kv_heads
    most_tiles = num_rows * max(1, triton.cdiv(block_tables.shape[1] * block_size, TILE))
    plan = DecodePlan(
        torch.empty(most_tiles, 4, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
        torch.empty(num_pieces, kv_heads, 2, group, head_dim, dtype=torch.float32, device=device),
        torch.empty(num_pieces, kv_heads, 2, group, 2, dtype=torch.float32, device=device),
        window,
    )
    _plan_kernel[(num_rows,)](
        seq_lens, block_tables, plan.tiles, plan.total, num_rows, window, block_tables.stride(0), BLOCK_SIZE=block_size,
        TILE=TILE, ROWS=max(512, triton.next_power_of_2(num_rows)), CHUNK=256, num_warps=4,
        **launch_options(device),
    )  # fmt: skip
    _plan_settled_kernel[(1,)](num_warps=1, **launch_options(device))
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
    cap: float | None = None,
) -> torch.Tensor:
    """softmax(scale · q Kᵀ) V for one query token a row; with a `cap`, softmax(cap · tanh(scale · q Kᵀ / cap)) V.

    q: [rows, heads, head_dim]; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim], any strides but the last
    dimension contiguous, block_size 16, 32 or a multiple of 64, in q's dtype or float8_e4m3fn; block_tables: [rows,
    columns] int32; seq_lens: [rows] int32, 0 giving an output of zeros, −1 none; plan: of `plan_paged_decode`, made
    here if absent. Returns [rows, heads, head_dim] in q's dtype.
    """
    num_heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    group = num_heads // kv_heads
    if plan is None:
        plan = plan_paged_decode(q, k_cache, block_tables, seq_lens)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_pieces = plan.partial.shape[0]
    options = launch_options(q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_m = max(16, triton.next_power_of_2(group))
    # The workers of a multiprocessor share its memory.  A tile in flight takes as many stages of Triton's pipeline as
    # there are loads that wait for each other: the tile's entry in the plan, block numbers if it has several, K and V.
    tile_bytes = (2 * TILE * k_cache.element_size() + block_m * q.element_size()) * block_d
    buffers = num_buffers(q.device, WORKERS_PER_MULTIPROCESSOR * tile_bytes, 20 << 10, most=2)
    stages = 1 + (2 if block_size % TILE == 0 else 3) * buffers
    _decode_kernel[(kv_heads, num_pieces)](
        q, k_cache, v_cache, out, block_tables, plan.tiles, plan.total, plan.partial, plan.partial_ml, scale * LOG2E,
        (cap or 0.0) * LOG2E, plan.window, q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3],
        block_tables.stride(0), out.stride(0), out.stride(1),
        HEADS=kv_heads, GROUP=group, BLOCK_M=block_m, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size,
        TILE=TILE, STAGES=stages, SOFTCAP=cap is not None, DOT_TYPE=dot_type(q, k_cache), num_warps=NUM_WARPS,
        **options,
    )  # fmt: skip
    _reduce_kernel[(kv_heads, num_pieces, group)](
        out, plan.tiles, plan.total, plan.partial, plan.partial_ml, out.stride(0), out.stride(1),
        HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_D=block_d, TILE=TILE, PIECES=8, num_warps=1, **options,
    )  # fmt: skip
    return out
