"""Drafts for speculative decoding without a second model: what followed the last tokens where they occurred before.

Prompt lookup (Saxena 2023): the longest of the last few n-grams that the request has had before proposes the tokens
that came after it.  A step computes them along with the request's next token, samples after each of them, and keeps
what it would have sampled anyway (Leviathan et al. 2023): since noise is a function of seed and position, that is the
very output without speculation, greedy or not, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minivllm.validation import check_int, reject_unknown

DECAY = 0.85  # of the running mean of right tokens, a step


@dataclass(frozen=True)
class NgramConfig:
    """vLLM's speculative_config of method "ngram"."""

    num_speculative_tokens: int
    prompt_lookup_max: int  # longest n-gram looked up
    prompt_lookup_min: int

    @classmethod
    def from_dict(cls, given: Any) -> NgramConfig:
        """From {"method": "ngram", "num_speculative_tokens": k, …}.  Raises ValueError for anything else."""
        if not isinstance(given, Mapping) or given.get("method") not in ("ngram", "[ngram]"):
            raise ValueError(
                f'speculative_config must be a dict with method "ngram", the only one there is; got {given!r}'
            )
        names = ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        reject_unknown(given, names, "speculative_config")
        if "num_speculative_tokens" not in given:
            raise ValueError("speculative_config lacks num_speculative_tokens, how many tokens to draft at once")
        longest = given.get("prompt_lookup_max") or given.get("prompt_lookup_min") or 5
        shortest = given.get("prompt_lookup_min") or longest
        for name, value in (
            ("num_speculative_tokens", given["num_speculative_tokens"]),
            ("prompt_lookup_max", longest),
            ("prompt_lookup_min", shortest),
        ):
            check_int(f"speculative_config: {name}", value, 1)
        if shortest > longest:
            raise ValueError(
                f"speculative_config: prompt_lookup_min ({shortest}) is over prompt_lookup_max ({longest})"
            )
        return cls(given["num_speculative_tokens"], longest, shortest)


@dataclass(frozen=True)
class DraftLimits:
    """How many drafts there may be, and when they pay, which hangs on the device."""

    max_rows: int  # of a step that computes drafts, these included; 0: nothing is drafted
    price: float  # right tokens that a step with drafts must bring a single request

    def pay(self, expected: float, num_requests: int) -> bool:
        """Whether `expected` right tokens a step, of all requests together, are worth making `num_requests` wait.  The
        price rises faster than their number: preparing a step takes longer with more, and all of them wait for it."""
        return expected > 0 and expected >= self.price * num_requests**1.4


NO_DRAFTS = DraftLimits(0, 0.0)
ON_GPU = DraftLimits(64, 0.16)  # rows up to there cost little more than their attention
ON_CPU = DraftLimits(16, 0.3)


class NgramDrafter:
    """Of one request.  It learns what drafts are worth without computing any: the tokens are the same with them, so it
    watches how many of those that come it would have drafted."""

    def __init__(self, config: NgramConfig) -> None:
        self._config = config
        self._next: dict[tuple[int, ...], int] = {}  # n-gram: the place after its last occurrence
        self._num_indexed = 0  # tokens that are the last of an indexed n-gram
        self.expected = 0.0  # tokens that a draft adds to a step: the running mean of the right ones
        self._draft: list[int] = []  # of the step that begins with `_num_before` tokens
        self._num_before = 0

    def watch(self, token_ids: list[int]) -> None:
        """To be called when a token has come, with all of the request's."""
        came = token_ids[self._num_before :]
        right = num_right(self._draft, came)
        if right == len(came):
            return  # the step's last token is still to come
        self.expected = DECAY * self.expected + (1 - DECAY) * right
        self._num_before = len(token_ids)
        self._draft = self.propose(token_ids, self._config.num_speculative_tokens)

    def propose(self, token_ids: list[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `token_ids`; none if nothing is found.  Where these end the text goes on
        in a circle, as one does that repeats itself."""
        sizes = range(self._config.prompt_lookup_max, self._config.prompt_lookup_min - 1, -1)
        for end in range(self._num_indexed, len(token_ids) - 1):  # all but the n-grams that end the text
            for size in sizes:
                if size <= end + 1:
                    self._next[tuple(token_ids[end + 1 - size : end + 1])] = end + 1
        self._num_indexed = max(self._num_indexed, len(token_ids) - 1)
        for size in sizes:
            place = self._next.get(tuple(token_ids[-size:])) if size <= len(token_ids) else None
            if place is not None:
                period = len(token_ids) - place
                number = min(most, self._config.num_speculative_tokens)
                return [token_ids[place + i % period] for i in range(number)]
        return []


def num_right(drafted: list[int], sampled: list[int]) -> int:
    """How many of the drafted tokens, from the first on, are what was sampled."""
    count = 0
    while count < min(len(drafted), len(sampled)) and drafted[count] == sampled[count]:
        count += 1
    return count


def accepted(drafted: list[int], sampled: list[int]) -> list[int]:
    """The right ones of the tokens sampled: the first, and each as long as the one before it had been drafted."""
    return sampled[: num_right(drafted, sampled) + 1]
