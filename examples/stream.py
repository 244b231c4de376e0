"""Print an answer as it comes: python examples/stream.py --prompt "What is the moon?" """

import argparse
import sys

from minivllm import LLM, SamplingParams

parser = argparse.ArgumentParser(description="Stream one answer.")
parser.add_argument("--prompt", default="Why is the sky blue?", help="(%(default)s)")
parser.add_argument("--model", help="folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct")
parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="(%(default)s)")
args = parser.parse_args()

try:
    llm = LLM(args.model)
    prompt = llm.preprocess_chat([{"role": "user", "content": args.prompt}])
    for output in llm.stream(prompt, SamplingParams(temperature=0, max_tokens=args.max_tokens)):
        print(output.outputs[0].text, end="", flush=True)
except (ValueError, OSError) as error:
    sys.exit(f"stream.py: {error}")
except KeyboardInterrupt:
    pass
print()
