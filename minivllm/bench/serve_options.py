"""The options of `minivllm bench serve`: what is a mistake in them is said before a request is sent."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable
from typing import Any

from minivllm.argument_types import at_least, json_object, output_file, picture_file
from minivllm.bench.serve_metrics import METRICS

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SLO_METRICS = ("ttft", "tpot", "e2el")
RESERVED = ("stream", "stream_options", "n", "prompt", "messages")  # in a body: what is measured rests on them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `bench serve`."""
    add = parser.add_argument_group("server").add_argument
    add("--backend", choices=ENDPOINTS, default="openai", help="v1/completions or v1/chat/completions (%(default)s)")
    add("--base-url", metavar="URL", help="the server, if not http://HOST:PORT")
    add("--host", default="127.0.0.1", help="(%(default)s)")
    add("--port", type=at_least(1, 65535), default=8000, metavar="N", help="(%(default)s)")
    add("--endpoint", metavar="PATH", help="default: that of the backend")
    add("--model", metavar="NAME", help="default: the first that the server names")
    add("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")
    add(
        "--ready-check-timeout-sec",
        type=_number(0),
        default=0,
        metavar="S",
        help="wait so long for the server to answer a test request; 0: send none (%(default)s)",
    )

    add = parser.add_argument_group("requests").add_argument
    add("--dataset-name", choices=["random", "custom"], default="random", help="(%(default)s)")
    add("--dataset-path", metavar="FILE", help='custom: JSONL with "prompt" or "messages", and perhaps "max_tokens"')
    add("--custom-output-len", type=at_least(1), default=256, metavar="N", help="of rows that say none (%(default)s)")
    add("--disable-shuffle", action="store_true", help="custom: keep the order of the file")
    add("--no-oversample", action="store_true", help="custom: send no row twice, be it fewer than --num-prompts")
    add("--random-input-len", type=at_least(0), default=1024, metavar="N", help="tokens (%(default)s)")
    add("--random-output-len", type=at_least(1), default=128, metavar="N", help="tokens (%(default)s)")
    add(
        "--random-range-ratio",
        type=_range_ratio,
        default="0.0",
        metavar="R",
        help='lengths are drawn from length ± R · length, R < 1, or {"input": R, "output": R} (%(default)s)',
    )
    add(
        "--random-prefix-len", type=at_least(0), default=0, metavar="N", help="more tokens, shared by all (%(default)s)"
    )
    add("--random-vocab-size", type=at_least(1), default=10000, metavar="N", help="ids are below this (%(default)s)")
    add("--num-prompts", type=at_least(1), default=1000, metavar="N", help="requests (%(default)s)")
    add("--num-warmups", type=at_least(0), default=0, metavar="N", help="requests before, not counted (%(default)s)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of prompts and arrivals (%(default)s)")

    add = parser.add_argument_group("load").add_argument
    add("--request-rate", type=_number(0, above=True), default=math.inf, metavar="R", help="a second (%(default)s)")
    add(
        "--burstiness",
        type=_number(0, above=True),
        default=1.0,
        metavar="B",
        help="shape of the gamma distribution of gaps: 1 is a Poisson process, less is more bursty (%(default)s)",
    )
    add("--max-concurrency", type=at_least(1), metavar="N", help="requests under way at most; default: any number")

    add = parser.add_argument_group("sampling").add_argument
    add("--ignore-eos", action="store_true", help="generate up to the output length; always so with random prompts")
    add("--temperature", type=_number(0), default=0.0, metavar="T", help="(%(default)s, greedy)")
    add("--top-p", type=_number(0, above=True), metavar="P", help="default: the server's")
    add("--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of each request")

    add = parser.add_argument_group("results").add_argument
    add(
        "--percentile-metrics",
        type=_metric_names,
        default=["ttft", "tpot", "itl"],
        metavar="M,…",
        help="what to print, of ttft, tpot, itl and e2el (ttft,tpot,itl)",
    )
    add("--metric-percentiles", type=_percentiles, default=[99.0], metavar="P,…", help="beside P99 (99)")
    add(
        "--goodput",
        type=_objective,
        nargs="+",
        default=[],
        metavar="M:MS",
        help="count requests that stay within all of these milliseconds, of ttft, tpot and e2el",
    )
    add("--disable-tqdm", action="store_true", help="no progress bar")
    add("--json", type=output_file, metavar="FILE", help="write all figures and every request")
    add("--plot", type=picture_file, metavar="FILE", help="draw the run (.png, .svg or .pdf)")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together, and for packages that are missing."""
    if importlib.util.find_spec("aiohttp") is None:
        raise ValueError("`bench serve` needs aiohttp: pip install 'minivllm[server]'")
    if args.base_url and not args.base_url.startswith(("http://", "https://")):
        raise ValueError(f"--base-url must begin with http:// or https://, got {args.base_url!r}")
    if args.base_url and args.base_url.rstrip("/").endswith("/v1") and (args.endpoint or "/v1").startswith("/v1"):
        raise ValueError("--base-url must not end in /v1, with which --endpoint begins")
    if args.endpoint and not args.endpoint.startswith("/"):
        raise ValueError(f"--endpoint must begin with /, got {args.endpoint!r}")
    if args.dataset_name == "custom" and not args.dataset_path:
        raise ValueError("--dataset-name custom needs --dataset-path")
    if args.dataset_name == "random" and args.dataset_path:
        raise ValueError("--dataset-path goes with --dataset-name custom")
    if args.dataset_name == "random" and not args.random_input_len + args.random_prefix_len:
        raise ValueError("--random-input-len and --random-prefix-len are both 0, which leaves no prompt")
    for name in RESERVED:
        if name in args.extra_body:
            raise ValueError(f"--extra-body must not set {name!r}")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they go into a result file: without the key, infinity in letters."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    values = {name: getattr(args, name) for name in vars(parser.parse_args([])) if name != "api_key"}
    return {name: "inf" if value == math.inf else value for name, value in values.items()}


def _number(least: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number, inf included, of at least `least`, or with `above` greater."""

    def parse(text: str) -> float:
        value = _float(text)
        if not (value > least if above else value >= least):  # so written, nan is refused
            raise argparse.ArgumentTypeError(f"must be a number {'above' if above else 'from'} {least:g}, got {text!r}")
        return value

    return parse


