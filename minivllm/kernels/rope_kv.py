"""Rotary embedding of Q and K (Su et al. 2021, halves layout), fused with the write of K and V into their cache slots.

A program takes HEADS heads of one token.  The heads of the merged projection lie in the order Q, K, V: Q is rotated in
place, K is rotated on its way to the cache, V is copied.  RMSNorm on each head of Q and K, of models that have it, is
done before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, wait_for_inputs


@triton.jit
def _rope_kv_kernel(
    qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, stride_t,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, QK_NORM: tl.constexpr, LARGEST: tl.constexpr,
    SATURATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    offs = tl.arange(0, BLOCK_HALF)
    in_half = (offs < HALF)[None, :]
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(cos_sin + position * 2 * HALF + offs, offs < HALF, 0.0)[None, :]
    sin = tl.load(cos_sin + position * 2 * HALF + HALF + offs, offs < HALF, 0.0)[None, :]
    slot = tl.load(slot_mapping + token)
    wait_for_inputs(PDL)
    base = qkv + token * stride_t + heads[:, None] * (2 * HALF) + offs[None, :]
    mask = (heads < Q_HEADS + 2 * KV_HEADS)[:, None] & in_half
    x1 = tl.load(base, mask, 0.0)
    x2 = tl.load(base + HALF, mask, 0.0)
    f1 = x1.to(tl.float32)
    f2 = x2.to(tl.float32)
    is_q = (heads < Q_HEADS)[:, None] & in_half
    n1, n2 = f1, f2
    if QK_NORM:
        scale = tl.rsqrt((tl.sum(f1 * f1, 1) + tl.sum(f2 * f2, 1)) / (2 * HALF) + eps)[:, None]
        w1 = tl.where(is_q, tl.load(q_weight + offs, offs < HALF, 0.0), tl.load(k_weight + offs, offs < HALF, 0.0))
        high = HALF + offs
        w2 = tl.where(is_q, tl.load(q_weight + high, offs < HALF, 0.0), tl.load(k_weight + high, offs < HALF, 0.0))
        n1 = ((f1 * scale).to(x1.dtype) * w1).to(tl.float32)
        n2 = ((f2 * scale).to(x1.dtype) * w2).to(tl.float32)
    r1 = n1 * cos - n2 * sin
    r2 = n2 * cos + n1 * sin
    tl.store(base, r1.to(x1.dtype), is_q)
    tl.store(base + HALF, r2.to(x1.dtype), is_q)
    if slot >= 0:  # a padded row writes nothing
        block = slot // BLOCK_SIZE
        within = slot % BLOCK_SIZE
        k_head = (heads - Q_HEADS)[:, None]
        is_k = (k_head >= 0) & (k_head < KV_HEADS) & in_half
        k = k_cache + block * stride_kb + within * stride_kt + k_head * stride_kh + offs[None, :]
        if SATURATE:
            r1, r2 = tl.clamp(r1, -LARGEST, LARGEST), tl.clamp(r2, -LARGEST, LARGEST)
        tl.store(k, r1.to(k_cache.dtype.element_ty), is_k)
        tl.store(k + HALF, r2.to(k_cache.dtype.element_ty), is_k)
        v_head = k_head - KV_HEADS
        is_v = (v_head >= 0) & (v_head < KV_HEADS) & in_half
        v = v_cache + block * stride_vb + within * stride_vt + v_head * stride_vh + offs[None, :]
        # Attention reads whole blocks and multiplies what it masks by 0, so what lies in one must be finite.
        tl.store(v, tl.clamp(f1, -LARGEST, LARGEST).to(v_cache.dtype.element_ty), is_v)
        tl.store(v + HALF, tl.clamp(f2, -LARGEST, LARGEST).to(v_cache.dtype.element_ty), is_v)


def rope_and_store_kv(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Rotate Q and K, write K and V to the cache; returns Q, a view of `qkv`: [tokens, heads, head_dim].

    qkv: [tokens, (heads + 2 · kv_heads) · head_dim]; positions: [tokens] int32; cos_sin: [positions, head_dim]
    float32, the cosines of a position and then its sines; k_cache, v_cache: [blocks, block_size, kv_heads, head_dim],
    of qkv's dtype or float8_e4m3fn, which what is too large saturates to; slot_mapping: [tokens] int64, block ·
    block_size + offset, or −1 to write nothing; qk_norm: first apply RMSNorm to each head, with these weights
    [head_dim] for Q and for K, and this epsilon.
    """
    q_weight, k_weight, eps = qk_norm or (qkv, qkv, 0.0)
    tokens = qkv.shape[0]
    _, block_size, kv_heads, head_dim = k_cache.shape
    heads = 8 if tokens > 16 else 4  # a small step wants more programs
    total = num_heads + 2 * kv_heads
    _rope_kv_kernel[(tokens, triton.cdiv(total, heads))](
        qkv, positions, cos_sin, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps, qkv.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        Q_HEADS=num_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), BLOCK_SIZE=block_size, HEADS=heads,
        QK_NORM=qk_norm is not None, LARGEST=torch.finfo(v_cache.dtype).max, SATURATE=v_cache.element_size() == 1,
        num_warps=4, **launch_options(qkv.device),
    )  # fmt: skip
    return qkv[:, : num_heads * head_dim].view(tokens, num_heads, head_dim)
