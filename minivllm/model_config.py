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

# What a config.json leaves out because it is the default of its architecture.
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": dict(sliding_window=4096, max_position_embeddings=131072),
    "Qwen2ForCausalLM": dict(
        use_sliding_window=False, max_window_layers=28, sliding_window=4096, max_position_embeddings=32768
    ),
    "Qwen3ForCausalLM": dict(
        use_sliding_window=False, max_window_layers=28, sliding_window=4096, max_position_embeddings=32768, head_dim=128
    ),
    "Phi3ForCausalLM": dict(rms_norm_eps=1e-5, max_position_embeddings=4096),
    "Gemma2ForCausalLM": dict(
        tie_word_embeddings=True, head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        sliding_window=4096, sliding_window_pattern=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        max_position_embeddings=8192,
    ),
    "Gemma3ForCausalLM": dict(
        tie_word_embeddings=True, head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
        sliding_window=4096, sliding_window_pattern=6, final_logit_softcapping=None, rope_theta=1e6,
        rope_local_base_freq=1e4, max_position_embeddings=131072,
    ),
}  # fmt: skip

# Fields that mean nothing but to the architectures whose defaults name them.
OWN_FIELDS = {
    "hidden_activation", "query_pre_attn_scalar", "sliding_window_pattern", "rope_local_base_freq",
    "attn_logit_softcapping", "final_logit_softcapping", "use_sliding_window", "max_window_layers",
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


LAYER_TYPES = {"full_attention", "sliding_attention"}
THETAS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}  # in transformers 4
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
    def from_hf(cls, settings: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeConfig:
        """From an entry of `_rope_by_layer`, and the config it is of."""
        rope = dict(settings)
        kind = rope.get("rope_type", rope.get("type"))
        if kind is None and rope.get("factor") is not None:
            raise ValueError("RoPE settings with a factor must have a rope_type")
        if kind in ("su", "yarn") and rope.get("short_factor"):
            kind = "longrope"  # its names in early Phi-3 checkpoints
        kind = "default" if kind is None else kind
        if not isinstance(kind, str) or kind not in ROPE_FIELDS:
            raise ValueError(f"RoPE type {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}")
        if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise ValueError("partial_rotary_factor is not supported; only models that rotate whole heads are")
        max_position_embeddings = hf.get("max_position_embeddings", 2048)
        original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original
        if kind == "longrope" and original and rope.get("factor") is None:
            _check_number("RoPE's original_max_position_embeddings", original)
            rope["factor"] = max_position_embeddings / original
        needed, optional = ROPE_FIELDS[kind]
        missing = [name for name in needed if rope.get(name) is None]
        if missing:
            raise ValueError(f"the config's {kind} RoPE settings lack {', '.join(missing)}")
        values: dict[str, Any] = {name: rope[name] for name in (*needed, *optional) if rope.get(name) is not None}
        for name, value in values.items():
            if name in ("short_factor", "long_factor"):
                if not isinstance(value, (list, tuple)):
                    raise ValueError(f"RoPE's {name} must be a list of numbers, got {value!r}")
                for one in value:
                    _check_number(f"RoPE's {name}", one)
                values[name] = tuple(value)
            elif name != "truncate":
                _check_number(f"RoPE's {name}", value, may_be_zero=name in optional)
        if "truncate" in optional:
            values["truncate"] = bool(rope.get("truncate", True))
        theta = 10000.0 if rope.get("rope_theta") is None else rope["rope_theta"]
        _check_number("config.json: rope_theta", theta)
        return cls(theta=float(theta), type=kind, max_position_embeddings=max_position_embeddings, **values)

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
    def default_max_model_len(self) -> int:
        """Where the user gives none: all positions, but of longrope and dynamic those of the first training.  Their
        frequencies for more serve all texts once longer ones may come, short ones less well (vLLM has the same default
        for longrope)."""
        if self.rope.type == "longrope" and self.rope.original_max_position_embeddings:
            return min(self.rope.original_max_position_embeddings, self.max_position_embeddings)
        return self.rope.max_position_embeddings if self.rope.type == "dynamic" else self.max_position_embeddings

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
        architecture = _architecture(hf)
        defaults = DEFAULTS.get(architecture, {})
        absent = {name for name in ("rms_norm_eps", "max_position_embeddings", "rope_theta") if hf.get(name) is None}
        absent |= OWN_FIELDS - defaults.keys()
        hf = {**defaults, **{name: value for name, value in hf.items() if name not in absent}}
        _check_types(hf)
        quantization = hf.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown")
            raise ValueError(f"checkpoints quantized with {method!r} are not supported; use the unquantized model")
        missing = [name for name in SIZES if not hf.get(name)]
        if missing:
            raise ValueError(f"config.json of a {architecture} lacks {', '.join(missing)}")
        activation = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
        if hf.get("use_bidirectional_attention") or hf.get("is_causal") is False:
            raise ValueError("attention to later tokens is not supported: use_bidirectional_attention, is_causal=False")
        heads = hf["num_attention_heads"]
        kv_heads = hf.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})")
        if not hf.get("head_dim") and hf["hidden_size"] % heads:
            raise ValueError(f"hidden_size ({hf['hidden_size']}) is no multiple of num_attention_heads ({heads})")
        head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
        if head_dim % 2:
            raise ValueError(f"head_dim ({head_dim}) must be even: RoPE rotates pairs of dimensions")
        rope, local_rope = _ropes(hf)
        scalar = hf.get("query_pre_attn_scalar")
        dtype = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        return cls(
            architecture=architecture,
            **{name: hf[name] for name in SIZES},
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
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


def _architecture(hf: Mapping[str, Any]) -> str:
    """The first of `architectures`, which must not be another one than `model_type` says."""
    names, model_type = hf.get("architectures") or ["(none)"], str(hf.get("model_type"))
    if not isinstance(names, (list, tuple)) or not isinstance(names[0], str):
        raise ValueError(f"config.json: architectures must be a list of names, got {names!r}")
    said = [name for name in DEFAULTS if name.removesuffix("ForCausalLM").lower() == model_type.removesuffix("_text")]
    if said and names[0] in DEFAULTS and names[0] not in said:
        raise ValueError(f"config.json: architectures ({names[0]}) and model_type ({model_type!r}) do not agree")
    return names[0]


def _rope_by_layer(hf: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """RoPE settings as transformers 5 writes those that differ by layer, from a config of transformers 4 or 5: of
    "full_attention", which layers without a window have, and others too if there is no "sliding_attention"."""
    given, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    for name, value in (("rope_parameters", given), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json: {name} must be an object, got {value!r}")
    layers = {kind: dict(settings) for kind, settings in given.items() if isinstance(settings, Mapping)}
    if layers and (len(layers) < len(given) or not layers.keys() <= LAYER_TYPES):
        raise ValueError(f"RoPE settings that differ by layer must be of {' and '.join(sorted(LAYER_TYPES))} alone")
    layers = layers or {"full_attention": dict(given)}
    if scaling:
        layers["full_attention"] = _scaled(layers.get("full_attention", {}), scaling)
    if hf.get("rope_local_base_freq") is not None:
        layers.setdefault("sliding_attention", {}).setdefault("rope_theta", hf["rope_local_base_freq"])
    if hf.get("rope_theta") is not None:
        for settings in (layers.setdefault("full_attention", {}), *layers.values()):
            settings.setdefault("rope_theta", hf["rope_theta"])
    return layers


def _scaled(rope: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Settings `new` in place of `rope`, of which they keep what no scaling changes."""
    return {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope} | dict(new)


def _ropes(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """That of the layers, and that of those with a sliding window if they have their own."""
    layers = _rope_by_layer(hf)
    local = layers.get("sliding_attention")
    rope = RopeConfig.from_hf(layers.get("full_attention", {}), hf)
    return rope, None if local is None else RopeConfig.from_hf(local, hf)


def _check_number(name: str, value: Any, may_be_zero: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (value > 0 or (may_be_zero and value == 0)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_types(hf: Mapping[str, Any]) -> None:
    for name in (*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"):
        if hf.get(name) is not None:
            check_int(f"config.json: {name}", hf[name], 0 if name == "sliding_window" else 1)
    for name in ("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        if hf.get(name) is not None:
            _check_number(f"config.json: {name}", hf[name])
    if not isinstance(hf.get("quantization_config"), (Mapping, type(None))):
        raise ValueError(f"config.json: quantization_config must be an object, got {hf['quantization_config']!r}")


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
    if not isinstance(types, (list, tuple)) or len(types) != num_layers or not LAYER_TYPES.issuperset(types):
        known = " or ".join(sorted(LAYER_TYPES))
        raise ValueError(f"config.json: layer_types must be {known} for each of the {num_layers} layers, got {types!r}")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _token_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` may be absent, one id or a list of them."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for one in ids:
        check_int("eos_token_id", one, 0)
    return tuple(ids)


def override(hf: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with `changes`.  RoPE settings may have the names of transformers 4 or 5, whichever it has; a
    scaling is of all layers but those that have their own."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"hf_overrides must be a dict of entries of config.json, got {changes!r}")
    config = {**hf, **changes}
    names = {"rope_parameters", "rope_scaling", *THETAS.values()}
    if names.isdisjoint(changes):
        return config
    layers = _rope_by_layer(hf)
    for kind, name in THETAS.items():
        if changes.get(name) is not None:
            layers.setdefault(kind, {})["rope_theta"] = changes[name]
    for name in ("rope_parameters", "rope_scaling"):
        if name in changes:  # None takes a scaling away
            new = _rope_by_layer({"rope_parameters": changes[name] or {"rope_type": "default"}})
            layers |= {kind: _scaled(layers.get(kind, {}), settings) for kind, settings in new.items()}
    return {name: value for name, value in config.items() if name not in names} | {"rope_parameters": layers}
