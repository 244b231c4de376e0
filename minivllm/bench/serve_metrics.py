"""What a run of `minivllm bench serve` comes to: the record of a request, and the figures over all of them.

Definitions and names are those of `vllm bench serve`, with two differences: token counts are the server's own, and the
peak of concurrent requests is exact, where vLLM counts a request into every second that it touches.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}


@dataclass(frozen=True)
class RequestRecord:
    """One request as the client saw it; times are seconds of `time.perf_counter`."""

    start: float  # when it was sent: time spent waiting for --max-concurrency is not in it
    end: float
    token_times: Sequence[float] = field(default_factory=lambda: array("d"))  # when each chunk of tokens came
    num_prompt_tokens: int = 0  # of the server's `usage`, as is the next
    num_output_tokens: int = 0
    error: str = ""  # why it failed; "" if it did not
    status: int | None = None  # of HTTP; None if no response came

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.start

    @property
    def e2el(self) -> float:
        """Until the last token: what the server sends after it (`usage`) is not waited for by anyone."""
        return self.token_times[-1] - self.start

    @property
    def tpot(self) -> float | None:
        """Mean seconds a token after the first; None of a single token."""
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None

    @property
    def itls(self) -> np.ndarray:
        """Seconds between chunks: [chunks - 1].  A chunk may hold several tokens, or none that shows yet."""
        return np.diff(self.token_times)

    def to_json(self, begin: float) -> dict[str, Any]:
        """`begin`: when the run did, in seconds of `time.perf_counter`.  A failed request has no latencies."""
        sent = {"start_s": self.start - begin, "end_s": self.end - begin, "status": self.status, "error": self.error}
        if self.error:
            return sent
        return sent | {
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "ttft_ms": 1e3 * self.ttft,
            "tpot_ms": None if self.tpot is None else 1e3 * self.tpot,
            "e2el_ms": 1e3 * self.e2el,
            "itl_ms": [round(1e3 * gap, 3) for gap in self.itls.tolist()],
        }


@dataclass(frozen=True)
class Summary:
    """Of one metric, in milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]


@dataclass(frozen=True)
class Figures:
    """All figures of a run.  Throughputs are a second of `duration`; a metric that no request has is None."""

    completed: int
    failed: int
    duration: float  # seconds
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    request_goodput: float | None  # None without --goodput
    output_throughput: float
    total_token_throughput: float
    max_output_tokens_per_s: float  # of the best whole second
    max_concurrent_requests: int
    metrics: dict[str, Summary | None]  # a key for each of METRICS

    def to_json(self) -> dict[str, Any]:
        """Flat, with the keys of vLLM's result files: mean_ttft_ms, p99_itl_ms and so on."""
        flat = {name: value for name, value in vars(self).items() if name != "metrics"}
        for metric, summary in self.metrics.items():
            if summary is not None:
                flat |= {f"{name}_{metric}_ms": getattr(summary, name) for name in ("mean", "median", "std")}
                flat |= {f"p{p:g}_{metric}_ms": value for p, value in summary.percentiles.items()}
        return flat


def compute_figures(
    records: Sequence[RequestRecord], duration: float, percentiles: Collection[float], goodput: Mapping[str, float]
) -> Figures:
    """`duration`: seconds of the whole run; `percentiles`: which to give of each metric, P99 always being one;
    `goodput`: the most milliseconds, by metric, that a request may take to count as good."""
    done = [record for record in records if not record.error]
    values = {
        "ttft": np.array([record.ttft for record in done]),
        "tpot": np.array([record.tpot for record in done if record.tpot is not None]),
        "itl": np.concatenate([record.itls for record in done]) if done else np.empty(0),
        "e2el": np.array([record.e2el for record in done]),
    }
    num_good = sum(all(1e3 * (getattr(record, m) or 0) <= most for m, most in goodput.items()) for record in done)
    num_input, num_output = sum(r.num_prompt_tokens for r in done), sum(r.num_output_tokens for r in done)
    return Figures(
        completed=len(done),
        failed=len(records) - len(done),
        duration=duration,
        total_input_tokens=num_input,
        total_output_tokens=num_output,
        request_throughput=len(done) / duration,
        request_goodput=num_good / duration if goodput else None,
        output_throughput=num_output / duration,
        total_token_throughput=(num_input + num_output) / duration,
        max_output_tokens_per_s=float(max(tokens_per_bin(records, 1.0), default=0.0)),
        max_concurrent_requests=int(max(concurrency(records)[1], default=0)),
        metrics={name: _summary(1e3 * values[name], {99.0, *percentiles}) for name in METRICS},
    )


