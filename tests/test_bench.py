"""bench.py: the workload is the one it says it is, the figures agree with each other, mistakes are one line."""

import gc
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import ON_GPU
from matplotlib.figure import Figure

from minivllm import LLM
from minivllm.argument_types import output_file, picture_file
from minivllm.bench import kernels, profile, throughput
from minivllm.bench.cli import COMMANDS, main
from minivllm.bench.result_file import save_picture, write_json
from minivllm.bench.workload import NANO, SHAPES, Workload, write_config
from minivllm.engine.batch import ScheduledBatch
from minivllm.model_config import ModelConfig

ROOT = Path(__file__).parents[1]

# ---- the workload


def test_nano_is_drawn_as_nano_vllm_does():
    r = random.Random(3)
    prompts = [[r.randint(0, 10000) for _ in range(r.randint(100, 1024))] for _ in range(256)]
    output_lens = [r.randint(100, 1024) for _ in range(256)]
    assert Workload(256, NANO, NANO, 0.6, seed=3).draw(32000) == (prompts, output_lens)


def test_fixed_lengths_draw_only_tokens():
    r = random.Random(0)
    prompts = [[r.randint(0, 10000) for _ in range(7)] for _ in range(5)]
    assert Workload(5, (7, 7), (9, 9), 0.0).draw(32000) == (prompts, [9] * 5)


def test_small_vocabulary():
    prompts, _ = Workload(20, (5, 30), (1, 2), 0.0).draw(50)
    assert {token for prompt in prompts for token in prompt} == set(range(50))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_public_models(shape, tmp_path):
    write_config(shape, str(tmp_path))
    c = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    attention = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    billions = (c.num_hidden_layers * layer + embeddings + c.hidden_size) / 1e9
    published = {
        "llama2-7b": 6.738,
        "llama2-13b": 13.016,
        "llama3-8b": 8.030,
        "llama3-70b": 70.554,
        "llama3.2-1b": 1.236,
        "llama3.2-3b": 3.213,
    }
    assert billions == pytest.approx(published[shape], abs=0.001)


