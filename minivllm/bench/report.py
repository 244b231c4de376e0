"""What a run is shown as: text, JSON, a plot."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from minivllm import LLM
from minivllm.bench.profile import DecodeStep
from minivllm.bench.result_file import save_picture
from minivllm.bench.throughput import Moment, Throughput, time_per_token, time_to_first_token
from minivllm.outputs import RequestOutput


def device_name(device: str) -> str:
    """ "cuda:0" or "cpu" as people call it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {num_threads} thread{'s' if num_threads > 1 else ''}"


def versions() -> str:
    """Of all that speed depends on."""
    parts = [f"Python {platform.python_version()}"]
    for name in ("minivllm", "torch", "triton", "transformers"):
        try:
            parts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            parts.append(f"{name} (not installed)")
    return ", ".join(parts)


def print_pairs(pairs: dict[str, str]) -> None:
    """Print names and values, aligned."""
    width = max(10, 2 + max(map(len, pairs)))
    for name, value in pairs.items():
        print(f"  {name:<{width}}{value}", flush=True)


def engine(llm: LLM) -> str:
    """The settings that the engine came to."""
    config, num_blocks = llm.config, llm.engine.executor.num_blocks
    return (
        f"{config.dtype}, max_model_len {config.max_model_len}, max_num_seqs {config.max_num_seqs}, "
        f"KV cache of {num_blocks:,} blocks of {config.block_size} tokens"
    )


def print_throughput(figures: Throughput, start_up_s: float) -> None:
    """Print the figures of a run as a table."""
    ttft, tpot = figures.ttft_ms, figures.tpot_ms
    print()
    for name, value, unit in (
        ("duration", f"{figures.duration_s:.2f}", "s"),
        ("requests", f"{figures.requests_per_s:.2f}", "requests/s"),
        ("output", f"{figures.output_tokens_per_s:,.1f}", "tok/s"),
        ("input + output", f"{figures.total_tokens_per_s:,.1f}", "tok/s"),
        ("time to first token, median", f"{ttft.median:,.1f}", "ms"),
        ("time to first token, p99", f"{ttft.p99:,.1f}", "ms"),
        ("time per output token, median", f"{tpot.median:,.2f}" if tpot else "-", "ms"),
        ("time per output token, p99", f"{tpot.p99:,.2f}" if tpot else "-", "ms"),
        ("peak KV-cache use", f"{figures.peak_kv_use_percent:.1f}", f"% of {figures.num_blocks:,} blocks"),
        ("prefix-cache hits", f"{figures.prefix_hit_percent:.1f}", "% of prompt tokens"),
        ("preemptions", f"{figures.num_preemptions:,}", ""),
        ("recomputed tokens", f"{figures.num_recomputed_tokens:,}", ""),
        ("start-up", f"{start_up_s:.2f}", "s for LLM(), without a tokenizer"),
    ):
        print(f"  {name:<30} {value:>10}  {unit}".rstrip())


def print_comparison(figures: Throughput, seconds: float, group_size: int) -> dict[str, float]:
    """Print and return how long Hugging Face took for the same requests, and the ratio of the speeds."""
    group_size = min(group_size, figures.num_requests)
    rate, ratio = figures.num_output_tokens / seconds, seconds / figures.duration_s
    print()
    for name, value, unit in (
        ("Hugging Face generate, duration", f"{seconds:.2f}", "s"),
        ("Hugging Face generate, output", f"{rate:,.1f}", f"tok/s, in batches of {group_size}"),
        ("minivllm / Hugging Face", f"{ratio:.2f}", "x"),
    ):
        print(f"  {name:<30} {value:>10}  {unit}")
    return {"duration_s": seconds, "output_tokens_per_s": rate, "minivllm_ratio": ratio}


