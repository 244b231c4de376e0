"""Tensor parallelism, on CPUs: the tokens of one worker, and nothing left behind when a worker is lost."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minivllm import LLM, SamplingParams, child_process
from minivllm.async_llm import AsyncLLM, EngineDeadError
from minivllm.loading.weights import fill_dummy, load_weights
from minivllm.parallel import Parts, Share, TensorParallel
from minivllm.runner import executor
from minivllm.runner.cuda_graph import mixed_graph_sizes
from minivllm.runner.executor import WorkerError

PROMPTS = [[1 + i, 2, 3 + 2 * i, 4] * (2 + 3 * (i % 4)) for i in range(9)]
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
OPTIONS = dict(device="cpu", skip_tokenizer_init=True, block_size=16)
NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)


@pytest.fixture
def start_workers(tmp_path, monkeypatch):
    """start_workers(code): workers run this first; returns a list of all those that are started."""

    def prepare(code):
        (tmp_path / "changed_worker.py").write_text(
            "import os, signal, time\n"
            "from minivllm.runner.model_runner import ModelRunner\n"
            f"from minivllm.runner.worker import main\n{code}"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        processes = []

        def start(module, *arguments, start_process=executor.start_process):
            process, connection = start_process("changed_worker", *arguments)
            processes.append(process.pid)
            return process, connection

        monkeypatch.setattr(executor, "start_process", start)
        return processes

    return prepare


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def pids(llm):
    return [process.pid for process in llm._executor._processes]


def are_gone(processes, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = []
        for pid in processes:
            try:
                with open(f"/proc/{pid}/stat") as file:
                    if file.read().rsplit(")")[1].split()[0] != "Z":
                        alive.append(pid)
            except FileNotFoundError:
                pass
        if not alive:
            return True
        time.sleep(0.02)
    return False


# Of the tiny checkpoints: 4 query heads, and as many, 2 or 1 KV heads, so that some are cut and some are shared.
@pytest.mark.parametrize(
    ("name", "size"),
    [("mha", 2), ("gqa-tied", 4), ("bias", 2), ("phi3-longrope", 2), ("gemma2", 2), ("gemma3", 2), ("qwen3", 4)],
)
def test_same_tokens(tiny, greedy, name, size):
    folder = tiny(name)
    expected = greedy(folder, PROMPTS, 20)
    with LLM(folder, tensor_parallel_size=size, max_model_len=256, **OPTIONS) as llm:
        assert [row[0] for row in tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))] == expected
        again = llm.generate(PROMPTS, GREEDY, use_tqdm=False)  # out of the prefix cache
        assert [row[0] for row in tokens(again)] == expected and any(output.num_cached_tokens for output in again)


def test_workers_without_logits(tiny):
    """Of a vocabulary of 5 tokens the first three of four workers have two, two and one."""
    options = OPTIONS | dict(load_format="dummy", hf_overrides=dict(vocab_size=5))
    with LLM(tiny("mha"), tensor_parallel_size=4, **options) as llm:
        (found,) = tokens(llm.generate([1, 2, 3], GREEDY, use_tqdm=False))[0]
    assert len(found) == 20 and set(found) <= set(range(5))


@pytest.mark.parametrize("num_tokens", [8, 100, 2048, 2100, 5001, 8192, 131_072])
def test_graphs_of_large_steps_are_for_many_workers_and_few(num_tokens):
    for size in (1, 2, 3, 4):
        sizes = mixed_graph_sizes(num_tokens, size)
        assert sizes == sorted(set(sizes)) and max(sizes, default=0) <= num_tokens and len(sizes) < 32
        assert max(sizes, default=0) <= 2048 or size > 2
        assert num_tokens < 2048 or size <= 2 or sizes[-1] == num_tokens


def test_steps_of_fewer_tokens_than_workers(tiny, greedy, start_workers):
    """Where norms exchange fewer too: no worker is left without a row of its own."""
    start_workers(FEW_ROWS.format(1))
    options = OPTIONS | dict(backend="triton", max_num_batched_tokens=8, max_num_seqs=2, kv_cache_memory_bytes=1 << 20)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    with LLM(tiny("mha"), tensor_parallel_size=4, **options) as llm:
        assert tokens(llm.generate([1, 2, 3], params, use_tqdm=False))[0] == greedy(tiny("mha"), [[1, 2, 3]], 2)


def test_same_tokens_with_everything_on(tiny):
    """Sampling, penalties, logprobs, n, chunks, preemption, drafts: with two workers as with one."""
    params = [
        SamplingParams(temperature=1.2, seed=5, top_k=20, top_p=0.9, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=3, prompt_logprobs=1, max_tokens=30),
        SamplingParams(temperature=0.7, seed=2, n=2, max_tokens=20, logit_bias={3: 5.0}),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=[3, 5, 62]),
    ]
    prompts = PROMPTS[:8]
    options = OPTIONS | dict(max_num_batched_tokens=24, max_num_seqs=6, speculative_config=NGRAM)
    found = []
    for size in (1, 2):
        per_block = 2 * 3 * 16 * 2 * 16 * 4 // size  # of K and V, 3 layers, 2 heads of 16
        with LLM(tiny("gqa-tied"), tensor_parallel_size=size, kv_cache_memory_bytes=12 * per_block, **options) as llm:
            outputs = llm.generate(prompts, params * 2, use_tqdm=False)
            stats = llm.engine.scheduler.stats
            assert llm.engine.scheduler.block_manager.num_blocks == 12
            assert stats.num_preemptions > 0 and stats.num_accepted_tokens > 0
            llm.engine.scheduler.check_integrity()
            found.append(outputs)
    assert tokens(found[0]) == tokens(found[1])
    for one, two in zip(*found, strict=True):
        first, second = one.outputs[0].cumulative_logprob, two.outputs[0].cumulative_logprob
        assert first == pytest.approx(second, abs=1e-3)


@pytest.mark.parametrize(("name", "size"), [("gqa-tied", 2), ("gemma3", 2)])
def test_kernels_exchange_sums_and_tokens(tiny, name, size):
    """Through Triton's interpreter, where norms add up and sampling chooses among the workers: as one worker does."""
    params = [SamplingParams(temperature=t, max_tokens=5, seed=i, ignore_eos=True) for i, t in enumerate([0, 1, 0, 1])]
    params[2].logprobs, params[3].top_k = 2, 5  # these need all logits, in steps beside those that do not
    params[2].max_tokens, params[3].max_tokens = 3, 2
    found = []
    for backend, workers in (("torch", 1), ("triton", size)):  # the second in steps of rows shared out, or not
        options = dict(backend=backend, max_num_batched_tokens=40, max_num_seqs=4, tensor_parallel_size=workers)
        with LLM(tiny(name), kv_cache_memory_bytes=1 << 20, **options, **OPTIONS) as llm:
            outputs = llm.generate(PROMPTS[1:5], params, use_tqdm=False)
            found.append((tokens(outputs), [sorted(step) for step in outputs[2].outputs[0].logprobs]))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "size", "quantization"), [("bias", 4, None), ("gemma2", 2, "fp8")])
