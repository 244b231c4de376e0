"""Serve a model with several replicas on a Ray cluster: python examples/ray_serve.py --replicas 2

The address and the API are those of `minivllm serve`; a request goes to the replica that has its prefix cached.
"""

import argparse
import sys

try:
    import ray
    from ray import serve

    from minivllm.ray_serve import application
except ImportError as error:
    sys.exit(f'ray_serve.py: {error}; pip install -e ".[ray]"')
except KeyboardInterrupt:
    sys.exit(130)

parser = argparse.ArgumentParser(description="Serve a model on Ray Serve.")
parser.add_argument("--model", help="folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct")
parser.add_argument(
    "--address", help="of a running Ray cluster; default: the one that Ray finds, or one on this machine"
)
parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
parser.add_argument("--replicas", type=int, metavar="N", help="engines; default: 1")
parser.add_argument("--autoscale", type=int, nargs=2, metavar=("MIN", "MAX"), help="engines, as many as the load needs")
parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of an engine (%(default)s)")
parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and output; default: the model's")
args = parser.parse_args()

engine_arguments = dict(tensor_parallel_size=args.tensor_parallel_size)
if args.max_model_len:
    engine_arguments["max_model_len"] = args.max_model_len
try:
    ray.init(args.address)
    on_gpus = ray.cluster_resources().get("GPU", 0) > 0
    app = application(
        args.model,
        num_replicas=args.replicas,
        autoscaling=tuple(args.autoscale) if args.autoscale else None,
        num_cpus=None if on_gpus else 1,
        engine_arguments=engine_arguments,
    )
    serve.start(http_options={"host": args.host, "port": args.port})
    serve.run(app, blocking=True)
except (ValueError, OSError, RuntimeError) as error:
    sys.exit(f"ray_serve.py: {error}")
except KeyboardInterrupt:
    sys.exit(130)
