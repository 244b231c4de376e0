"""The front door: what goes in, what is refused, what comes out, and what happens when something goes wrong midway."""

import ast
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_VOCAB
from safetensors.torch import load_file, save_file

import minivllm
from minivllm import LLM, RequestOutputKind, SamplingParams
from minivllm.async_llm import AsyncLLM
from minivllm.backends import make_backend
from minivllm.config import NO_MEANING_HERE, NOT_SUPPORTED, EngineConfig
from minivllm.engine.detokenizer import Detokenizer
from minivllm.layers import Attention, rope_table
from minivllm.model_config import ModelConfig
from minivllm.process_state import deferred_interrupt
from minivllm.runner.forward_batch import ForwardBatch

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [[1, 2, 3], list(range(20)), [7] * 5]


def make(folder, **arguments):
    """An LLM on a tiny checkpoint with 8 blocks of 16 tokens."""
    model = ModelConfig.from_hf(json.loads((Path(folder) / "config.json").read_text()))
    settings = dict(
        skip_tokenizer_init=True,
        device="cpu",
        block_size=16,
        kv_cache_memory_bytes=8 * 16 * 4 * model.kv_elements_per_token,
    )
    return LLM(folder, **settings | arguments)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def llm(tiny):
    """An LLM without tokenizer, which must be idle, intact and serving when the test ends."""
    with make(tiny("mha")) as llm:
        expected = tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        yield llm
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()
        assert llm.engine.scheduler.block_manager.num_free_blocks == 8
        assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.fixture(scope="module")
def embedded_llm(embedded):
    with LLM(embedded, device="cpu", max_model_len=2048, kv_cache_memory_bytes=1 << 28) as llm:
        yield llm


def test_the_embedded_model_is_the_default(embedded, monkeypatch):
    monkeypatch.setattr("minivllm.llm.make_executor", lambda *_: SimpleNamespace(num_blocks=1, shutdown=int))
    with LLM(device="cpu") as llm:
        assert llm.model == "SmolLM2-135M-Instruct" and llm.get_tokenizer() is not None


# ---- what goes in


def test_prompt_forms(embedded_llm):
    text = "The capital of France is"
    ids = embedded_llm.get_tokenizer()(text).input_ids
    forms = [
        text,
        ids,
        tuple(ids),
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt": "x", "prompt_token_ids": ids},
        {"prompt": text, "prompt_token_ids": None, "multi_modal_data": None},
    ]
    params = SamplingParams(temperature=0, max_tokens=3)
    together = embedded_llm.generate(forms, params, use_tqdm=False)
    assert [output.prompt for output in together] == [text, None, None, text, None, "x", text]
    assert [int(output.request_id) for output in together] == sorted(int(output.request_id) for output in together)
    for form, output in zip(forms, together, strict=True):
        assert output.prompt_token_ids == ids and output.outputs[0].text == " Paris.\n"
        if not isinstance(form, tuple):  # alone, it is a list of prompts
            assert tokens_of(embedded_llm.generate(form, params, use_tqdm=False)) == tokens_of([output])


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], GREEDY, use_tqdm=False) == [] and list(llm.stream([], GREEDY)) == []


def test_one_params_for_all_or_one_a_prompt(llm):
    lengths = [3, 1, 5]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [len(tokens) for tokens in tokens_of(outputs)] == lengths
    expected = tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert tokens_of(outputs) == [tokens[:n] for tokens, n in zip(expected, lengths, strict=True)]
    assert params[0].output_kind == RequestOutputKind.CUMULATIVE, "the user's params are not changed"


def test_default_params_are_the_model_s(tiny, tmp_path):
    folder = shutil.copytree(tiny("mha"), tmp_path / "model")
    recommended = dict(
        temperature=0.3, top_k=7, top_p=0.8, min_p=0.1, max_new_tokens=5, repetition_penalty=1.05, eos_token_id=[4, 5]
    )
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    asked = dict(temperature=0.3, top_k=7, top_p=0.8, min_p=0.1, max_tokens=5, repetition_penalty=1.05)
    with make(str(folder)) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**asked)
        assert llm.engine.scheduler.eos_token_ids == {4, 5}
        assert len(llm.generate([1, 2], use_tqdm=False)[0].outputs[0].token_ids) <= 5


