"""Phi-3 and 3.5 (Abdin et al. 2024): Llama whose checkpoints hold Q, K and V, and gate and up, as one weight each."""

from __future__ import annotations

from dataclasses import replace

from minivllm.layers import MergedLinear, Target
from minivllm.model_config import ModelConfig
from minivllm.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    @classmethod
    def adapt(cls, config: ModelConfig) -> ModelConfig:
        return replace(config, qkv_bias=False, o_bias=False, mlp_bias=False)

    def weight_targets(self) -> dict[str, Target]:
        targets = super().weight_targets()
        for path, module in self.named_modules():
            if isinstance(module, MergedLinear):
                for name in module.targets(path):
                    del targets[name]
                targets.update(module.merged_targets(path))
        return targets
