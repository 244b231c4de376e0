"""Tensor parallelism on GPUs that see each other's memory: the tokens of one GPU, eager and in CUDA graphs."""

import contextlib
import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.runner.executor import WorkerError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
GREEDY = dict(temperature=0.0, ignore_eos=True)
OPTIONS = dict(skip_tokenizer_init=True, block_size=16, kv_cache_memory_bytes=1 << 22)
PLAIN = SamplingParams(max_tokens=2, **GREEDY)
NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)
FOUR = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")


def prompts(count, length=40):
    return [[(7 * i + 3 * j) % 150 for j in range(1 + (i * 11) % length)] for i in range(count)]


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    ("name", "eager", "size"),
    [
        ("mha", True, 2),
        ("mha", False, 2),
        ("gqa-tied", False, 2),
        ("bias", False, 2),
        ("phi3-longrope", False, 2),
        ("gemma3", False, 2),
        pytest.param("mha", True, 4, marks=FOUR),
        pytest.param("gqa-tied", False, 4, marks=FOUR),
        pytest.param("gemma3", False, 4, marks=FOUR),
    ],
)
def test_parity(tiny, greedy, name, eager, size):
    """Few rows, as many as large graphs of mixed steps have, and thousands."""
    few, some, many = prompts(9), prompts(20, 200), prompts(40, 200)
    assert 1408 < sum(map(len, some)) <= 2048 < sum(map(len, many))
    options = dict(dtype="float32", enforce_eager=eager, max_model_len=256, **OPTIONS)
    with LLM(tiny(name), tensor_parallel_size=size, **options) as llm:
        for batch in (few, some, many):
            llm.reset_prefix_cache()
            found = llm.generate(batch, SamplingParams(max_tokens=12, **GREEDY), use_tqdm=False)
            assert [row[0] for row in tokens(found)] == greedy(tiny(name), batch, 12)
        llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=FOUR)])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
def test_same_tokens_with_everything_on(tiny, eager, size):
    params = [
        SamplingParams(temperature=1.2, seed=5, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.2, seed=6, top_k=20, top_p=0.9, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=3, prompt_logprobs=1, max_tokens=30),
        SamplingParams(temperature=0.7, seed=2, n=2, max_tokens=20, logit_bias={3: 5.0}),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=[3]),  # drafted for
    ]
    found = []
    for count in (1, size):
        with LLM(
            tiny("gqa-tied"), tensor_parallel_size=count, dtype="float32", enforce_eager=eager, block_size=16,
            skip_tokenizer_init=True, kv_cache_memory_bytes=12 * 2 * 3 * 16 * 2 * 16 * 4 // min(count, 2),
            max_num_batched_tokens=24, max_num_seqs=6, speculative_config=NGRAM,
        ) as llm:  # fmt: skip
            found.append(llm.generate(prompts(10), params * 2, use_tqdm=False))
            stats = llm.engine.scheduler.stats
            assert stats.num_preemptions > 0 and stats.num_accepted_tokens > 0
            llm.engine.scheduler.check_integrity()
    assert tokens(found[0]) == tokens(found[1])
    for one, two in zip(*found, strict=True):
        assert one.outputs[0].cumulative_logprob == pytest.approx(two.outputs[0].cumulative_logprob, abs=1e-3)


@FOUR
def test_large_steps_in_graphs_after_one_that_wants_all_outputs(tiny):
    """Messages in graphs have fixed flags, which other steps must leave as they were."""
    batch = prompts(40, 200)
    asking = [SamplingParams(max_tokens=2, prompt_logprobs=1, **GREEDY) if i > 5 else PLAIN for i in range(40)]
    found = []
    for size in (1, 4):
        with LLM(tiny("mha"), tensor_parallel_size=size, dtype="float32", **OPTIONS) as llm:
            for params in (asking, PLAIN, asking, PLAIN):
                llm.reset_prefix_cache()
                found.append(tokens(llm.generate(batch, params, use_tqdm=False)))
    assert found[:4] == found[4:]


def test_bfloat16_logprobs_are_near(tiny):
    found = []
    for size in (1, 2):
        with LLM(tiny("mha"), tensor_parallel_size=size, dtype="bfloat16", **OPTIONS) as llm:
            params = SamplingParams(max_tokens=1, prompt_logprobs=0, **GREEDY)
            outputs = llm.generate([prompt for prompt in prompts(20, 200) if len(prompt) > 1], params, use_tqdm=False)
            values = [next(iter(one.values())).logprob for o in outputs for one in o.prompt_logprobs if one]
            found.append(torch.tensor(values))
    assert (found[0] - found[1]).norm() / found[0].norm() < 2e-2


def workers():
    out = subprocess.run(["pgrep", "-f", "minivllm.runner.worker"], capture_output=True, text=True).stdout
    return [int(pid) for pid in out.split()]


@contextlib.contextmanager
def error_within_seconds(delay):
    """Kill a worker after `delay` seconds, which must be an error soon, and leave none of them."""
    killed = []

    def kill():
        os.kill(workers()[-1], signal.SIGKILL)
        killed.append(time.monotonic())

    timer = threading.Timer(delay, kill)
    timer.start()
    try:
        with pytest.raises(WorkerError, match="has ended with status -9"):
            yield
        assert time.monotonic() - killed[0] < 6 and not workers()
    finally:
        timer.cancel()
        timer.join()


def test_a_worker_killed_while_it_starts_is_an_error_within_seconds(tiny):
    """While it loads, compiles, measures its memory or captures graphs."""
    options = OPTIONS | dict(tensor_parallel_size=2, dtype="bfloat16", max_num_seqs=256)
    for _ in range(2):  # the first one compiles
        start = time.monotonic()
        LLM(tiny("mha"), **options).shutdown()
        seconds = time.monotonic() - start
    for share in (0.25, 0.45, 0.65, 0.8):
        with error_within_seconds(share * seconds):
            LLM(tiny("mha"), **options)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_worker_killed_while_it_computes_is_an_error_within_seconds(tiny, phase):
    batch, num_tokens = (prompts(60, 250), 1) if phase == "prefill" else (prompts(9), 200)
    with (
        LLM(tiny("mha"), tensor_parallel_size=2, dtype="bfloat16", **OPTIONS) as llm,
        error_within_seconds(0.5),
    ):
        while True:
            llm.reset_prefix_cache()
            llm.generate(batch, SamplingParams(max_tokens=num_tokens, **GREEDY), use_tqdm=False)