def test_a_further_end_of_sequence_token_is_told(tiny, tmp_path):
    """As in vLLM: the main one says nothing."""
    folder = shutil.copytree(tiny("mha"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[4, 5])))
    with make(str(folder)) as llm:
        for token, reason in ((4, None), (5, 5)):
            params = SamplingParams(temperature=0, logit_bias={token: 100}, max_tokens=9)
            completion = llm.generate([1, 2], params, use_tqdm=False)[0].outputs[0]
            assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_other_defaults_of_sampling(tiny, tmp_path, kind):
    folder, other = shutil.copytree(tiny("mha"), tmp_path / "model"), tmp_path / "other"
    other.mkdir()
    for place, content in ((folder, dict(temperature=0.3, eos_token_id=7)), (other, dict(temperature=0.7, top_k=9))):
        (place / "generation_config.json").write_text(json.dumps(content))
    for options, asked in (
        (dict(generation_config="vllm"), {}),
        (dict(generation_config=str(other)), dict(temperature=0.7, top_k=9)),
        (dict(override_generation_config=dict(top_p=0.5)), dict(temperature=0.3, top_p=0.5)),
        (dict(generation_config="vllm", override_generation_config=dict(max_new_tokens=3)), dict(max_tokens=3)),
    ):
        with kind(str(folder), device="cpu", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20, **options) as llm:
            assert llm.inputs.default_options() == asked
            if kind is LLM:
                assert llm.engine.scheduler.eos_token_ids == {7}, "these hold always"
    for options, error in (
        (dict(generation_config="nowhere"), "generation_config: there is no nowhere"),
        (dict(generation_config=3), "generation_config must be"),
        (dict(override_generation_config="x"), "override_generation_config must be a dict"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            kind(str(folder), device="cpu", skip_tokenizer_init=True, **options)


def test_chat(embedded_llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    other = [{"role": "system", "content": "You speak German."}, {"role": "user", "content": "Hello!"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    alone = embedded_llm.chat(messages, params, use_tqdm=False)[0]
    assert alone.outputs[0].text == "The capital of France is Paris." and alone.outputs[0].finish_reason == "stop"
    template = embedded_llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
    assert alone.prompt_token_ids == template["input_ids"] and alone.prompt.endswith("<|im_start|>assistant\n")
    together = embedded_llm.chat([messages, other], params, use_tqdm=False)
    assert together[0].outputs == alone.outputs and together[1].prompt_token_ids != alone.prompt_token_ids


@pytest.mark.parametrize(
    "messages", [[[]], ["hello"], [[{"role": "user"}]], [{"content": "x"}], [[{"role": "user", "content": "x"}], []]]
)
def test_wrong_messages(embedded_llm, messages):
    with pytest.raises(ValueError, match="messages must be a list of"):
        embedded_llm.chat(messages)


# ---- what is refused


@contextmanager
def refused(llm, message):
    """What is done within is a ValueError that says `message`, and a request that runs meanwhile goes on."""
    expected = tokens_of(llm.generate([9, 8, 7], GREEDY, use_tqdm=False))[0]
    with closing(llm.stream([9, 8, 7], GREEDY)) as stream:
        tokens = list(next(stream).outputs[0].token_ids)
        with pytest.raises(ValueError, match=message):
            yield
        for output in stream:
            tokens += output.outputs[0].token_ids
    assert tokens == expected


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], {}, r"prompts\[0\]: the prompt is empty"),
        ([[1], []], {}, r"prompts\[1\]: the prompt is empty"),
        ([0] * 256, {}, "the prompt has 256 tokens, but max_model_len is 256"),
        ([0] * 100, dict(max_tokens=60), "160 tokens, but the KV cache holds 128"),
        ([0] * 129, dict(max_tokens=None), "130 tokens, but the KV cache holds 128"),
        ([[1], [2, TINY_VOCAB]], {}, rf"prompts\[1\]: prompt_token_ids: token id {TINY_VOCAB} is outside"),
        ([-1], {}, "token id -1 is outside the vocabulary of 157"),
        ([1], dict(stop_token_ids=[5, TINY_VOCAB]), rf"stop_token_ids: token id {TINY_VOCAB} is outside"),
        ("text", {}, "skip_tokenizer_init=True"),
        (None, {}, "prompts must be .* got NoneType"),
        (5, {}, "prompts must be .* got int"),
        ([[1.5]], {}, r"prompts\[0\]: a prompt must be text, token ids"),
        ([True], {}, r"prompts\[0\]: a prompt must be text, token ids"),
        ([["a"]], {}, r"prompts\[0\]: a prompt must be text, token ids"),
        ([b"abc"], {}, r"prompts\[0\]: a prompt must be text, token ids"),
        ([range(3)], {}, r"prompts\[0\]: a prompt must be text, token ids"),
        ({"prompt": [1, 2]}, {}, r'"prompt" must be text'),
        ({"prompt": 5, "prompt_token_ids": [1]}, {}, r'"prompt" must be text'),
        ({"prompt_token_ids": "abc"}, {}, r'"prompt_token_ids" must be token ids'),
        (["\ud800a", "ok"], {}, r"prompts\[0\]: a prompt must be text, and has half a surrogate pair at 0"),
        ([{}], {}, 'a prompt dict has "prompt" or "prompt_token_ids"'),
        ([{"prompt_token_ids": [1], "multi_modal_data": 1}], {}, "multi_modal_data"),
        ({"prompt": None}, {}, "a prompt must be text"),
        (PROMPTS, [GREEDY] * 2, "sampling_params has 2 entries for 3 prompts"),
        ([1], [GREEDY] * 2, "sampling_params has 2 entries for 1 prompts"),
        ([1], ["greedy"], r"sampling_params\[0\] must be a SamplingParams, got str"),
        ([1], 0.5, "sampling_params"),
    ],
)
def test_wrong_requests(llm, prompts, params, message):
    """Each is a ValueError that names what is wrong; a request that runs meanwhile goes on."""
    with refused(llm, message):
        llm.generate(prompts, SamplingParams(**params) if isinstance(params, dict) else params, use_tqdm=False)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 2**31), ("min_tokens", 2**31), ("temperature", 10**400)], ids="kmt"
)
def test_numbers_too_large(tiny, name, value):
    with make(tiny("mha"), max_model_len=128) as llm, refused(llm, name):
        llm.generate([1], SamplingParams(max_tokens=None, **{name: value}), use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_tokens=0), "max_tokens must be an integer of at least 1, got 0"),
        (dict(max_tokens=1.5), "max_tokens"),
        (dict(max_tokens=True), "max_tokens"),
        (dict(top_p=0), r"top_p must be in \(0, 1\], got 0"),
        (dict(top_p=1.1), "top_p must be in"),
        (dict(top_p="1"), "top_p must be a number"),
        (dict(min_p=-0.1), "min_p must be in"),
        (dict(min_p=1.1), "min_p must be in"),
        (dict(top_k=-2), "top_k must be an integer of at least -1"),
        (dict(top_k=1.0), "top_k"),
        (dict(temperature=-1), "temperature must be"),
        (dict(temperature=float("nan")), "temperature must be a number"),
        (dict(temperature=float("inf")), "temperature must be"),
        (dict(temperature=None), "temperature must be a number"),
        (dict(temperature=2.1), r"temperature must be in \[0, 2\]"),
        (dict(seed=-(1 << 63) - 1), "seed must be"),
        (dict(seed="a"), "seed must be"),
        (dict(seed=1 << 63), "seed must be at most 9223372036854775807"),
        (dict(logit_bias={"²": 1}), "logit_bias must be"),
        (dict(min_tokens=-1), "min_tokens must be"),
        (dict(min_tokens=20, max_tokens=10), r"min_tokens \(20\) must not exceed max_tokens \(10\)"),
        (dict(stop_token_ids=["a"]), "stop_token_ids must be"),
        (dict(stop_token_ids=3), "stop_token_ids must be"),
        (dict(ignore_eos=1), "ignore_eos must be True or False"),
        (dict(detokenize="no"), "detokenize must be True or False"),
        (dict(output_kind=1), "output_kind must be"),
        (dict(temprature=1), "no argument 'temprature'; did you mean 'temperature'"),
        (dict(xyz=1), "no argument 'xyz'; known: n, "),
        (dict(best_of=2), "best_of=2 is not supported: use n"),
        (dict(flat_logprobs=1), "flat_logprobs must be True or False"),
        (dict(prompt_logprob_token_ids=[1, 2]), "prompt_logprob_token_ids must be lists of token ids, one for each"),
        (dict(prompt_logprob_token_ids=[[], []]), "prompt_logprob_token_ids has no token ids"),
        (dict(prompt_logprob_token_ids=[[-2]]), "prompt_logprob_token_ids must be an integer of at least -1"),
        (dict(prompt_logprob_start=1), "prompt_logprob_start needs prompt_logprob_token_ids"),
        (dict(prompt_logprob_token_ids=[[1]], prompt_logprobs=1), "cannot be combined; send two requests"),
        (dict(thinking_token_budget=100), "thinking_token_budget=100 is not supported: use max_tokens"),
        (dict(logprob_token_ids=[]), "logprob_token_ids must have 1 to 128 token ids, got 0"),
        (dict(logprob_token_ids=[1] * 129), "logprob_token_ids must have 1 to 128 token ids, got 129"),
        (dict(logprob_token_ids=[-1]), "logprob_token_ids must be"),
        (dict(logprob_token_ids=[1, 2], logprobs=3), r"logprobs \(3\) must be the number of logprob_token_ids \(2\)"),
        (dict(skip_reading_prefix_cache=1), "skip_reading_prefix_cache must be True or False"),
        (dict(repetition_detection=dict(min_count=2)), "repetition_detection must be RepetitionDetectionParams"),
        (dict(stream_interval=0), "stream_interval must be an integer of at least 1"),
        (dict(structured_outputs=1), "structured_outputs must be StructuredOutputsParams"),
        (dict(n=0), "n must be an integer of at least 1"),
        (dict(n=2, temperature=0), "n must be 1 with temperature 0"),
        (dict(presence_penalty=2.1), r"presence_penalty must be in \[-2, 2\]"),
        (dict(frequency_penalty=-2.1), r"frequency_penalty must be in \[-2, 2\]"),
        (dict(frequency_penalty="1"), "frequency_penalty must be a number"),
        (dict(repetition_penalty=0), "repetition_penalty must be greater than 0"),
        (dict(stop=3), "stop must be a string or a list of strings"),
        (dict(stop=["a", ""]), "stop must not contain an empty string"),
        (dict(stop="a", detokenize=False), "stop needs the text of the output"),
        (dict(bad_words=[1]), "bad_words must be a string or a list"),
        (dict(logprobs=-2), "logprobs must be an integer of at least -1"),
        (dict(prompt_logprobs=1.0), "prompt_logprobs must be an integer"),
        (dict(logit_bias=[1]), "logit_bias must be a dict"),
        (dict(logit_bias={"x": 1}), "logit_bias must be an integer"),
        (dict(logit_bias={1: "x"}), "logit_bias must be a dict of token id: number"),
        (dict(logit_bias={1: float("inf")}), "logit_bias must be a dict of token id: number up to 1e30"),
        (dict(allowed_token_ids=[]), "allowed_token_ids is empty"),
        (dict(allowed_token_ids=5), "allowed_token_ids must be a list"),
        (dict(include_stop_str_in_output=1), "include_stop_str_in_output must be True or False"),
    ],
    ids=str,
)
def test_wrong_sampling_params(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_unsupported_options_that_ask_for_nothing_are_accepted():
    asked = SamplingParams(
        n=1, stop=None, stop_token_ids=None, logprobs=None, presence_penalty=0, bad_words=[], seed=-1,
        flat_logprobs=False, thinking_token_budget=None, extra_args={},
    )  # fmt: skip
    assert asked == SamplingParams()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(max_num_sequences=3), "LLM has no argument 'max_num_sequences'; did you mean 'max_num_seqs'"),
        (dict(xyz=3), "LLM has no argument 'xyz'; known: dtype, "),
        (dict(dtype="float8"), "dtype must be one of"),
        (dict(load_format="pickle"), "load_format must be one of"),
        (dict(load_format="gguf"), "load_format='gguf' needs a .gguf file"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(device="tpu"), "device must be"),
        (dict(device="cuda:99"), "device 'cuda:99': there are . GPUs"),
        (dict(block_size=24), "block_size must be 16, 32 or a multiple of 64, got 24"),
        (dict(block_size="16"), "block_size must be an integer"),
        (dict(gpu_memory_utilization=1.1), r"gpu_memory_utilization must be in \(0, 1\]"),
        (dict(gpu_memory_utilization="x"), "gpu_memory_utilization must be"),
        (dict(max_model_len=257), r"max_model_len \(257\) is more than the model's own limit of 256"),
        (dict(max_model_len=0), "max_model_len must be an integer of at least 1"),
        (
            dict(max_num_seqs=10, max_num_batched_tokens=5),
            r"max_num_batched_tokens \(5\) must be at least max_num_seqs",
        ),
        (dict(kv_cache_memory_bytes=1000), "no memory is left for the KV cache"),
        (dict(kv_cache_memory_bytes=10**15), r"kv_cache_memory_bytes \(931322.57 GiB\) is more than there is"),
        (dict(tensor_parallel_size=0), "tensor_parallel_size must be"),
        (dict(revision="main"), "revision is for models on the hub"),
        (dict(seed=-1), "seed must be"),
        (dict(enforce_eager=1), "enforce_eager must be True or False"),
        (dict(async_scheduling="yes"), "async_scheduling must be True or False"),
        (dict(load_format=["a"]), "load_format must be one of"),
        (dict(backend=["a"]), "backend must be one of"),
        (dict(enable_prefix_caching="no"), "enable_prefix_caching must be"),
    ],
    ids=str,
)
def test_wrong_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(tiny("mha"), **arguments)


