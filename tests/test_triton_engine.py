"""The whole engine through the Triton backend, in the interpreter: the same tokens as through torch."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from minivllm import LLM, SamplingParams
from minivllm.backends import make_backend
from minivllm.model_config import ModelConfig
from minivllm.runner import warm_up
from minivllm.runner.cuda_graph import graph_sizes

PROMPTS = [[(7 * i + j) % 150 for j in range(n)] for i, n in enumerate([3, 16, 33, 1])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py does this for real")
@pytest.mark.parametrize(
    "name", ["gqa-tied", "odd-head-dim", "mistral-window", "qwen2-windows", "qwen3", "gemma2", "gemma3"]
)
def test_same_tokens_as_torch(tiny, name):
    params = [SamplingParams(temperature=t, max_tokens=6, seed=i) for i, t in enumerate([0.0, 0.0, 1.0, 0.0])]
    tokens = {}
    for backend in ("torch", "triton"):
        with LLM(
            tiny(name), backend=backend, skip_tokenizer_init=True, block_size=16, max_num_batched_tokens=40,
            kv_cache_memory_bytes=1 << 20,
        ) as llm:  # fmt: skip
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            tokens[backend] = [output.outputs[0].token_ids for output in outputs]
    assert tokens["triton"] == tokens["torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs one kernel at a time; test_gpu.py counts")
@pytest.mark.parametrize("changes", [{}, dict(qk_norm=True, sliding_windows=(None, 9))], ids=str)
def test_warm_up_runs(monkeypatch, changes):
    """It reaches every kernel, and no input of its own making is one that a kernel trips over."""
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)
    config = replace(ModelConfig.from_hf(shape), **changes)
    launched = set()
    original = InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (launched.add(self.fn.__name__), original(self, *a, **k))[1]
    )
    monkeypatch.setattr(warm_up, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    caches = torch.zeros(2, 1, 64, config.num_key_value_heads, config.head_dim).unbind()
    warm_up.compile_kernels(make_backend("triton"), config, torch.float32, caches, 4)
    expected = [
        "_prefill",
        "_decode",
        "_reduce",
        "_plan",
        "_plan_settled",
        "_sample_split",
        "_sample_pick",
        "_truncate",
        "_rms_norm",
        "_activate_and_mul",
        "_rope_kv",
    ]
    assert launched == {f"{name}_kernel" for name in expected}  # float32 leaves products to cuBLAS


@pytest.mark.parametrize("fails", [None, "compiling", "the block"])
def test_the_block_runs_while_kernels_are_compiled(monkeypatch, fails):
    """Each waits for the other at the end, also for one that fails, and the error of either comes out."""
    begun, goes_on, done = threading.Event(), threading.Event(), []

    def compile_kernels(*arguments):
        assert arguments == (1, 2, 3, 4, 5)
        begun.set()
        assert goes_on.wait(10)
        done.append(arguments)
        if fails == "compiling":
            raise RuntimeError(fails)

    monkeypatch.setattr(warm_up, "compile_kernels", compile_kernels)
    expected = pytest.raises(RuntimeError, match=fails) if fails else nullcontext()
    with expected, warm_up.kernels_compiled_meanwhile(1, 2, 3, 4, 5):
        assert begun.wait(10) and not done
        goes_on.set()
        if fails == "the block":
            raise RuntimeError(fails)
    assert done


@pytest.mark.parametrize("most", [1, 7, 64, 100, 256, 600])
def test_graphs_fit_every_batch_with_little_padding(most):
    sizes = graph_sizes(most)
    assert sizes == sorted({*sizes}) and sizes[-1] == most
    assert not {240, 288, 448}.intersection(sizes), "these take products as long as larger ones"
    bounds = {8: 4, 64: 8, 224: 16, 256: 32, 384: 64, 600: 128}
    for rows in range(1, most + 1):
        padding = next(size for size in sizes if size >= rows) - rows
        assert padding < next(bound for limit, bound in bounds.items() if rows <= limit)
