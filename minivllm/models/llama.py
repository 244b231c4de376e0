"""LLaMA (Touvron et al. 2023; grouped-query attention from Llama 2, RoPE scaling from Llama 3.1).  The one decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from minivllm.backends import Backend
from minivllm.backends.base import KVCache
from minivllm.layers import Attention, Embedding, Linear, LMHead, MergedLinear, RMSNorm, Target, rope_table
from minivllm.model_config import ModelConfig
from minivllm.parallel import ALONE, Rows, Summand, TensorParallel

if TYPE_CHECKING:
    from minivllm.runner.forward_batch import ForwardBatch


class LlamaMLP(nn.Module):
    def __init__(
        self, config: ModelConfig, backend: Backend, dtype: torch.dtype, device: torch.device, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.backend = backend
        self.tp = tp
        self.activation = config.activation
        size, bias = config.intermediate_size, config.mlp_bias
        parts = {"gate_proj": size, "up_proj": size}
        shares = dict.fromkeys(parts, tp.share)
        self.gate_up_proj = MergedLinear(config.hidden_size, parts, bias, backend, dtype, device, shares)
        self.down_proj = Linear(size, config.hidden_size, bias, backend, dtype, device, tp.share)

    def forward(self, x: Rows) -> Rows | Summand:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        return self.tp.sum(self.down_proj, self.backend.activate_and_mul(self.gate_up_proj(x), self.activation))


class LlamaLayer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        tp: TensorParallel,
    ) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            eps, zero_centered = config.rms_norm_eps, config.zero_centered_norms
            return RMSNorm(config.hidden_size, eps, backend, dtype, device, zero_centered)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, backend, dtype, device, tp)
        self.post_attention_layernorm = norm()
        self.has_sandwich = config.sandwich_norms
        if self.has_sandwich:  # the norm before the MLP has a name of its own, and there is one after it
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.mlp = LlamaMLP(config, backend, dtype, device, tp)

    def forward(
        self,
        x: Rows | Summand,
        residual: Rows | None,
        cos_sin: torch.Tensor,
        kv_cache: KVCache,
        batch: ForwardBatch,
        wanted: torch.Tensor | None,
    ) -> tuple[Rows | Summand, Rows]:
        """x: the output of the layer before, to be added to `residual`, the stream so far; both [tokens, hidden].  The
        output is for the tokens `wanted` [S] alone, if given."""
        normed, residual = self.input_layernorm(x, residual)
        x = self.self_attn(normed, cos_sin, kv_cache, batch, wanted)
        if wanted is not None:
            residual = residual[wanted]
        if not self.has_sandwich:
            normed, residual = self.post_attention_layernorm(x, residual)
            return self.mlp(normed), residual
        normed, _ = self.post_attention_layernorm(x, None)
        normed, residual = self.pre_feedforward_layernorm(normed, residual)
        normed, _ = self.post_feedforward_layernorm(self.mlp(normed), None)
        return normed, residual


class LlamaModel(nn.Module):
    def __init__(
        self, config: ModelConfig, backend: Backend, dtype: torch.dtype, device: torch.device, tp: TensorParallel
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device, config.embedding_scale)
        self.layers = nn.ModuleList(
            LlamaLayer(config, i, backend, dtype, device, tp) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend, dtype, device, config.zero_centered_norms)


class LlamaForCausalLM(nn.Module):
    """The decoder.  `num_positions`: positions to be ready for (max_model_len).  `tp`: whose share of it this is.

    Other architectures are subclasses that say in `adapt` what they mean by their configs.
    """

    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        """`config`, read as if it were Llama's, as this architecture means it."""
        return replace(config, sliding_windows=())

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        num_positions: int,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.config = config
        self.tp = tp
        self.model = LlamaModel(config, backend, dtype, device, tp)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = LMHead(config.vocab_size, config.hidden_size, dtype, device, tp)
        self.backend = backend
        self.cos_sin = rope_table(config.rope, config.head_dim, num_positions, device)
        self.local_cos_sin = self.cos_sin  # of the layers with a window
        if config.local_rope is not None:
            self.local_cos_sin = rope_table(config.local_rope, config.head_dim, num_positions, device)

    def forward(self, batch: ForwardBatch, kv_caches: Sequence[KVCache]) -> torch.Tensor:
        """One pass over the step's tokens, writing their K and V.  Returns what `compute_logits` takes, [tokens,
        hidden], or of `batch.output_tokens` alone: for the others the last layer only writes K and V."""
        x: Rows | Summand = self.model.embed_tokens(batch.token_ids)
        residual = None
        last = len(kv_caches) - 1
        for i, (layer, kv_cache) in enumerate(zip(self.model.layers, kv_caches, strict=True)):
            wanted = batch.output_tokens if i == last else None
            cos_sin = self.cos_sin if self.config.window(i) is None else self.local_cos_sin
            x, residual = layer(x, residual, cos_sin, kv_cache, batch, wanted)
        hidden, _ = self.model.norm(x, residual)
        return hidden if isinstance(hidden, torch.Tensor) else hidden.whole()

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """LM head: [rows, hidden] -> [rows, token ids of this worker]."""
        logits, cap = self.backend.linear(hidden, self.head, None), self.config.logit_cap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    def weight_targets(self) -> dict[str, Target]:
        """Every checkpoint tensor the model takes, by its name there, with the view of a parameter it goes to."""
        targets: dict[str, Target] = {}
        for path, module in self.named_modules():
            if hasattr(module, "targets"):
                targets.update(module.targets(path))
        return targets

    def finish_loading(self) -> None:
        """To be called when all weights are there."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
            if isinstance(module, RMSNorm):
                module.finish_loading()
        if self.lm_head is None:
            ids = self.tp.vocab_range(self.config.vocab_size)
            self.head = self.backend.pack(self.model.embed_tokens.weight.data[ids.start : ids.stop])
        else:
            self.head = self.backend.pack(self.lm_head.weight.data)
            del self.lm_head.weight  # packed, it is there already

    def ignores_weight(self, name: str) -> bool:
        """Whether a checkpoint may bring tensor `name` although the model does not take it."""
        tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        return tied_head or name.endswith("rotary_emb.inv_freq")  # written by old versions of transformers
