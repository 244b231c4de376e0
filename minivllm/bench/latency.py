"""Seconds that one batch takes, from its prompts to its last tokens, again and again."""

from __future__ import annotations

import time
from random import Random

import numpy as np

from minivllm.llm import LLM
from minivllm.sampling_params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def measure(
    llm: LLM, batch_size: int, input_len: int, output_len: int, num_warm_ups: int, num_runs: int
) -> list[float]:
    """Seconds of each run, of greedy requests with fresh random prompts."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    random = Random(0)
    seconds = []
    for _ in range(num_warm_ups + num_runs):
        highest = min(10_000, llm.model_config.vocab_size - 1)
        prompts = [[random.randint(0, highest) for _ in range(input_len)] for _ in range(batch_size)]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    return seconds[num_warm_ups:]


def figures(seconds: list[float], num_tokens: int) -> dict[str, float]:
    """What to report of the runs, each of which generates `num_tokens` tokens."""
    mean = float(np.mean(seconds))
    percentiles = {f"latency_p{p}_s": float(np.percentile(seconds, p)) for p in PERCENTILES}
    return {"latency_mean_s": mean, **percentiles, "output_tokens_per_s": num_tokens / mean}