def test_kernels_need_a_gpu_or_the_interpreter(tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' needs a GPU"):
        make(tiny("mha"), backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
        (dict(architectures=None), "(none)"),
        (dict(rope_parameters=dict(rope_type="mrope", factor=2.0)), "RoPE type 'mrope' is not supported"),
        (dict(rope_parameters=dict(rope_type="llama3", factor=2.0)), "llama3 RoPE settings lack low_freq_factor"),
        (dict(quantization_config=dict(quant_method="awq")), "quantized with 'awq' are not supported"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        (dict(use_bidirectional_attention=True), "attention to later tokens is not supported"),
        (dict(vocab_size=None), "lacks vocab_size"),
        (dict(num_key_value_heads=3), "must be a multiple of num_key_value_heads"),
        (dict(num_hidden_layers=2), "model.layers.2"),  # tensors that would go unused
        (dict(num_hidden_layers=4), "model.layers.3"),  # tensors that are missing
    ],
    ids=str,
)
def test_models_that_would_run_wrongly(tiny, tmp_path, change, message):
    folder = shutil.copytree(tiny("mha"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        make(str(folder))


def test_a_missing_folder():
    with pytest.raises(FileNotFoundError, match="'/no/such/folder'"):
        LLM("/no/such/folder")


@pytest.mark.parametrize("name", NO_MEANING_HERE)
def test_meaningless_arguments_warn(tiny, name):
    with pytest.warns(UserWarning, match=f"{name} has no effect: {NO_MEANING_HERE[name]}"):
        make(tiny("mha"), **{name: 1})


@pytest.mark.parametrize("name", NOT_SUPPORTED)
def test_arguments_that_ask_for_what_there_is_not(tiny, name):
    harmless, remedy = NOT_SUPPORTED[name]
    for value in harmless:
        EngineConfig.from_arguments({name: value})
    with pytest.raises(ValueError, match=re.escape(f"{name}='other' is not supported: {remedy}")):
        make(tiny("mha"), **{name: "other"})


def test_outputs_without_max_tokens_end_where_the_kv_cache_does(tiny):
    with make(tiny("mha"), num_gpu_blocks_override=7) as llm:
        output = llm.generate([1, 2, 3], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    assert len(output.token_ids) == 7 * 16 + 1 - 3 and output.finish_reason == "length"


def test_weights_that_are_more_than_the_memory(tiny, monkeypatch):
    monkeypatch.setattr("minivllm.runner.memory._host_bytes", lambda: 100_000)
    with pytest.raises(ValueError, match="the weights need 0.00 GiB of memory, and there are 0.00; take a smaller"):
        make(tiny("mha"))


def test_a_number_of_blocks(tiny):
    with make(tiny("mha"), num_gpu_blocks_override=7) as llm:
        assert llm.engine.scheduler.block_manager.num_blocks == 7
    with pytest.raises(ValueError, match="num_gpu_blocks_override must be an integer of at least 1"):
        make(tiny("mha"), num_gpu_blocks_override=0)


def test_a_temperature_too_small_is_raised():
    with pytest.warns(UserWarning, match="temperature 0.001 raised to 0.01"):
        assert SamplingParams(temperature=0.001).temperature == 0.01


# ---- what comes out


def test_outputs(llm):
    llm.reset_prefix_cache()
    long, short = llm.generate([list(range(40)), [5]], SamplingParams(max_tokens=4), use_tqdm=False)
    again = llm.generate([list(range(40))], GREEDY, use_tqdm=False)[0]
    for output in (long, short, again):
        assert output.finished and output.outputs[0].finished() and output.outputs[0].finish_reason == "length"
        assert output.outputs[0].text == "" and output.outputs[0].stop_reason is None
        metrics = output.metrics
        assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
        assert metrics.first_token_time < metrics.last_token_time
        assert 0 <= metrics.time_in_queue <= metrics.time_to_first_token and metrics.num_preemptions == 0
    assert (long.num_cached_tokens, short.num_cached_tokens, again.num_cached_tokens) == (0, 0, 32)
    assert llm.reset_prefix_cache()
    assert llm.generate([list(range(40))], GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_the_longest_output_fills_max_model_len(tiny):
    with make(tiny("mha"), max_model_len=50) as llm:
        output = llm.generate([1, 2, 3], SamplingParams(max_tokens=None), use_tqdm=False)[0].outputs[0]
        assert len(output.token_ids) == 47 and output.finish_reason == "length"
        output = llm.generate([0] * 49, SamplingParams(max_tokens=100), use_tqdm=False)[0].outputs[0]
        assert len(output.token_ids) == 1 and output.finish_reason == "length"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_ends(tiny, tmp_path, greedy, hugging_face, asynchronous):
    """End-of-sequence tokens of generation_config and config, stop_token_ids, min_tokens: as in Hugging Face."""
    prompt = [1, 2, 3]
    free = greedy(tiny("gqa-tied"), [prompt], 24)[0]
    eos = [free[9], free[12], free[6]]  # whichever comes first ends it
    assert len(set(free[:13])) == 13
    folder = shutil.copytree(tiny("gqa-tied"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=eos[:2])))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(eos_token_id=eos[2])))

    def until(*ends):
        return free[: 1 + next(i for i, token in enumerate(free) if token in ends)]

    model = hugging_face(tiny("gqa-tied"))
    ids = torch.tensor([prompt])
    lengths = dict(min_new_tokens=12, max_new_tokens=24)
    late = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=eos, pad_token_id=0, **lengths
    )[0, len(prompt) :].tolist()
    assert late != free[: len(late)], "no end was in the way"
    cases = [
        (dict(), (until(*eos), "stop", None)),
        (dict(ignore_eos=True), (free, "length", None)),
        (dict(ignore_eos=True, stop_token_ids=[free[8]]), (until(free[8]), "stop", free[8])),
        (dict(stop_token_ids=[free[2]]), (until(free[2]), "stop", free[2])),
        (dict(max_tokens=3), (free[:3], "length", None)),
    ]
    with make(str(folder), async_scheduling=asynchronous) as llm:
        params = [SamplingParams(temperature=0, **dict(max_tokens=24) | options) for options, _ in cases]
        outputs = [output.outputs[0] for output in llm.generate([prompt] * len(cases), params, use_tqdm=False)]
        ends = [(output.token_ids, output.finish_reason, output.stop_reason) for output in outputs]
        assert ends == [end for _, end in cases]
        params = SamplingParams(temperature=0, max_tokens=24, min_tokens=12)
        assert tokens_of(llm.generate(prompt, params, use_tqdm=False)) == [late]


def test_stream(embedded_llm):
    """Deltas add up to what `generate` returns, in text and tokens, for several requests at once."""
    prompts = ["Write a haiku about the sea. 🌊", "Translate to Chinese: good morning.\n早上好", "1, 2, 3,"]
    params = [SamplingParams(temperature=t, seed=3, max_tokens=n) for t, n in ((0.0, 30), (1.5, 40), (0.7, 5))]
    expected = embedded_llm.generate(prompts, params, use_tqdm=False)
    text, tokens, ends = {}, {}, {}
    for output in embedded_llm.stream(prompts, params):
        assert output.request_id not in ends, "an output after the last one"
        text.setdefault(output.request_id, []).append(output.outputs[0].text)
        tokens.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
        if output.finished:
            ends[output.request_id] = output.outputs[0].finish_reason
    assert sorted(ends) == sorted(text, key=int), "request ids count up"
    for request_id, whole in zip(sorted(ends, key=int), expected, strict=True):
        assert "".join(text[request_id]) == whole.outputs[0].text != ""
        assert tokens[request_id] == whole.outputs[0].token_ids
        assert ends[request_id] == whole.outputs[0].finish_reason


def test_cumulative_outputs_and_special_tokens(embedded_llm):
    prompt = embedded_llm.preprocess_chat([{"role": "user", "content": "What is the capital of France?"}])
    seen = []
    params = SamplingParams(temperature=0, max_tokens=20, skip_special_tokens=False, include_stop_str_in_output=True)
    embedded_llm.engine.add_request("x", prompt["prompt_token_ids"], params)
    while embedded_llm.engine.has_unfinished_requests():
        seen += [output.outputs[0] for output in embedded_llm.engine.step()]
    assert seen[-1].text == "The capital of France is Paris.<|im_end|>"
    for i, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        assert len(after.token_ids) == i + 2 and after.token_ids[:-1] == before.token_ids
        assert after.text.startswith(before.text)
    without_end = SamplingParams(temperature=0, max_tokens=20, skip_special_tokens=False)
    output = embedded_llm.generate(prompt, without_end, use_tqdm=False)[0].outputs[0]
    assert output.text == "The capital of France is Paris." and output.token_ids == seen[-1].token_ids
    plain = SamplingParams(temperature=0, max_tokens=20, detokenize=False)
    output = embedded_llm.generate(prompt, plain, use_tqdm=False)[0].outputs[0]
    assert output.text == "" and output.token_ids == seen[-1].token_ids


# ---- text

WORLD = "Hello 😀👩‍👩‍👧 你好，世界！ 日本語 한국어 naïve café 🏳️‍🌈 ∑∞ end"


def detokenize(tokenizer, prompt, token_ids, sizes):
    """The deltas of token_ids given a few at a time."""
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams())
    deltas, i = [], 0
    while i < len(token_ids):
        i, begin = i + sizes(), i
        deltas.append(detokenizer.append(token_ids[begin:i], finished=i >= len(token_ids)))
    assert "".join(deltas) == detokenizer.text
    return deltas


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("prompt", ["", "Say: ", "日本語の"])
def test_no_delta_ends_inside_a_character(embedded_llm, prompt, size):
    tokenizer = embedded_llm.get_tokenizer()
    token_ids = tokenizer(WORLD).input_ids
    deltas = detokenize(tokenizer, tokenizer(prompt).input_ids, token_ids, lambda: size)
    assert "".join(deltas) == WORLD and not any("\ufffd" in delta for delta in deltas)
    if size == 1:
        assert 20 < sum(delta != "" for delta in deltas) < len(token_ids), "text comes as soon as it is whole"


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize("text", ["hello 😀", "hello 日本", "日本", "世界 😀"])
def test_a_character_that_begins_in_the_prompt_is_the_output_s(embedded_llm, text, size):
    tokenizer = embedded_llm.get_tokenizer()
    ids = tokenizer(text).input_ids
    for cut in range(1, len(ids)):
        whole = [n for n in range(cut + 1) if not tokenizer.decode(ids[:n]).endswith("\ufffd")][-1]
        deltas = detokenize(tokenizer, ids[:cut], ids[cut:], lambda: size)
        assert "".join(deltas) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:whole])) :]
    other = tokenizer("abc").input_ids
    for given in (other, []):  # which does not go on with the character
        assert "".join(detokenize(tokenizer, ids[:-1], given, lambda: size)) == tokenizer.decode(given)


