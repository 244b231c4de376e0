"""Detokenizer: the text of a growing list of tokens, never ending inside a UTF-8 character.

The text of a token may depend on those before it (a leading space, a character made of several byte tokens), so new
tokens are decoded together with the few before them, and what those few decode to alone is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minivllm.sampling_params import SamplingParams

NUM_CONTEXT_TOKENS = 5  # of context, or new at once: what was context before is then no longer decoded
MAX_PENDING_TOKENS = 32  # without any text: nothing will come of them
HOPELESS = "\ufffd" * 16  # no character has so many bytes that they all could still be one


def decoder(
    tokenizer: Any, skip_special_tokens: bool = False, spaces_between_special_tokens: bool = True
) -> Callable[[list[int]], str]:
    """A function from token ids to their text: that of the library below transformers, where there is one, which takes
    a quarter of the time."""
    if getattr(tokenizer, "is_fast", False):
        decode = tokenizer.backend_tokenizer.decode
        return lambda token_ids: decode(token_ids, skip_special_tokens=skip_special_tokens)
    return lambda token_ids: tokenizer.decode(
        token_ids,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
        clean_up_tokenization_spaces=False,
    )


class Detokenizer:
    """Incremental text of one request's output."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self.num_tokens = 0  # taken so far
        self._params = params
        self._num_searched = 0  # characters in which there is no stop string
        self._decode = decoder(tokenizer, params.skip_special_tokens, params.spaces_between_special_tokens)
        first = last = max(0, len(prompt_token_ids) - NUM_CONTEXT_TOKENS)
        # The context must not begin inside a character, which has four bytes at most.
        while first > max(0, last - 3) and self._decode(list(prompt_token_ids[first:])).startswith("\ufffd"):
            first -= 1
        self._token_ids = list(prompt_token_ids[first:])  # the context, and those whose text is not out
        text, end = self._decode(self._token_ids), len(self._token_ids)
        self._context, self._num_context = text, end  # the context's text
        while self._context.endswith("\ufffd") and 0 < self._num_context > end - 3:
            self._num_context -= 1  # a character that the prompt begins and does not end is the output's
            self._context = self._decode(self._token_ids[: self._num_context])
        self._torn = text[len(self._context) :]  # what there is of it: not to be shown if it stays so

    def append(self, token_ids: Sequence[int], finished: bool) -> str:
        """Take new tokens; returns the text they complete.  A character cut short is held back until `finished`."""
        if not token_ids and not finished:
            return ""
        self.num_tokens += len(token_ids)
        self._token_ids.extend(token_ids)
        text, end = self._decode(self._token_ids), len(self._token_ids)
        if text == self._context and end - self._num_context > MAX_PENDING_TOKENS:  # special tokens, which are skipped
            del self._token_ids[self._num_context :]
        if text.endswith("\ufffd") and not finished:
            if not text.endswith(HOPELESS):
                return ""
            # At most three tokens are the beginning of a character; where bytes are tokens, all before look torn too.
            texts = [(end - torn, self._decode(self._token_ids[: end - torn])) for torn in (1, 2, 3)]
            end, text = next((pair for pair in texts if not pair[1].endswith("\ufffd")), texts[-1])
        if len(text) <= len(self._context):
            return ""
        new = text[len(self._context) :].removeprefix(self._torn)
        self._torn = ""
        self.text += new
        if max(end - self._num_context, self._num_context) >= NUM_CONTEXT_TOKENS:
            del self._token_ids[: self._num_context]
            end -= self._num_context
            text = self._decode(self._token_ids[:end])
        self._context, self._num_context = text, end
        return new

    def find_stop(self, *, search: bool) -> str | None:
        """The stop string that ends first in the text, which is cut there; of several that end together the first in
        the list; one that began in text searched before counts too.  Without `search`, stop strings in the text so far
        are passed over."""
        assert isinstance(self._params.stop, list)
        found = []
        for index, string in enumerate(self._params.stop if search else []):
            place = self.text.find(string, max(0, self._num_searched - len(string) + 1))
            if place >= 0:
                found.append((place + len(string), index))
        self._num_searched = len(self.text)
        if not found:
            return None
        end, index = min(found)
        string = self._params.stop[index]
        self.text = self.text[: end if self._params.include_stop_str_in_output else end - len(string)]
        return string

    def visible_text(self, finished: bool) -> str:
        """The text, without an end that may turn out to be the beginning of a stop string."""
        if finished or not self._params.stop or self._params.include_stop_str_in_output:
            return self.text
        return self.text[: max(0, len(self.text) - max(map(len, self._params.stop)) + 1)]
