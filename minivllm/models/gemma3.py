"""Gemma 3, text only (Gemma Team 2025): Llama with norms around attention and MLP, scaled embeddings, RMSNorm on each
head of Q and K, and windows with a RoPE of their own in five of six layers."""

from __future__ import annotations

from dataclasses import replace

from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class Gemma3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(
            config,
            qk_norm=True,
            mlp_bias=False,
            zero_centered_norms=True,
            sandwich_norms=True,
            embedding_scale=config.hidden_size**0.5,
            max_position_embeddings=config.rope.max_position_embeddings,  # which counts RoPE's scaling already
        )
