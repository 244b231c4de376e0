"""Request: one prompt on its way through the engine."""

from __future__ import annotations

from minivllm.engine.batch import TokenLogprobs
from minivllm.engine.grammar import Grammar
from minivllm.engine.ngram import NgramDrafter
from minivllm.outputs import RequestMetrics
from minivllm.sampling_params import SamplingParams


class Request:
    """The state of one request.  Only the scheduler changes its progress.

    `num_computed_tokens` (whose K and V are in the cache, or will be when the steps in flight have run) chases
    `num_tokens`.  The latter counts the known tokens and one placeholder for each token in flight, that is, sampled by
    a step whose result has not been read yet.
    """

    __slots__ = (
        "bad_word_ids",
        "block_hashes",
        "block_ids",
        "drafter",
        "finish_reason",
        "grammar",
        "logprobs",
        "max_num_tokens",
        "metrics",
        "num_admitted_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_dropped_blocks",
        "num_in_flight",
        "num_prompt_tokens",
        "num_published_blocks",
        "params",
        "prompt_logprobs",
        "request_id",
        "seed",
        "slot",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_num_tokens: int,
        seed: int,
        arrival_time: float,
        bad_word_ids: list[list[int]] | None = None,
        grammar: Grammar | None = None,
        drafter: NgramDrafter | None = None,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = seed
        self.token_ids = list(prompt_token_ids)  # the known tokens: prompt, then output
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_num_tokens = max_num_tokens  # it ends when it has so many
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_admitted_tokens = 0  # tokens known when it was last admitted: the runner was told them
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when it was first admitted
        self.slot = -1  # its place in the runner while it runs
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []  # of its full blocks of known tokens, as far as computed
        self.num_published_blocks = 0
        self.num_dropped_blocks = 0  # at the start of block_ids: no longer its own, and never read again
        self.bad_word_ids = bad_word_ids or []
        self.grammar = grammar
        self.drafter = drafter
        self.logprobs: list[TokenLogprobs] = []  # of the newest output tokens, if asked for
        self.prompt_logprobs: list[TokenLogprobs] = []  # of the prompt's tokens from the second on, if asked for
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.metrics = RequestMetrics(arrival_time)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_tokens(self) -> bool:
        """Whether its next step cannot be launched before its tokens are known: its functions are called with them."""
        return self.params.logits_processors is not None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.num_computed_tokens}/{self.num_tokens} tokens, slot {self.slot})"
