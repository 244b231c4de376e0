"""On a GPU: parity with Hugging Face through Triton, CUDA graphs against eager, nothing compiled after warm-up."""

import json

import numpy as np
import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.runner.cuda_graph import StepGraphs
from minivllm.runner.step_inputs import StepInputs

pytestmark = pytest.mark.gpu
GREEDY = dict(temperature=0.0, ignore_eos=True)


def prompts(count, vocab=150):
    return [[(7 * i + 3 * j) % vocab for j in range(1 + (i * 11) % 40)] for i in range(count)]


def generate(llm, batch, params):
    return [output.outputs[0].token_ids for output in llm.generate(batch, params, use_tqdm=False)]


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
@pytest.mark.parametrize("name", ["mha", "gqa-tied", "bias", "odd-head-dim", "llama3-rope-sharded", "gemma2"])
def test_parity(tiny, greedy, name, eager):
    batch = prompts(9)
    with LLM(
        tiny(name), dtype="float32", skip_tokenizer_init=True, block_size=16, max_num_batched_tokens=64,
        max_num_seqs=9, kv_cache_memory_bytes=1 << 20, enforce_eager=eager,
    ) as llm:  # fmt: skip
        tokens = generate(llm, batch, SamplingParams(max_tokens=24, **GREEDY))
    assert tokens == greedy(tiny(name), batch, 24)


@pytest.mark.parametrize("num_blocks", [400, 20], ids=["ample", "preempting"])
def test_graph_equals_eager_bitwise(tiny, num_blocks):
    """bf16, every batch size up to max_num_seqs, greedy and drawn, and up to max_model_len; with preemptions too."""
    results = {}
    max_num_seqs, block_bytes = 17, 16 * 2 * 3 * 2 * 16 * 2
    for eager in (True, False):
        with LLM(
            tiny("gqa-tied"), dtype="bfloat16", skip_tokenizer_init=True, block_size=16, max_num_seqs=max_num_seqs,
            max_model_len=100, kv_cache_memory_bytes=num_blocks * block_bytes, enforce_eager=eager,
        ) as llm:  # fmt: skip
            assert llm.engine.executor.num_blocks == num_blocks
            results[eager] = []
            for size in range(1, max_num_seqs + 1):
                params = [SamplingParams(temperature=i % 2, ignore_eos=True, max_tokens=None) for i in range(size)]
                results[eager].append(generate(llm, prompts(size), params))
            preemptions = llm.engine.scheduler.stats.num_preemptions
            assert (preemptions > 0) == (num_blocks == 20)
            llm.engine.scheduler.check_integrity()
    assert results[True] == results[False]


def test_large_mixed_graphs_equal_eager_bitwise(tiny, monkeypatch):
    """Steps of 60 to 1,300 tokens: whole prompts, and behind them chunks and decodes."""
    replayed, original = set(), StepGraphs.replay

    def replay(self, kind, size):
        output = original(self, kind, size)
        if output is not None:
            replayed.add((kind, size))
        return output

    monkeypatch.setattr(StepGraphs, "replay", replay)
    batches = [[[(7 * i + 3 * j) % 150 for j in range(60 + 2 * i)] for i in range(size)] for size in (1, 3, 9, 17)]
    results = {}
    for eager in (True, False):
        results[eager] = []
        for budget in (8192, 700):
            with LLM(
                tiny("gqa-tied"), dtype="bfloat16", skip_tokenizer_init=True, block_size=16, max_num_seqs=17,
                max_model_len=100, kv_cache_memory_bytes=1 << 21, enforce_eager=eager, max_num_batched_tokens=budget,
                enable_prefix_caching=False,
            ) as llm:  # fmt: skip
                params = SamplingParams(max_tokens=4, **GREEDY)
                results[eager].append([generate(llm, batch, params) for batch in batches])
    assert results[True] == results[False]
    assert {size for kind, size in replayed if kind == "mixed"} >= {64, 192, 640, 1408}


@pytest.mark.parametrize("max_num_seqs", [8, 400])
def test_graphs_of_long_sums_equal_eager_bitwise(tmp_path, max_num_seqs):
    """Sums of more than 4,096 numbers: products whose bias of zeros the graphs share."""
    shape = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=4608,
        num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8, vocab_size=512, rms_norm_eps=1e-5,
        max_position_embeddings=512,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    batches = [[[(7 * i + 3 * j) % 500 for j in range(length)] for i in range(3)] for length in (30, 50, 80, 120)]
    batches.append([[i] for i in range(100)])
    results = {}
    for eager in (True, False):
        with LLM(
            str(tmp_path), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, max_num_seqs=max_num_seqs,
            kv_cache_memory_bytes=1 << 29, enforce_eager=eager, enable_prefix_caching=False,
        ) as llm:  # fmt: skip
            asked = SamplingParams(max_tokens=4, logprobs=1, **GREEDY)
            outputs = [llm.generate(batch, asked, use_tqdm=False) for batch in batches]
            results[eager] = [[one.outputs[0].logprobs for one in batch] for batch in outputs]
    assert results[True] == results[False]


def test_nothing_compiles_after_warm_up(tiny):
    from triton.runtime.jit import JITFunction

    compiled = []
    original = JITFunction._do_compile if hasattr(JITFunction, "_do_compile") else None
    if original is None:
        pytest.skip("this Triton has no hook to count compilations")
    with LLM(tiny("mha"), dtype="bfloat16", skip_tokenizer_init=True, max_num_seqs=20, max_model_len=200) as llm:
        JITFunction._do_compile = lambda self, *args, **kwargs: (
            compiled.append(self.fn.__name__),
            original(self, *args, **kwargs),
        )[1]
        try:
            for size in (1, 3, 8, 20):
                for params in (SamplingParams(**GREEDY), SamplingParams(top_k=5, min_tokens=3, max_tokens=5)):
                    generate(llm, prompts(size), params)
        finally:
            JITFunction._do_compile = original
    assert not compiled


def test_embedded_model_parity(embedded, greedy):
    """20 prompts × 64 tokens, and two past 2,048 tokens of context, through Triton in float32."""
    from test_parity import TEXTS

    with LLM(dtype="float32") as llm:
        tokenizer = llm.get_tokenizer()
        short = [tokenizer(text).input_ids for text in TEXTS[:20]]
        long = [(tokenizer(" ".join(TEXTS)).input_ids * 40)[:n] for n in (2100, 2300)]
        assert generate(llm, short, SamplingParams(max_tokens=64, **GREEDY)) == greedy(embedded, short, 64)
        assert generate(llm, long, SamplingParams(max_tokens=16, **GREEDY)) == greedy(embedded, long, 16)


def test_shutdown_frees_the_gpu(tiny):
    settings = dict(dtype="bfloat16", skip_tokenizer_init=True, max_num_seqs=4, gpu_memory_utilization=0.5)
    free = []
    for _ in range(2):
        llm = LLM(tiny("mha"), **settings)
        generate(llm, prompts(3), SamplingParams(**GREEDY))
        llm.shutdown()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] >= free[0] - (64 << 20)


def test_out_of_memory_says_what_to_lower(tiny):
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        LLM(tiny("mha"), skip_tokenizer_init=True, gpu_memory_utilization=0.001)


def test_inputs_wait_for_their_buffer():
    """More uploads at once than there are host buffers, the device being busy: none takes another's values."""
    inputs = StepInputs(1 << 22, torch.device("cuda"))
    torch.cuda._sleep(200_000_000)
    sums = [inputs.upload({"x": np.full(1 << 20, i, np.int32)})["x"].float().mean() for i in range(8)]
    assert [round(mean.item()) for mean in sums] == list(range(8))
