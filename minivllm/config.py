"""Configuration: what the user asked for (EngineConfig) and what the model is (ModelConfig).

Both are frozen.  Nothing measured is ever written back into them: the number of KV blocks, for one, is returned by the
executor and handed to the scheduler.  `ModelConfig.from_hf` is the one place that reads a Hugging Face config.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from minivllm.engine.ngram import NgramConfig
from minivllm.validation import check_int, reject_unknown

DTYPES = ("auto", "float32", "float16", "bfloat16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "pt", "dummy")

# vLLM arguments that change nothing here: accepted so that scripts run, each with the reason that a warning gives once.
NO_MEANING_HERE = {
    "disable_log_stats": "statistics are always kept; nothing is logged",
    "disable_custom_all_reduce": "there is no custom all-reduce",
    "compilation_config": "the model is not compiled",
    "max_seq_len_to_capture": "CUDA graphs cover every length",
    "cuda_graph_sizes": "CUDA graphs cover every batch size up to max_num_seqs",
    "enable_chunked_prefill": "prefill is always chunked by max_num_batched_tokens",
    "swap_space": "preempted requests are recomputed, not swapped",
    "tokenizer_mode": "the tokenizer is the one transformers loads",
}


ACTIVATIONS = ("silu", "gelu_pytorch_tanh")

# What a config.json leaves out because it is the default of its kind of model.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": dict(
        tie_word_embeddings=True, head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        sliding_window=4096, sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=1e4,
        max_position_embeddings=131072,
    ),
}  # fmt: skip

# Types of RoPE: the fields each must have, and those it may have.
ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "factor", "original_max_position_embeddings"), ("attention_factor",)
    ),
}  # fmt: skip


def override(hf: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `changes`.  RoPE settings may have the names of transformers 4 or 5, whichever it has."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"hf_overrides must be a dict of entries of config.json, got {changes!r}")
    config = {**hf, **changes}
    if "rope_parameters" in hf and "rope_parameters" not in changes:
        rope = dict(hf["rope_parameters"] or {})
        if "rope_scaling" in changes:
            theta = {name: value for name, value in rope.items() if name == "rope_theta"}
            rope = theta | dict(changes["rope_scaling"] or {})
        if "rope_theta" in changes:
            rope["rope_theta"] = changes["rope_theta"]
        config["rope_parameters"] = rope
    return config


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The settings of one engine, under vLLM's names.  None means: derived from model and device by `resolve`."""

    dtype: str = "auto"
    max_model_len: int | None = None  # tokens of prompt and output together; None: the model's own limit
    max_num_seqs: int | None = None  # requests running at once; None: 256
    max_num_batched_tokens: int | None = None  # tokens computed in one step; None: 8192 on a GPU, 2048 on a CPU
    block_size: int = 64  # tokens in a KV-cache block
    gpu_memory_utilization: float = 0.9  # share of the GPU's memory for weights, activations and KV cache
    kv_cache_memory_bytes: int | None = None  # KV-cache size; None: all that is left on a GPU, up to 4 GiB on a CPU
    kv_cache_dtype: str = "auto"  # "auto": the model's; "fp8" (8 bits, e4m3, scale 1): twice the tokens, less exact
    quantization: str | None = None  # "fp8": linear layers rounded to 8 bits (e4m3) when loaded
    enable_prefix_caching: bool = True
    enforce_eager: bool = False  # True: no CUDA graphs
    load_format: str = "auto"  # "pt": pytorch_model*.bin; "dummy": random weights
    seed: int = 0  # of requests that bring none, and of dummy weights
    max_logprobs: int = 20  # the most that `logprobs` and `prompt_logprobs` may ask for; -1: no limit
    tensor_parallel_size: int = 1
    speculative_config: dict[str, Any] | None = None  # {"method": "ngram", …}: see engine/ngram.py
    device: str = "auto"  # "cuda", "cuda:N" or "cpu"; "auto": a GPU if there is one
    async_scheduling: bool | None = None  # launch a step before the last one's tokens are read; None: on a GPU
    backend: str = "auto"  # "triton" or "torch": who runs the operators; "auto": triton on a GPU

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> EngineConfig:
        """From keyword arguments as users give them: unknown ones are errors, vLLM's meaningless ones warn."""
        known = [field.name for field in fields(cls)]
        reject_unknown(arguments, [*known, *NO_MEANING_HERE], "LLM")
        for name in arguments.keys() & NO_MEANING_HERE.keys():
            warnings.warn(f"{name} has no effect: {NO_MEANING_HERE[name]}", stacklevel=3)
        dtype = arguments.get("dtype", "auto")
        given = {name: value for name, value in arguments.items() if name in known}
        return cls(**{**given, "dtype": str(dtype).removeprefix("torch.")})

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
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
        for field in fields(self):
            value = getattr(self, field.name)
            is_none = value is None and field.type == "bool | None"
            if field.type in ("bool", "bool | None") and not isinstance(value, bool) and not is_none:
                raise ValueError(f"{field.name} must be True or False, got {value!r}")
        if not isinstance(self.gpu_memory_utilization, (int, float)) or not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {self.gpu_memory_utilization!r}")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be 'auto', 'cuda', 'cuda:N' or 'cpu', got {self.device!r}")
        if self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size > 1 is not supported yet; use 1")
        if self.block_size not in (16, 32) and self.block_size % 64:
            raise ValueError(f"block_size must be 16, 32 or a multiple of 64, got {self.block_size}")
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request computes a token a step"
            )

    def resolve(self, model: ModelConfig, device: str) -> EngineConfig:
        """A copy in which everything that `model` and `device` ("cuda:0", "cpu") decide is filled in."""
        on_gpu = device.startswith("cuda")
        dtype = self.dtype
        if dtype == "auto":
            # On a CPU float32 is the fast and exact choice; on a GPU float32 checkpoints run as bfloat16, as in vLLM.
            dtype = ("bfloat16" if model.dtype == "float32" else model.dtype) if on_gpu else "float32"
        max_model_len = self.max_model_len or model.max_position_embeddings
        if max_model_len > model.max_position_embeddings:
            raise ValueError(
                f"max_model_len ({max_model_len}) is more than the model's own limit of "
                f"{model.max_position_embeddings} positions; lower max_model_len"
            )
        budget = self.max_num_batched_tokens or max(8192 if on_gpu else 2048, self.max_num_seqs or 0)
        return replace(
            self,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            max_num_seqs=self.max_num_seqs or min(256, budget),
            async_scheduling=on_gpu if self.async_scheduling is None else self.async_scheduling,
            backend=("triton" if on_gpu else "torch") if self.backend == "auto" else self.backend,
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, by type; a field that a type does not know is None."""

    theta: float = 10000.0
    type: str = "default"
    max_position_embeddings: int = 2048  # the config's own figure, before any scaling
    factor: float | None = None
    original_max_position_embeddings: int | None = None  # of the training before the context was extended
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    attention_factor: float | None = None  # on cosines and sines; None: the type's formula
    short_factor: tuple[float, ...] | None = None  # one for each pair of dimensions
    long_factor: tuple[float, ...] | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> RopeConfig:
        """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
        rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        kind = "longrope" if kind == "su" else kind  # its name in early Phi-3 checkpoints
        if any(isinstance(value, dict) for value in rope.values()):
            raise ValueError("RoPE settings that differ by layer are not supported")
        if kind not in ROPE_FIELDS:
            raise ValueError(f"RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}")
        if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise ValueError("partial_rotary_factor is not supported; only models that rotate whole heads are")
        max_position_embeddings = hf.get("max_position_embeddings", 2048)
        rope.setdefault("original_max_position_embeddings", hf.get("original_max_position_embeddings"))
        if kind == "longrope" and rope["original_max_position_embeddings"]:
            rope.setdefault("factor", max_position_embeddings / rope["original_max_position_embeddings"])
        needed, optional = ROPE_FIELDS[kind]
        missing = [name for name in needed if rope.get(name) is None]
        if missing:
            raise ValueError(f"the config's {kind} RoPE settings lack {', '.join(missing)}")
        values: dict[str, Any] = {name: rope.get(name) for name in (*needed, *optional)}
        for name in ("short_factor", "long_factor"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
        return cls(theta=theta, type=kind, max_position_embeddings=max_position_embeddings, **values)

    @property
    def num_positions(self) -> int:
        """Positions that the model is good for, as vLLM counts them."""
        if self.type == "yarn":
            return int((self.original_max_position_embeddings or self.max_position_embeddings) * (self.factor or 1))
        if self.type in ("linear", "dynamic"):
            return int(self.max_position_embeddings * (self.factor or 1))
        return self.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder model, normalised.  Counts are whole-model figures."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dtype: str  # what the checkpoint says it is
    eos_token_ids: tuple[int, ...]
    qk_norm: bool = False  # RMSNorm on each head of Q and K, before RoPE
    sliding_windows: tuple[int | None, ...] = ()  # of each layer, in tokens; empty: none
    local_rope: RopeConfig | None = None  # of the layers with a sliding window, if another
    activation: str = "silu"
    attention_scale: float | None = None  # None: 1 / √head_dim
    embedding_scale: float = 1.0
    zero_centered_norms: bool = False  # the checkpoint's RMSNorm weights are the true ones minus 1
    sandwich_norms: bool = False  # RMSNorm after attention and MLP too, before the residual addition

    @property
    def kv_elements_per_token(self) -> int:
        """K and V elements of one token, over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def window(self, layer: int) -> int | None:
        """How many of the last tokens layer `layer` attends to; None: all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @property
    def longest_window(self) -> int | None:
        """How many of the last tokens any layer attends to; None: all."""
        windows = [window for window in self.sliding_windows if window is not None]
        return max(windows) if windows and len(windows) == self.num_hidden_layers else None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """From a raw `config.json` and `generation_config.json`, as written by transformers 4 or 5.

        Raises ValueError for what would run wrongly: a missing field, quantized weights, an unsupported activation.
        """
        hf = {**DEFAULTS.get(hf.get("model_type", ""), {}), **hf}
        architectures = hf.get("architectures") or ["(none)"]
        quantization = hf.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown")
            raise ValueError(f"checkpoints quantized with {method!r} are not supported; use the unquantized model")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [name for name in needed if not hf.get(name)]
        if missing:
            raise ValueError(f"config.json of a {architectures[0]} lacks {', '.join(missing)}")
        activation = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if hf.get(name):
                raise ValueError(f"{name} is not supported; models that need it (Gemma 2) are not")
        heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
        if not hf.get("head_dim") and hf["hidden_size"] % heads:
            raise ValueError(f"hidden_size ({hf['hidden_size']}) is no multiple of num_attention_heads ({heads})")
        rope, local_rope = _ropes(hf)
        scalar = hf.get("query_pre_attn_scalar")
        dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return cls(
            architecture=architectures[0],
            **{name: hf[name] for name in needed},
            num_key_value_heads=kv_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_position_embeddings=rope.num_positions,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope=rope,
            local_rope=local_rope,
            sliding_windows=_sliding_windows(hf),
            activation=activation,
            attention_scale=None if scalar is None else scalar**-0.5,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=bool(hf.get("attention_bias", False)),
            o_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            dtype=dtype if dtype in DTYPES else "bfloat16",
            eos_token_ids=tuple(
                dict.fromkeys(_token_ids(hf) + _token_ids(generation_config or {}))  # without duplicates, in order
            ),
        )


def _ropes(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """That of the layers, and that of those with a sliding window if it is another."""
    by_type = hf.get("rope_parameters") or {}
    if by_type.keys() == {"full_attention", "sliding_attention"}:  # transformers 5
        full, local = (
            RopeConfig.from_hf({**hf, "rope_parameters": by_type[kind]})
            for kind in ("full_attention", "sliding_attention")
        )
        return full, local
    rope = RopeConfig.from_hf(hf)
    theta = None if by_type else hf.get("rope_local_base_freq")  # transformers 4
    return rope, None if theta is None else RopeConfig(theta=float(theta))


def _sliding_windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Of each layer.  Qwen has a switch for it, and windows in its upper layers; Mistral has them in all."""
    window, num_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    if not window or not hf.get("use_sliding_window", True):
        return ()
    types, pattern = hf.get("layer_types"), hf.get("sliding_window_pattern")
    if types is None and pattern:  # Gemma: every so many layers, one attends to all
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    if types is None:
        first = hf.get("max_window_layers", 0)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` may be absent, one id or a list of them."""
    value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
