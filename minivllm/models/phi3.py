"""Phi-3 and 3.5 (Abdin et al. 2024): Llama whose checkpoints hold Q, K and V, and gate and up, as one weight each."""

from __future__ import annotations

from dataclasses import replace

import torch

from minivllm.layers import Linear
from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(config, qkv_bias=False, o_bias=False, mlp_bias=False)

    def weight_targets(self) -> dict[str, torch.Tensor]:
        targets = super().weight_targets()
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                for name in module.targets(path):
                    del targets[name]
                targets.update(Linear.targets(module, path))
        return targets