def test_text_cut_inside_a_character_is_given_at_the_end(embedded_llm):
    tokenizer = embedded_llm.get_tokenizer()
    token_ids = tokenizer("ok 🏳").input_ids[:-1]
    whole = tokenizer.decode(token_ids)
    assert whole.endswith("\ufffd")
    deltas = detokenize(tokenizer, [1], token_ids, lambda: 1)
    assert "".join(deltas) == whole and not any("\ufffd" in delta for delta in deltas[:-1])


def sentencepiece_like():
    """A tokenizer like Llama 2's: spaces as ▁, the first one stripped, characters out of the vocabulary as bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁hello",
        "▁world",
        "▁a",
        "▁",
        "b",
        "ing",
        ".",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def random_pieces(draw, least):
    token_ids = []
    while len(token_ids) < least:
        character = draw.choice("😀你é").encode() if draw.random() < 0.2 else b""
        token_ids += [10 + byte for byte in character] or [draw.randint(1, 9)]
    return token_ids


@pytest.mark.parametrize(
    "prompt_has_bytes",
    [
        False,
        True,
    ],
)
def test_deltas_of_a_sentencepiece_tokenizer(prompt_has_bytes):
    """On random tokens: no space is lost, bytes become characters; the text is that of decoding all at once."""
    tokenizer = sentencepiece_like()
    draw = random.Random(0)
    for _ in range(2000):
        prompt = random_pieces(draw, draw.randint(1, 9)) if prompt_has_bytes else draw.choices(range(1, 10), k=9)
        token_ids = random_pieces(draw, draw.randint(1, 16))
        deltas = detokenize(tokenizer, prompt, token_ids, lambda: draw.randint(1, 3))
        before, after = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + token_ids))
        assert before + "".join(deltas) == after


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_a_long_run_of_byte_tokens(size):
    """While its last character is torn, all of it looks so."""
    tokenizer = sentencepiece_like()
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("😀你éß") for _ in range(draw.randint(1, 30)))
        token_ids = [10 + byte for byte in text.encode()] + [4] * draw.randint(0, 9)
        deltas = detokenize(tokenizer, [1, 3], token_ids, lambda: size)
        assert "".join(deltas) == tokenizer.decode([3, *token_ids]).removeprefix("hello")


@pytest.mark.parametrize("prompt", [[1, 3], [1]], ids=["context", "no context"])
@pytest.mark.parametrize("token", [2, 10 + 0xFF], ids=["skipped", "no character"])
def test_tokens_that_never_become_text_are_not_decoded_again_and_again(token, prompt):
    """Special tokens, as where EOS is ignored, and bytes that are no UTF-8."""
    tokenizer = sentencepiece_like()
    detokenizer = Detokenizer(tokenizer, prompt, SamplingParams())
    decode, lengths = detokenizer._decode, []
    detokenizer._decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    for _ in range(500):
        detokenizer.append([token], False)
    assert max(lengths) < 70
    detokenizer.append([4, 9], True)
    begins_text = token == 2 and prompt == [1]  # where the space is stripped
    assert detokenizer.text == ("" if token == 2 else "\ufffd" * 500) + ("world." if begins_text else " world.")


@pytest.mark.parametrize("num_before", [15, 16, 17, 100])
def test_a_character_after_many_bytes_that_are_none_is_there_however_it_comes(embedded_llm, num_before):
    tokenizer = embedded_llm.get_tokenizer()
    first, second = tokenizer.convert_tokens_to_ids(["\u00cd", "\u00b8"])  # the bytes of U+0378
    token_ids = [first] * num_before + [second, second]
    for size in (1, 3, 1000):
        detokenizer = Detokenizer(tokenizer, [1, 50], SamplingParams())
        for begin in range(0, len(token_ids), size):
            detokenizer.append(token_ids[begin : begin + size], begin + size >= len(token_ids))
        assert detokenizer.text == tokenizer.decode(token_ids) == "\ufffd" * (num_before - 1) + "\u0378\ufffd"


def test_a_character_at_the_end_of_many_tokens_at_once_is_waited_for():
    """As of a draft."""
    detokenizer = Detokenizer(sentencepiece_like(), [1, 3], SamplingParams())
    first, second, third = (10 + byte for byte in "你".encode())
    assert detokenizer.append([4] * 40 + [first, second], False) == ""
    assert detokenizer.append([third], False) == " world" * 40 + "你"


# ---- when something goes wrong midway


def test_a_stream_that_the_collector_closes_in_a_step(tiny, monkeypatch):
    """Is aborted after it."""
    with make(tiny("mha")) as llm:
        manager = llm.engine.scheduler.block_manager
        (expected,) = tokens_of(llm.generate(PROMPTS[0], GREEDY, use_tqdm=False))
        grow, calls, owner = manager.grow, [], SimpleNamespace()
        owner.itself, owner.stream = owner, llm.stream([[7, 8], [3] * 17], SamplingParams(max_tokens=60))
        next(owner.stream)
        gc.collect()

        def collected(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                gc.collect()
                assert llm._left
            return grow(*arguments)

        gc.disable()
        try:
            del owner
            monkeypatch.setattr(manager, "grow", collected)
            found = [token for output in llm.stream(PROMPTS[0], GREEDY) for token in output.outputs[0].token_ids]
        finally:
            gc.enable()
        assert found == expected
        assert len(calls) > 3 and not llm.engine.request_ids and not llm._inboxes
        llm.engine.scheduler.check_integrity()


def test_ctrl_c_while_a_stream_is_left(tiny, monkeypatch):
    with make(tiny("mha")) as llm:
        manager, calls = llm.engine.scheduler.block_manager, []
        free = manager.free

        def interrupted(request):
            if not calls:
                os.kill(os.getpid(), signal.SIGINT)
            calls.append(request)
            return free(request)

        stream = llm.stream(PROMPTS, SamplingParams(max_tokens=60))
        next(stream)
        monkeypatch.setattr(manager, "free", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.close()
        assert len(calls) == len(PROMPTS) and not llm.engine.request_ids and not llm._inboxes
        llm.engine.scheduler.check_integrity()
        assert len(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == len(PROMPTS)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_llm_called_by_a_function_of_its_own_request(tiny, asynchronous):
    """Is that request's mistake alone."""
    with make(tiny("mha"), async_scheduling=asynchronous) as llm:
        expected = tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))[0]

        def nested(token_ids, logits):
            llm.generate([7, 8], GREEDY, use_tqdm=False)
            return logits

        other = llm.stream(PROMPTS[0], GREEDY)
        found = list(next(other).outputs[0].token_ids)
        with pytest.raises(ValueError, match="cannot be called by the functions of its own requests"):
            llm.generate([1, 2], SamplingParams(max_tokens=3, logits_processors=[nested]), use_tqdm=False)
        assert found + [token for output in other for token in output.outputs[0].token_ids] == expected
        llm.engine.scheduler.check_integrity()