def print_decode_step(step: DecodeStep) -> None:
    """Print where the time of a decode step goes, beside the time to read what must be read."""
    total, limit = sum(step.groups.values()), sum(step.limit.values())
    print(f"\n  {_describe(step)}")
    for name, milliseconds in {**step.groups, "all": total}.items():
        least = step.limit.get(name, limit if name == "all" else 0.0)
        beside = f"reading alone {least:.3f} ms" if least else ""
        print(f"  {name:<30} {milliseconds:>10.3f}  ms, {100 * milliseconds / total:4.1f}%  {beside}".rstrip())


def requests_json(outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
    """Lengths, cached tokens and times of every request; times in seconds."""
    return [
        dict(
            num_prompt_tokens=len(output.prompt_token_ids),
            num_output_tokens=len(output.outputs[0].token_ids),
            num_cached_tokens=output.num_cached_tokens,
            num_preemptions=output.metrics.num_preemptions,
            ttft_s=time_to_first_token(output),
            tpot_s=time_per_token(output),
        )
        for output in outputs
    ]


def series_json(moments: Sequence[Moment]) -> dict[str, list[float]]:
    """A list for each field of `Moment`."""
    return {field.name: [getattr(moment, field.name) for moment in moments] for field in fields(Moment)}


def plot(path: str, title: str, figures: Throughput, moments: Sequence[Moment], step: DecodeStep | None = None) -> None:
    """Draw tokens/s and KV-cache use over the run, and what a decode step's time goes to, in the format of the
    file's suffix."""
    from matplotlib.figure import Figure

    seconds = np.array([moment.seconds for moment in moments])
    tokens = np.array([moment.num_output_tokens for moment in moments])
    edges = np.linspace(0, figures.duration_s, min(60, 1 + len(moments) // 4) + 1)
    rates = np.diff(np.interp(edges, [0, *seconds], [0, *tokens])) / np.diff(edges)
    kv_use = [100 * moment.num_used_blocks / figures.num_blocks for moment in moments]

    figure = Figure(figsize=(8, 5 if step is None else 7), layout="constrained")
    parts: Any = [figure] if step is None else figure.subfigures(2, 1, height_ratios=[5, 2])
    top, bottom = parts[0].subplots(2, 1, sharex=True)
    top.set_title(title, fontsize=10, loc="left")
    top.stairs(rates, edges, fill=True, color="tab:blue", alpha=0.35)
    top.stairs(rates, edges, color="tab:blue", baseline=None)
    mean = figures.output_tokens_per_s
    top.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:,.0f} tok/s")
    top.set_ylabel("output tokens/s")
    top.legend(loc="upper right", frameon=False)
    bottom.fill_between(seconds, kv_use, step="post", color="tab:green", alpha=0.35)
    bottom.step(seconds, kv_use, where="post", color="tab:green")
    bottom.set_ylabel("KV cache in use (%)")
    bottom.set_xlabel("seconds")
    for axes, values in ((top, rates), (bottom, kv_use)):
        axes.set_ylim(0, 1.2 * max(values))
        axes.set_xlim(0, figures.duration_s)
        axes.spines[["top", "right"]].set_visible(False)
    if step is not None:
        _plot_decode_step(parts[1].subplots(), step)
    save_picture(path, figure)


def _plot_decode_step(axes: Any, step: DecodeStep) -> None:
    """Two bars: what a decode step's time goes to, and the time to read what must be read."""
    for i, name in enumerate(step.groups):
        for y, bar in enumerate((step.limit, step.groups)):
            left = sum(bar[other] for other in list(step.groups)[:i] if other in bar)
            if name in bar:
                color = "lightgrey" if name == "idle" else f"C{i}"
                axes.barh(y, bar[name], left=left, color=color, label=name if bar is step.groups else None)
    axes.set_yticks([0, 1], ["reading alone", "measured"])
    axes.set_xlabel("milliseconds")
    axes.set_title(_describe(step), fontsize=10, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _describe(step: DecodeStep) -> str:
    rows = f"{step.num_rows:,.0f} row{'s' if step.num_rows > 1 else ''}"
    return f"a decode step, mean of {step.num_steps}: {rows}, {step.num_kv_tokens:,.0f} tokens of context"
