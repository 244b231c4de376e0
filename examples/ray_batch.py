"""Answer a file of prompts on a Ray cluster: python examples/ray_batch.py in.jsonl out.jsonl --concurrency 2

A row is {"prompt": …} or {"messages": […]}.  Started again after it was stopped, it goes on where it was.
"""

import argparse
import sys

try:
    import ray

    from minivllm.ray import generate
except ImportError as error:
    sys.exit(f'ray_batch.py: {error}; pip install -e ".[ray]"')
except KeyboardInterrupt:
    sys.exit(130)

parser = argparse.ArgumentParser(description="Answer a .jsonl or .parquet file of prompts on a Ray cluster.")
parser.add_argument("input", help=".jsonl or .parquet, with prompt, prompt_token_ids or messages in each row")
parser.add_argument("output", help="the same kind of file, to be written")
parser.add_argument("--model", help="folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct")
parser.add_argument(
    "--address", help="of a running Ray cluster; default: the one that Ray finds, or one on this machine"
)
parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="engines at once (%(default)s)")
parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of an engine (%(default)s)")
parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="in an answer (%(default)s)")
parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; default: the model's own")
parser.add_argument("--chunk-size", type=int, default=64, metavar="N", help="rows of a chunk (%(default)s)")
args = parser.parse_args()

sampling_params = {"max_tokens": args.max_tokens}
if args.temperature is not None:
    sampling_params["temperature"] = args.temperature
try:
    if args.address:
        ray.init(args.address)
    summary = generate(
        args.input,
        args.output,
        args.model,
        sampling_params=sampling_params,
        concurrency=args.concurrency,
        chunk_size=args.chunk_size,
        tensor_parallel_size=args.tensor_parallel_size,
    )
except (ValueError, OSError, ImportError, RuntimeError) as error:
    sys.exit(f"ray_batch.py: {error}")
except KeyboardInterrupt:
    sys.exit(130)
print(f"{summary.num_rows} rows, {summary.num_answered_rows} answered now, {summary.num_failed_rows} of them failed")
