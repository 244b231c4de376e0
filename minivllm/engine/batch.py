"""ScheduledBatch: the order form from the scheduler to the runner.

Plain lists (but for the masks, which go their own way), small enough to send to worker processes each step: it says
what changed since the last one, and the runner keeps the rest by slot (a request's place in the runner from its
admission until it ends or is preempted).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from minivllm.engine.grammar import TokenMasks
from minivllm.sampling_params import SamplingParams


@dataclass(slots=True)
class AdmittedRequest:
    """What the runner is told of a request when it starts (or starts again after preemption)."""

    slot: int
    token_ids: list[int]  # all known ones
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: list[int]  # all that end texts: not to be sampled before min_tokens
    bad_word_ids: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class ScheduledBatch:
    """One step.  Row i computes tokens [num_computed[i], num_computed[i] + num_scheduled[i]) of slots[i].

    The first `num_decodes` rows each compute the one token that the step before sampled, which only the runner knows;
    the tokens of all other rows are among those named when the request was admitted.
    """

    admitted: list[AdmittedRequest] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    num_computed: list[int] = field(default_factory=list)
    num_scheduled: list[int] = field(default_factory=list)
    num_decodes: int = 0
    sampled_rows: list[int] = field(default_factory=list)  # rows that reach their last token, so sample the next
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)  # slot, first column, block ids
    prompt_logprobs_rows: list[int] = field(default_factory=list)  # rows whose prompt tokens' logprobs are wanted
    token_masks: TokenMasks = field(default_factory=TokenMasks)  # by number in `sampled_rows`
    # Those of `sampled_rows`, by their number there, that have logits_processors; and their ids of prompt and output.
    processed: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    # In a step of decodes only, for some rows: tokens that may follow theirs, to be computed too.  A token is sampled
    # after each.
    drafts: list[tuple[int, list[int]]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(self.num_scheduled)


@dataclass(slots=True)
class TokenLogprobs:
    """The log probability of a token, its rank (1: the most likely), and those of the most likely tokens, or of those
    that the request has named."""

    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]

    def first(self, num_top: int) -> TokenLogprobs:
        """The same with fewer of the other tokens."""
        return TokenLogprobs(self.logprob, self.rank, self.top_token_ids[:num_top], self.top_logprobs[:num_top])


@dataclass(slots=True)
class StepResult:
    """What a step found out."""

    tokens: list[int]  # of the batch's `sampled_rows`
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)  # of `tokens`, or empty: nobody asked
    draft_tokens: list[list[int]] = field(default_factory=list)  # of the batch's `drafts`: sampled after each token
    failed: dict[int, str] = field(default_factory=dict)  # by number in `sampled_rows`: why there is no token
    # For each of `prompt_logprobs_rows`, of the tokens after those computed: num_computed + 1, … in the prompt.
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