def tokens_per_bin(records: Sequence[RequestRecord], seconds: float) -> np.ndarray:
    """Output tokens in each `seconds` since the first request was sent; a request's chunks count as equal shares of its
    tokens, since which chunk holds how many is not known."""
    done = [record for record in records if not record.error]
    if not done:
        return np.empty(0)
    begin = min(record.start for record in records)
    times = np.concatenate([record.token_times for record in done]) - begin
    shares = np.concatenate([np.full(len(r.token_times), r.num_output_tokens / len(r.token_times)) for r in done])
    return np.bincount((times / seconds).astype(int), weights=shares)


def concurrency(records: Sequence[RequestRecord]) -> tuple[np.ndarray, np.ndarray]:
    """(times at which it changes, in `time.perf_counter` seconds; requests that run from then on)."""
    times = np.array([record.end for record in records] + [record.start for record in records])
    changes = np.repeat([-1, 1], len(records))
    order = np.argsort(times, kind="stable")  # at one and the same time, ends come before starts
    return times[order], np.cumsum(changes[order])


def format_table(
    figures: Figures, shown: Collection[str], max_concurrency: int | None = None, request_rate: float = np.inf
) -> str:
    """The table that `vllm bench serve` prints.  `shown`: the metrics that get a part of their own."""
    rows: list[tuple[str, float | None]] = [
        ("Successful requests:", figures.completed),
        ("Failed requests:", figures.failed),
        ("Maximum request concurrency:", max_concurrency),
        ("Request rate configured (RPS):", request_rate if request_rate < np.inf else None),
        ("Benchmark duration (s):", figures.duration),
        ("Total input tokens:", figures.total_input_tokens),
        ("Total generated tokens:", figures.total_output_tokens),
        ("Request throughput (req/s):", figures.request_throughput),
        ("Request goodput (req/s):", figures.request_goodput),
        ("Output token throughput (tok/s):", figures.output_throughput),
        ("Peak output token throughput (tok/s):", figures.max_output_tokens_per_s),
        ("Peak concurrent requests:", figures.max_concurrent_requests),
        ("Total token throughput (tok/s):", figures.total_token_throughput),
    ]
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [_row(name, value) for name, value in rows if value is not None]
    for metric, (short, title) in METRICS.items():
        summary = figures.metrics[metric]
        if metric in shown and summary is not None:
            lines.append(f"{title:-^50}")
            lines += [_row(f"{name.capitalize()} {short} (ms):", getattr(summary, name)) for name in _MOMENTS]
            lines += [_row(f"P{p:g} {short} (ms):", value) for p, value in summary.percentiles.items()]
    return "\n".join([*lines, "=" * 50])


_MOMENTS = ("mean", "median", "std")


def _row(name: str, value: float) -> str:
    return f"{name:<40} {value if isinstance(value, int) else f'{value:.2f}':<10}".rstrip()


def _summary(milliseconds: np.ndarray, percentiles: Collection[float]) -> Summary | None:
    if not len(milliseconds):
        return None
    return Summary(
        mean=float(milliseconds.mean()),
        median=float(np.median(milliseconds)),
        std=float(milliseconds.std()),
        percentiles={p: float(np.percentile(milliseconds, p)) for p in sorted(percentiles)},
    )
