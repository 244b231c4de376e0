"""ModelConfig: what the model is, and with it RopeConfig.  Both are frozen.

`ModelConfig.from_hf` is the one place that reads a Hugging Face config, of transformers 4 or 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minivllm.validation import check_int

MODEL_DTYPES = ("float32", "float16", "bfloat16")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")

# What a config.json leaves out because it is the default of its kind of model.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": dict(use_sliding_window=False, max_window_layers=28),
    "qwen3": dict(use_sliding_window=False, max_window_layers=28, head_dim=128),
    "phi3": dict(rms_norm_eps=1e-5),
    "gemma2": dict(
        tie_word_embeddings=True, head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        sliding_window=4096, sliding_window_pattern=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        max_position_embeddings=8192,
    ),
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


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


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
        original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original
        if kind == "longrope" and original and rope.get("factor") is None:
            rope["factor"] = max_position_embeddings / original
        needed, optional = ROPE_FIELDS[kind]
        missing = [name for name in needed if rope.get(name) is None]
        if missing:
            raise ValueError(f"the config's {kind} RoPE settings lack {', '.join(missing)}")
        values: dict[str, Any] = {name: rope.get(name) for name in (*needed, *optional)}
        if values.get("factor") is not None:
            _check_positive("RoPE's factor", values["factor"])
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
    attention_cap: float | None = None  # c: attention's scores x are c · tanh(x / c)
    logit_cap: float | None = None  # the same of logits
    embedding_scale: float = 1.0
    zero_centered_norms: bool = False  # the checkpoint's RMSNorm weights are the true ones minus 1
    sandwich_norms: bool = False  # RMSNorm after attention and MLP too, before the residual addition

    def share(self, size: int) -> ModelConfig:
        """What each of `size` tensor-parallel workers has of the model.  Raises ValueError if it cannot be cut so."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        for name, count in (("attention heads", heads), ("intermediate_size", self.intermediate_size)):
            if count % size:
                raise ValueError(f"tensor_parallel_size ({size}) must divide the model's {name} ({count})")
        if kv_heads % size and size % kv_heads:
            raise ValueError(f"tensor_parallel_size ({size}) must divide the model's {kv_heads} KV heads, or they it")
        return replace(
            self,
            num_attention_heads=heads // size,
            num_key_value_heads=max(1, kv_heads // size),
            intermediate_size=self.intermediate_size // size,
        )

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
        absent = [name for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta") if hf.get(name) is None]
        hf = {**DEFAULTS.get(hf.get("model_type", ""), {}), **{k: v for k, v in hf.items() if k not in absent}}
        _check_types(hf)
        if hf.get("rope_parameters") and hf.get("rope_scaling"):
            hf["rope_parameters"] = _scaled(hf["rope_parameters"], hf["rope_scaling"])
        architectures = hf.get("architectures") or ["(none)"]
        quantization = hf.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown")
            raise ValueError(f"checkpoints quantized with {method!r} are not supported; use the unquantized model")
        missing = [name for name in SIZES if not hf.get(name)]
        if missing:
            raise ValueError(f"config.json of a {architectures[0]} lacks {', '.join(missing)}")
        activation = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if hf.get("use_bidirectional_attention"):
            raise ValueError("use_bidirectional_attention is not supported; models that need it are not")
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
            **{name: hf[name] for name in SIZES},
            num_key_value_heads=kv_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            max_position_embeddings=rope.num_positions,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope=rope,
            local_rope=local_rope,
            sliding_windows=_sliding_windows(hf),
            activation=activation,
            attention_scale=None if scalar is None else scalar**-0.5,
            attention_cap=hf.get("attn_logit_softcapping"),
            logit_cap=hf.get("final_logit_softcapping"),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=bool(hf.get("attention_bias", False)),
            o_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            dtype=dtype if dtype in MODEL_DTYPES else "bfloat16",
            eos_token_ids=tuple(
                dict.fromkeys(_token_ids(hf) + _token_ids(generation_config or {}))  # without duplicates, in order
            ),
        )


def _ropes(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """That of the layers, and that of those with a sliding window if it is another."""
    by_type = hf.get("rope_parameters") or {}
    if by_type.keys() == {"full_attention", "sliding_attention"}:  # transformers 5
        theta = hf.get("rope_local_base_freq", hf.get("rope_theta", 10000.0))
        full, local = ({**hf, "rope_parameters": by_type[kind]} for kind in ("full_attention", "sliding_attention"))
        return RopeConfig.from_hf(full), RopeConfig.from_hf(local | {"rope_theta": theta})
    rope = RopeConfig.from_hf(hf)
    theta = None if by_type else hf.get("rope_local_base_freq")  # transformers 4
    return rope, None if theta is None else RopeConfig(theta=float(theta))


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_types(hf: Mapping[str, Any]) -> None:
    for name in (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if hf.get(name) is not None:
            check_int(f"config.json: {name}", hf[name], 1)
    for name in ("rms_norm_eps", "rope_theta"):
        if hf.get(name) is not None:
            _check_positive(f"config.json: {name}", hf[name])
    for name in ("rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(hf.get(name), (Mapping, type(None))):
            raise ValueError(f"config.json: {name} must be an object, got {hf[name]!r}")


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


def _scaled(rope: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with the scaling of `rope_scaling`: as in transformers 5, of the layers without a window."""
    if "full_attention" in rope:
        return {**rope, "full_attention": _scaled(rope["full_attention"], scaling)}
    return {name: value for name, value in rope.items() if name == "rope_theta"} | dict(scaling)


def override(hf: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `changes`.  RoPE settings may have the names of transformers 4 or 5, whichever it has."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"hf_overrides must be a dict of entries of config.json, got {changes!r}")
    config = {**hf, **changes}
    rope, new = hf.get("rope_parameters") or {}, changes.get("rope_parameters")
    if new is None and rope and "rope_theta" in changes:
        config["rope_parameters"] = {**rope, "rope_theta": changes["rope_theta"]}
    if isinstance(new, Mapping) and "rope_theta" in rope and not any(isinstance(one, Mapping) for one in new.values()):
        config["rope_parameters"] = _scaled(rope, new)
    if "rope_scaling" in changes:  # None takes a scaling away
        config["rope_scaling"] = changes["rope_scaling"] or {"rope_type": "default"}
    return config