def _float(text: object) -> float:
    try:
        return float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _range_ratio(text: str) -> dict[str, float]:
    """An argparse type: a ratio for the lengths of input and output, or one for each."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        given = None
    ratios = given if isinstance(given, dict) else {"input": given, "output": given}
    ratios = {"input": 0.0, "output": 0.0} | ratios
    if len(ratios) != 2 or not all(0 <= _float(ratio) < 1 for ratio in ratios.values()):
        raise argparse.ArgumentTypeError(
            f'must be a number from 0 to below 1, or {{"input": R, "output": R}}, got {text!r}'
        )
    return {name: float(ratio) for name, ratio in ratios.items()}


def _metric_names(text: str) -> list[str]:
    """An argparse type: metrics, with commas between them."""
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"must be some of {','.join(METRICS)}, got {name!r}")
    return names


def _percentiles(text: str) -> list[float]:
    """An argparse type: percentiles, with commas between them."""
    values = [_float(part) for part in text.split(",")]
    if not all(0 <= value <= 100 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 to 100 with commas between them, got {text!r}")
    return values


def _objective(text: str) -> tuple[str, float]:
    """An argparse type: a metric of a request and the most milliseconds it may take."""
    name, _, value = text.partition(":")
    if name not in SLO_METRICS or not 0 <= _float(value) < math.inf:
        raise argparse.ArgumentTypeError(f"must be METRIC:MILLISECONDS, of {', '.join(SLO_METRICS)}, got {text!r}")
    return name, float(value)