def test_workers_share_out_the_rows_of_large_steps(tiny, name, size, quantization, start_workers):
    """Steps of more tokens than norms exchange by themselves, with all of a prompt's outputs wanted, or the last one's:
    as workers do that add up through a library."""
    start_workers(FEW_ROWS.format(16))
    batch = [[(7 * i + 3 * j) % 150 for j in range(length)] for i, length in enumerate((37, 35))]
    params = [SamplingParams(temperature=0, max_tokens=2, ignore_eos=True) for _ in batch]
    params[0].prompt_logprobs = 1  # of 36 tokens in one step
    found = []
    options = OPTIONS | dict(max_num_batched_tokens=38, max_num_seqs=4, quantization=quantization)
    for backend in ("torch", "triton"):
        with LLM(
            tiny(name), backend=backend, tensor_parallel_size=size, kv_cache_memory_bytes=1 << 20, **options
        ) as llm:
            found.append(llm.generate(batch, params, use_tqdm=False))
    assert tokens(found[0]) == tokens(found[1])
    for one, two in zip(*(outputs[0].prompt_logprobs[1:] for outputs in found), strict=True):
        assert {i: one[i].logprob for i in one} == pytest.approx({i: two[i].logprob for i in two}, abs=1e-4)


def test_gguf_and_dummy_weights(embedded, tmp_path):
    """Sources other than safetensors reach the workers; the embedded model has 3 KV heads."""
    with LLM(embedded, device="cpu", tensor_parallel_size=3, max_model_len=128, kv_cache_memory_bytes=1 << 26) as llm:
        text = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
        assert "Paris" in text[0].outputs[0].text
    with LLM(embedded, device="cpu", tensor_parallel_size=3, max_model_len=128, load_format="dummy") as llm:
        assert len(llm.generate("Hi", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 20


def test_what_cannot_be_cut_is_refused(tiny):
    for size, message in ((3, "attention heads"), (8, "attention heads")):
        with pytest.raises(ValueError, match=rf"tensor_parallel_size \({size}\) must divide the model's {message}"):
            LLM(tiny("mha"), tensor_parallel_size=size, **OPTIONS)
    with pytest.raises(ValueError, match="no memory is left for the KV cache"):
        LLM(tiny("mha"), tensor_parallel_size=2, kv_cache_memory_bytes=1, **OPTIONS)


def test_shares():
    assert [Share(i, 3).of(9, start=2) for i in range(3)] == [slice(2, 5), slice(5, 8), slice(8, 11)]
    assert [TensorParallel(rank, 4).kv_share(2) for rank in range(4)] == [
        Share(0, 2),
        Share(0, 2),
        Share(1, 2),
        Share(1, 2),
    ]
    assert [list(TensorParallel(rank, 3).vocab_range(7)) for rank in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [len(TensorParallel(rank, 4).vocab_range(5)) for rank in range(4)] == [2, 2, 1, 0]


class Source:
    def shapes(self):
        return {"w": (4, 6)}

    def tensors(self):
        yield "w", torch.arange(24.0).view(4, 6)


def test_parts_of_a_tensor():
    left, low = torch.zeros(4, 2), torch.zeros(1, 6)
    columns, rows = (slice(None), slice(2, 4)), (slice(3, 4), slice(None))
    load_weights({"w": Parts((4, 6), ((columns, left), (rows, low)))}, Source())
    assert left[1].tolist() == [8, 9] and low[0].tolist() == [18, 19, 20, 21, 22, 23]
    with pytest.raises(ValueError, match=r"\[4, 6\] in the checkpoint and \[4, 5\] in the model"):
        load_weights({"w": Parts((4, 5), ())}, Source())
    first, second = torch.zeros(3, 2), torch.zeros(3, 2)
    fill_dummy({"a": first}, 1)
    fill_dummy({"b": torch.zeros(5), "a": Parts((6, 2), ((columns, second),))}, 1)
    assert not torch.equal(first, torch.zeros(3, 2)), "drawn"


FEW_ROWS = "from minivllm.runner import worker; worker.SENT_ROWS = {}"
FAULT = """
execute = ModelRunner.execute
def faulty(self, batch):
    if self.tp.rank == 1 and batch.num_computed == [3]:
        {}
    return execute(self, batch)
ModelRunner.execute = faulty
"""


def mishap(*_):
    raise RuntimeError("a mishap")


@pytest.mark.parametrize(
    ("fault", "message", "seconds"),
    [
        ("raise RuntimeError('a mishap in the second worker')", "a mishap in the second worker", 5),
        ("time.sleep(60)", "no worker has answered for 2 s", 6),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"worker 1 has ended with status -9 \(killed", 5),
    ],
)
def test_a_lost_worker_is_an_error_within_seconds(tiny, start_workers, fault, message, seconds):
    processes = start_workers(FAULT.format(fault))
    with LLM(tiny("mha"), tensor_parallel_size=2, distributed_timeout_seconds=2, **OPTIONS) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=message):
            llm.generate([1, 2], GREEDY, use_tqdm=False)
        assert time.monotonic() - start < seconds
        assert len(processes) == 2 and are_gone(processes)
        with pytest.raises(WorkerError):
            llm.generate([1], GREEDY, use_tqdm=False)


def test_a_worker_that_does_not_read_is_an_error_within_seconds(tiny):
    """Of a step's message of more than a connection takes unread."""
    options = OPTIONS | dict(max_num_batched_tokens=65536, distributed_timeout_seconds=2)
    with LLM(tiny("mha"), tensor_parallel_size=2, **options) as llm:
        llm.generate([1], GREEDY, use_tqdm=False)
        processes = pids(llm)
        with socket.socket(fileno=os.dup(llm._executor._connections[1].fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        os.kill(processes[1], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerError, match="no worker has answered for 2 s"):
            llm.generate([[i % 100] * 200 for i in range(200)], GREEDY, use_tqdm=False)
        assert time.monotonic() - start < 6 and are_gone(processes)


def test_a_step_in_flight_when_the_workers_are_ended_is_an_error(tiny):
    with LLM(tiny("mha"), tensor_parallel_size=2, async_scheduling=True, **OPTIONS) as llm:
        engine = llm.engine
        engine.add_request("a", [1, 2], GREEDY)
        engine.step()
        llm._executor.shutdown()
        with pytest.raises(WorkerError, match="the executor was shut down"):
            engine.step()


def test_a_worker_that_hangs_while_it_gets_ready_is_an_error(tiny, start_workers, monkeypatch):
    processes = start_workers("ModelRunner.make_ready = lambda self: time.sleep(60)")
    monkeypatch.setattr(executor, "READY_SECONDS", 1)
    with pytest.raises(WorkerError, match="no worker has answered for 2 s"):
        LLM(tiny("mha"), tensor_parallel_size=2, distributed_timeout_seconds=2, **OPTIONS)
    assert len(processes) == 2 and are_gone(processes)


def draw_and_tell(file, token_ids, logits):
    with open(file, "a") as told:
        told.write(f"{os.getpid()}\n")
    if token_ids and len(token_ids) == 5:
        raise RuntimeError("a mishap")
    return torch.randn_like(logits)


def favour_a_far_one(token_ids, logits):
    logits[(37 * len(token_ids)) % len(logits)] += 3.0
    return logits


class Counter:
    """Remembers how often it was called."""

    count = 0

    def __call__(self, token_ids, logits):
        self.count += 1
        logits[self.count] += 1000.0
        return logits


@pytest.mark.parametrize("function", [favour_a_far_one, Counter])
def test_what_a_function_changes_is_changed_for_all_workers(tiny, function):
    found = []
    for size in (1, 2):
        params = [SamplingParams(max_tokens=20, temperature=0, ignore_eos=True) for _ in PROMPTS]
        for one in params:
            one.logits_processors = [function() if function is Counter else function]
        with LLM(tiny("mha"), tensor_parallel_size=size, **OPTIONS) as llm:
            found.append(tokens(llm.generate(PROMPTS, params, use_tqdm=False)))
            plain = tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert found[0] == found[1] != plain


def test_functions_are_called_by_one_worker_and_what_they_raise_is_their_request_s(tiny, tmp_path):
    file = str(tmp_path / "told")
    with LLM(tiny("mha"), tensor_parallel_size=2, **OPTIONS) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        other = llm.stream(PROMPTS[:1], GREEDY)
        found = next(other).outputs[0].token_ids
        drawn = SamplingParams(max_tokens=9, temperature=0, logits_processors=[partial(draw_and_tell, file)])
        with pytest.raises(ValueError, match="(?s)logits_processors: .*RuntimeError: a mishap"):
            llm.generate([1, 2], drawn, use_tqdm=False)
        assert Path(file).read_text().split() == [str(pids(llm)[0])] * 6
        assert [found + [token for output in other for token in output.outputs[0].token_ids]] == expected[0]
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_functions_that_workers_cannot_import_are_refused(tiny, monkeypatch):
    def of_the_script(token_ids, logits):
        return logits

    of_the_script.__module__, of_the_script.__qualname__ = "__main__", "of_the_script"
    monkeypatch.setattr(sys.modules["__main__"], "of_the_script", of_the_script, raising=False)
    with LLM(tiny("mha"), tensor_parallel_size=2, **OPTIONS) as llm:
        for function in (lambda token_ids, logits: logits, of_the_script):
            with pytest.raises(ValueError, match=r"logits_processors: .* has to run in another process"):
                llm.generate([1], SamplingParams(logits_processors=[function]), use_tqdm=False)
        assert llm.generate([1], GREEDY, use_tqdm=False)


def test_an_abandoned_step_leaves_no_answer_behind(tiny, monkeypatch):
    with LLM(tiny("gqa-tied"), tensor_parallel_size=2, async_scheduling=True, **OPTIONS) as llm:
        expected = tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
        outputs = llm.stream(PROMPTS[:1], GREEDY)
        next(outputs)  # the next step is in flight
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a mishap"):
            patch.setattr(llm._executor, "execute", mishap)
            llm.generate([1], GREEDY, use_tqdm=False)
        outputs.close()
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_every_waiting_caller_hears_of_it_and_engines_do_not_disturb_each_other(tiny):
    async def last(outputs):
        async for output in outputs:
            final = output
        return final

    options = OPTIONS | dict(tensor_parallel_size=2)
    with AsyncLLM(tiny("mha"), **options) as llm, LLM(tiny("gqa-tied"), **options) as other:

        async def run():
            long = SamplingParams(max_tokens=200, ignore_eos=True)
            waiting = [asyncio.ensure_future(last(llm.generate(prompt, long))) for prompt in PROMPTS]
            await asyncio.sleep(0.3)
            children = subprocess.run(["pgrep", "-P", str(llm._process.pid)], capture_output=True, text=True).stdout
            workers = [int(pid) for pid in children.split()]
            assert len(workers) == 2
            os.kill(workers[1], signal.SIGKILL)
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(result, EngineDeadError) for result in results)
            assert "worker 1 has ended with status -9" in str(results[0])
            assert are_gone(workers)

        asyncio.run(run())
        assert len(tokens(other.generate(PROMPTS, GREEDY, use_tqdm=False))) == len(PROMPTS)


def test_a_worker_that_ends_while_there_are_no_requests_is_noticed(tiny):
    with AsyncLLM(tiny("mha"), tensor_parallel_size=2, **OPTIONS) as llm:
        children = subprocess.run(["pgrep", "-P", str(llm._process.pid)], capture_output=True, text=True).stdout
        assert not llm.errored
        os.kill(int(children.split()[1]), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not llm.errored:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "has ended with status -9" in str(llm.dead_error())


def test_time_in_which_all_processes_are_stopped_does_not_count(monkeypatch):
    class Connection:
        def recv(self):
            return "done", 5

    def waits(*seconds):
        """Let waiting take so long, or as long as it may (0); the worker answers after the last."""
        now, left = [0.0], list(seconds)

        def wait(connections, timeout):
            if not left:
                return connections
            assert timeout <= 1
            now[0] += left.pop(0) or timeout
            return []

        monkeypatch.setattr(executor, "time", SimpleNamespace(monotonic=lambda: now[0]))
        monkeypatch.setattr(executor, "wait", wait)
        waiting = executor.WorkersExecutor.__new__(executor.WorkersExecutor)
        waiting._answers, waiting._connections, waiting._processes = [deque()], [Connection()], []
        waiting._fail = lambda reason: (_ for _ in ()).throw(WorkerError(reason))
        return waiting._answer(0, 3.5)

    assert waits(0, 100, 0) == 5
    with pytest.raises(WorkerError, match="no worker has answered"):
        waits(0, 0, 0, 0)


def listening():
    """Addresses and ports of this host, in hexadecimal."""
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    return {line[1] for line in lines if line[3] == "0A"}


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="needs /proc")
def test_workers_meet_where_no_other_host_gets(tiny):
    with LLM(tiny("mha"), tensor_parallel_size=2, **OPTIONS) as llm:
        port = f":{llm._executor._store.port:04X}"
        assert [place for place in listening() if place.endswith(port)] == ["0100007F" + port]
        llm.shutdown()
        assert not [place for place in listening() if place.endswith(port)]


def test_workers_find_what_the_engine_finds(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", ["/a", tmp_path, "", "/b"])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert child_process._module_path() == ["/a", str(tmp_path / "here"), "/b"]
    (tmp_path / "here").rmdir()
    assert child_process._module_path() == ["/a", "/b"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_engine(tiny, number):
    code = f"""
from minivllm import LLM, SamplingParams
llm = LLM({tiny("mha")!r}, tensor_parallel_size=2, **{OPTIONS!r})
print(*[process.pid for process in llm._executor._processes], flush=True)
while True:
    llm.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=200, ignore_eos=True), use_tqdm=False)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as p:
        workers = [int(pid) for pid in p.stdout.readline().split()]
        time.sleep(0.3)
        p.send_signal(number)
    assert len(workers) == 2 and are_gone(workers)
