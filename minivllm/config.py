"""EngineConfig: what the user asked for.

It is frozen, and nothing measured is ever written back into it: the number of KV blocks, for one, is returned by the
executor and handed to the scheduler.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from minivllm.engine.ngram import NO_DRAFTS, ON_CPU, ON_GPU, DraftLimits, NgramConfig
from minivllm.model_config import MODEL_DTYPES, ModelConfig
from minivllm.validation import NotSupported, check_int, take_options

DTYPES = ("auto", *MODEL_DTYPES)
LOAD_FORMATS = ("auto", "safetensors", "gguf", "pt", "dummy")

# vLLM arguments that change nothing here: accepted so that scripts run, each with the reason that a warning gives once.
NO_MEANING_HERE = {
    "attention_backend": "backend says who runs attention",
    "attention_config": "backend says who runs attention",
    "compilation_config": "the model is not compiled",
    "cuda_graph_sizes": "CUDA graphs cover every batch size up to max_num_seqs",
    "cudagraph_capture_sizes": "CUDA graphs cover every batch size up to max_num_seqs",
    "disable_cascade_attn": "there is no cascade attention",
    "disable_custom_all_reduce": "sums are part of the norms' kernels where GPUs see each other",
    "disable_hybrid_kv_cache_manager": "blocks outside the window of all layers are always freed",
    "disable_log_stats": "statistics are always kept; nothing is logged",
    "distributed_executor_backend": "workers are processes on this host; across hosts, see minivllm/ray.py",
    "enable_chunked_prefill": "prefill is always chunked by max_num_batched_tokens",
    "enable_flashinfer_autotune": "FlashInfer is not used",
    "long_prefill_token_threshold": "long prompts are chunked like others",
    "max_cudagraph_capture_size": "CUDA graphs cover every batch size up to max_num_seqs",
    "max_long_partial_prefills": "as many prompts are computed at once as fit max_num_batched_tokens",
    "max_num_partial_prefills": "as many prompts are computed at once as fit max_num_batched_tokens",
    "max_parallel_loading_workers": "each worker reads its own share of the weights",
    "max_seq_len_to_capture": "CUDA graphs cover every length",
    "optimization_level": "the model is not compiled",
    "prefix_caching_hash_algo": "blocks are known by a 128-bit xxhash",
    "pt_load_map_location": "weights go straight to the device",
    "safetensors_load_strategy": "weights go straight to the device",
    "stream_interval": "outputs come as soon as there are tokens",
    "structured_outputs_config": "llguidance makes the masks",
    "swap_space": "preempted requests are recomputed, not swapped",
    "tokenizer_mode": "the tokenizer is the one transformers loads",
    "use_tqdm_on_load": "a line appears only when loading takes long",
}

# vLLM arguments that ask for something there is not.
NOT_SUPPORTED: NotSupported = {
    "additional_config": ((None, {}), "leave it out"),
    "allowed_local_media_path": ((None, ""), "only text is supported"),
    "allowed_media_domains": ((None, []), "only text is supported"),
    "calculate_kv_scales": ((False,), "kv_cache_dtype='fp8' has a scale of 1"),
    "code_revision": ((None,), "code that comes with a model is never run"),
    "config_format": (("auto", "hf"), "config.json is read, in Hugging Face's format"),
    "convert": (("auto", "none"), "only models that generate are supported"),
    "cpu_offload_gb": ((0,), "take tensor_parallel_size, quantization='fp8' or a smaller model"),
    "data_parallel_size": ((1,), "start several engines, or examples/ray_serve.py --replicas N"),
    "disable_sliding_window": ((False,), "the model attends as far as it was trained to"),
    "download_dir": ((None,), "set HF_HUB_CACHE"),
    "enable_expert_parallel": ((False,), "mixtures of experts are not supported"),
    "enable_lora": ((False,), "merge the adapter into its base model"),
    "enable_prompt_embeds": ((False,), "give token ids"),
    "enable_sleep_mode": ((False,), "shutdown() frees the GPU"),
    "hf_config_path": ((None,), "give the folder with config.json as model, or hf_overrides"),
    "hf_token": ((None, True), "set HF_TOKEN, or log in with `hf auth login`"),
    "kv_events_config": ((None,), "KV caches are not shared between engines"),
    "kv_transfer_config": ((None,), "KV caches are not shared between engines"),
    "limit_mm_per_prompt": ((None, {}), "only text is supported"),
    "logits_processors": ((None, []), "give them to SamplingParams, request by request"),
    "logprobs_mode": (("raw_logprobs",), "logprobs are those before penalties, temperature and the like"),
    "mm_processor_kwargs": ((None, {}), "only text is supported"),
    "model_impl": (("auto", "vllm"), "there is one implementation of each model"),
    "model_loader_extra_config": ((None, {}), "leave it out"),
    "offload_group_size": ((0,), "take tensor_parallel_size, quantization='fp8' or a smaller model"),
    "otlp_traces_endpoint": ((None,), "GET /metrics of minivllm serve has the figures"),
    "pipeline_parallel_size": ((1,), "take tensor_parallel_size"),
    "pooler_config": ((None,), "only models that generate are supported"),
    "profiler_config": ((None,), "python bench.py --profile FILE writes a trace"),
    "quantization_config": ((None,), "take quantization='fp8'"),
    "runner": (("auto", "generate"), "only models that generate are supported"),
    "scheduler_cls": ((None,), "change minivllm/engine/scheduler.py"),
    "scheduling_policy": (("fcfs",), "requests are served in the order they come"),
    "spec_method": ((None,), "give speculative_config"),
    "spec_model": ((None,), "give speculative_config"),
    "spec_tokens": ((None,), "give speculative_config"),
    "task": (("auto", "generate"), "only models that generate are supported"),
    "tokenizer_revision": ((None,), "give the folder of that revision as tokenizer"),
    "worker_cls": (("auto",), "change minivllm/runner/worker.py"),
    "worker_extension_cls": ((None, ""), "change minivllm/runner/worker.py"),
}


def option(default: Any, help: str) -> Any:
    """A field with a default and a line that the command line shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of one engine, under vLLM's names.  None means: derived from model and device, by `resolve` or when
    memory is measured, or not asked for."""

    dtype: str = option("auto", "float32, bfloat16 or float16; auto: the model's, on a CPU float32")
    max_model_len: int | None = option(
        None, "tokens of prompt and output together; default: the model's own limit, of longrope the original one"
    )
    max_num_seqs: int | None = option(None, "requests running at once; default: 256")
    max_num_batched_tokens: int | None = option(
        None, "tokens computed in one step; default: 8192 on a GPU, 2048 on a CPU"
    )
    block_size: int = option(64, "tokens in a KV-cache block")
    gpu_memory_utilization: float = option(0.9, "share of the GPU's memory for weights, activations and KV cache")
    kv_cache_memory_bytes: int | None = option(
        None, "KV-cache size; default: all that is left on a GPU, up to 4 GiB on a CPU"
    )
    num_gpu_blocks_override: int | None = option(None, "KV-cache size in blocks, in place of kv_cache_memory_bytes")
    kv_cache_dtype: str = option("auto", "auto: the model's; fp8 (8 bits, e4m3, scale 1): twice the tokens, less exact")
    quantization: str | None = option(None, "fp8: linear layers rounded to 8 bits (e4m3) when loaded")
    enable_prefix_caching: bool = option(True, "share the KV cache of equal beginnings")
    enforce_eager: bool = option(False, "no CUDA graphs")
    load_format: str = option("auto", "auto, safetensors, gguf, pt (pytorch_model*.bin) or dummy (random weights)")
    generation_config: str = option(
        "auto",
        "sampling by default: auto (the model's generation_config.json), vllm (neutral), or a folder with such a file",
    )
    override_generation_config: dict[str, Any] | None = option(None, '{"temperature": 0.5, …}: defaults of sampling')
    seed: int = option(0, "of requests that bring none, and of dummy weights")
    max_logprobs: int = option(20, "the most log probabilities a request may ask for; -1: no limit")
    tensor_parallel_size: int = option(1, "GPUs, each with a process of its own, that share the model")
    distributed_timeout_seconds: int | None = option(
        None, "without an answer, after which workers count as lost; default: 30 on GPUs, 300 on CPUs"
    )
    speculative_config: dict[str, Any] | None = option(None, '{"method": "ngram", "num_speculative_tokens": N, …}')
    device: str = option("auto", "cuda, cuda:N or cpu; auto: a GPU if there is one")
    async_scheduling: bool | None = option(
        None, "launch a step before the last one's tokens are read; default: on a GPU"
    )
    backend: str = option("auto", "triton or torch: who runs the operators; auto: triton on a GPU")

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> EngineConfig:
        """From keyword arguments as users give them: unknown ones are errors, vLLM's meaningless ones warn, and None
        stands for the default."""
        known = [one.name for one in fields(cls)]
        arguments = take_options(arguments, "LLM", NOT_SUPPORTED, [*known, *NO_MEANING_HERE])
        arguments = {name: value for name, value in arguments.items() if value is not None}
        for name in arguments.keys() & NO_MEANING_HERE.keys():
            warnings.warn(f"{name} has no effect: {NO_MEANING_HERE[name]}", stacklevel=3)
        dtype = arguments.get("dtype", "auto")
        given = {name: value for name, value in arguments.items() if name in known}
        return cls(**{**given, "dtype": str(dtype).removeprefix("torch.")})

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes",
                     "num_gpu_blocks_override", "distributed_timeout_seconds"):  # fmt: skip
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_int("block_size", self.block_size, 1)
        check_int("seed", self.seed, 0)
        check_int("max_logprobs", self.max_logprobs, -1)
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1)
        for name, allowed in (
            ("dtype", {"float": "float32", "half": "float16"} | {d: d for d in DTYPES}),
            ("load_format", {name: name for name in LOAD_FORMATS}),
            ("kv_cache_dtype", {"auto": "auto", "fp8": "fp8", "fp8_e4m3": "fp8"}),
            ("backend", {name: name for name in ("auto", "torch", "triton")}),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
            object.__setattr__(self, name, allowed[getattr(self, name)])
        if self.speculative_config is not None:
            NgramConfig.from_dict(self.speculative_config)
        if self.quantization not in (None, "fp8"):
            raise ValueError(f"quantization must be None or 'fp8', got {self.quantization!r}")
        switches: dict[Any, Any] = {"bool": bool, "bool | None": (bool, type(None))}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type in switches and not isinstance(value, switches[one.type]):
                raise ValueError(f"{one.name} must be True or False, got {value!r}")
        if not isinstance(self.gpu_memory_utilization, (int, float)) or not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'auto', 'cuda', 'cuda:N' or 'cpu', got {self.device!r}")
        if self.block_size not in (16, 32) and self.block_size % 64:
            raise ValueError(f"block_size must be 16, 32 or a multiple of 64, got {self.block_size}")
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request computes a token a step"
            )

    @property
    def draft_limits(self) -> DraftLimits:
        """Of a resolved config."""
        if self.speculative_config is None:
            return NO_DRAFTS
        return ON_GPU if self.device.startswith("cuda") else ON_CPU

    def resolve(self, model: ModelConfig, device: str) -> EngineConfig:
        """A copy in which everything that `model` and `device` ("cuda:0", "cpu") decide is filled in."""
        on_gpu = device.startswith("cuda")
        dtype = self.dtype
        if dtype == "auto":
            # On a CPU float32 is the fast and exact choice; on a GPU float32 checkpoints run as bfloat16, as in vLLM.
            dtype = ("bfloat16" if model.dtype == "float32" else model.dtype) if on_gpu else "float32"
        max_model_len = self.max_model_len or model.default_max_model_len
        if max_model_len > model.max_position_embeddings:
            raise ValueError(
                f"max_model_len ({max_model_len}) is more than the model's own limit of "
                f"{model.max_position_embeddings} positions; lower max_model_len"
            )
        if self.backend == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend='triton' needs a GPU; leave it out (or set TRITON_INTERPRET=1, to debug kernels)")
        budget = self.max_num_batched_tokens or max(8192 if on_gpu else 2048, self.max_num_seqs or 0)
        return replace(
            self,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            max_num_seqs=self.max_num_seqs or min(256, budget),
            distributed_timeout_seconds=self.distributed_timeout_seconds or (30 if on_gpu else 300),
            async_scheduling=on_gpu if self.async_scheduling is None else self.async_scheduling,
            backend=("triton" if on_gpu else "torch") if self.backend == "auto" else self.backend,
        )
