"""Benchmarks of minivllm.

python bench.py                      end-to-end tokens/s: on a GPU nano-vLLM's workload, on a CPU a small one
python bench.py --shape llama2-7b    the same on a public model's shape, with random weights
python bench.py latency              seconds of one batch
python bench.py serve --port 8000    requests at a given rate to any OpenAI-compatible server
python bench.py kernels              the decode-attention kernel beside a token-by-token one
"""

import sys

from minivllm.bench.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
