"""Where the time goes: a trace of the first steps of a workload, and in it a decode step, by groups of kernels.

The trace (Chrome's format, for ui.perfetto.dev) has the engine's work in named ranges: step, schedule, prepare, upload,
forward, sample, update.  A decode step that replays a CUDA graph has its sampling inside the graph.
"""

from __future__ import annotations

import bisect
import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minivllm import LLM
from minivllm.bench.throughput import add_requests
from minivllm.bench.workload import Workload
from minivllm.engine.batch import ScheduledBatch
from minivllm.layers import Linear
from minivllm.process_state import heap_left_alone
from minivllm.runner import model_runner

NUM_STEPS = 64
GROUPS = {  # the first of these words in a kernel's name says what it belongs to
    "_prefill_": "attention",
    "_decode_kernel": "attention",
    "_reduce_kernel": "attention",
    "_plan_": "attention",
    "rope": "RoPE and KV write",
    "norm": "norms",
    "_activate_": "activation",
    "_sample_": "sampling",
    "_truncate_": "sampling",
    "_quantize_": "matrix products",
    "_vector_kernel": "matrix products",
    "_dot_kernel": "matrix products",
    "nvjet": "matrix products",
    "gemm": "matrix products",
    "gemv": "matrix products",
    "cutlass": "matrix products",
    "splitK": "matrix products",
}


@dataclass(frozen=True)
class DecodeStep:
    """The mean of the decode steps in a trace; times in milliseconds."""

    num_steps: int
    num_rows: float
    num_kv_tokens: float
    groups: dict[str, float]  # GPU time of each group of kernels, and "idle"; together the whole step
    limit: dict[str, float]  # the time to read what must be read, at the memory's measured bandwidth


def trace(llm: LLM, workload: Workload, path: str) -> list[ScheduledBatch]:
    """Run the first NUM_STEPS steps of the workload under the profiler and write the trace.  Returns the steps; the
    requests are aborted."""
    engine, batches = llm.engine, []
    executor: Any = engine.executor
    runner = executor.runner
    execute = executor.execute
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if runner.on_gpu else [])

    def named_step(batch: ScheduledBatch) -> Any:
        batches.append(batch)
        with record_function(f"step {len(batches)}: {batch.num_decodes} decodes of {batch.num_tokens} tokens"):
            return execute(batch)

    names: list[tuple[Any, str, str]] = [
        (engine.scheduler, "schedule", "schedule"),
        (engine.scheduler, "update", "update"),
        (runner, "_upload_decode", "prepare"),
        (model_runner, "mixed_arrays", "prepare"),
        (runner.inputs, "upload", "upload"),
        (runner.model, "forward", "forward"),
        (runner.backend, "sample", "sample"),
    ]
    if runner.graphs:
        names.append((runner.graphs, "replay", "forward (graph)"))
    llm.reset_prefix_cache()
    request_ids = add_requests(engine, *workload.draw(llm.model_config.vocab_size), workload.temperature)
    with ExitStack() as patches:
        patches.enter_context(heap_left_alone())  # as in LLM.generate
        patches.enter_context(patch.object(executor, "execute", named_step))
        for target, attribute, name in names:
            patches.enter_context(patch.object(target, attribute, _named(name, getattr(target, attribute))))
        with profile(activities=activities, acc_events=True) as profiler:
            while len(batches) < NUM_STEPS and engine.scheduler.requests:
                engine.step()
            if runner.on_gpu:
                torch.cuda.synchronize()
    engine.abort_requests(request_ids)
    while engine.has_unfinished_requests():
        engine.step()
    with open(path, "wb"):  # raises what the profiler does not, and leaves nothing of an older one
        pass
    profiler.export_chrome_trace(path)
    return batches


def decode_step(llm: LLM, batches: list[ScheduledBatch], path: str, bytes_per_s: float) -> DecodeStep | None:
    """What the decode steps in a trace of a GPU spent their time on, or None if there is none.  `bytes_per_s`: the
    memory's read bandwidth."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    starts = sorted(e["ts"] for e in events if e["cat"] == "user_annotation" and e["name"].startswith("step "))
    launched_at = {e["args"]["correlation"]: e["ts"] for e in events if e["cat"] in ("cuda_runtime", "cuda_driver")}
    on_gpu = sorted((e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"])
    decodes = {i for i, batch in enumerate(batches) if batch.num_decodes == len(batch.slots)}
    milliseconds: dict[str, float] = defaultdict(float)
    end = 0.0
    for event in on_gpu:
        # A kernel may start while the one before it still runs, and wait: what counts is the time it adds.
        begin, previous_end = event["ts"], end
        end = max(end, begin + event["dur"])
        step = bisect.bisect(starts, launched_at.get(event["args"]["correlation"], 0)) - 1
        if step in decodes and previous_end:
            milliseconds["idle"] += max(0.0, begin - previous_end) / 1e3 / len(decodes)
            milliseconds[_group(event["name"])] += (end - max(begin, previous_end)) / 1e3 / len(decodes)
    if not milliseconds:
        return None
    num_kv_tokens = sum(sum(batches[i].num_computed) + len(batches[i].slots) for i in decodes) / len(decodes)
    executor: Any = llm.engine.executor
    model, dtype = executor.runner.model, getattr(torch, llm.config.dtype)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    weights.append(model.head)
    per_token = llm.model_config.kv_elements_per_token * dtype.itemsize
    return DecodeStep(
        num_steps=len(decodes),
        num_rows=sum(len(batches[i].slots) for i in decodes) / len(decodes),
        num_kv_tokens=num_kv_tokens,
        groups=dict(sorted(milliseconds.items(), key=lambda item: -item[1])),
        limit={
            "attention": 1e3 * num_kv_tokens * per_token / bytes_per_s,
            "matrix products": 1e3 * sum(weight.nbytes for weight in weights) / bytes_per_s,
        },
    )


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def _group(kernel: str) -> str:
    return next((group for word, group in GROUPS.items() if word in kernel), "other")
