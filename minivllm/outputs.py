"""What a user gets back, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import numpy as np


@dataclass(slots=True)
class RequestMetrics:
    """Moments in a request's life, in seconds of `time.monotonic()`; None until reached."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step that computed a token of the prompt."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    # The same under vLLM's later names.
    queued_ts = property(lambda self: self.arrival_time)
    scheduled_ts = property(lambda self: self.first_scheduled_time)
    first_token_ts = property(lambda self: self.first_token_time)
    last_token_ts = property(lambda self: self.last_token_time)
    first_token_latency = time_to_first_token


@dataclass(slots=True)
class Logprob:
    """The natural logarithm of a token's probability, before penalties, temperature and the like.

    `rank` is 1 for the most likely token; `decoded_token` its text, None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """The logprobs of many tokens in six lists, whatever their number (SamplingParams.flat_logprobs): dicts of Logprobs
    are millions of objects for Python's garbage collector to go through.

    It is read like a list of these dicts, which are made when they are read.  Place i's entries are those from
    start_indices[i] to end_indices[i] in the other lists; the first token of a prompt has none.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, entries: dict[int, Logprob] | None) -> None:
        """Add the next token's."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (entries or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, places: Iterable[dict[int, Logprob] | None]) -> None:
        """Add several tokens'."""
        for entries in places:
            self.append(entries)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...
    def __getitem__(self, index: int | slice) -> dict[int, Logprob] | FlatLogprobs:
        if isinstance(index, slice):
            part = FlatLogprobs()
            part.extend(self[i] for i in range(*index.indices(len(self))))
            return part
        columns = (self.token_ids, self.logprobs, self.ranks, self.decoded_tokens)
        own = slice(self.start_indices[index], self.end_indices[index])
        entries = zip(*(column[own] for column in columns), strict=True)
        return {token_id: Logprob(*fields) for token_id, *fields in entries}


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.  `finish_reason` is "stop", "length", "repetition", "abort", "error" (one of the
    request's own functions has failed) or None (unfinished).

    `stop_reason` is the stop string, or the id of the stop_token_ids or of a further end-of-sequence token, that ended
    it, "repetition_detected", what the function that failed has raised, or why its grammar could not go on ("abort");
    else None.
    `logprobs` has a dict by token id for each of `token_ids`: the token sampled, then the most likely ones, or those of
    logprob_token_ids; None, like `cumulative_logprob`, the sum for the tokens sampled, if they were not asked for.
    With flat_logprobs they are FlatLogprobs.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | FlatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    lora_request = None  # here and below: vLLM's, of what there is not

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The output of one request.  `num_cached_tokens` prompt tokens came from the prefix cache.

    `prompt_logprobs`, if asked for, has an entry for each token of the prompt; the first is None.  With flat_logprobs
    they are FlatLogprobs.  `prompt_token_id_logprobs`: those of prompt_logprob_token_ids, [num_rows, num_ids] float32.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | FlatLogprobs | None = None
    prompt_token_id_logprobs: np.ndarray | None = field(default=None, compare=False)

    lora_request = encoder_prompt = encoder_prompt_token_ids = kv_transfer_params = None

    def raise_failure(self) -> None:
        """Raise ValueError if one of the request's own functions has failed."""
        for completion in self.outputs:
            if completion.finish_reason == "error":
                raise ValueError(completion.stop_reason)
