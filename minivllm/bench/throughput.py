"""End-to-end throughput: many requests at once, from the moment they are added to the last token."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from tqdm import tqdm

from minivllm import LLM, SamplingParams
from minivllm.bench.workload import Workload
from minivllm.engine.batch import ScheduledBatch
from minivllm.engine.engine import Engine, PendingTokens
from minivllm.outputs import RequestOutput
from minivllm.process_state import heap_left_alone
from minivllm.sampling_params import RequestOutputKind


@dataclass(frozen=True)
class Moment:
    """The engine at one moment.  `seconds` count from the start of the run."""

    seconds: float
    num_output_tokens: int  # read so far
    num_used_blocks: int
    num_running: int
    num_waiting: int


@dataclass(frozen=True)
class Percentiles:
    median: float
    p99: float


@dataclass(frozen=True)
class Throughput:
    """The figures of one run.  All requests come at once, so `ttft_ms` holds the wait in the queue too."""

    duration_s: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Percentiles  # arrival to first token
    tpot_ms: Percentiles | None  # (last token - first token) / (tokens - 1); None if no request has two tokens
    num_blocks: int
    peak_kv_use_percent: float
    prefix_hit_percent: float  # of prompt tokens
    num_preemptions: int
    num_recomputed_tokens: int


class RecordingExecutor:
    """Passes steps on to the engine's executor, and notes the state of the engine at each: all blocks of the step are
    allocated then.  The step is launched first, so that on a GPU it does not wait for the note."""

    def __init__(self, engine: Engine) -> None:
        self.executor = engine.executor
        self.num_blocks = engine.executor.num_blocks
        self.num_finished_tokens = 0  # output tokens of finished requests; kept by whoever steps the engine
        self.moments: list[Moment] = []
        self._scheduler = engine.scheduler
        self._start = time.monotonic()

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        now = time.monotonic()
        pending = self.executor.execute(batch)
        self.note(now)
        return pending

    def check(self) -> None:
        self.executor.check()

    def shutdown(self) -> None:
        self.executor.shutdown()

    def note(self, now: float) -> None:
        """Add a moment, `now` being its time.monotonic()."""
        scheduler, manager = self._scheduler, self._scheduler.block_manager
        # Preempted requests wait ahead of those that never ran; only these two can be many.
        preempted = takewhile(lambda request: request.metrics.first_scheduled_time is not None, scheduler.waiting)
        num_tokens = sum(request.num_output_tokens for request in (*scheduler.running, *preempted))
        self.moments.append(
            Moment(
                seconds=now - self._start,
                num_output_tokens=self.num_finished_tokens + num_tokens,
                num_used_blocks=manager.num_blocks - manager.num_free_blocks,
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
            )
        )


def measure(llm: LLM, workload: Workload) -> tuple[Throughput, list[RequestOutput], list[Moment]]:
    """Run the workload once, after an untimed warm-up; (figures, outputs, the state of the engine at every step).

    Raises ValueError for a workload that does not fit the engine.
    """
    assert llm.config.max_model_len is not None
    check_lengths(llm.config.max_model_len, workload.input_len[1], workload.output_len[1])
    engine, stats = llm.engine, llm.engine.scheduler.stats
    prompts, output_lens = workload.draw(llm.model_config.vocab_size)
    _run(engine, [[1, 2, 3]] * 2, [4] * 2, workload.temperature)
    llm.reset_prefix_cache()
    before = replace(stats)
    outputs, moments = _run(engine, prompts, output_lens, workload.temperature, progress=True)
    assert [len(output.outputs[0].token_ids) for output in outputs] == output_lens, "a request ended early"

    duration, num_in, num_out = moments[-1].seconds, sum(map(len, prompts)), sum(output_lens)
    num_prompt_tokens = stats.num_prompt_tokens - before.num_prompt_tokens
    tpot_ms = [1e3 * seconds for output in outputs if (seconds := time_per_token(output)) is not None]
    figures = Throughput(
        duration_s=duration,
        num_requests=len(prompts),
        num_prompt_tokens=num_in,
        num_output_tokens=num_out,
        requests_per_s=len(prompts) / duration,
        output_tokens_per_s=num_out / duration,
        total_tokens_per_s=(num_in + num_out) / duration,
        ttft_ms=_percentiles([1e3 * time_to_first_token(output) for output in outputs]),
        tpot_ms=_percentiles(tpot_ms) if tpot_ms else None,
        num_blocks=engine.executor.num_blocks,
        peak_kv_use_percent=100 * max(m.num_used_blocks for m in moments) / engine.executor.num_blocks,
        prefix_hit_percent=100 * (stats.num_cached_tokens - before.num_cached_tokens) / num_prompt_tokens,
        num_preemptions=stats.num_preemptions - before.num_preemptions,
        num_recomputed_tokens=stats.num_recomputed_tokens - before.num_recomputed_tokens,
    )
    return figures, outputs, moments


def time_to_first_token(output: RequestOutput) -> float:
    """Seconds from arrival to the first token."""
    seconds = output.metrics.time_to_first_token
    assert seconds is not None
    return seconds


def time_per_token(output: RequestOutput) -> float | None:
    """Seconds a token after the first, None if there is only one."""
    metrics, num_tokens = output.metrics, len(output.outputs[0].token_ids)
    if num_tokens < 2 or metrics.first_token_time is None or metrics.last_token_time is None:
        return None
    return (metrics.last_token_time - metrics.first_token_time) / (num_tokens - 1)


def check_lengths(max_model_len: int, input_len: int, output_len: int) -> None:
    """Raise ValueError if requests would be cut at max_model_len, which would falsify the figures."""
    longest = input_len + output_len
    if longest > max_model_len:
        raise ValueError(
            f"requests of up to {longest} tokens (in and out) do not fit max_model_len {max_model_len}; "
            "lower --input-len or --output-len, or raise --max-model-len"
        )


def add_requests(engine: Engine, prompts: list[list[int]], output_lens: list[int], temperature: float) -> list[str]:
    """Queue requests that run to exactly these lengths; returns their ids."""
    for i, (prompt, output_len) in enumerate(zip(prompts, output_lens, strict=True)):
        params = SamplingParams(
            temperature=temperature,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(i), prompt, params)
    return [str(i) for i in range(len(prompts))]


def _run(
    engine: Engine, prompts: list[list[int]], output_lens: list[int], temperature: float, progress: bool = False
) -> tuple[list[RequestOutput], list[Moment]]:
    """Run requests to their end, as LLM.generate does; (outputs in the order of the prompts, moments, the last one
    being the end)."""
    done: dict[str, RequestOutput] = {}
    recorder = RecordingExecutor(engine)
    engine.executor = recorder
    try:
        request_ids = add_requests(engine, prompts, output_lens, temperature)
        hidden = None if progress else True
        with heap_left_alone(), tqdm(total=sum(output_lens), unit="tok", disable=hidden, leave=False) as bar:
            while len(done) < len(prompts):
                for output in engine.step():
                    done[output.request_id] = output
                    recorder.num_finished_tokens += len(output.outputs[0].token_ids)
                bar.update(recorder.moments[-1].num_output_tokens - bar.n)
            recorder.note(time.monotonic())
        while engine.has_unfinished_requests():  # a last step in flight, whose tokens nobody needs
            engine.step()
    finally:
        engine.executor = recorder.executor
    return [done[request_id] for request_id in request_ids], recorder.moments


def _percentiles(values: list[float]) -> Percentiles:
    return Percentiles(float(np.median(values)), float(np.percentile(values, 99)))
