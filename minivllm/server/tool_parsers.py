"""Tool parsers: from the text of an answer to content and tool calls, while the text still grows.

Every family of models writes its calls in a form of its own; the parsers have vLLM's names.  What a parser finds
depends on the text alone, not on the pieces in which it came: text is given out once no continuation can make it part
of a call, and what looked like a call and is none is given out unchanged.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_DECODER = json.JSONDecoder(strict=False)  # models write plain line breaks inside strings
_LOOKAHEAD = 10  # characters; longer than any token that the decoder takes as a whole or not at all ("-Infinity")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MISTRAL_HEAD = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_MISTRAL_HEAD_BEGUN = re.compile(r"[\w.-]+\s*(?:\[[\w\s\[\]]*)?\Z")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called."""

    name: str
    arguments: str  # JSON text of an object


class _Incomplete(Exception):
    """The text ends before it is clear whether this is a call."""


class ToolParser:
    """Splits one answer into content and tool calls.  One object serves one output, from its first text to its last.

    Here for JSON after a marker, `{"name": ..., "arguments": {...}}` or a list of such objects.
    """

    markers: tuple[str, ...] = ()  # each announces a call
    closer = ""  # may stand behind a call
    openers = "{"  # how the JSON may begin
    bare = False  # whether a call at the very start, or right behind another one, needs no marker
    special = False  # whether a marker is, or in some models may be, a special token

    def __init__(self) -> None:
        self._held = ""  # text not given out yet
        self._num_tried = 0  # length of the held text when the call in it was last found incomplete
        self._behind_call = False
        self._at_start = True  # nothing but white space since the start, or since a call

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        """New text of the answer -> the content that can be shown now, and the calls that are complete now."""
        self._held += text
        # JSON ends at a bracket, so there is little use in decoding it again before one comes.  That it is broken may
        # show anywhere; looking when the text has doubled keeps the work linear.
        if len(self._held) < 2 * self._num_tried and "}" not in text and "]" not in text:
            return "", []
        return self._parse(final=False)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The answer ended -> the rest."""
        return self._parse(final=True)

    def _parse(self, final: bool) -> tuple[str, list[ToolCall]]:
        content = ""
        calls: list[ToolCall] = []
        self._num_tried = 0
        while not self._behind_call or self._pass_closer(final):
            place = self._find_marker()
            if place is None:
                content += self._take(len(self._held) if final else self._num_settled())
                break
            start, end = place
            try:
                new_calls, stop = self._read_calls(self._held, end)
            except (_Incomplete, ValueError, RecursionError) as error:
                if isinstance(error, _Incomplete) and not final:
                    content += self._take(len(self._held[:start].rstrip()))
                    self._num_tried = len(self._held)
                    break
                new_calls = []
            if new_calls:
                content += self._take(start).rstrip()
                self._held = self._held[stop - start :]
                self._behind_call = self._at_start = True
                calls += new_calls
            else:
                content += self._take(end)
                self._at_start = False
        return content, calls

    def _take(self, num_characters: int) -> str:
        """Cut off the beginning of the held text, as content."""
        content, self._held = self._held[:num_characters], self._held[num_characters:]
        self._at_start = self._at_start and not content.strip()
        return content

    def _pass_closer(self, final: bool) -> bool:
        """Drop white space and the closer behind a call.  Returns whether it is clear that no more of it comes."""
        self._held = self._held.lstrip()
        while self.closer and self._held.startswith(self.closer):
            self._held = self._held[len(self.closer) :].lstrip()
        self._behind_call = not final and self.closer.startswith(self._held)
        return not self._behind_call

    def _find_marker(self) -> tuple[int, int] | None:
        """Where the first marker in the held text starts and ends; a bare call has an empty one."""
        text = self._held
        if self.bare and self._at_start:
            start = len(text) - len(text.lstrip())
            if text.startswith("{", start):
                return start, start
        places = [(text.find(marker), marker) for marker in self.markers]
        return min(((start, start + len(marker)) for start, marker in places if start >= 0), default=None)

    def _num_settled(self) -> int:
        """How much of the held text, free of markers, is content: all but the beginning of one, and space before it."""
        text = self._held
        num_open = 0
        for marker in self.markers:
            begun = (n for n in range(min(len(marker) - 1, len(text)), num_open, -1) if text.endswith(marker[:n]))
            num_open = next(begun, num_open)
        return len(text[: len(text) - num_open].rstrip())

    def _read_calls(self, text: str, begin: int) -> tuple[list[ToolCall], int]:
        """The calls of the marker that ends at `begin`, and where they end.

        Raises _Incomplete if more text is needed to tell, ValueError if there is no call.
        """
        begin = _skip_space(text, begin)
        if text[begin] not in self.openers:
            raise ValueError("no JSON")
        value, end = _decode(text, begin)
        return [_to_call(item) for item in (value if isinstance(value, list) else [value])], end


class HermesParser(ToolParser):
    """`<tool_call>{...}</tool_call>`, the last tag optional: Hermes, Qwen2.5, Qwen3, SmolLM."""

    markers = ("<tool_call>",)
    closer = "</tool_call>"


class Llama3JsonParser(ToolParser):
    """`{"name": ..., "parameters": {...}}`, at the start or after `<|python_tag|>`, several parted by `;`: Llama 3."""

    markers = ("<|python_tag|>",)
    closer = ";"
    bare = True
    special = True


class MistralParser(ToolParser):
    """`[TOOL_CALLS] [{...}, ...]`, or each call `[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}`, the inner tags optional."""

    markers = ("[TOOL_CALLS]",)
    openers = "[{"
    special = True

    def _read_calls(self, text: str, begin: int) -> tuple[list[ToolCall], int]:
        name_begin = _skip_space(text, begin)
        if text[name_begin] in self.openers:
            return super()._read_calls(text, begin)
        head = _MISTRAL_HEAD.match(text, name_begin)
        if head is None:
            if _MISTRAL_HEAD_BEGUN.match(text, name_begin):
                raise _Incomplete
            raise ValueError("no name, or no arguments")
        arguments, end = _decode(text, head.end())
        return [_make_call(head[1], arguments)], end


class Phi4MiniJsonParser(ToolParser):
    """`functools[{...}]`, which vLLM's template asks for, or `<|tool_call|>[{...}]<|/tool_call|>`: Phi-4-mini."""

    markers = ("<|tool_call|>", "functools")
    closer = "<|/tool_call|>"
    openers = "[{"
    special = True


PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": Llama3JsonParser,
    "mistral": MistralParser,
    "phi4_mini_json": Phi4MiniJsonParser,
}


def guess_parser(chat_template: str | None) -> str | None:
    """The name of the parser for a model, by what its chat template writes; None if that shows none."""
    template = chat_template or ""
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template:
        # Qwen3-Coder and GLM write XML between these tags, in place of JSON.
        return None if "<function=" in template or "<arg_key>" in template else "hermes"
    if "<|tool_call|>" in template or "<|tool|>" in template or "functools[" in template:
        return "phi4_mini_json"
    # The templates of small Llamas, which have no built-in tools, do without the tag.
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters": ' in template):
        return "llama3_json"
    return None


def needs_special_tokens(name: str) -> bool:
    """Whether the marker may be a special token, which skip_special_tokens=True would remove from the text."""
    return PARSERS[name].special


def _skip_space(text: str, begin: int) -> int:
    """Where the white space at `begin` ends; _Incomplete if the text ends there."""
    while begin < len(text) and text[begin].isspace():
        begin += 1
    if begin == len(text):
        raise _Incomplete
    return begin


def _decode(text: str, begin: int) -> tuple[Any, int]:
    """The JSON value at `begin`, and where it ends.  Raises _Incomplete if there may yet be one, else ValueError."""
    try:
        return _DECODER.raw_decode(text, begin)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated string") or len(text) - error.pos < _LOOKAHEAD:
            raise _Incomplete from None
        raise
    except (ValueError, RecursionError):  # a long number, which may yet become a float; deep nesting
        raise _Incomplete from None


def _to_call(value: Any) -> ToolCall:
    """The call that a JSON value describes; ValueError if it describes none."""
    if not isinstance(value, dict) or not value.keys() & {"arguments", "parameters"}:
        raise ValueError("no call")
    return _make_call(value.get("name"), value.get("arguments", value.get("parameters")))


def _make_call(name: Any, arguments: Any) -> ToolCall:
    if isinstance(arguments, str):
        arguments = _DECODER.decode(arguments.strip() or "{}")
    if arguments is None:
        arguments = {}
    if not isinstance(name, str) or not name or _SURROGATE.search(name) or not isinstance(arguments, dict):
        raise ValueError("no call")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if _SURROGATE.search(text):  # half a character has no bytes; its escape has
        text = json.dumps(arguments)
    return ToolCall(name, text)
