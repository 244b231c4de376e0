"""A conversation in the terminal, with a model in this process or on a server.

What was said before comes out of the prefix cache, so that a long conversation is answered as fast as a short one.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from minivllm import openai_events
from minivllm.sampling_params import SamplingParams

HELP = """/reset        start a new conversation
/system TEXT  set the system prompt (without TEXT: the model's own)
/stats        what the conversation took so far
/help         this
/exit         leave (Ctrl-D too); Ctrl-C stops an answer"""


@dataclass
class Part:
    """A piece of an answer; the last one says how it ended, and all say the tokens so far, as far as they are known."""

    text: str
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    finish_reason: str | None = None


class ChatModel(Protocol):
    name: str
    max_model_len: int | None  # tokens of a conversation, if known

    def stream(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[Part]:
        """The answer, piece by piece.  Closing it stops the model.  Raises ValueError for what cannot be answered."""


class LocalModel:
    """A model in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.name: str = llm.model
        self.max_model_len: int | None = llm.config.max_model_len

    def stream(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[Part]:
        prompt = self.llm.preprocess_chat(messages)
        num_prompt, num_output = len(prompt["prompt_token_ids"]), 0
        assert self.max_model_len is not None
        if num_prompt >= self.max_model_len:
            raise ValueError(
                f"with this message the conversation has {num_prompt} tokens, and {self.max_model_len} is the limit; "
                "/reset starts a new one"
            )
        with closing(self.llm.stream(prompt, SamplingParams(**options))) as outputs:
            for output in outputs:
                completion = output.outputs[0]
                num_output += len(completion.token_ids)
                yield Part(completion.text, num_prompt, output.num_cached_tokens, num_output, completion.finish_reason)


class RemoteModel:
    """A model on an OpenAI-compatible server.  Raises ValueError if it does not answer, or cannot be asked."""

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--url must begin with http:// or https://, got {url!r}")
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1/"
        self._headers = {"Content-Type": "application/json"} | openai_events.authorization(api_key)
        with self._request("models") as response:
            try:
                models = {str(one["id"]): one.get("max_model_len") for one in json.load(response)["data"]}
            except (ValueError, LookupError, TypeError, AttributeError):
                models = {}
        if not models:
            raise ValueError(f"{self._url}models names no model")
        if model is not None and model not in models:
            raise ValueError(f"the server has no model {model!r}; it has {', '.join(models)}")
        self.name = model or next(iter(models))
        self.max_model_len = models[self.name]

    def stream(self, messages: list[dict[str, str]], options: dict[str, Any]) -> Iterator[Part]:
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        part, has_ended = Part(""), False
        with self._request("chat/completions", body | options) as response:
            for payload in _payloads(response):
                if has_ended := payload == openai_events.DONE:
                    break
                event = openai_events.decode(payload)
                usage = event.get("usage") or {}
                part.num_prompt_tokens = usage.get("prompt_tokens", part.num_prompt_tokens)
                part.num_output_tokens = usage.get("completion_tokens", part.num_output_tokens)
                details = usage.get("prompt_tokens_details") or {}
                part.num_cached_tokens = details.get("cached_tokens") or part.num_cached_tokens
                part.text = ""
                for choice in event.get("choices") or ():
                    part.text = (choice.get("delta") or {}).get("content") or ""
                    part.finish_reason = choice.get("finish_reason") or part.finish_reason
                yield part
        if not has_ended and part.finish_reason is None:
            raise ValueError("the server broke off in the middle of its answer, which is forgotten")

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(self._url + path, data, self._headers))
        except urllib.error.HTTPError as error:
            message = openai_events.http_error(error.code, error.read(), error.reason)
            remedy = "; give its key with --api-key or $OPENAI_API_KEY" if error.code == 401 else ""
            raise ValueError(f"the server says {message}{remedy}") from None
        except (urllib.error.URLError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{self._url} does not answer: {getattr(error, 'reason', error)}") from None


def _payloads(response: Any) -> Iterator[bytes]:
    """What the lines of a stream carry, up to where it ends or breaks off."""
    with suppress(http.client.HTTPException):
        yield from openai_events.payloads(response)


class Chat:
    """A conversation with a model, and figures about it.  options: those of SamplingParams."""

    def __init__(self, model: ChatModel, system: str | None, options: dict[str, Any]) -> None:
        self.model = model
        self.system = system
        self.options = options
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
        elif name == "/exit":
            note("/exit stands alone; this was more")
        else:
            note(f"there is no {name}; /help lists the commands")

    def answer(self, question: str) -> bool:
        """Stream an answer; returns whether there is one.  Ctrl-C ends it; what was said until then stays in the
        conversation."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": question}
        text, part, reason = "", Part(""), None
        start, first = time.monotonic(), None
        try:
            with closing(self.model.stream([*system, *self.turns, user], self.options)) as parts:  # type: ignore[type-var]
                for part in parts:
                    if first is None and (part.text or part.num_output_tokens):
                        first = time.monotonic()
                    text += part.text
                    print(part.text, end="", flush=True)
            reason = part.finish_reason
        except KeyboardInterrupt:
            reason = "stopped"
        except (ValueError, OSError) as error:
            if text:
                print()
            note(str(error))
            return False
        end = time.monotonic()
        if first is None:
            note("stopped before the first token; the message is forgotten")
            return False
        print()
        self.turns += [user, {"role": "assistant", "content": text}]
        self.num_answers += 1
        self.num_prompt_tokens += part.num_prompt_tokens
        self.num_cached_tokens += part.num_cached_tokens
        self.num_output_tokens += part.num_output_tokens
        num = part.num_output_tokens
        figures = [f"first after {1e3 * (first - start):.0f} ms"]
        if part.num_prompt_tokens:  # a server tells them at the end only
            rate = [f"{(num - 1) / (end - first):.1f} tokens/s"] if num > 1 else []
            cached = f"{part.num_cached_tokens} of {part.num_prompt_tokens} prompt tokens cached"
            figures = [f"{num} tokens", *rate, *figures, cached]
        note(self.ending(reason, part.num_prompt_tokens + num) + ", ".join(figures))
        return True

    def ending(self, reason: str | None, num_tokens: int) -> str:
        """Why an answer in a conversation of now `num_tokens` tokens ended, if not by itself."""
        if reason == "length" and self.model.max_model_len is not None and num_tokens >= self.model.max_model_len:
            return f"cut at {num_tokens} tokens of conversation, the limit (/reset starts a new one); "
        return {"length": "cut at --max-tokens; ", "stopped": "stopped; "}.get(reason or "", "")

    def print_stats(self) -> None:
        """What /stats shows."""
        cached = 100 * self.num_cached_tokens / max(1, self.num_prompt_tokens)
        note(
            f"answers: {self.num_answers}, of {self.num_output_tokens} tokens; "
            f"prompts: {self.num_prompt_tokens} tokens, {self.num_cached_tokens} ({cached:.0f}%) of them cached"
        )


def note(text: str) -> None:
    """Print what the program says, as opposed to the model: dim on a terminal."""
    print(f"\033[2m{text}\033[0m" if sys.stdout.isatty() else text, flush=True)


def run(model: ChatModel, system: str | None, options: dict[str, Any]) -> None:
    """Answer what is typed, line by line, until the end of input.  Raises ValueError if nobody is there and not one
    question could be answered."""
    if sys.stdin is None or sys.stdout is None:
        raise ValueError("a chat needs standard input and output")
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        note(f"{model.name}; /help lists the commands")
    chat, answered = Chat(model, system, options), []
    for line in _read_lines() if interactive else map(str.strip, sys.stdin):
        if line == "/exit":
            break
        with suppress(KeyboardInterrupt):  # a second Ctrl-C, after an answer was stopped
            if line.startswith("/"):
                chat.command(line)
            elif line:
                answered.append(chat.answer(line))
    if answered and not any(answered) and not interactive:
        raise ValueError("not one question was answered")


def _read_lines() -> Iterator[str]:
    """What the user types, line by line, until the end of input.  Ctrl-C gives up the line being typed."""
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
