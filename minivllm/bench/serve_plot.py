"""A picture of a run of `minivllm bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivllm.bench.result_file import save_picture
from minivllm.bench.serve_metrics import Figures, RequestRecord, Summary, concurrency, tokens_per_bin

HISTOGRAM_HEIGHT = 0.7  # of the axes, which leaves room for the legend above
NUM_BINS, MIN_GAPS = 60, 3  # of the throughput, and in a bin of it: in narrower ones it would be a comb


def plot(path: str, title: str, figures: Figures, records: Sequence[RequestRecord]) -> None:
    """Draw the distributions of TTFT and ITL, and tokens/s and running requests over time, in the format of the
    file's suffix.  At least one request must have been completed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    done = [record for record in records if not record.error]
    begin = min(record.start for record in records)
    duration = max(record.end for record in records) - begin
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    (ttft, itl), (throughput, running) = figure.subplots(2, 2)

    ttfts = np.array([1e3 * record.ttft for record in done])
    highest = _histogram(ttft, "Time to first token (TTFT)", "requests", ttfts, figures.metrics["ttft"])
    ttft.set_ylim(0, highest / HISTOGRAM_HEIGHT)
    itls = 1e3 * np.concatenate([record.itls for record in done])
    what = "gaps between chunks (log scale)"
    most_gaps = _histogram(itl, "Inter-token latency (ITL)", what, itls, figures.metrics["itl"])

    least = MIN_GAPS * np.median(itls) / 1e3 if len(itls) else 0.0
    seconds = duration / max(1, min(NUM_BINS, int(duration / max(least, 1e-3))))
    rates = tokens_per_bin(records, seconds) / seconds
    edges = seconds * np.arange(len(rates) + 1)
    throughput.stairs(rates, edges, fill=True, color="tab:blue", alpha=0.35)
    throughput.stairs(rates, edges, color="tab:blue", baseline=None)
    mean = figures.output_throughput
    throughput.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:,.0f} tok/s")
    throughput.set_title("Output throughput", fontsize=10, loc="left")
    throughput.set_ylabel("output tokens/s")

    times, counts = concurrency(records)
    peak = figures.max_concurrent_requests
    running.fill_between(times - begin, counts, step="post", color="tab:green", alpha=0.35, linewidth=0)
    running.step(times - begin, counts, where="post", color="tab:green", linewidth=1)
    running.axhline(peak, color="black", linewidth=1, linestyle="--", label=f"peak {peak:,}")
    running.set_title("Running requests", fontsize=10, loc="left")
    running.set_ylabel("requests")
    for axes, highest in ((throughput, max(rates.max(), mean)), (running, peak)):
        axes.set_xlabel("seconds since the first request")
        axes.set_xlim(0, duration)
        axes.set_ylim(0, 1.2 * highest)
    for axes in (ttft, itl, throughput, running):
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper right", edgecolor="white", framealpha=0.9, fontsize=9)
    if len(itls):
        itl.set_yscale("log")  # the few long gaps, when prompts of others are computed, are what to look at
        itl.set_ylim(0.8, 0.8 * (most_gaps / 0.8) ** (1 / HISTOGRAM_HEIGHT))
        itl.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most_gaps < 1000 else (1,)))
        itl.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        itl.yaxis.set_minor_formatter(NullFormatter())
    save_picture(path, figure)


def _histogram(axes: Any, name: str, what: str, milliseconds: np.ndarray, summary: Summary | None) -> float:
    """Draw the distribution; returns the height of the highest bar."""
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel(what)
    if summary is None:
        axes.text(0.5, 0.5, "no request had two chunks", ha="center", transform=axes.transAxes, color="grey")
        return 1.0
    # A few stragglers would press all others into one bar, so the axis ends a little after P99.
    largest, p99 = milliseconds.max(), summary.percentiles[99.0]
    right = largest if largest <= 2 * p99 else 1.5 * p99
    num_beyond = int((milliseconds > right).sum())
    counts, _, _ = axes.hist(milliseconds, bins=60, range=(0, right), color="tab:blue", alpha=0.5)
    axes.axvline(summary.median, color="black", linewidth=1, label=f"median {summary.median:,.1f} ms")
    axes.axvline(p99, color="tab:red", linewidth=1, linestyle="--", label=f"P99 {p99:,.1f} ms")
    if num_beyond:
        axes.plot([], [], " ", label=f"{num_beyond:,} beyond the axis, up to {largest:,.0f} ms")
    axes.set_xlim(0, right)
    return float(counts.max())
