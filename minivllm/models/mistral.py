"""Mistral 7B (Jiang et al. 2023): Llama with a sliding window, which later versions leave out."""

from __future__ import annotations

from dataclasses import replace

from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(config, qkv_bias=False, o_bias=False, mlp_bias=False)
