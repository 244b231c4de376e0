"""Detokenizer: the text of a growing list of tokens, never ending inside a UTF-8 character.

The text of a token may depend on those before it (a leading space, a character made of several byte tokens), so new
tokens are decoded together with the few before them, and what those few decode to alone is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivllm.sampling_params import SamplingParams

NUM_CONTEXT_TOKENS = 5  # at least so many tokens of context; enough for every tokenizer's rules about spaces


class Detokenizer:
    """Incremental text of one request's output."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self.num_tokens = 0  # taken so far
        self._params = params
        self._num_searched = 0  # characters in which there is no stop string
        self._tokenizer = tokenizer
        first = last = max(0, len(prompt_token_ids) - NUM_CONTEXT_TOKENS)
        # The context must not begin inside a character, which has four bytes at most.
        while first > max(0, last - 3) and self._decode(prompt_token_ids[first:]).startswith("\ufffd"):
            first -= 1
        self._token_ids = list(prompt_token_ids[first:])
        self._start = 0  # the tokens before it are not decoded again; a character never straddles it
        self._done = len(self._token_ids)  # tokens whose text is out (or is the prompt's)

    def append(self, token_ids: Sequence[int], finished: bool) -> str:
        """Take new tokens; returns the text they complete.  A character cut short is held back until `finished`."""
        self.num_tokens += len(token_ids)
        self._token_ids.extend(token_ids)
        before = self._decode(self._token_ids[self._start : self._done])
        after = self._decode(self._token_ids[self._start :])
        if (after.endswith("\ufffd") and not finished) or len(after) <= len(before):
            return ""
        if len(self._token_ids) - self._done >= NUM_CONTEXT_TOKENS or self._done - self._start >= NUM_CONTEXT_TOKENS:
            self._start = self._done
        self._done = len(self._token_ids)
        new = after[len(before) :]
        self.text += new
        return new

    def find_stop(self, *, search: bool) -> str | None:
        """The first stop string in the text, which is cut there; one that began in text searched before counts too.
        Without `search`, stop strings in the text so far are passed over."""
        assert isinstance(self._params.stop, list)
        found = []
        for string in self._params.stop if search else []:
            place = self.text.find(string, max(0, self._num_searched - len(string) + 1))
            if place >= 0:
                found.append((place, string))
        self._num_searched = len(self.text)
        if not found:
            return None
        place, string = min(found)
        self.text = self.text[: place + len(string) if self._params.include_stop_str_in_output else place]
        return string

    def visible_text(self, finished: bool) -> str:
        """The text, without an end that may turn out to be the beginning of a stop string."""
        if finished or not self._params.stop or self._params.include_stop_str_in_output:
            return self.text
        return self.text[: max(0, len(self.text) - max(map(len, self._params.stop)) + 1)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._params.skip_special_tokens,
            spaces_between_special_tokens=self._params.spaces_between_special_tokens,
            clean_up_tokenization_spaces=False,
        )
