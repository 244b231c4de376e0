"""Slots: what the runner remembers of each running request, in numpy arrays changed in place.

A request keeps its slot from admission to its end, or until it is preempted, so a step only has to name slots and what
changed.  The last slot belongs to no request: padded rows point to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minivllm.engine.batch import ScheduledBatch
from minivllm.sampling_params import LogitsProcessor


@dataclass(frozen=True)
class BadWords:
    """Words that a request must not sample: the last token of each, and at the right of a row those before it."""

    before: np.ndarray  # [words, longest − 1] int64; −1: none
    last: np.ndarray  # [words] int64

    @classmethod
    def of(cls, words: Sequence[Sequence[int]]) -> BadWords:
        """From the token ids of each."""
        longest = max(map(len, words))
        padded = np.array([[-1] * (longest - len(word)) + list(word) for word in words], np.int64)
        return cls(padded[:, :-1], padded[:, -1])


class Slots:
    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, vocab_size: int) -> None:
        n = max_num_seqs + 1
        self.padding = max_num_seqs
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.block_table = np.zeros((n, -(-max_model_len // block_size)), np.int32)
        self.token_ids: list[np.ndarray] = [np.zeros(0, np.int32)] * n  # those known at admission
        self.num_prompt_tokens = np.zeros(n, np.int32)
        self.temperature = np.zeros(n, np.float32)
        self.seed = np.zeros(n, np.int64)
        self.top_k = np.zeros(n, np.int32)
        self.top_p = np.ones(n, np.float32)
        self.min_p = np.zeros(n, np.float32)
        self.truncates = np.zeros(n, bool)
        self.min_tokens = np.zeros(n, np.int32)
        self.stop_token_ids: list[list[int]] = [[]] * n
        self.presence_penalty = np.zeros(n, np.float32)
        self.frequency_penalty = np.zeros(n, np.float32)
        self.repetition_penalty = np.ones(n, np.float32)
        self.penalizes = np.zeros(n, bool)
        self.bad_words: list[BadWords | None] = [None] * n
        self.allowed_token_ids: list[list[int] | None] = [None] * n
        self.logit_bias: list[dict[int, float] | None] = [None] * n
        self.logits_processors: list[list[LogitsProcessor]] = [[]] * n
        self.remembers = np.zeros(n, bool)  # asks for what hangs on the tokens so far
        self.processes = np.zeros(n, bool)  # asks for more than the backend's own sampling
        self.num_logprobs = np.full(n, -1, np.int32)  # −1: none asked for
        self.num_prompt_logprobs = np.full(n, -1, np.int32)
        self.logprob_token_ids: list[list[int] | None] = [None] * n
        self.prompt_rows: list[tuple[int, list[list[int]]]] = [(0, [])] * n  # the first place, the token ids of each

    def apply(self, batch: ScheduledBatch) -> tuple[np.ndarray, np.ndarray]:
        """Take in what `batch` says is new.  Returns the changes to `block_table`: flat indices (int64), values
        (int32)."""
        for request in batch.admitted:
            slot, params = request.slot, request.params
            self.token_ids[slot] = np.array(request.token_ids, np.int32)
            self.num_prompt_tokens[slot] = request.num_prompt_tokens
            self.temperature[slot] = params.temperature
            self.seed[slot] = np.uint64(request.seed & 0xFFFFFFFFFFFFFFFF).astype(np.int64)
            self.top_k[slot], self.top_p[slot], self.min_p[slot] = params.top_k, params.top_p, params.min_p
            self.truncates[slot] = params.truncates
            self.min_tokens[slot] = params.min_tokens
            self.stop_token_ids[slot] = request.stop_token_ids
            self.presence_penalty[slot], self.frequency_penalty[slot] = (
                params.presence_penalty,
                params.frequency_penalty,
            )
            self.repetition_penalty[slot], self.penalizes[slot] = params.repetition_penalty, params.penalizes
            self.bad_words[slot] = BadWords.of(request.bad_word_ids) if request.bad_word_ids else None
            self.allowed_token_ids[slot], self.logit_bias[slot] = params.allowed_token_ids, params.logit_bias
            self.logits_processors[slot] = params.logits_processors or []
            self.remembers[slot] = params.penalizes or bool(request.bad_word_ids)
            asks = params.allowed_token_ids is not None or bool(params.logit_bias)
            self.processes[slot] = params.truncates or self.remembers[slot] or asks
            self.logprob_token_ids[slot] = params.logprob_token_ids
            self.prompt_rows[slot] = params.prompt_logprob_start or 0, params.prompt_logprob_token_ids or []
            for counts, asked in (
                (self.num_logprobs, params.logprobs), (self.num_prompt_logprobs, params.num_prompt_logprobs),
            ):  # fmt: skip
                counts[slot] = -1 if asked is None else self.vocab_size if asked == -1 else asked
        indices: list[int] = []
        values: list[int] = []
        for slot, column, blocks in batch.new_blocks:
            self.block_table[slot, column : column + len(blocks)] = blocks
            start = slot * self.block_table.shape[1] + column
            indices.extend(range(start, start + len(blocks)))
            values.extend(blocks)
        return np.array(indices, np.int64), np.array(values, np.int32)

    def slot_mapping(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the K and V of tokens at `positions` of `slots` go in the cache.  int64, one a token."""
        blocks = self.block_table[slots, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size
