"""GGUF files (llama.cpp's format) as Hugging Face checkpoints: config, tokenizer and weights.

Weights are dequantized while they are read. An architecture is an entry of `_ARCHITECTURES`; a file of another one,
or with a feature that would change the computation, is refused.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivllm.loading.embedded import build_folder, cache_dir


@dataclass(frozen=True)
class _Architecture:
    """What Hugging Face calls an architecture of GGUF, and how its tensors differ."""

    hf_class: str
    model_type: str
    tensors: dict[str, str]  # GGUF module name, without "blk.N.", to Hugging Face module name
    interleaved_rope: bool  # rows of Q and K are stored in the order that rotates neighbouring pairs


_LLAMA_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_TENSORS = {**_LLAMA_TENSORS, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", "llama", _LLAMA_TENSORS, interleaved_rope=True),  # and Mistral
    "qwen2": _Architecture("Qwen2ForCausalLM", "qwen2", _LLAMA_TENSORS, interleaved_rope=False),
    "qwen3": _Architecture("Qwen3ForCausalLM", "qwen3", _QWEN3_TENSORS, interleaved_rope=False),
}

# RoPE tables: the frequencies follow from the config, which `_rope_scaling` checks.
_UNUSED_TENSORS = ("rope_freqs", "attn_rot_embd")
# Metadata that changes the computation, unless it has these values.
_HARMLESS: dict[str, Any] = {
    "expert_count": 0, "logit_scale": 0, "embedding_scale": 0, "residual_scale": 0, "attention.scale": 0,
    "attention.sliding_window": 0, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0, "attention.causal": True,
    "rope.scaling.attn_factor": 1,
}  # fmt: skip


class GGUFSource:
    """The weights of one GGUF file under their Hugging Face names, in float32 (a `WeightSource`).

    `config` is the model's config.json. Raises FileNotFoundError where there is no file, and ValueError, naming the
    file, when it is damaged, of an unknown architecture, or uses a feature that is not supported.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        reader = _read(self._path)
        name = _value(reader, "general.architecture")
        if name not in _ARCHITECTURES:
            raise ValueError(f"{path}: GGUF architecture {name!r} is not supported, only {', '.join(_ARCHITECTURES)}")
        self._architecture = _ARCHITECTURES[name]
        self.config = _config(reader, self._architecture, self._path)
        self._tensors: dict[str, Any] = {}
        for tensor in reader.tensors:
            if (hf_name := self._hf_name(tensor.name)) is not None:
                self._tensors[hf_name] = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return GGUFSource, (self._path,)  # another process opens the file for itself

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in self._tensors.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        from gguf.quants import dequantize

        num_heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        for name, tensor in self._tensors.items():
            data, module = tensor.data, name.split(".")[-2]
            if self._architecture.interleaved_rope and module in num_heads:
                data = _deinterleave(data, num_heads[module])
            try:
                values = dequantize(data, tensor.tensor_type)
            except NotImplementedError as error:
                kind = tensor.tensor_type.name
                raise ValueError(f"{self._path}: quantization {kind} of {tensor.name} is not supported") from error
            yield name, torch.from_numpy(np.require(values, np.float32, ["C", "W"]))

    def _hf_name(self, name: str) -> str | None:
        """Hugging Face's name of a tensor, or None where the model computes it."""
        match = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", name)
        layer, module, kind = match.groups() if match else (None, name, "")
        if module in _UNUSED_TENSORS:
            return None
        if module not in self._architecture.tensors:
            raise ValueError(f"{self._path}: tensor {name} has no place in a {self._architecture.hf_class}")
        prefix = f"model.layers.{layer.split('.')[1]}." if layer else ""
        return f"{prefix}{self._architecture.tensors[module]}.{kind}"


def gguf_tokenizer(path: str | Path) -> str:
    """A folder with the tokenizer of a GGUF file, converted once. Raises ValueError for a kind that is not known."""
    path = Path(path)
    with path.open("rb") as file:
        # All metadata lies at the start, so this is the identity of a tokenizer without reading gigabytes.
        digest = hashlib.sha256(file.read(16 << 20))
    digest.update(str(path.stat().st_size).encode())
    folder = cache_dir() / "gguf-tokenizers" / digest.hexdigest()[:32]
    return str(build_folder(folder, lambda temporary: convert_tokenizer(path, temporary)))


