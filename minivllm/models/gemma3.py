"""Gemma 3, text only (Gemma Team 2025): Gemma 2 with RMSNorm on each head of Q and K in place of soft caps, and windows
with a RoPE of their own in five of six layers."""

from __future__ import annotations

from dataclasses import replace

from minivllm.model_config import ModelConfig
from minivllm.models.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(
            super().adapt(config),
            qk_norm=True,
            max_position_embeddings=config.rope.max_position_embeddings,  # which counts RoPE's scaling already
        )