def test_a_request_of_nan_leaves_others_alone(tiny, tmp_path):
    """Beside them, and in the blocks that they get after it."""
    folder = shutil.copytree(tiny("mha"), tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][9] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    good, bad = [1, 2, 3, 4, 5], [7, 8, 9, 10] * 15
    short, long = (SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 20))
    with make(str(folder), enable_prefix_caching=False) as llm:
        (expected,) = tokens_of(llm.generate([good], long, use_tqdm=False))
        assert 9 not in expected
        assert tokens_of(llm.generate([bad, good], [short, long], use_tqdm=False))[1] == expected
        assert tokens_of(llm.generate([good], long, use_tqdm=False)) == [expected]


class Faulty:
    """An executor that calls `fault` in its n-th step: before launching it, or when its tokens are awaited."""

    def __init__(self, executor, n, fault, where="execute"):
        self.executor, self.n, self.fault, self.where = executor, n, fault, where

    def execute(self, batch):
        self.n -= 1
        if self.n == 0 and self.where == "execute":
            self.fault()
        pending = self.executor.execute(batch)
        return SimpleNamespace(wait=self.fault) if self.n == 0 and self.where == "wait" else pending


def raise_error():
    raise RuntimeError("the device is on fire")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def either_llm(request, tiny):
    """A tiny LLM with and without async scheduling, and the tokens it should give for PROMPTS."""
    with make(tiny("mha"), async_scheduling=request.param) as llm:
        yield llm, tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        assert not llm.engine.scheduler.requests
        llm.engine.scheduler.check_integrity()


