"""The CPU backend, in plain torch: every request of a step in one forward pass.  It is also the oracle in tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minivllm.backends.base import Backend, KVCache
from minivllm.runner.forward_batch import ForwardBatch


class TorchBackend(Backend):
    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.is_cuda or x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        # W xᵀ instead of x Wᵀ: the same product, but the CPU's library runs it 1.4 to 5 times as fast for few rows, and
        # two rows faster than one.
        rows = x.shape[0]
        if rows == 1:
            x = x.repeat(2, 1)
        out = torch.mm(weight, x.t()).t()
        out = out[:rows]
        return out if bias is None else out + bias

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def rotate_and_store(
        self, qkv: torch.Tensor, cos_sin: torch.Tensor, num_heads: int, kv_cache: KVCache, batch: ForwardBatch
    ) -> torch.Tensor:
        k_cache, v_cache = kv_cache
        _, _, kv_heads, head_dim = k_cache.shape
        heads = qkv.reshape(qkv.shape[0], num_heads + 2 * kv_heads, head_dim)
        cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, -1)  # [T, 1, D / 2] each
        x1, x2 = heads[:, : num_heads + kv_heads].float().chunk(2, -1)
        rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(qkv.dtype)
        used = batch.slot_mapping >= 0  # all but padding
        slots, k, v = batch.slot_mapping[used], rotated[used, num_heads:], heads[used, num_heads + kv_heads :]
        k_cache.view(-1, kv_heads, head_dim).index_copy_(0, slots, k)
        v_cache.view(-1, kv_heads, head_dim).index_copy_(0, slots, v)
        return rotated[:, :num_heads]

    def attention(self, q: torch.Tensor, kv_cache: KVCache, batch: ForwardBatch, scale: float) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for rows, mask in batch.decode_groups():
            out[rows] = self._decode(q[rows], kv_cache, batch.block_tables[rows], mask, scale)
        for row in range(batch.num_decodes, len(batch.host_seq_lens)):
            begin, end = batch.host_query_start_loc[row], batch.host_query_start_loc[row + 1]
            out[begin:end] = self._prefill(
                q[begin:end], kv_cache, batch.block_tables[row], batch.host_seq_lens[row], scale
            )
        return out

    def _decode(
        self, q: torch.Tensor, kv_cache: KVCache, block_tables: torch.Tensor, mask: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Rows of similar length.  q: [R, H, D]; mask: [R, 1, 1, keys], True where there is a key."""
        rows, num_heads, head_dim = q.shape
        num_keys = mask.shape[-1]
        block_size, kv_heads = kv_cache[0].shape[1:3]
        tables = block_tables[:, : -(-num_keys // block_size)]
        k, v = (c[tables].view(rows, -1, kv_heads, head_dim)[:, :num_keys].transpose(1, 2) for c in kv_cache)
        grouped = q.reshape(rows, kv_heads, num_heads // kv_heads, head_dim)  # heads of one KV head as its queries
        out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
        return out.reshape(rows, num_heads, head_dim)

    def _prefill(
        self, q: torch.Tensor, kv_cache: KVCache, block_table: torch.Tensor, seq_len: int, scale: float
    ) -> torch.Tensor:
        """One row.  q: [queries, H, D], the last of seq_len tokens."""
        num_queries = q.shape[0]
        block_size, kv_heads, head_dim = kv_cache[0].shape[1:]
        table = block_table[: -(-seq_len // block_size)]
        k, v = (c[table].view(1, -1, kv_heads, head_dim)[:, :seq_len].transpose(1, 2) for c in kv_cache)
        mask = None
        if num_queries < seq_len:
            mask = torch.ones(num_queries, seq_len, dtype=torch.bool, device=q.device).tril(seq_len - num_queries)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        last_token: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        logits = logits.float()
        drawn = temperature > 0
        if drawn.any():
            noise = gumbel_noise(seeds[drawn], positions[drawn], logits.shape[1])
            logits = logits.clone()
            logits[drawn] = logits[drawn] / temperature[drawn, None] + noise
        tokens = logits.argmax(-1).to(torch.int32)
        last_token[slots] = tokens
        return tokens


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, a hash of (seed, position, token id): the noise of kernels/sample.py.

    seeds: [R] int64; positions: [R] int32.  Returns [R, vocab_size] float32.
    """
    low, high = _as_int32(seeds), _as_int32(seeds >> 32)
    key = _mix(_mix(low ^ -0x61C88647) + positions.to(torch.int32))  # −0x61C88647 is 0x9E3779B9
    second = _mix(key + high)
    ids = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    bits = _mix(_mix(ids ^ key[:, None]) + second[:, None]) >> 1 & 0x7FFFFFFF
    u = (bits.float() + 0.5) * 4.656612873077393e-10
    exponential = torch.where(u < 1e-3, u + 0.5 * u * u, -torch.log(1.0 - u.clamp(max=0.9999999)))
    return -torch.log(exponential)


def _as_int32(x: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64, as int32 (two's complement, like all 32-bit arithmetic here)."""
    x = x & 0xFFFFFFFF
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit mixer of kernels/sample.py; int32 shifts are arithmetic, so the sign bits are masked off."""
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * -0x7B935975  # 0x846CA68B
    return x ^ (x >> 16 & 0xFFFF)
