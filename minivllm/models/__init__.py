"""The models that can be run: a registry from the architecture named in a checkpoint to the class that runs it."""

from __future__ import annotations

from minivllm.models.gemma2 import Gemma2ForCausalLM
from minivllm.models.gemma3 import Gemma3ForCausalLM
from minivllm.models.llama import LlamaForCausalLM
from minivllm.models.mistral import MistralForCausalLM
from minivllm.models.phi3 import Phi3ForCausalLM
from minivllm.models.qwen2 import Qwen2ForCausalLM
from minivllm.models.qwen3 import Qwen3ForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = {
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def model_class(architecture: str, trust_remote_code: bool = False) -> type[LlamaForCausalLM]:
    """The class for `architecture`; ValueError if there is none: a model is refused, never run wrongly."""
    if architecture not in MODELS:
        never = "; code that comes with a model is never run, whatever trust_remote_code says" * trust_remote_code
        raise ValueError(f"model architecture {architecture!r} is not supported; supported: {', '.join(MODELS)}{never}")
    return MODELS[architecture]


__all__ = ["MODELS", "LlamaForCausalLM", "model_class"]