def test_the_collector_is_kept_off_the_heap_while_an_llm_is_made(tiny, monkeypatch):
    class Cycle:
        def __init__(self):
            self.itself = self

    left = weakref.ref(Cycle())
    seen = []

    def make_executor(*_):
        seen.append((gc.get_freeze_count() > 0, left() is None))
        raise RuntimeError("on fire")

    monkeypatch.setattr("minivllm.llm.make_executor", make_executor)
    gc.disable()  # or a collection by chance may find the cycle
    try:
        with pytest.raises(RuntimeError, match="on fire"):
            LLM(tiny("gqa-tied"), skip_tokenizer_init=True)
    finally:
        gc.enable()
    assert seen == [(True, True)] and gc.get_freeze_count() == 0


@pytest.mark.parametrize("where", ["execute", "wait"])
@pytest.mark.parametrize("step", [1, 2, 5, 12])
def test_an_error_reaches_the_caller_and_the_engine_works_on(either_llm, monkeypatch, step, where):
    llm, expected = either_llm
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "executor", Faulty(llm.engine.executor, step, raise_error, where))
        with pytest.raises(RuntimeError, match="on fire"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not llm.engine.scheduler.requests
    assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_the_collector_is_kept_off_the_heap_only_while_generating(either_llm, monkeypatch):
    """Also when generating fails; a heap that the program has frozen stays so."""
    llm, _ = either_llm
    counts = []
    with monkeypatch.context() as patch:
        patch.setattr(
            llm.engine,
            "executor",
            Faulty(llm.engine.executor, 2, lambda: (counts.append(gc.get_freeze_count()), raise_error())),
        )
        with pytest.raises(RuntimeError, match="on fire"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert counts[0] > 0 and gc.get_freeze_count() == 0
    gc.freeze()
    try:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("where", ["execute", "wait"])
def test_a_failed_step_loses_no_request(either_llm, monkeypatch, where):
    llm, expected = either_llm
    monkeypatch.setattr(llm.engine, "executor", Faulty(llm.engine.executor, 5, raise_error, where))
    for i, prompt in enumerate(PROMPTS):
        llm.engine.add_request(str(i), prompt, GREEDY)
    tokens, num_errors = {}, 0
    while llm.engine.has_unfinished_requests():
        try:
            for output in llm.engine.step():
                tokens[int(output.request_id)] = output.outputs[0].token_ids
        except RuntimeError:
            num_errors += 1
            llm.engine.scheduler.check_integrity()
    assert num_errors == 1 and [tokens[i] for i in range(len(PROMPTS))] == expected


def test_outputs_that_cannot_be_made_are_made_by_the_next_step(either_llm, monkeypatch):
    llm, expected = either_llm
    original, calls = llm.engine._outputs._output, []

    def output(group, samples):
        made = original(group, samples)
        calls.append(group.request_id)
        if len(calls) in (2, 8):
            raise MemoryError
        return made

    monkeypatch.setattr(llm.engine._outputs, "_output", output)
    for i, prompt in enumerate(PROMPTS):
        kind = RequestOutputKind.FINAL_ONLY if i % 2 else RequestOutputKind.CUMULATIVE
        llm.engine.add_request(str(i), prompt, replace(GREEDY, output_kind=kind))
    tokens, num_errors = {}, 0
    while llm.engine.has_unfinished_requests():
        assert len(calls) < 500
        try:
            tokens |= {int(output.request_id): output.outputs[0].token_ids for output in llm.engine.step()}
        except MemoryError:
            num_errors += 1
            llm.engine.scheduler.check_integrity()
    assert num_errors == 2 and [tokens[i] for i in range(len(PROMPTS))] == expected
    assert not llm.engine.request_ids and not llm.engine._outputs.ended()


def test_an_end_is_reported_once(either_llm):
    """Also if a step fails after it: what has ended is not due again."""
    llm, _ = either_llm
    params = SamplingParams(n=4, seed=1, max_tokens=40, stop_token_ids=list(range(5, 25)), ignore_eos=True)
    llm.engine.add_request("x", [1, 2, 3], params)
    num_ended = set()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        assert not llm.engine._outputs.ended()
        num_ended |= {sum(s.has_ended for s in group.samples) for group in llm.engine._outputs.groups.values()}
    assert num_ended & {1, 2, 3}, "some end before the others"


@pytest.mark.parametrize("handler", [None, signal.SIG_DFL, signal.SIG_IGN], ids=str)
def test_a_handler_of_ctrl_c_that_is_not_python_s_is_left_alone(monkeypatch, handler):
    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda number: handler)
        patch.setattr(signal, "signal", None)
        with deferred_interrupt():
            pass


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 4])
def test_ctrl_c_aborts_and_the_engine_stays_usable(either_llm, monkeypatch, step):
    llm, expected = either_llm
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        faulty = Faulty(llm.engine.executor, step, interrupt)
        patch.setattr(llm.engine, "executor", faulty)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert faulty.n == 0, "no step came after the one that was interrupted"
        assert llm.engine.scheduler.stats.num_preemptions == 0, "that step was left half done"
    assert not llm.engine.scheduler.requests and signal.getsignal(signal.SIGINT) is handler
    assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_ctrl_c_while_requests_are_queued(either_llm, monkeypatch):
    llm, expected = either_llm
    add, added = llm.engine.scheduler.add, []

    def interrupt_and_add(request):  # where it is half known
        if len(added) == 1:
            interrupt()
        added.append(add(request))

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "add", interrupt_and_add)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[:3], GREEDY, use_tqdm=False)
    assert not llm.engine.scheduler.requests and not llm.engine.request_ids
    assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_ctrl_c_at_any_moment(either_llm):
    llm, expected = either_llm
    endless = SamplingParams(max_tokens=100)
    for i in range(5):
        timer = threading.Timer(0.01 + 0.007 * i, interrupt)
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                llm.generate([[1, 2, 3]], endless, use_tqdm=False)
        timer.join()
        assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_ctrl_c_before_the_first_step(either_llm, monkeypatch):
    llm, _ = either_llm
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minivllm.llm.tqdm", lambda **_: interrupt())
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    left = list(llm.engine.scheduler.requests)
    llm.engine.abort_requests(left)
    assert not left


