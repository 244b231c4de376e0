"""The GPU backend: Triton kernels, and cuBLAS for the larger matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minivllm import kernels
from minivllm.backends.base import Backend, KVCache, QKNorm
from minivllm.parallel import Summand
from minivllm.runner.forward_batch import ForwardBatch


class TritonBackend(Backend):
    def __init__(self) -> None:
        self._no_bias: dict[int, torch.Tensor] = {}  # zeros, for weights with so many outputs and long sums

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        out_size, in_size = weight.shape
        if out_size >= 4096 and in_size > 4096:
            self._no_bias[out_size] = torch.zeros(out_size, dtype=weight.dtype, device=weight.device)
        return weight

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if kernels.has_kernel(x.shape[0], weight):
            return kernels.small_linear(x, weight, bias)
        out_size, in_size = weight.shape
        if bias is None and x.shape[0] <= 384 and in_size > 4096:
            # With a bias, torch asks cuBLASLt, whose choice for long sums is up to a third faster on an H100.
            bias = self._no_bias.get(out_size)
        return F.linear(x, weight, bias)

    def fp8_linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if kernels.has_kernel(x.shape[0], weight):
            return kernels.small_linear(x, weight, bias, scale)
        if not x.is_cuda:
            return super().fp8_linear(x, weight, scale, bias)
        rounded, row_scale = kernels.quantize_rows(x)
        return torch._scaled_mm(
            rounded, weight.t(), row_scale[:, None], scale[None, :], bias, out_dtype=x.dtype, use_fast_accum=True
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return kernels.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.add_rms_norm(x, residual, weight, eps)

    def sum_rms_norm(
        self, x: Summand, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return kernels.sum_rms_norm(x.value, residual, weight, eps, x.addends)

    def activate_and_mul(self, gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
        return kernels.activate_and_mul(gate_up, activation)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        num_heads: int,
        kv_cache: KVCache,
        batch: ForwardBatch,
        qk_norm: QKNorm | None = None,
    ) -> torch.Tensor:
        return kernels.rope_and_store_kv(
            qkv, batch.positions, cos_sin, *kv_cache, batch.slot_mapping, num_heads, qk_norm
        )

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
        n = batch.num_decodes
        if n:
            tables = batch.block_tables[:n]
            seq_lens = batch.seq_lens[:n] if batch.decode_seq_lens is None else batch.decode_seq_lens
            if batch.plan is None:
                batch.plan = {}
            if window not in batch.plan:  # the first layer plans for all of its kind
                batch.plan[window] = kernels.plan_paged_decode(q[:n], kv_cache[0], tables, seq_lens, window)
            kernels.paged_attention_decode(q[:n], *kv_cache, tables, seq_lens, scale, batch.plan[window], out[:n], cap)
        if batch.query_tiles is not None:
            assert batch.query_start_loc is not None
            kernels.paged_attention_prefill(
                q, *kv_cache, batch.block_tables, batch.seq_lens, batch.query_start_loc, batch.query_tiles, scale, out,
                window, cap,
            )  # fmt: skip
        return out

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        last_token: torch.Tensor,
        slots: torch.Tensor,
        share: kernels.VocabShare | None = None,
    ) -> torch.Tensor:
        return kernels.sample(logits, temperature, seeds, positions, last_token, slots, share)

    def truncate(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> None:
        kernels.truncate(logits, temperature, top_k, top_p, min_p)
