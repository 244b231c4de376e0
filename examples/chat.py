"""Chat with a model in the terminal: python examples/chat.py; on a server: minivllm chat --url http://127.0.0.1:8000"""

import argparse
import sys

from minivllm.command import discard_output


def main() -> None:
    parser = argparse.ArgumentParser(description="Chat with a model in the terminal; /help lists the commands.")
    parser.add_argument("--model", help="folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="in an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens in a conversation; default: the model's")
    args = parser.parse_args()
    try:
        from minivllm import LLM, SamplingParams  # takes a moment, in which Ctrl-C may come
        from minivllm.chat import LocalModel, run

        options = dict(temperature=args.temperature, max_tokens=args.max_tokens)
        SamplingParams(**options)  # mistakes show before anything is loaded
        # Small blocks: only full ones are cached, so more of a short conversation is.
        llm = LLM(args.model, max_model_len=args.max_model_len, block_size=16)
        run(LocalModel(llm), args.system, options)
    except BrokenPipeError:  # nobody reads on
        discard_output()
    except (ValueError, OSError) as error:
        sys.exit(f"chat.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