def test_generate_starts_the_longest_first_and_keeps_the_order(either_llm, monkeypatch):
    llm, _ = either_llm
    started = []
    original = llm.engine.add_request
    monkeypatch.setattr(
        llm.engine, "add_request", lambda *arguments: (started.append(arguments[2].max_tokens), original(*arguments))
    )
    limits = [3, 9, 12, 9, 1]
    params = [SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True) for limit in limits]
    outputs = llm.generate([[1, 2, 3]] * 5, params, use_tqdm=False)
    assert started == [12, 9, 9, 3, 1]
    assert [len(output.outputs[0].token_ids) for output in outputs] == limits
    assert [int(output.request_id) for output in outputs] == sorted(int(output.request_id) for output in outputs)


def test_generate_in_another_thread(either_llm):
    llm, expected = either_llm
    found = []
    thread = threading.Thread(target=lambda: found.append(tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False))))
    thread.start()
    thread.join()
    assert found == [expected]


def test_the_largest_step_is_no_longer_than_requests_can_be(tiny, monkeypatch):
    """What a GPU measures before the KV cache is sized, where the longest request ends inside a block."""
    steps = []
    options = dict(max_model_len=100, block_size=64, max_num_batched_tokens=256, max_num_seqs=4)
    with make(tiny("mha"), **options) as llm, torch.inference_mode():
        runner = llm._executor.runner
        execute = runner.execute
        monkeypatch.setattr(runner, "execute", lambda batch: steps.append(batch.num_scheduled) or execute(batch))
        runner._profile(use_graphs=False)
    assert steps == [[100, 100, 56]]


def test_threads_take_turns(either_llm):
    """Each gets its own outputs, and all end."""
    llm, expected = either_llm
    found: dict[int, list] = {}

    def work(i):
        found[i] = []
        for turn in range(3):
            prompts = PROMPTS[i:] if turn % 2 else PROMPTS[i : i + 2]
            if turn == 1:
                outputs = {}
                for output in llm.stream(prompts, GREEDY):
                    outputs.setdefault(int(output.request_id), []).extend(output.outputs[0].token_ids)
                found[i].append([outputs[key] for key in sorted(outputs)] == expected[i:])
            else:
                found[i].append(tokens_of(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected[i : i + 2])

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [True] * 3 for i in range(4)}


def test_params_changed_after_they_were_made_are_checked_again(either_llm):
    llm, expected = either_llm
    stream = llm.stream(PROMPTS[0], GREEDY)
    first = next(stream).outputs[0].token_ids
    for name, value in (("n", 0), ("temperature", float("nan")), ("max_tokens", "5"), ("top_p", 0.0), ("stop", 7)):
        params = SamplingParams(max_tokens=3)
        setattr(params, name, value)
        with pytest.raises(ValueError, match=rf"prompts\[0\]: {name} must be"):
            llm.generate([1], params, use_tqdm=False)
    params = SamplingParams(max_tokens=3)
    params.stop_token_ids = params.bad_words = None
    assert len(llm.generate([1], params, use_tqdm=False)[0].outputs[0].token_ids) <= 3
    assert first + [token for output in stream for token in output.outputs[0].token_ids] == expected[0]


@pytest.mark.parametrize(
    "num_outputs",
    [
        0,
        1,
        5,
    ],
)
def test_closing_a_stream_aborts_its_requests(either_llm, num_outputs):
    llm, expected = either_llm
    stream = llm.stream(PROMPTS, GREEDY)
    for _ in range(num_outputs):
        next(stream)
    stream.close()
    left = list(llm.engine.scheduler.requests)
    llm.engine.abort_requests(left)
    assert not left
    assert tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.fixture
def patience(monkeypatch):
    """patience(llm): let it do 300 steps, then raise, so that what hangs fails."""

    def limit(llm):
        step, left = llm.engine.step, iter(range(300))

        def limited_step():
            if next(left, None) is None:
                raise TimeoutError("300 steps")
            return step()

        monkeypatch.setattr(llm.engine, "step", limited_step)

    return limit


