"""Figures for Prometheus, under vLLM's names: the engine's own, and latencies as the server sees them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minivllm.async_llm import AsyncLLM
from minivllm.metrics import Counter
from minivllm.outputs import RequestOutput

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class _Engine(Collector):
    """The engine's figures at the moment they are asked for."""

    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self._llm = llm
        self._model_name = model_name

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        for metric in self._llm.get_metrics():
            family = CounterMetricFamily if isinstance(metric, Counter) else GaugeMetricFamily
            one = family(metric.name, metric.name.removeprefix("vllm:").replace("_", " "), labels=["model_name"])
            one.add_metric([self._model_name], metric.value)  # type: ignore[attr-defined]
            yield one


class ServerMetrics:
    def __init__(self, llm: AsyncLLM, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(llm, model_name))

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", help, ["model_name"], buckets=buckets, registry=self._registry)
            return made.labels(model_name)

        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.itl = histogram("inter_token_latency_seconds", "Between tokens of a request.", SECONDS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of a request, without its first token.", SECONDS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", LONG_SECONDS)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", LONG_SECONDS)
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.generation = histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self.success = PrometheusCounter(
            "vllm:request_success", "Outputs that ended.", ["model_name", "finished_reason"], registry=self._registry
        )
        self.model_name = model_name

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestWatch:
    """Is told of each output of a request that came at `arrival`, in seconds of time.monotonic."""

    def __init__(self, metrics: ServerMetrics, arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._last: float | None = None  # when an output came last
        self._num_tokens = 0
        self._num_first_tokens = 0  # of the first sample, whose times an output carries

    def see(self, output: RequestOutput) -> None:
        """An output has come."""
        metrics, now = self._metrics, time.monotonic()
        num_new = sum(len(completion.token_ids) for completion in output.outputs)
        if self._last is None:
            metrics.ttft.observe((output.metrics.first_token_time or now) - self._arrival)
            if output.metrics.first_scheduled_time is not None:
                metrics.queue.observe(max(0.0, output.metrics.first_scheduled_time - self._arrival))
            metrics.prompt.observe(len(output.prompt_token_ids))
        elif num_new:
            metrics.itl.observe((now - self._last) / num_new)
        self._last = now
        self._num_tokens += num_new
        for completion in output.outputs:
            if completion.index == 0:
                self._num_first_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                metrics.success.labels(metrics.model_name, completion.finish_reason).inc()
        if output.finished:
            metrics.e2e.observe(now - self._arrival)
            metrics.generation.observe(self._num_tokens)
            first, last = output.metrics.first_token_time, output.metrics.last_token_time
            if self._num_first_tokens > 1 and first is not None and last is not None:
                metrics.tpot.observe((last - first) / (self._num_first_tokens - 1))
