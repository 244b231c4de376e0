"""Self-attention with a paged KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from minivllm.backends import Backend
from minivllm.backends.base import KVCache
from minivllm.layers.linear import Linear, MergedLinear
from minivllm.layers.norm import RMSNorm
from minivllm.model_config import ModelConfig
from minivllm.parallel import ALONE, Rows, Summand, TensorParallel

if TYPE_CHECKING:
    from minivllm.runner.forward_batch import ForwardBatch


class Attention(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.tp = tp
        self.num_heads = config.num_attention_heads // tp.size
        self.scale = config.attention_scale or config.head_dim**-0.5  # handed to the backend, which alone applies it
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        kv_share = tp.kv_share(config.num_key_value_heads)
        shares = {"q_proj": tp.share, "k_proj": kv_share, "v_proj": kv_share}
        self.qkv_proj = MergedLinear(config.hidden_size, parts, config.qkv_bias, backend, dtype, device, shares)
        self.o_proj = Linear(q_size, config.hidden_size, config.o_bias, backend, dtype, device, tp.share)
        self.window = config.window(layer)
        self.cap = config.attention_cap
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, config.rms_norm_eps, backend, dtype, device, config.zero_centered_norms)
                for _ in range(2)
            )

    def forward(
        self,
        x: Rows,
        cos_sin: torch.Tensor,
        kv_cache: KVCache,
        batch: ForwardBatch,
        wanted: torch.Tensor | None = None,
    ) -> Rows | Summand:
        """x: [tokens, hidden] -> [tokens, hidden], or [S, hidden] for the tokens `wanted` [S] alone."""
        qkv = self.qkv_proj(x)
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        q = self.backend.rotate_and_store(qkv, cos_sin, self.num_heads, kv_cache, batch, norms)
        # [tokens, heads, head_dim]
        out = self.backend.attention(q, kv_cache, batch, self.scale, self.window, self.cap)
        return self.tp.sum(self.o_proj, (out if wanted is None else out[wanted]).flatten(1))