# ---- a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(standard output, JSON, plot) of a small `python bench.py`."""
    folder = tmp_path_factory.mktemp("bench")
    argv = (
        f"--num-prompts 5 --input-len 70 --output-len 9 --compare hf --json {folder}/out.json --plot {folder}/out.png "
        f"--profile {folder}/trace.json"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "bench.py", *argv.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two threads wait for each other where others use the cores too
        cwd=folder,  # it must not need to be started from the repository
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, json.loads((folder / "out.json").read_text()), folder / "out.png"


def test_figures_agree(run):
    _, content, _ = run
    figures, requests, series = content["figures"], content["requests"], content["series"]
    assert [(r["num_prompt_tokens"], r["num_output_tokens"]) for r in requests] == [(70, 9)] * 5
    assert (figures["num_requests"], figures["num_prompt_tokens"], figures["num_output_tokens"]) == (5, 350, 45)

    duration = figures["duration_s"]
    assert figures["requests_per_s"] == pytest.approx(5 / duration)
    assert figures["output_tokens_per_s"] == pytest.approx(45 / duration)
    assert figures["total_tokens_per_s"] == pytest.approx(395 / duration)
    for name in ("ttft", "tpot"):
        times = [1e3 * request[f"{name}_s"] for request in requests]
        assert figures[f"{name}_ms"] == pytest.approx(dict(median=np.median(times), p99=np.percentile(times, 99)))
    for request in requests:
        assert min(request["ttft_s"], request["tpot_s"]) > 0
        assert request["ttft_s"] + 8 * request["tpot_s"] <= duration

    assert len({len(values) for values in series.values()}) == 1
    assert series["seconds"] == sorted(series["seconds"]) and series["seconds"][-1] == duration
    assert series["num_output_tokens"] == sorted(series["num_output_tokens"])
    assert series["num_output_tokens"][-1] == 45
    assert series["num_used_blocks"][-1] == series["num_running"][-1] == series["num_waiting"][-1] == 0
    assert max(series["num_used_blocks"]) == 10  # 79 tokens are two blocks of 64 for each
    assert figures["peak_kv_use_percent"] == pytest.approx(1000 / figures["num_blocks"])
    assert figures["prefix_hit_percent"] == figures["num_preemptions"] == figures["num_recomputed_tokens"] == 0
    assert figures["start_up_s"] > 0


def test_trace_has_named_ranges(run):
    """Every step is a range, and has the phases it went through inside it or right before and after it."""
    events = json.loads((run[2].parent / "trace.json").read_text())["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in ranges if event["name"].startswith("step ")]
    assert [event["name"].split(": ")[1] for event in sorted(steps, key=lambda event: event["ts"])] == [
        "0 decodes of 350 tokens",
        *["5 decodes of 5 tokens"] * 8,
    ]
    for name, inside in dict(
        prepare=True, upload=True, forward=True, sample=True, schedule=False, update=False
    ).items():
        found = [event for event in ranges if event["name"] == name]
        assert len(found) >= len(steps), name
        assert inside == all(
            any(step["ts"] <= event["ts"] <= step["ts"] + step["dur"] for step in steps) for event in found
        ), name


def test_decode_step_in_a_trace(tiny, tmp_path):
    """A made-up trace of three steps: kernels that wait inside for the one before, a gap, a step that is no decode."""
    kernels_us = [  # name, step, begin, duration
        ("_prefill_kernel", 0, 0, 50),
        ("_vector_kernel", 1, 60, 30),
        ("_decode_kernel", 1, 70, 40),  # 20 of them after the one before
        ("_reduce_kernel", 1, 100, 5),  # none of them
        ("nvjet_sm90", 2, 110, 20),
        ("_sample_pick_kernel", 2, 140, 10),
    ]
    events = [dict(ph="X", cat="user_annotation", name=f"step {i + 1}: x", ts=i * 3, dur=2, args={}) for i in range(3)]
    for i, (name, step, begin, duration) in enumerate(kernels_us):
        events.append(dict(ph="X", cat="cuda_runtime", name="launch", ts=step * 3 + 1, dur=1, args=dict(correlation=i)))
        events.append(dict(ph="X", cat="kernel", name=name, ts=begin, dur=duration, args=dict(correlation=i)))
    (tmp_path / "trace.json").write_text(json.dumps(dict(traceEvents=events)))
    batches = [
        ScheduledBatch(slots=[0], num_computed=[0], num_scheduled=[9]),
        *(ScheduledBatch(slots=[0, 1], num_computed=[9, n], num_scheduled=[1, 1], num_decodes=2) for n in (20, 40)),
    ]
    with LLM(tiny("gqa-tied"), skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20) as llm:
        step = profile.decode_step(llm, batches, str(tmp_path / "trace.json"), bytes_per_s=1e9)
        config = llm.model_config
    assert step.groups == pytest.approx({"matrix products": 0.025, "attention": 0.01, "idle": 0.01, "sampling": 0.005})
    assert sum(step.groups.values()) == pytest.approx((150 - 50) / 1e3 / 2)
    assert (step.num_steps, step.num_rows, step.num_kv_tokens) == (2, 2, 41)
    assert step.limit["attention"] == pytest.approx(41 * 4 * config.kv_elements_per_token / 1e6)
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    assert step.limit["matrix products"] == pytest.approx(4 * weights / 1e6)


def test_a_trace_leaves_the_engine_as_it_was(tiny, tmp_path, monkeypatch):
    """And keeps the collector off the heap, as LLM.generate does: a collection takes a dozen steps' time."""
    monkeypatch.setattr(profile, "NUM_STEPS", 6)
    with LLM(tiny("gqa-tied"), skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 20) as llm:
        execute, calls = llm.engine.executor.execute, []

        def noted(batch):
            calls.append((batch, gc.get_freeze_count()))
            return execute(batch)

        monkeypatch.setattr(llm.engine.executor, "execute", noted)
        batches = profile.trace(llm, Workload(2, (9, 9), (20, 20), 0.0), str(tmp_path / "trace.json"))
        assert llm.engine.executor.execute is noted
        assert [batch for batch, _ in calls[:6]] == batches and len(batches) == 6
        assert all(count > 0 for _, count in calls[:6]) and gc.get_freeze_count() == 0
        assert not llm.engine.has_unfinished_requests()
        llm.engine.scheduler.check_integrity()


def test_comparison_with_hugging_face(run):
    stdout, content, _ = run
    other = content["hugging_face"]
    assert other["output_tokens_per_s"] == pytest.approx(45 / other["duration_s"])
    assert other["minivllm_ratio"] == pytest.approx(other["duration_s"] / content["figures"]["duration_s"])
    assert f"{other['minivllm_ratio']:.2f}  x" in stdout and "in batches of 5\n" in stdout


def test_printed_is_what_was_measured(run):
    stdout, content, _ = run
    lines = stdout.splitlines()
    assert lines[0] == "  model     SmolLM2-135M-Instruct (embedded)"
    assert "  workload  5 requests at once, 70 tokens in, 9 out, " in stdout
    rows = {line[2:32].strip(): line[32:].split()[0] for line in lines[lines.index("") + 1 :] if line}
    assert rows["output"] == f"{content['figures']['output_tokens_per_s']:,.1f}"
    assert rows["time to first token, p99"] == f"{content['figures']['ttft_ms']['p99']:,.1f}"
    assert {len(line) <= 120 for line in lines} == {True}


def test_plot_shows_something(run):
    image = matplotlib.image.imread(run[2])
    height, width, _ = image.shape
    assert width >= 1000 and height >= 600
    for half in (image[: height // 2], image[height // 2 :]):
        assert 0.02 < (half[..., :3].min(-1) < 0.95).mean() < 0.9  # neither blank nor all ink


def test_preempted_requests_are_counted(tiny, monkeypatch):
    """A KV cache of 12 blocks, for requests that grow to 5 blocks each."""
    workload = Workload(6, (20, 30), (40, 45), 0.7, seed=1)
    bytes_per_block = 16 * 2 * 3 * 2 * 16 * 4  # tokens, K and V, layers, heads, head_dim, float32
    llm = LLM(
        tiny("gqa-tied"), block_size=16, kv_cache_memory_bytes=12 * bytes_per_block, dtype="float32",
        skip_tokenizer_init=True,
    )  # fmt: skip
    figures, outputs, moments = throughput.measure(llm, workload)
    assert [len(output.outputs[0].token_ids) for output in outputs] == workload.draw(157)[1]
    assert figures.num_preemptions == sum(output.metrics.num_preemptions for output in outputs) > 0
    assert figures.num_recomputed_tokens > 0
    assert figures.num_blocks == 12 and figures.peak_kv_use_percent > 90
    tokens = [moment.num_output_tokens for moment in moments]
    # A step reads 6 tokens at most, and on a GPU a step may be read without another being launched.
    assert all(0 <= after - before <= 12 for before, after in pairwise(tokens)), "a preempted request was forgotten"
    assert tokens[-1] == figures.num_output_tokens
    execute, counts = llm.engine.executor.execute, []
    monkeypatch.setattr(
        llm.engine.executor, "execute", lambda batch: (counts.append(gc.get_freeze_count()), execute(batch))[1]
    )
    again, _, _ = throughput.measure(llm, workload)
    assert counts and all(counts), "the collector goes through what LLM.generate keeps it off"
    assert again.num_preemptions == figures.num_preemptions, "figures must be of one run"
    assert again.prefix_hit_percent == figures.prefix_hit_percent, "a run must not find the prefixes of the last one"


def test_random_weights_of_a_shape(monkeypatch, capsys, tmp_path):
    shape = SHAPES["llama3.2-1b"] | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=300)
    monkeypatch.setitem(SHAPES, "small", shape | dict(num_attention_heads=16, head_dim=64))
    lengths = "--num-prompts 3 --input-len 5 --output-len 1"
    argv = f"--shape small {lengths} --temperature 0.5 --compare hf --json {tmp_path}/out.json"
    assert main(argv.split()) == 0
    out = capsys.readouterr().out
    assert "small, random weights" in out and "max_model_len 4096" in out and "minivllm / Hugging Face" in out
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["figures"]["tpot_ms"] is None  # one token has no time between tokens
    assert content["figures"]["peak_kv_use_percent"] == pytest.approx(300 / content["figures"]["num_blocks"])


# ---- mistakes


def test_pipes_are_files_to_write(tmp_path):
    """An open pipe, as of /dev/stdout and of a shell's >(…), has a path that leads to no other."""
    end, pipe = os.pipe()
    try:
        path = f"/dev/fd/{pipe}"
        assert output_file(path) == picture_file(path) == path
        write_json(path, [1], None)
        assert os.read(end, 1 << 16) == b"[1]\n"
        save_picture(path, Figure())
        assert os.read(end, 1 << 16).startswith(b"\x89PNG")
        os.mkfifo(tmp_path / "named.pdf")
        assert picture_file(str(tmp_path / "named.pdf"))
    finally:
        os.close(end)
        os.close(pipe)


def test_a_file_to_write_may_be_a_link_and_is_left_alone(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    assert output_file(str(link)) == str(link) and link.is_symlink() and not target.exists()
    target.write_text("kept")
    assert output_file(str(link)) and target.read_text() == "kept"


@pytest.mark.parametrize("argv", ["throughput --num-prompts 1 --output-len 2", "--help"])
def test_a_reader_that_has_gone_is_no_error(argv):
    end, pipe = os.pipe()
    os.close(end)
    try:
        command = [sys.executable, "-m", "minivllm", "bench", *argv.split()]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE)
    finally:
        os.close(pipe)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--temperature -1", "temperature must be"),
        ("--seed 9223372036854775808", "seed must be"),
        ("--input-len 9000", "raise --max-model-len"),
        ("latency --input-len 9000", "raise --max-model-len"),
        ("--shape llama2-7b --input-len 4090", "raise --max-model-len"),
    ],
)
def test_mistakes_show_before_a_model_is_loaded(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(LLM, "__init__", lambda *_, **__: pytest.fail("loaded"))
    assert main(argv.split()) == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--num-prompts 0", "at least 1"),
        ("--num-prompts many", "at least 1"),
        ("--num-prompts ³", "at least 1"),
        ("--shape gpt5", "invalid choice"),
        ("--shape llama3-8b --model x", "not allowed with"),
        ("--json /nowhere/out.json", "cannot write"),
        ("--compare hf --model x.gguf", ".gguf"),
        ("--model /nowhere", "no folder '/nowhere'"),
        ("--model=", "must not be empty"),
        ("latency --model=", "must not be empty"),
        ("--profile x.json --tensor-parallel-size 2", "leave --tensor-parallel-size out"),
        ("--tensor-parallel-size 2", "tensor_parallel_size (2) must divide the model's attention heads (9)"),
        ("--dtype int3", "dtype must be one of"),
        ("--temperature -1", "temperature must be"),
        ("--max-model-len 100 --input-len 64 --output-len 64", "raise --max-model-len"),
        ("latency --max-model-len 100 --input-len 64 --output-len 64", "raise --max-model-len"),
        ("--plot out.foo", "must end in .png, .svg, .pdf, got 'out.foo'"),
        ("--plot out.tiff", "must end in .png, .svg, .pdf"),
        ("--profile /proc/x", "cannot write"),
        ("--num-prompts 1 kernels", "unrecognized arguments"),
        ("nonsense", "there is no benchmark 'nonsense'; there are throughput, latency, serve, kernels"),
        ("kernels --block-size 48", "block_size must be"),
        ("kernels --block-size many", "invalid int value"),
        ("latency --num-iters 0", "at least 1"),
        ("serve --num-prompts 0", "at least 1"),
        pytest.param("kernels", "no CUDA GPU", marks=pytest.mark.skipif(ON_GPU, reason="there is a GPU")),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    try:
        status = main(argv.split())
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert message in error.splitlines()[-1] and "error: " in error.splitlines()[-1]
    assert sum(line.startswith(" ") for line in error.splitlines()) == 0, "the usage is a line"


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(command in out.split("Commands: ")[1] for command in COMMANDS)
    assert all(command in (ROOT / "bench.py").read_text() for command in COMMANDS if command != "throughput")


def test_missing_matplotlib_is_said_before_the_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main(["--plot", "out.png"])
    assert "pip install 'minivllm[plot]'" in capsys.readouterr().err


# ---- kernels


@pytest.mark.parametrize("head_dim", [32, 20])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_token_by_token_kernel(heads, kv_heads, head_dim):
    case = kernels.Case("ragged", (1, 16, 17, 50), heads, kv_heads, head_dim)
    inputs = kernels.make_inputs(case, 16, torch.float32, "cuda" if ON_GPU else "cpu")
    out = kernels.token_by_token_decode(
        inputs.q, inputs.k_cache, inputs.v_cache, inputs.block_tables, inputs.seq_lens, inputs.scale
    )
    expected = []
    for row, length in enumerate(case.seq_lens):
        slots = [(int(inputs.block_tables[row, t // 16]), t % 16) for t in range(length)]
        k, v = (torch.stack([cache[slot] for slot in slots], 1) for cache in (inputs.k_cache, inputs.v_cache))
        q = inputs.q[row].unsqueeze(1)  # [heads, 1, head_dim]
        expected.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).squeeze(1))
    expected = torch.stack(expected)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kernels.reference(inputs), expected, atol=1e-5, rtol=1e-5)


def test_read_kernel_reads_everything():
    device = "cuda" if ON_GPU else "cpu"
    x, out = torch.rand(5 * 256, device=device), torch.empty(3, device=device)
    kernels._read_kernel[(3,)](x, out, len(x), BLOCK=256)
    assert out.sum().item() == pytest.approx(x.sum().item(), rel=1e-5)


@pytest.mark.gpu
def test_kernel_benchmark_on_a_gpu(capsys):
    content = kernels.run(64, [kernels.CASES[0], kernels.CASES[-1]])
    assert 2e11 < content["read_bytes_per_s"] < 2e13
    for row in content["cases"]:
        assert row["minivllm"]["error"] < 1e-2 and row["token_by_token"]["error"] < 1e-2
        assert 0 < row["minivllm"]["bandwidth_percent"] < 120
    assert {len(line) <= 120 for line in capsys.readouterr().out.splitlines()} == {True}
