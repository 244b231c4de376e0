"""Detokenizer: the text of a growing list of tokens, never ending inside a UTF-8 character.

The text of a token may depend on those before it (a leading space, a character made of several byte tokens), so new
tokens are decoded together with the few before them, and what those few decode to alone is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NUM_CONTEXT_TOKENS = 5  # at least so many tokens of context; enough for every tokenizer's rules about spaces


class Detokenizer:
    """Incremental text of one request's output."""

    def __init__(self, tokenizer: Any, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        first = max(0, len(prompt_token_ids) - NUM_CONTEXT_TOKENS)
        while first > 0 and self._decode(prompt_token_ids[first:]).startswith("\ufffd"):
            first -= 1  # the context must not begin inside a character
        self._token_ids = list(prompt_token_ids[first:])
        self._start = 0  # the tokens before it are not decoded again; a character never straddles it
        self._done = len(self._token_ids)  # tokens whose text is out (or is the prompt's)

    def append(self, token_ids: Sequence[int], finished: bool) -> str:
        """Take new tokens; returns the text they complete.  A character cut short is held back until `finished`."""
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

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            token_ids, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False
        )
