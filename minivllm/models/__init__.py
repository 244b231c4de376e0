"""The models that can be run: a registry from the architecture named in a checkpoint to the class that runs it."""

from __future__ import annotations

from minivllm.models.llama import LlamaForCausalLM

MODELS: dict[str, type[LlamaForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
}


def model_class(architecture: str) -> type[LlamaForCausalLM]:
    """The class for `architecture`; ValueError if there is none: a model is refused, never run wrongly."""
    if architecture not in MODELS:
        raise ValueError(f"model architecture {architecture!r} is not supported; supported: {', '.join(MODELS)}")
    return MODELS[architecture]


__all__ = ["MODELS", "LlamaForCausalLM", "model_class"]
