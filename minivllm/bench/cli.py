"""The command line of the benchmarks.  What needs torch is imported once the arguments are known to be right."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivllm.argument_types import at_least, output_file, picture_file
from minivllm.bench.result_file import write_json
from minivllm.bench.workload import NANO, SHAPES, Workload, write_config
from minivllm.command import exit_status, print_any_text
from minivllm.config import EngineConfig
from minivllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minivllm import LLM

COMMANDS = {
    "throughput": "end-to-end tokens/s of many requests at once",
    "latency": "seconds of one batch, from its prompts to its last tokens",
    "serve": "requests at a given rate to any OpenAI-compatible server",
    "kernels": "the decode-attention kernel beside a token-by-token one, on a GPU",
}


def main(argv: Sequence[str], prog: str = "bench.py") -> int:
    """Run a benchmark with these arguments; returns the exit status.  A user's mistakes are one line on stderr.

    Without the name of one it is throughput, for `bench.py`.
    """
    print_any_text()
    first = argv[0] if argv else ""
    command, rest = (first, argv[1:]) if first in COMMANDS else ("throughput", argv)
    named = prog if rest is argv else f"{prog} {command}"

    def run() -> int | None:
        if first not in COMMANDS and (prog != "bench.py" or (first and not first.startswith("-"))):
            return _explain_commands(first, prog)
        if command == "kernels":
            _bench_kernels(parse_kernels(rest, named))
        elif command == "serve":
            _bench_serve(rest, named)
        elif command == "latency":
            _bench_latency(parse_latency(rest, named))
        else:
            _bench_throughput(parse_throughput(rest, named))
        return None

    return exit_status(named, run)


def _explain_commands(first: str, prog: str) -> int:
    """What there is, in answer to a first argument that is no command; returns the exit status."""
    if first in ("", "-h", "--help"):
        lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
        out = sys.stdout if first else sys.stderr
        print(
            f"usage: {prog} COMMAND [options]\n", *lines, f"\n`{prog} COMMAND --help` explains one.", sep="\n", file=out
        )
        return 0 if first else 2
    wrong = f"name a benchmark before {first}" if first.startswith("-") else f"there is no benchmark {first!r}"
    print(f"{prog}: error: {wrong}; there are {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def parse_throughput(argv: Sequence[str], prog: str = "bench.py") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [options]" + (f"  or  {prog} COMMAND [options]" if prog == "bench.py" else ""),
        description="End-to-end tokens/s of minivllm.",
        epilog=f"Commands: {', '.join(COMMANDS)}; throughput if none is named." if prog == "bench.py" else None,
    )
    add = parser.add_argument
    _add_engine(parser)
    add("--num-prompts", type=at_least(1), metavar="N", help="requests; default: 256 on a GPU, 16 on a CPU")
    add("--input-len", type=at_least(1), metavar="N", help="prompt tokens; default: 100-1024 on a GPU, 64 on a CPU")
    add("--output-len", type=at_least(1), metavar="N", help="output tokens; default: 100-1024 on a GPU, 64 on a CPU")
    add("--temperature", type=float, metavar="T", help="default: 0.6 on a GPU, 0 (greedy) on a CPU")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of the workload and of sampling (%(default)s)")
    add("--max-num-seqs", type=at_least(1), metavar="N", help="requests that run at once at most; default: 256")
    add("--compare", choices=["hf"], help="run the same requests through Hugging Face generate too")
    add("--json", type=output_file, metavar="FILE", help="write all figures, requests and the time series")
    add("--plot", type=picture_file, metavar="FILE", help="draw the run, on a GPU a step too (.png, .svg or .pdf)")
    add("--profile", type=output_file, metavar="FILE", help="write a trace of the first steps, for ui.perfetto.dev")
    args = parser.parse_args(argv)
    if args.profile and args.tensor_parallel_size > 1:
        parser.error("--profile traces this process; leave --tensor-parallel-size out")
    if args.compare and args.model and args.model.endswith(".gguf"):
        parser.error("--compare hf does not read .gguf files; give a folder or a hub id")
    return args


def _add_engine(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct")
    what.add_argument("--shape", choices=SHAPES, help="a public model's shape with random weights")
    add = parser.add_argument
    add("--dtype", default="auto", help="float32, bfloat16 or float16; default: the model's, on a CPU float32")
    add("--max-model-len", type=at_least(1), metavar="N", help="default: the model's; 4096 with --shape")
    add("--tensor-parallel-size", type=at_least(1), default=1, metavar="N", help="GPUs that share it (%(default)s)")
    add("--eager", action="store_true", help="no CUDA graphs")


def parse_latency(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = _parser(prog, "Seconds of one batch, from its prompts to its last tokens.")
    _add_engine(parser)
    add = parser.add_argument
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="prompts at once (%(default)s)")
    add("--input-len", type=at_least(1), default=32, metavar="N", help="prompt tokens (%(default)s)")
    add("--output-len", type=at_least(1), default=128, metavar="N", help="output tokens (%(default)s)")
    add(
        "--num-iters-warmup",
        type=at_least(0),
        default=2,
        metavar="N",
        help="runs before those that count (%(default)s)",
    )
    add("--num-iters", type=at_least(1), default=5, metavar="N", help="runs that count (%(default)s)")
    add("--json", type=output_file, metavar="FILE", help="write all figures")
    return parser.parse_args(argv)


def parse_kernels(argv: Sequence[str], prog: str) -> argparse.Namespace:
    parser = _parser(prog, "Time of decode attention and KV bytes read a second, on a GPU.")
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="tokens in a KV block (%(default)s)")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures")
    return parser.parse_args(argv)


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    """One whose usage is a line: a mistake is what its user is to see, --help has all options."""
    return argparse.ArgumentParser(prog=prog, usage="%(prog)s [options]", description=description)


def _bench_throughput(args: argparse.Namespace) -> None:
    import torch

    from minivllm.bench import kernels, profile, report, throughput

    EngineConfig(seed=args.seed)  # mistakes show before anything is loaded
    SamplingParams(temperature=args.temperature or 0.0)
    on_gpu = torch.cuda.is_available()
    lengths = NANO if on_gpu else (64, 64)
    workload = Workload(
        num_prompts=args.num_prompts or (256 if on_gpu else 16),
        input_len=(args.input_len, args.input_len) if args.input_len else lengths,
        output_len=(args.output_len, args.output_len) if args.output_len else lengths,
        temperature=(0.6 if on_gpu else 0.0) if args.temperature is None else args.temperature,
        seed=args.seed,
    )
    name = "SmolLM2-135M-Instruct (embedded)" if args.model is None else args.model
    if args.shape:
        name = f"{args.shape}, random weights"
    setup = {
        "model": name,
        "device": report.device_name("cuda:0" if on_gpu else "cpu"),
        "versions": report.versions(),
        "workload": str(workload),
    }
    report.print_pairs(setup)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as at_the_end:
        model = _model(args, folder)
        _check_lengths(args, model, workload.input_len[1], workload.output_len[1])
        start = time.perf_counter()
        llm = _load(args, model, max_num_seqs=args.max_num_seqs, seed=args.seed)
        start_up_s = time.perf_counter() - start
        setup["engine"] = report.engine(llm)
        report.print_pairs({"engine": setup["engine"]})
        figures, outputs, moments = throughput.measure(llm, workload)
        report.print_throughput(figures, start_up_s)
        content: dict[str, Any] = {
            "setup": setup,
            "workload": asdict(workload),
            "figures": {**asdict(figures), "start_up_s": start_up_s},
            "requests": report.requests_json(outputs),
            "series": report.series_json(moments),
        }
        if args.json:
            at_the_end.callback(write_json, args.json, content)  # whatever comes of the rest
        step = None
        if args.profile or (args.plot and on_gpu and args.tensor_parallel_size == 1):
            path = args.profile or str(Path(folder) / "trace.json")
            batches = profile.trace(llm, workload, path)
            if on_gpu:
                step = profile.decode_step(llm, batches, path, kernels.read_bandwidth())
        if step is not None:
            report.print_decode_step(step)
            content["decode_step"] = asdict(step)
        if args.compare:
            from minivllm.bench import hf

            dtype, device = llm.config.dtype, llm.config.device
            prompts, output_lens = workload.draw(llm.model_config.vocab_size)
            llm.shutdown()
            seconds = hf.generate(model, bool(args.shape), prompts, output_lens, workload.temperature, dtype, device)
            content["hugging_face"] = report.print_comparison(figures, seconds, hf.GROUP_SIZE)
    if args.plot:
        report.plot(args.plot, f"{name} on {setup['device']}\n{workload}", figures, moments, step)


def _model(args: argparse.Namespace, folder: str) -> str:
    """The model that the arguments name; a shape becomes one in `folder`."""
    from minivllm.loading import embedded_model

    if args.shape:
        write_config(args.shape, folder)
        return folder
    return embedded_model() if args.model is None else args.model


def _check_lengths(args: argparse.Namespace, model: str, input_len: int, output_len: int) -> None:
    """Raise ValueError, before anything is loaded, if requests of so many tokens will not fit."""
    from minivllm.bench import throughput
    from minivllm.loading.resolve import resolve
    from minivllm.model_config import ModelConfig

    limit = _max_model_len(args)
    if limit is None:
        files = resolve(model, need_tokenizer=False, need_weights=False)
        limit = ModelConfig.from_hf(files.config, files.generation_config).default_max_model_len
    throughput.check_lengths(limit, input_len, output_len)


def _max_model_len(args: argparse.Namespace) -> int | None:
    return args.max_model_len or (4096 if args.shape else None)


def _load(args: argparse.Namespace, model: str, **options: Any) -> LLM:
    from minivllm import LLM

    return LLM(
        model,
        load_format="dummy" if args.shape else "auto",
        skip_tokenizer_init=True,
        dtype=args.dtype,
        max_model_len=_max_model_len(args),
        enforce_eager=args.eager,
        tensor_parallel_size=args.tensor_parallel_size,
        **options,
    )


def _bench_serve(argv: Sequence[str], prog: str) -> None:
    from minivllm.bench import serve

    parser = _parser(prog, "Send requests to an OpenAI-compatible server and time it.")
    serve.add_arguments(parser)
    serve.run(parser.parse_args(argv))


def _bench_latency(args: argparse.Namespace) -> None:
    from minivllm.bench import latency, report

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = _model(args, folder)
        _check_lengths(args, model, args.input_len, args.output_len)
        llm = stack.enter_context(_load(args, model, max_num_seqs=args.batch_size))
        seconds = latency.measure(
            llm, args.batch_size, args.input_len, args.output_len, args.num_iters_warmup, args.num_iters
        )
        figures = latency.figures(seconds, args.batch_size * args.output_len)
        report.print_pairs({"engine": report.engine(llm), **{k: f"{v:.4g}" for k, v in figures.items()}})
    if args.json:
        write_json(args.json, {"seconds": seconds, **figures})


def _bench_kernels(args: argparse.Namespace) -> None:
    import torch

    EngineConfig(block_size=args.block_size)  # refuses what there is not
    if not torch.cuda.is_available():
        raise ValueError("this times GPU kernels, and there is no CUDA GPU here")
    from minivllm.bench import kernels, report

    print(f"decode attention on {torch.cuda.get_device_name()}, bfloat16, blocks of {args.block_size} tokens")
    print(report.versions(), flush=True)
    rows = kernels.run(args.block_size)
    if args.json:
        write_json(args.json, rows)
