"""Chat with a model in the terminal: python examples/chat.py

What was said before comes out of the prefix cache, so that a long conversation is answered as fast as a short one.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from minivllm import LLM, RequestMetrics, SamplingParams

HELP = """/reset        start a new conversation
/system TEXT  set the system prompt (without TEXT: the model's own)
/stats        what the conversation took so far
/help         this
/exit         leave (Ctrl-D too); Ctrl-C stops an answer"""


class Chat:
    """A conversation with a model, and figures about it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Start anew; the system prompt stays."""
        self.turns: list[dict[str, str]] = []
        self.num_answers = self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0

    def command(self, line: str) -> None:
        """Run a /command other than /exit."""
        name, _, text = line.partition(" ")
        if name == "/reset":
            self.reset()
            note("new conversation")
        elif name == "/system":
            self.system = text.strip() or None
            note("system prompt set" if self.system else "the model's own system prompt is back")
        elif name == "/stats":
            self.print_stats()
        elif name == "/help":
            note(HELP)
        else:
            note(f"there is no {name}; /help lists the commands")

    def answer(self, question: str) -> None:
        """Stream an answer.  Ctrl-C ends it; what was said until then stays in the conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": question}
        text, num_tokens, output, reason = "", 0, None, None
        try:
            prompt = self.llm.preprocess_chat([*system, *self.turns, user])
            self.check_length(len(prompt["prompt_token_ids"]))
            with closing(self.llm.stream(prompt, self.params)) as outputs:
                for output in outputs:
                    completion = output.outputs[0]
                    text += completion.text
                    num_tokens += len(completion.token_ids)
                    reason = completion.finish_reason
                    print(completion.text, end="", flush=True)
        except KeyboardInterrupt:
            reason = "stopped"
        except ValueError as error:
            return note(str(error))
        if output is None:
            return note("stopped before the first token; the message is forgotten")
        print()
        self.turns += [user, {"role": "assistant", "content": text}]
        self.num_answers += 1
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.num_cached_tokens
        self.num_output_tokens += num_tokens
        note(
            f"{self.ending(reason, len(output.prompt_token_ids) + num_tokens)}{num_tokens} tokens, "
            f"{speed(output.metrics, num_tokens)}, "
            f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens cached"
        )

    def check_length(self, num_tokens: int) -> None:
        """Raise ValueError if a prompt of so many tokens leaves no room for an answer."""
        limit = self.llm.config.max_model_len
        if num_tokens >= limit:
            raise ValueError(
                f"with this message the conversation has {num_tokens} tokens, and {limit} is the limit; "
                "/reset starts a new one"
            )

    def ending(self, reason: str | None, num_tokens: int) -> str:
        """Why an answer in a conversation of now `num_tokens` tokens ended, if not by itself."""
        if reason == "length" and num_tokens >= self.llm.config.max_model_len:
            return f"cut at {num_tokens} tokens of conversation, the limit (/reset starts a new one); "
        return {"length": "cut at --max-tokens; ", "stopped": "stopped; "}.get(reason, "")

    def print_stats(self) -> None:
        cached = 100 * self.num_cached_tokens / max(1, self.num_prompt_tokens)
        note(
            f"answers: {self.num_answers}, of {self.num_output_tokens} tokens; "
            f"prompts: {self.num_prompt_tokens} tokens, {self.num_cached_tokens} ({cached:.0f}%) of them cached"
        )


def speed(metrics: RequestMetrics, num_tokens: int) -> str:
    """Time to the first token, and tokens a second after it."""
    seconds = metrics.last_token_time - metrics.first_token_time
    rate = f"{(num_tokens - 1) / seconds:.1f} tokens/s, " if seconds else ""
    return f"{rate}first after {1e3 * metrics.time_to_first_token:.0f} ms"


def note(text: str) -> None:
    """Print what the program says, as opposed to the model: dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


def read_lines(interactive: bool) -> Iterator[str]:
    """What the user types, line by line, until the end of input.  Ctrl-C gives up the line being typed."""
    while True:
        try:
            yield input("> " if interactive else "").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            if interactive:
                print()
            return


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a model in the terminal; /help lists the commands.")
    parser.add_argument("--model", help="folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="in an answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, metavar="T", help="0 is greedy (%(default)s)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens in a conversation; default: the model's")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        # Small blocks: only full ones are cached, so more of a short conversation is.
        llm = LLM(args.model, max_model_len=args.max_model_len, block_size=16)
    except (ValueError, OSError) as error:
        sys.exit(f"chat.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.stdin.reconfigure(errors="replace")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        note(f"{llm.model}; /help lists the commands")
    chat = Chat(llm, params, args.system)
    for line in read_lines(interactive):
        if line == "/exit":
            break
        with suppress(KeyboardInterrupt):  # a second Ctrl-C, after an answer was stopped
            if line.startswith("/"):
                chat.command(line)
            elif line:
                chat.answer(line)


if __name__ == "__main__":
    main()
