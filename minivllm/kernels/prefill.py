"""Paged prefill attention: packed queries of varying length, causal, over paged K and V (FlashAttention-2, Dao 2023).

One program computes one tile of queries of one head.  The host lists the tiles, so that the grid has no empty programs,
row by row, so that programs which run together read the same keys, and in a row those with most keys first, so that it
ends evenly.  Only key tiles on the diagonal are masked.  Where the GPU can copy whole tiles by descriptor, and a tile
lies in one block, they are copied so, with what lies behind the end of the keys: it must be finite, since it is
multiplied by 0.  The softmax scale is applied here and nowhere else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from minivllm.kernels.device import dot_type, has_tensor_copies, launch_options, num_buffers, softcap, wait_for_inputs
from minivllm.kernels.paged_decode import LOG2E
from minivllm.runner.forward_batch import QUERY_TILE

KEY_TILE = 64


@triton.jit(do_not_specialize=["window"])
def _prefill_kernel(
    q, k_cache, v_cache, out, block_tables, seq_lens, query_start_loc, query_tiles, scale_log2e, cap_log2e, window,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_bt,
    stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, TENSOR_COPIES: tl.constexpr, WINDOW: tl.constexpr,
    STAGES: tl.constexpr, SOFTCAP: tl.constexpr, DOT_TYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    head = tl.program_id(0)
    tile = tl.program_id(1) // SPLIT
    row = tl.load(query_tiles + tile * 2)
    first = tl.load(query_tiles + tile * 2 + 1) + tl.program_id(1) % SPLIT * BLOCK_M
    q_start = tl.load(query_start_loc + row)
    q_len = tl.load(query_start_loc + row + 1) - q_start
    if first >= q_len:
        return
    kv_len = tl.load(seq_lens + row)
    kv_head = head // GROUP
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, TILE)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask = (offs_m < q_len)[:, None] & mask_d[None, :]
    rows = (q_start + offs_m).to(tl.int64)
    q_tile = tl.load(q + rows[:, None] * stride_qt + head * stride_qh + offs_d[None, :], mask, 0.0).to(DOT_TYPE)
    positions = kv_len - q_len + offs_m
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    table = block_tables + row.to(tl.int64) * stride_bt
    k_offs = offs_n[:, None] * stride_kt + offs_d[None, :]
    v_offs = offs_n[:, None] * stride_vt + offs_d[None, :]
    diagonal = (kv_len - q_len + first + 1) // TILE  # key tiles before it are seen by every query
    end = tl.cdiv(tl.minimum(kv_len - q_len + first + BLOCK_M, kv_len), TILE)
    factor = scale_log2e
    if SOFTCAP:
        factor = 1.0  # scores are scaled before
    begin = 0
    if WINDOW:  # key tiles before `begin` are seen by no query, those before `edge` not by every one
        begin = tl.maximum(kv_len - q_len + first - window + 1, 0) // TILE
        edge = tl.cdiv(tl.maximum(kv_len - q_len + first + BLOCK_M - window, 0), TILE)
    for t in tl.range(begin, end, num_stages=STAGES):
        tokens = t * TILE + offs_n
        in_length = (tokens < kv_len)[:, None] & mask_d[None, :]
        if TENSOR_COPIES:
            block = tl.load(table + t * TILE // BLOCK_SIZE)
            k = k_cache.load([block, t * TILE % BLOCK_SIZE, kv_head, 0]).reshape(TILE, BLOCK_D)
        elif BLOCK_SIZE % TILE == 0:  # a tile lies in one block: one scalar load
            block = tl.load(table + t * TILE // BLOCK_SIZE).to(tl.int64)
            first_in_block = t * TILE % BLOCK_SIZE
            k_base = k_cache + (block * stride_kb + first_in_block * stride_kt + kv_head * stride_kh)
            k = tl.load(k_base + k_offs, in_length, 0.0)
        else:
            blocks = tl.load(table + tokens // BLOCK_SIZE, tokens < kv_len, 0).to(tl.int64)
            k_rows = blocks * stride_kb + tokens % BLOCK_SIZE * stride_kt + kv_head * stride_kh
            k = tl.load(k_cache + k_rows[:, None] + offs_d[None, :], in_length, 0.0)
        scores = tl.dot(q_tile, tl.trans(k.to(DOT_TYPE)), input_precision="ieee")
        if SOFTCAP:
            scores = softcap(scores * scale_log2e, cap_log2e)
        if t >= diagonal:
            scores = tl.where(tokens[None, :] <= positions[:, None], scores, float("-inf"))
        if WINDOW:  # noqa: SIM102 (the compiler knows WINDOW, not t)
            if t < edge:
                scores = tl.where(tokens[None, :] > positions[:, None] - window, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * factor)
        if WINDOW:  # a query may not see the first tiles; without a window, it always sees key 0
            m_new = tl.maximum(m_new, -1e30)
        p = tl.exp2(scores * factor - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        if TENSOR_COPIES:
            v = v_cache.load([block, t * TILE % BLOCK_SIZE, kv_head, 0]).reshape(TILE, BLOCK_D)
        elif BLOCK_SIZE % TILE == 0:
            v_base = v_cache + (block * stride_vb + first_in_block * stride_vt + kv_head * stride_vh)
            v = tl.load(v_base + v_offs, in_length, 0.0)
        else:
            v_rows = blocks * stride_vb + tokens % BLOCK_SIZE * stride_vt + kv_head * stride_vh
            v = tl.load(v_cache + v_rows[:, None] + offs_d[None, :], in_length, 0.0)
        acc = tl.dot(p.to(DOT_TYPE), v.to(DOT_TYPE), acc, input_precision="ieee")
        m = m_new
    offs_m = first + tl.arange(0, BLOCK_M)
    rows = (q_start + offs_m).to(tl.int64)
    o = out + rows[:, None] * stride_ot + head * stride_oh + offs_d[None, :]
    tl.store(o, (acc / l[:, None]).to(out.dtype.element_ty), (offs_m < q_len)[:, None] & mask_d[None, :])


def paged_attention_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    query_tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Causal softmax(scale · q Kᵀ) V for the last queries of each row; K and V of them are in the cache already.  With
    a `cap`, softmax(cap · tanh(scale · q Kᵀ / cap)) V.

    q: [tokens, heads, head_dim], row r's queries at query_start_loc[r] : query_start_loc[r + 1]; k_cache, v_cache:
    [blocks, block_size, kv_heads, head_dim], in q's dtype or float8_e4m3fn; block_tables: [rows, columns] int32;
    seq_lens: [rows] int32, keys of each row, its queries the last of them; query_start_loc: [rows + 1] int32;
    query_tiles: [tiles, 2] int32, the row and the first query (counted in the row) of each tile of QUERY_TILE
    queries; window: a query attends to so many tokens, itself the last of them; None: to all before it. Returns
    [tokens, heads, head_dim]; tokens of rows without a tile are not written.
    """
    num_heads, head_dim = q.shape[1:]
    kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    row_bytes = block_d * q.element_size()  # long rows (float32, heads of 256) take smaller tiles, to fit smaller chips
    tile = KEY_TILE * 256 // max(256, row_bytes)
    tensor_copies = (
        has_tensor_copies(q.device) and block_d == head_dim and block_size % tile == 0 and q.element_size() == 2
    )
    block_m = QUERY_TILE if tensor_copies else QUERY_TILE // 2 if row_bytes <= 512 else QUERY_TILE // 4
    fixed_bytes = block_m * (row_bytes + tile * q.element_size())  # queries and probabilities
    buffers = num_buffers(q.device, 2 * tile * row_bytes, fixed_bytes, most=1 if tensor_copies else 2)
    keys, values = k_cache, v_cache
    if tensor_copies:
        tile_shape = [1, tile, 1, head_dim]
        keys, values = (TensorDescriptor(c, list(c.shape), list(c.stride()), tile_shape) for c in (k_cache, v_cache))
    _prefill_kernel[(num_heads, query_tiles.shape[0] * (QUERY_TILE // block_m))](
        q, keys, values, out, block_tables, seq_lens, query_start_loc, query_tiles, scale * LOG2E,
        (cap or 0.0) * LOG2E, window or 0,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        out.stride(0), out.stride(1),
        GROUP=num_heads // kv_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_SIZE=block_size, BLOCK_M=block_m,
        SPLIT=QUERY_TILE // block_m, TILE=tile, TENSOR_COPIES=tensor_copies, WINDOW=window is not None,
        STAGES=1 + buffers, SOFTCAP=cap is not None, DOT_TYPE=dot_type(q, k_cache), num_warps=4,
        **launch_options(q.device),
    )  # fmt: skip
    return out