@pytest.mark.parametrize("other", ["stream", "generate"])
def test_calls_do_not_eat_each_other_s_outputs(either_llm, patience, other):
    """A stream that is read while another, or a generate, runs."""
    llm, expected = either_llm
    patience(llm)
    stream = llm.stream(PROMPTS[0], GREEDY)
    tokens = list(next(stream).outputs[0].token_ids)
    if other == "stream":
        assert sum((o.outputs[0].token_ids for o in llm.stream(PROMPTS[1], GREEDY)), []) == expected[1]
    else:
        assert tokens_of(llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)) == [expected[1]]
    for output in stream:
        tokens += output.outputs[0].token_ids
    assert tokens == expected[0]


@pytest.mark.parametrize("how", ["abort", "shutdown"])
def test_a_stream_ends_when_its_requests_do(tiny, patience, how):
    with make(tiny("mha")) as llm:
        patience(llm)
        stream = llm.stream(PROMPTS[0], GREEDY)
        request_id = next(stream).request_id
        if how == "abort":
            llm.engine.abort_requests([request_id])
        else:
            llm.shutdown()
        assert all(output.outputs[0].finish_reason == "abort" for output in stream)


# ---- several


def test_two_llms_at_once_do_not_disturb_each_other(tiny, greedy):
    """Of the same shapes, with other weights, and the same slots and blocks for other requests."""
    prompts = {"mha": [[1, 2, 3], list(range(30))], "bias": [list(range(40)), [4, 5]]}
    params = SamplingParams(temperature=0, max_tokens=20)
    found = {}
    with make(tiny("mha")) as first, make(tiny("bias"), dtype=torch.float32) as second:
        streams = {name: llm.stream(prompts[name], params) for name, llm in (("mha", first), ("bias", second))}
        while streams:
            for name, stream in list(streams.items()):
                output = next(stream, None)
                if output is None:
                    del streams[name]
                else:
                    found.setdefault((name, output.request_id), []).extend(output.outputs[0].token_ids)
    for name in prompts:
        assert [found[name, "0"], found[name, "1"]] == greedy(tiny(name), prompts[name], 20)


def test_shutdown_and_another_llm(tiny):
    first = make(tiny("mha"))
    expected = tokens_of(first.generate(PROMPTS, GREEDY, use_tqdm=False))
    first.shutdown()
    first.shutdown()
    for call in (first.generate, first.stream):
        with pytest.raises(ValueError, match="was shut down"):
            call(PROMPTS, GREEDY)
    with make(tiny("mha")) as second:
        assert tokens_of(second.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_dummy_weights_need_only_a_config(tiny, tmp_path):
    shutil.copy(Path(tiny("mha")) / "config.json", tmp_path)
    outputs = []
    for seed in (0, 0, 1):
        with make(str(tmp_path), load_format="dummy", seed=seed) as llm:
            outputs.append(tokens_of(llm.generate(PROMPTS, GREEDY, use_tqdm=False)))
    assert outputs[0] == outputs[1] != outputs[2]


# ---- the rules of the house

PACKAGE = Path(minivllm.__file__).parent


def imports_of(folder):
    """(file, module imported) for every import in the folder, also inside functions."""
    for file in sorted((PACKAGE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, "relative imports hide what is imported"
                yield from ((file.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_the_engine_imports_no_torch():
    below = ("torch", "triton", *(f"minivllm.{name}" for name in ("runner", "models", "layers", "backends", "kernels")))
    bad = [(file, name) for file, name in imports_of("engine") if f"{name}.".startswith(tuple(f"{b}." for b in below))]
    assert bad == []
    code = "import sys, minivllm.engine.engine; sys.exit('torch' in sys.modules)"
    path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}).returncode == 0


def test_the_runner_schedules_nothing():
    from_engine = {name for _, name in imports_of("runner") if name.startswith("minivllm.engine")}
    assert from_engine and all(name.startswith("minivllm.engine.batch.") for name in from_engine)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (6, 2, 20), (4, 1, 64)])
def test_attention_is_softmax_of_scaled_products(heads, kv_heads, head_dim):
    """In float64, by the definition: the scale 1 / √head_dim is applied, and once.  One row is prefilled, then decodes;
    another is prefilled in two chunks."""
    torch.manual_seed(0)
    hidden, block_size, lengths, first = 48, 16, (38, 45), (37, 20)
    shape = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    config = ModelConfig.from_hf(
        dict(vocab_size=9, hidden_size=hidden, intermediate_size=9, num_hidden_layers=1, **shape)
    )
    device = torch.device("cpu")
    layer = Attention(config, 0, make_backend("torch"), torch.float32, device)
    weights = {name: view.normal_(0, 0.3) for part in (layer.qkv_proj, layer.o_proj)
               for name, view in part.targets("o_proj" if part is layer.o_proj else "x.qkv").items()}  # fmt: skip
    cos_sin = rope_table(config.rope, head_dim, 64, device)
    caches = tuple(torch.full((9, block_size, kv_heads, head_dim), 1e4) for _ in range(2))  # poisoned
    tables = torch.tensor([[7, 2, 5], [3, 8, 1]], dtype=torch.int32)
    inputs = [torch.randn(length, hidden) for length in lengths]

    def forward(ranges):
        """One step that computes tokens [begin, end) of each row.  [tokens, hidden]"""
        positions = torch.cat([torch.arange(begin, end) for begin, end in ranges])
        rows = torch.cat([torch.full((end - begin,), row) for row, (begin, end) in enumerate(ranges)])
        counts = [end - begin for begin, end in ranges]
        batch = ForwardBatch(
            token_ids=torch.zeros(len(rows), dtype=torch.int32),
            positions=positions.int(),
            slot_mapping=tables[rows, positions // block_size].long() * block_size + positions % block_size,
            block_tables=tables,
            seq_lens=torch.tensor([end for _, end in ranges], dtype=torch.int32),
            num_decodes=int(counts[0] == 1),
            query_start_loc=torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32),
            host_seq_lens=[end for _, end in ranges],
            host_query_start_loc=[0, counts[0], sum(counts)],
        )
        x = torch.cat([inputs[row][begin:end] for row, (begin, end) in enumerate(ranges)])
        return layer(x, cos_sin, caches, batch).split(counts)

    steps = [forward(list(zip((0, 0), first, strict=True))), forward(list(zip(first, lengths, strict=True)))]
    for row, x in enumerate(inputs):
        q, k, v = (
            (x.double() @ weights[f"x.{name}_proj.weight"].double().T).view(len(x), -1, head_dim) for name in "qkv"
        )
        angles = torch.arange(len(x)).double()[:, None] / 10000 ** (torch.arange(0, head_dim, 2).double() / head_dim)
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        q, k = (turn * torch.complex(*x.chunk(2, -1)) for x in (q, k))
        q, k = (torch.cat([x.real, x.imag], -1) for x in (q, k))
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
        scores.masked_fill_(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
        assert scores.softmax(-1)[:, -1].amax() > 0.2, "else the scale would hardly matter"
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ weights["o_proj.weight"].double().T
        found = torch.cat([step[row] for step in steps])
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
