"""Gemma 2 (Gemma Team 2024): Llama with norms around attention and MLP, scaled embeddings, windows in every other
layer, and soft caps on attention's scores and on logits."""

from __future__ import annotations

from dataclasses import replace

from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class Gemma2ForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(
            config,
            mlp_bias=False,
            zero_centered_norms=True,
            sandwich_norms=True,
            embedding_scale=config.hidden_size**0.5,
        )