def convert_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file, chat template included, into `folder` as Hugging Face files.

    It is put together here since transformers' own conversion differs between versions and loses, among others, how
    SmolLM splits digits.
    """
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    reader = _read(path)

    def get(key: str, default: Any = None) -> Any:
        return _value(reader, f"tokenizer.ggml.{key}", default)

    tokens, model, pre = get("tokens"), get("model"), get("pre")
    vocab = {token: index for index, token in enumerate(tokens or [])}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: get(f"{name}_token_id") for role, name in names.items()}
    special = {role: tokens[index] for role, index in ids.items() if index is not None}
    if model == "gpt2" and pre in _SPLITS:
        backend = _byte_level_bpe(vocab, get("merges"), pre)
    elif model == "llama":
        backend = _sentencepiece_bpe(vocab, get("scores"), special.get("unk_token"), get("add_space_prefix", True))
    else:
        raise ValueError(f"{path}: tokenizer {model!r} of type {pre!r} is not supported; name another `tokenizer`")

    kinds = list(zip(tokens, get("token_type", []), strict=False))
    control = [token for token, kind in kinds if kind in (2, 3)]  # unknown and control
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == 4])  # user-defined
    # Where the file does not say, llama.cpp begins with BOS for these two families.
    add_bos, add_eos = get("add_bos_token", model == "llama" or pre == "llama-bpe"), get("add_eos_token", False)
    first = [special["bos_token"]] if add_bos and "bos_token" in special else []
    last = [special["eos_token"]] if add_eos and "eos_token" in special else []
    if first or last:
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], special_tokens=[(token, vocab[token]) for token in {*first, *last}]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = _value(reader, "tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _read(path: Path) -> Any:
    """A gguf.GGUFReader over the memory-mapped file."""
    from gguf import GGUFReader

    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}")
    try:
        reader = GGUFReader(path)
    except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError) as error:  # it checks little itself
        raise ValueError(f"{path} is cut short, damaged, or not a GGUF file; fetch it again ({error})") from error
    if _value(reader, "split.count", 0) > 1:
        raise ValueError(f"{path} is one part of a split model; join the parts with `llama-gguf-split --merge`")
    return reader


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _config(reader: Any, architecture: _Architecture, path: Path) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        value = _value(reader, f"{_value(reader, 'general.architecture')}.{key}", default)
        if value is None:
            raise ValueError(f"{path}: the metadata has no {key}")
        if isinstance(value, list):
            raise ValueError(f"{path}: {key} differs between layers, which is not supported")
        # Shortest decimal: 1e-5 rather than the float32 next to it, as in the model's own config.json.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    for key, harmless in _HARMLESS.items():
        if get(key, harmless) != harmless:
            raise ValueError(f"{path}: {key}={get(key)} is not supported for {architecture.hf_class}")
    shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path}: there is no token_embd.weight; is it a language model?")
    hidden_size, num_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", hidden_size // num_heads)
    if get("attention.value_length", head_dim) != head_dim or get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: head sizes of K, V and RoPE that differ are not supported")
    rope_theta = get("rope.freq_base", 10000.0)
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(reader, get, rope_theta, head_dim, path),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "bfloat16",
    }
    ids = {key: _value(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    # A chat model has several ways to end: of the text, of its turn (eot) and of its message to a tool (eom).
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    eos = ends[0] if len(ends) == 1 else ends or None
    return config | {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}


def _rope_scaling(
    reader: Any, get: Callable[..., Any], theta: float, head_dim: int, path: Path
) -> dict[str, Any] | None:
    """RoPE scaling of the metadata (linear), or of the table of factors that Llama 3.1 and later carry (llama3)."""
    factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    kind = get("rope.scaling.type", "linear")  # "none": whatever the factor is
    tables = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if kind not in ("none", "linear") or (tables and kind == "linear" and factor != 1):
        raise ValueError(f"{path}: RoPE scaling {kind!r} is not supported")
    if tables:
        low, high, original = 1.0, 4.0, 8192  # as in every Llama 3.x; the table says whether this file is one
        factor = float(tables[0].max())
        turns = original * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if tables[0].shape != expected.shape or not np.allclose(tables[0], expected, rtol=1e-3):
            raise ValueError(f"{path}: the factors in rope_freqs.weight are not those of Llama 3; not supported")
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        return scaling | {"original_max_position_embeddings": original}
    return None if kind == "none" or factor in (0, 1) else {"rope_type": "linear", "factor": factor}


def _deinterleave(data: np.ndarray, num_heads: int) -> np.ndarray:
    """Put rows back from llama.cpp's order (x0, y0, x1, y1, …) to Hugging Face's (x0, x1, …, y0, y1, …), per head.

    Quantization blocks lie inside rows, so quantized bytes are moved as well as values. data: [heads * head_dim, …].
    """
    return data.reshape(num_heads, -1, 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)


# How `tokenizer.ggml.pre` splits text before merging, as the vocabulary was learned.
_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {
    "gpt-2": [_GPT2_SPLIT],
    "smollm": [r"\p{N}", _GPT2_SPLIT],
    "llama-bpe": [_LLAMA3_SPLIT],
    "qwen2": [_QWEN2_SPLIT],
}


def _byte_level_bpe(vocab: dict[str, int], merges: list[str], pre: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece_bpe(vocab: dict[str, int], scores: list[float], unk: str | None, space_first: bool) -> Any:
    """Llama 2's kind: a merge for each way to make a token of two others, best score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pairs = [
        (-scores[index], vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, index in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    merges = [pair[3:] for pair in sorted(pairs)]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if space_first else spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_first else steps)
    return backend
