"""The CPU backend, in plain torch: every request of a step in one forward pass.  It is also the oracle in tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from minivllm.backends.base import SPLIT_SIZE, Backend, KVCache, QKNorm
from minivllm.runner.forward_batch import ForwardBatch

if TYPE_CHECKING:
    from minivllm.kernels import VocabShare

FIRST_SPLIT = 1 << 30  # ids of the noise of splits
NEVER = float("-inf")


@dataclass(slots=True)
class TorchPlan:
    """What is the same in all layers of a step, or in all that share a RoPE table or a window."""

    # By the address of the table: cosines and signed sines (−sin, sin), [T, 1, D] float32 each.
    rotations: dict[int, tuple[torch.Tensor, torch.Tensor]]
    stored: torch.Tensor | slice  # the tokens whose K and V are kept: all but padding
    slots: torch.Tensor  # where
    decode_groups: dict[int | None, list[tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]]]  # by window


class TorchBackend(Backend):
    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        # oneDNN on a weight in its own layout runs these products 2 to 4 times as fast as F.linear, which takes BLAS.
        can_reorder = torch.backends.mkldnn.is_available() and weight.numel() > 0
        if weight.is_cuda or weight.dtype != torch.float32 or not can_reorder:
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        return F.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype).mul(weight).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + residual
        return self.rms_norm(residual, weight, eps), residual

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        num_heads: int,
        kv_cache: KVCache,
        batch: ForwardBatch,
        qk_norm: QKNorm | None = None,
    ) -> torch.Tensor:
        k_cache, v_cache = kv_cache
        _, _, kv_heads, head_dim = k_cache.shape
        plan = self._plan(batch)
        if cos_sin.data_ptr() not in plan.rotations:
            cos, sin = cos_sin[batch.positions].unsqueeze(1).chunk(2, -1)  # [T, 1, D / 2] each
            plan.rotations[cos_sin.data_ptr()] = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        cosines, signed_sines = plan.rotations[cos_sin.data_ptr()]
        heads = qkv.reshape(qkv.shape[0], num_heads + 2 * kv_heads, head_dim)
        x = heads[:, : num_heads + kv_heads]
        if qk_norm is not None:
            q_weight, k_weight, eps = qk_norm
            q, k = x.split([num_heads, kv_heads], 1)
            x = torch.cat([self.rms_norm(q, q_weight, eps), self.rms_norm(k, k_weight, eps)], 1)
        x = x.float()
        swapped = torch.cat([x[..., head_dim // 2 :], x[..., : head_dim // 2]], -1)
        rotated = torch.addcmul(x * cosines, swapped, signed_sines)
        k, v = rotated[plan.stored, num_heads:], heads[plan.stored, num_heads + kv_heads :]
        # Attention adds −inf to the scores of what it masks and multiplies it by 0: both must be finite.
        _store(k_cache, plan.slots, k.nan_to_num(0.0, 0.0, 0.0))
        _store(v_cache, plan.slots, v.nan_to_num())
        return rotated[:, :num_heads].to(qkv.dtype)

    def attention(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        batch: ForwardBatch,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        groups = batch.plan.decode_groups
        if window not in groups:
            groups[window] = list(_decode_groups(batch, kv_cache[0].shape[1], window))
        for rows, tables, mask in groups[window]:
            out[rows] = self._decode(q[rows], kv_cache, tables, mask, scale, cap)
        for row in range(batch.num_decodes, len(batch.host_seq_lens)):
            begin, end = batch.host_query_start_loc[row], batch.host_query_start_loc[row + 1]
            out[begin:end] = self._prefill(
                q[begin:end], kv_cache, batch.block_tables[row], batch.host_seq_lens[row], scale, window, cap
            )
        return out

    def _decode(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        tables: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        cap: float | None,
    ) -> torch.Tensor:
        """Rows of similar length.  q: [R, H, D]; tables: [R, columns]; mask: [R, 1, 1, columns · block_size]."""
        rows, num_heads, head_dim = q.shape
        kv_heads = kv_cache[0].shape[2]
        k, v = (
            _gather(c, tables.flatten(), q.dtype).view(rows, -1, kv_heads, head_dim).transpose(1, 2) for c in kv_cache
        )
        grouped = q.reshape(rows, kv_heads, num_heads // kv_heads, head_dim)  # heads of one KV head as its queries
        out = _attend(grouped, k, v, mask, scale, cap)
        return out.reshape(rows, num_heads, head_dim)

    def _prefill(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        block_table: torch.Tensor,
        seq_len: int,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> torch.Tensor:
        """One row.  q: [queries, H, D], the last of seq_len tokens."""
        num_queries = q.shape[0]
        block_size, kv_heads, head_dim = kv_cache[0].shape[1:]
        blocks = block_table[: -(-seq_len // block_size)]
        k, v = (
            _gather(c, blocks, q.dtype).view(1, -1, kv_heads, head_dim)[:, :seq_len].transpose(1, 2) for c in kv_cache
        )
        mask = None
        if num_queries < seq_len or (window is not None and window < seq_len):
            mask = torch.ones(num_queries, seq_len, dtype=torch.bool, device=q.device).tril(seq_len - num_queries)
            if window is not None:
                mask = mask.triu(seq_len - num_queries - window + 1)
        return _attend(q.transpose(0, 1).unsqueeze(0), k, v, mask, scale, cap)[0].transpose(0, 1)

    def _plan(self, batch: ForwardBatch) -> TorchPlan:
        if batch.plan is None:
            is_stored = batch.slot_mapping >= 0
            stored = slice(None) if is_stored.all() else is_stored
            batch.plan = TorchPlan({}, stored, batch.slot_mapping[stored], {})
        return batch.plan

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        last_token: torch.Tensor,
        slots: torch.Tensor,
        share: VocabShare | None = None,
    ) -> torch.Tensor:
        assert share is None, "logits are gathered for this backend"
        logits = logits.float()
        tokens = logits.argmax(-1)
        drawn = temperature > 0
        if drawn.any():
            tokens[drawn] = _draw(logits[drawn] / temperature[drawn, None], seeds[drawn], positions[drawn])
        tokens = tokens.to(torch.int32)
        last_token[slots] = tokens
        return tokens

    def truncate(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> None:
        vocab_size = logits.shape[1]
        temperature = torch.where(temperature > 0, temperature, 1.0)[:, None]
        values = logits.sort(-1, descending=True).values
        # p < min_p · p_best  <=>  logit < best + temperature · log(min_p)
        lowest = values[:, :1] + temperature * min_p.log()[:, None]
        k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
        lowest = lowest.maximum(values.gather(1, k.long()[:, None] - 1))
        probabilities = (values / temperature).masked_fill(values < lowest, NEVER).softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the more likely tokens
        within = ((before < top_p[:, None]) | (top_p >= 1)[:, None]).sum(-1, keepdim=True).clamp(min=1)
        lowest = lowest.maximum(values.gather(1, within - 1))
        logits.masked_fill_(logits < lowest, NEVER)


def _store(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Write values [N, K, D] to slots [N] of a cache; what its dtype cannot hold saturates, if that has 8 bits."""
    if cache.element_size() > 1:
        cache.view(-1, *values.shape[1:]).index_copy_(0, slots, values.to(cache.dtype))
    else:  # torch copies 8-bit floats, but not by index
        largest = torch.finfo(cache.dtype).max
        values = values.clamp(-largest, largest).to(cache.dtype).view(torch.uint8)
        cache.view(torch.uint8).view(-1, *values.shape[1:]).index_copy_(0, slots, values)


