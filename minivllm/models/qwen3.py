"""Qwen3, dense (Yang et al. 2025): Llama with RMSNorm on each head of Q and K."""

from __future__ import annotations

from dataclasses import replace

from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(config, qk_norm=True, mlp_bias=False)
