"""`minivllm bench serve`: load for any server of the OpenAI API, and how fast it answers.

Options, defaults and figures are those of `vllm bench serve`.  Nothing here needs torch, the engine or a tokenizer:
random prompts are token ids or common words, and tokens are counted by the server.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minivllm.bench import serve_workload as workload
from minivllm.bench.result_file import write_json
from minivllm.bench.serve_metrics import RequestRecord, compute_figures, format_table
from minivllm.bench.serve_options import ENDPOINTS, add_arguments, check, settings
from minivllm.process_state import allow_open_files

__all__ = ["add_arguments", "run"]

NUM_SHOWN_ERRORS = 5


def run(args: argparse.Namespace) -> None:
    """Run the benchmark, print its table and write its files.

    Raises:
        ValueError: options do not go together, a package is missing, or all requests failed.
        OSError: the server cannot be reached, or a file cannot be read or written.
    """
    check(args)
    allow_open_files(min(args.num_prompts, args.max_concurrency or args.num_prompts))
    chat = args.backend == "openai-chat"
    samples, spare = _draw_samples(args, chat)
    model, begin, records, arrivals = asyncio.run(_send(args, chat, samples, spare))

    duration = max(record.end for record in records) - begin
    figures = compute_figures(records, duration, args.metric_percentiles, dict(args.goodput))
    errors = Counter(record.error for record in records if record.error)
    shown = errors.most_common(NUM_SHOWN_ERRORS)
    try:  # each of the two is made even if the other fails
        if args.json:
            requests = [
                {"arrival_s": due} | record.to_json(begin) for due, record in zip(arrivals, records, strict=True)
            ]
            content = {"date": time.strftime("%Y%m%d-%H%M%S"), "model_id": model, "settings": settings(args)}
            write_json(args.json, content | figures.to_json() | {"requests": requests}, indent=None)
    finally:
        if figures.completed:
            print(format_table(figures, args.percentile_metrics, args.max_concurrency, args.request_rate))
            for error, count in shown:
                print(f"{count} failed: {error}")
            if len(errors) > NUM_SHOWN_ERRORS:
                print(f"and {len(errors) - NUM_SHOWN_ERRORS} other errors")
    if not figures.completed:
        raise ValueError(f"all {len(records)} requests failed: {'; '.join(error for error, _ in shown)}")
    if args.plot:
        from minivllm.bench.serve_plot import plot

        plot(args.plot, _title(args, model, len(records)), figures, records)


async def _send(
    args: argparse.Namespace, chat: bool, samples: Sequence[workload.Sample], spare: Sequence[workload.Sample]
) -> tuple[str, float, list[RequestRecord], list[float]]:
    """(the model, when the run began, a record for each sample, when each was due)."""
    from minivllm.bench import serve_client as client

    base_url = _base_url(args)
    url = base_url + (args.endpoint or ENDPOINTS[args.backend])
    options = {"temperature": args.temperature}
    if args.top_p is not None:
        options["top_p"] = args.top_p
    if args.ignore_eos or args.dataset_name == "random":
        options["ignore_eos"] = True
    options |= args.extra_body

    def progress(name: str, total: int) -> tqdm:
        return tqdm(total=total, desc=name, unit="req", leave=False, disable=args.disable_tqdm or None)

    async with client.open_session(args.api_key or os.environ.get("OPENAI_API_KEY")) as session:
        timeout = args.ready_check_timeout_sec
        model = args.model or await client.until_ready(lambda: client.first_model(session, base_url), timeout)
        bodies = [workload.request_body(sample, model, chat, options) for sample in samples]
        warmups = [workload.request_body(sample, model, chat, options) for sample in spare]
        if timeout:
            print(f"waiting for {url} to answer a test request", flush=True)
            await client.until_ready(lambda: client.test_request(session, url, warmups[-1]), timeout)
        warmups = warmups[: args.num_warmups]
        if warmups:
            with progress("warm-up", len(warmups)) as bar:
                at_once = [0.0] * len(warmups)
                _, records = await client.run_load(session, url, warmups, at_once, args.max_concurrency, bar.update)
            if all(record.error for record in records):
                raise ValueError(f"all {len(warmups)} warm-up requests to {url} failed: {records[0].error}")
        arrivals = workload.plan_arrivals(len(bodies), args.request_rate, args.burstiness, args.seed).tolist()
        print(f"{len(bodies)} requests to {url}, model {model}", flush=True)
        # What is here stays: a collection that goes through it would stop the clock of all streams.
        gc.collect()
        gc.freeze()
        try:
            with progress("requests", len(bodies)) as bar:
                begin, records = await client.run_load(session, url, bodies, arrivals, args.max_concurrency, bar.update)
        finally:
            gc.unfreeze()
    return model, begin, records, arrivals


def _draw_samples(args: argparse.Namespace, chat: bool) -> tuple[Sequence[workload.Sample], Sequence[workload.Sample]]:
    """(what is measured, what is sent before): warm-ups of their own, so that no measured prompt is in a cache."""
    num_spare = max(1, args.num_warmups)
    if args.dataset_name == "random":
        ratios = args.random_range_ratio
        lengths = workload.RandomLengths(
            args.random_input_len, args.random_output_len, ratios["input"], ratios["output"], args.random_prefix_len
        )
        num_samples = args.num_prompts + num_spare
        samples = workload.random_samples(num_samples, lengths, args.random_vocab_size, args.seed, chat)
        return samples[: args.num_prompts], samples[args.num_prompts :]
    samples = workload.custom_samples(
        args.dataset_path,
        args.num_prompts,
        args.custom_output_len,
        args.seed,
        chat,
        shuffle=not args.disable_shuffle,
        oversample=not args.no_oversample,
    )
    return samples, [samples[-1 - i % len(samples)] for i in range(num_spare)]


def _base_url(args: argparse.Namespace) -> str:
    if args.base_url:
        return str(args.base_url.rstrip("/"))
    host = f"[{args.host}]" if ":" in args.host else args.host
    return f"http://{host}:{args.port}"


def _title(args: argparse.Namespace, model: str, num_requests: int) -> str:
    rate = "all at once" if args.request_rate == math.inf else f"{args.request_rate:g} a second"
    if args.request_rate < math.inf and args.burstiness != 1:
        rate += f", burstiness {args.burstiness:g}"
    if args.max_concurrency:
        rate += f", at most {args.max_concurrency:,} under way"
    if args.dataset_name == "random":
        about = "about " if any(args.random_range_ratio.values()) else ""
        input_len = args.random_prefix_len + args.random_input_len
        prompts = f"random, {about}{input_len:,} tokens in, {about}{args.random_output_len:,} out"
    else:
        prompts = Path(args.dataset_path).name
    requests = "1 request" if num_requests == 1 else f"{num_requests:,} requests"
    return f"{model}, {args.backend}\n{requests} ({prompts}), {rate}"