def _gather(cache: torch.Tensor, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Blocks [N] of a cache, in `dtype`: [N, block_size, K, D]."""
    if cache.element_size() > 1:
        return cache.index_select(0, blocks)
    return cache.view(torch.uint8).index_select(0, blocks).view(cache.dtype).to(dtype)


def _decode_groups(
    batch: ForwardBatch, block_size: int, window: int | None
) -> Iterator[tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor]]:
    """The decode rows in groups of similar length, so that padding each to its longest costs little.

    Yields (rows, block tables [rows, columns], mask [rows, 1, 1, columns · block_size], True where there is a key).
    """
    groups: dict[int, list[int]] = {}
    for row in range(batch.num_decodes):
        groups.setdefault(max(batch.host_seq_lens[row], 128).bit_length(), []).append(row)
    device = batch.seq_lens.device
    for members in groups.values():
        rows = slice(0, batch.num_decodes) if len(groups) == 1 else torch.tensor(members, device=device)
        columns = max(1, *(-(-batch.host_seq_lens[row] // block_size) for row in members))
        seq_lens = batch.seq_lens[rows].clamp(min=1)  # a padded row sees one key, not none
        tokens = torch.arange(columns * block_size, device=device)[None, :]
        mask = tokens < seq_lens[:, None]
        if window is not None:
            mask &= tokens >= seq_lens[:, None] - window
        yield rows, batch.block_tables[rows, :columns], mask[:, None, None, :]


def _draw(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens drawn from softmax(logits), first a split of the vocabulary, then inside it, as in kernels/sample.py.

    logits: [R, vocab]; seeds: [R] int64; positions: [R] int32.  Returns [R] int64."""
    num_rows, vocab_size = logits.shape
    num_splits, size = -(-vocab_size // SPLIT_SIZE), min(SPLIT_SIZE, vocab_size)
    values = F.pad(logits, (0, num_splits * size - vocab_size), value=NEVER).view(num_rows, num_splits, size)
    tops = values.amax(-1)
    values = _below_top(values)
    splits = torch.arange(num_splits, dtype=torch.int32, device=logits.device)
    mass = values.exp().sum(-1).log() + _below_top(tops)
    split = (mass + gumbel_noise(seeds, positions, splits + FIRST_SPLIT)).argmax(-1)
    ids = split[:, None].int() * SPLIT_SIZE + torch.arange(size, dtype=torch.int32, device=logits.device)
    chosen = values[torch.arange(num_rows, device=logits.device), split].masked_fill(ids >= vocab_size, NEVER)
    return split * SPLIT_SIZE + (chosen + gumbel_noise(seeds, positions, ids)).argmax(-1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, cap: float | None
) -> torch.Tensor:
    """Attention of q [R, H, queries, D] to k and v [R, K, keys, D], where `mask` is True; None: causal."""
    if cap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    group = q.shape[1] // k.shape[1]
    scores = q.float() @ k.repeat_interleave(group, 1).float().transpose(2, 3) * scale
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    weights = (cap * (scores / cap).tanh()).masked_fill(~mask, NEVER).softmax(-1)
    return (weights @ v.repeat_interleave(group, 1).float()).to(q.dtype)


def _below_top(values: torch.Tensor) -> torch.Tensor:
    """value − the largest of its row; 0 for that one, also where it is infinite."""
    top = values.amax(-1, keepdim=True)
    return torch.where(values == top, 0.0, values - top)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, a hash of (seed, position, id): the noise of kernels/sample.py.

    seeds: [R] int64; positions: [R] int32; ids: [N] or [R, N] int32.  Returns [R, N] float32.
    """
    a = _mix(_as_int32(seeds) ^ -0x61C88647)  # 0x9E3779B9
    b = _mix(_as_int32(seeds >> 32) + a)
    place = positions.to(torch.int32)
    second = _mix(b ^ _mix(place ^ -0x7A143595))  # 0x85EBCA6B
    bits = _mix(_mix(_mix(a + place)[:, None] ^ ids) + second[:, None]) >> 1 & 0x7FFFFFFF
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
