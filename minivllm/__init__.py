"""minivllm: a minimal LLM inference engine.

from minivllm import LLM, SamplingParams
print(LLM().generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text)
"""

from typing import TYPE_CHECKING, Any

from minivllm.beam_search import BeamSearchParams
from minivllm.inputs import PromptType, TextPrompt, TokensPrompt
from minivllm.outputs import CompletionOutput, FlatLogprobs, Logprob, RequestMetrics, RequestOutput
from minivllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM
    from minivllm.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "FlatLogprobs",
    "Logprob",
    "PromptType",
    "RepetitionDetectionParams",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

# What scripts for vLLM import, and what to take here.
_NOT_HERE = {
    "AsyncEngineArgs": "give its arguments to AsyncLLM",
    "AsyncLLMEngine": "use AsyncLLM",
    "EngineArgs": "give its arguments to LLM",
    "LLMEngine": "use LLM, whose stream() yields outputs as they come, or AsyncLLM",
    "PoolingParams": "only models that generate are supported",
}


def __getattr__(name: str) -> Any:
    """`LLM` is imported on first use, so that what needs no tensors (the scheduler, say) does not load torch."""
    if name == "LLM":
        from minivllm.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from minivllm.async_llm import AsyncLLM

        return AsyncLLM
    if name in _NOT_HERE:  # an AttributeError's text would be lost in `from minivllm import …`
        raise ImportError(f"minivllm has no {name}: {_NOT_HERE[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
