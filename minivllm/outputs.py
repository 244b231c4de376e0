"""What a user gets back, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(slots=True)
class Logprob:
    """The natural logarithm of a token's probability, before penalties, temperature and the like.

    `rank` is 1 for the most likely token; `decoded_token` its text, None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.  `finish_reason` is "stop", "length", "repetition", "abort" or None (unfinished).

    `stop_reason` is the stop string, or the id of the stop_token_ids, that ended it; None for end-of-sequence.
    `logprobs` has a dict by token id for each of `token_ids`: the token sampled, then the most likely ones, or those of
    logprob_token_ids; None, like `cumulative_logprob`, the sum for the tokens sampled, if they were not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The output of one request.  `num_cached_tokens` prompt tokens came from the prefix cache.

    `prompt_logprobs`, if asked for, has an entry for each token of the prompt; the first is None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
