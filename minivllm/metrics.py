"""The engine's figures, under vLLM's metric names."""

from __future__ import annotations

from dataclasses import dataclass

from minivllm.engine.scheduler import Scheduler


@dataclass(frozen=True)
class Metric:
    """A figure with a name.  `labels`: of one engine there is nothing to tell apart."""

    name: str

    @property
    def labels(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Counter(Metric):
    """A figure that only grows, from the start of the engine."""

    value: int


@dataclass(frozen=True)
class Gauge(Metric):
    """A figure of this moment."""

    value: float


def collect(scheduler: Scheduler) -> list[Metric]:
    """All figures."""
    stats, manager = scheduler.stats, scheduler.block_manager
    return [
        Gauge("vllm:num_requests_running", len(scheduler.running)),
        Gauge("vllm:num_requests_waiting", len(scheduler.waiting)),
        Gauge("vllm:kv_cache_usage_perc", 1 - manager.num_free_blocks / manager.num_blocks),
        Counter("vllm:prefix_cache_queries", stats.num_prompt_tokens),
        Counter("vllm:prefix_cache_hits", stats.num_cached_tokens),
        Counter("vllm:num_preemptions", stats.num_preemptions),
        Counter("vllm:prompt_tokens", stats.num_prompt_tokens),
        Counter("vllm:generation_tokens", stats.num_generated_tokens),
        Counter("vllm:spec_decode_num_drafts", stats.num_drafts),
        Counter("vllm:spec_decode_num_draft_tokens", stats.num_draft_tokens),
        Counter("vllm:spec_decode_num_accepted_tokens", stats.num_accepted_tokens),
    ]
