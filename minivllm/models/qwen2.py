"""Qwen2 and 2.5 (Yang et al. 2024): Llama with biases on Q, K and V; upper layers may have a sliding window."""

from __future__ import annotations

from dataclasses import replace

from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(config, qkv_bias=True, o_bias=False, mlp_bias=False)
