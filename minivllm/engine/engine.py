"""Engine: requests in, outputs out, one step at a time.

A step schedules, launches, and then reads the tokens of the step launched before it (or, without async scheduling, its
own), so that on a GPU the next step is already queued while the tokens of the last one are looked at.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Iterable, KeysView
from functools import partial
from typing import Any, Protocol

from minivllm.child_process import check_importable
from minivllm.config import EngineConfig
from minivllm.engine.batch import ScheduledBatch, StepResult
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.grammar import Grammar, GrammarCompiler
from minivllm.engine.ngram import NgramConfig, NgramDrafter
from minivllm.engine.output_processor import OutputProcessor
from minivllm.engine.request import Request
from minivllm.engine.scheduler import Scheduler
from minivllm.model_config import ModelConfig
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import SamplingParams, StructuredOutputsParams


class PendingTokens(Protocol):
    """The result of a step that may still be running."""

    def wait(self) -> StepResult:
        """Wait for it."""


class Executor(Protocol):
    """Whoever runs the steps."""

    num_blocks: int

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Launch a step."""

    def check(self) -> None:
        """Raise if there is nobody left to run them."""

    def shutdown(self) -> None:
        """Free what it holds."""


class Engine:
    """Runs requests.  `config` must be resolved; `tokenizer` may be None, and then outputs have no text."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, executor: Executor, tokenizer: Any) -> None:
        assert config.max_model_len and config.max_num_seqs and config.max_num_batched_tokens, "config is not resolved"
        self.config = config
        self.model_config = model_config
        self.executor = executor
        self.tokenizer = tokenizer
        eos_token_ids = list(model_config.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos_token_ids.insert(0, tokenizer.eos_token_id)
        given = config.speculative_config
        self._ngram = None if given is None else NgramConfig.from_dict(given)
        self.scheduler = Scheduler(
            BlockManager(executor.num_blocks, config.block_size, config.enable_prefix_caching),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            [token_id for token_id in eos_token_ids if token_id < model_config.vocab_size],
            model_config.longest_window,
            config.draft_limits,
        )
        self._max_in_flight = 2 if config.async_scheduling else 1
        self._pending: deque[PendingTokens] = deque()
        self._progressed: list[Request] = []  # got a token or ended, and are still to be reported
        self._outputs = OutputProcessor(tokenizer)
        self._grammars: GrammarCompiler | None = None  # made when the first request needs it
        self._making_grammars = threading.Lock()
        self._num_requests = 0

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> list[list[int]]:
        """Raise ValueError if a request with this prompt cannot be run.  Returns the tokens of its bad words."""
        limit, vocab_size = self.config.max_model_len, self.model_config.vocab_size
        assert limit is not None
        if not prompt_token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt_token_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt_token_ids)} tokens, but max_model_len is {limit} and must hold at least "
                "one token of output too; shorten the prompt or raise max_model_len"
            )
        ids_by_name = {
            "prompt_token_ids": prompt_token_ids,
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or [],
            "logit_bias": list(params.logit_bias or ()),
            "logprob_token_ids": params.logprob_token_ids or [],
            "prompt_logprob_token_ids": [max(0, *row) for row in params.prompt_logprob_token_ids or ()],
        }
        for name, ids in ids_by_name.items():
            if min(ids, default=0) < 0 or max(ids, default=0) >= vocab_size:
                bad = next(i for i in ids if not 0 <= i < vocab_size)
                raise ValueError(f"{name}: token id {bad} is outside the vocabulary of {vocab_size} tokens")
        numbers = {
            "logprobs": params.logprobs if params.logprob_token_ids is None else None,  # these have their own limit
            "prompt_logprobs": params.prompt_logprobs,
            "prompt_logprob_token_ids": params.num_prompt_logprobs if params.prompt_logprob_token_ids else None,
        }
        for name, number in numbers.items():
            most = self.config.max_logprobs
            if number is not None and number > vocab_size:
                raise ValueError(f"{name} asks for {number}, and the vocabulary has {vocab_size} tokens")
            if number is not None and most >= 0 and (number > most or number == -1):
                asked = "all (-1)" if number == -1 else number
                raise ValueError(f"{name} asks for {asked}, more than max_logprobs ({most}); raise that (-1: no limit)")
        if params.prompt_logprob_token_ids is not None:
            num_rows, num_places = len(params.prompt_logprob_token_ids), len(prompt_token_ids) - 1
            if num_rows != num_places - (params.prompt_logprob_start or 0):
                raise ValueError(
                    f"prompt_logprob_token_ids has {num_rows} rows; the prompt has {num_places} tokens after its "
                    f"first one, of which prompt_logprob_start ({params.prompt_logprob_start or 0}) are left out"
                )
        for name in ("stop", "bad_words"):
            if getattr(params, name) and self.tokenizer is None:
                raise ValueError(f"{name} needs a tokenizer; leave skip_tokenizer_init=True out")
        excluded = {token_id for token_id, bias in (params.logit_bias or {}).items() if bias == float("-inf")}
        bad_word_ids = self._bad_word_ids(params)
        excluded |= {word_ids[0] for word_ids in bad_word_ids if len(word_ids) == 1}
        if params.min_tokens:
            excluded |= self.scheduler.eos_token_ids.union(params.stop_token_ids)  # which would end the output
        if params.allowed_token_ids and excluded.issuperset(params.allowed_token_ids):
            raise ValueError("min_tokens, bad_words and logit_bias leave none of the allowed_token_ids to sample")
        if self.config.tensor_parallel_size > 1:
            check_importable("logits_processors", params.logits_processors or ())
        self.scheduler.check_fits(self._max_num_tokens(prompt_token_ids, params))
        self.start_grammar(params.structured_outputs)
        return bad_word_ids

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> None:
        """Queue a request.  Raises ValueError, and changes nothing, if it cannot be run."""
        bad_word_ids = self.check_request(prompt_token_ids, params)
        own_ids = [request_id] if params.n == 1 else [f"{index}_{request_id}" for index in range(params.n)]
        if request_id in self._outputs.groups or not self.scheduler.requests.keys().isdisjoint(own_ids):
            raise ValueError(f"request_id {request_id!r} is in use; choose another")
        requests = []
        for index, own_id in enumerate(own_ids):
            self._num_requests += 1
            own = params
            if index > 0 and params.num_prompt_logprobs is not None:  # once is enough
                own = copy.copy(params)
                own.prompt_logprobs = own.prompt_logprob_token_ids = None
            requests.append(
                Request(
                    own_id,
                    prompt_token_ids,
                    own,
                    max_num_tokens=self._max_num_tokens(prompt_token_ids, params),
                    seed=self.config.seed * 1_000_003 + self._num_requests
                    if params.seed is None
                    else params.seed + index,
                    arrival_time=time.monotonic(),
                    bad_word_ids=bad_word_ids,
                    grammar=self.start_grammar(params.structured_outputs),
                    drafter=NgramDrafter(self._ngram) if self._ngram and params.can_be_drafted else None,
                )
            )
        self._outputs.add(request_id, prompt, params, requests)
        for request in requests:
            self.scheduler.add(request)

    def abort_requests(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests; returns the outputs (finish_reason "abort") of those that were still unfinished."""
        groups = [self._outputs.groups[i] for i in dict.fromkeys(request_ids) if i in self._outputs.groups]
        requests = [sample.request for group in groups for sample in group.samples if not sample.has_ended]
        self.scheduler.abort(requests)
        ended = set(requests)
        self._progressed = [request for request in self._progressed if request not in ended]
        return self._outputs.outputs(requests)

    @property
    def request_ids(self) -> KeysView[str]:
        """Of the unfinished requests."""
        return self._outputs.groups.keys()

    def has_unfinished_requests(self) -> bool:
        """Whether another step is needed."""
        return bool(self.scheduler.requests or self._pending or self._progressed)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the outputs that are due.

        If anything in it raises, the requests are kept, to be computed again by later steps, and the error is passed
        on.
        """
        try:
            batch = self.scheduler.schedule()
            if batch is not None:
                if batch.token_masks:
                    batch.token_masks.catch_up = partial(self._enter_results, 0)
                self._pending.append(self.executor.execute(batch))
            most = 0 if self.scheduler.waits_for_tokens else self._max_in_flight - 1
            if batch is None:
                most = min(most, len(self._pending) - 1)  # nothing to do before a result is there
            self._enter_results(most)
            outputs = self._outputs.outputs(dict.fromkeys(self._progressed))
        except BaseException:
            self._pending.clear()
            self.scheduler.recover()
            self._progressed = self._outputs.ended()
            raise
        self._progressed = []
        return outputs

    def _enter_results(self, most: int) -> None:
        """Wait for steps, oldest first, until at most so many are in flight, and enter what they found out."""
        while self._pending and len(self._pending) > most:
            progressed = self.scheduler.update(self._pending.popleft().wait())
            for request in progressed:
                if request.params.stop and (stop_string := self._outputs.find_stop(request)) is not None:
                    self.scheduler.stop(request, stop_string)
            self._progressed += progressed

    def start_grammar(self, params: StructuredOutputsParams | None) -> Grammar | None:
        """The grammar of an output, at its beginning.  It is compiled but once: a thread that asks for it before the
        request is added spares the steps the wait.  Raises ValueError for one that is not well-formed."""
        if params is None:
            return None
        if self.tokenizer is None:
            raise ValueError("structured_outputs needs a tokenizer; leave skip_tokenizer_init=True out")
        with self._making_grammars:
            if self._grammars is None:
                eos_token_ids = self.scheduler.eos_token_ids
                self._grammars = GrammarCompiler(self.tokenizer, self.model_config.vocab_size, eos_token_ids)
        return self._grammars.start(params)

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests that run keep their blocks."""
        self.scheduler.block_manager.reset_prefix_cache()
        return True

    def _max_num_tokens(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        limit = self.config.max_model_len
        assert limit is not None
        if params.max_tokens is not None:
            return min(len(prompt_token_ids) + params.max_tokens, limit)
        return max(len(prompt_token_ids) + 1, min(limit, self.scheduler.max_num_tokens))

    def _bad_word_ids(self, params: SamplingParams) -> list[list[int]]:
        """The tokens of each bad word, as a text's beginning and, where it differs, after a space."""
        found: list[list[int]] = []
        assert isinstance(params.bad_words, list)
        if not params.bad_words:
            return found
        words = [word.lstrip() for word in params.bad_words]
        ids = self.tokenizer(words + [" " + word for word in words], add_special_tokens=False).input_ids
        for word, plain, spaced in zip(params.bad_words, ids, ids[len(words) :], strict=False):
            if not plain or not spaced:
                raise ValueError(f"bad_words: {word!r} has no text to rule out")
            found.append(plain)
            if spaced[0] != plain[0] and len(spaced) == len(plain):
                found.append(spaced)
        # A tokenizer may know tokens that the model has no logits for.
        return [word_ids for word_ids in found if max(word_ids) < self.model_config.vocab_size]
