"""Engine: requests in, outputs out, one step at a time.

A step schedules, launches, and then reads the tokens of the step launched before it (or, without async scheduling, its
own), so that on a GPU the next step is already queued while the tokens of the last one are looked at.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from minivllm.config import EngineConfig, ModelConfig
from minivllm.engine.batch import ScheduledBatch
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.detokenizer import Detokenizer
from minivllm.engine.request import Request
from minivllm.engine.scheduler import Scheduler
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams


class PendingTokens(Protocol):
    """The tokens of a step that may still be running."""

    def wait(self) -> list[int]:
        """The sampled tokens, in the order of the batch's `sampled_rows`."""


class Executor(Protocol):
    """Whoever runs the steps."""

    num_blocks: int

    def execute(self, batch: ScheduledBatch) -> PendingTokens:
        """Launch a step."""

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
        eos_token_ids = set(model_config.eos_token_ids)
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            eos_token_ids.add(tokenizer.eos_token_id)
        self.scheduler = Scheduler(
            BlockManager(executor.num_blocks, config.block_size, config.enable_prefix_caching),
            config.max_num_seqs,
            config.max_num_batched_tokens,
            eos_token_ids,
        )
        self._max_in_flight = 2 if config.async_scheduling else 1
        self._pending: deque[PendingTokens] = deque()
        self._detokenizers: dict[str, Detokenizer] = {}
        self._num_requests = 0

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raise ValueError if a request with this prompt cannot be run."""
        limit, vocab_size = self.config.max_model_len, self.model_config.vocab_size
        assert limit is not None
        if not prompt_token_ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(prompt_token_ids) >= limit:
            raise ValueError(
                f"the prompt has {len(prompt_token_ids)} tokens, but max_model_len is {limit} and must hold at least "
                "one token of output too; shorten the prompt or raise max_model_len"
            )
        for name, ids in (("prompt_token_ids", prompt_token_ids), ("stop_token_ids", params.stop_token_ids)):
            if min(ids, default=0) < 0 or max(ids, default=0) >= vocab_size:
                bad = next(i for i in ids if not 0 <= i < vocab_size)
                raise ValueError(f"{name}: token id {bad} is outside the vocabulary of {vocab_size} tokens")
        self.scheduler.check_fits(self._max_num_tokens(prompt_token_ids, params))

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, prompt: str | None = None
    ) -> None:
        """Queue a request.  Raises ValueError, and changes nothing, if it cannot be run."""
        self.check_request(prompt_token_ids, params)
        self._num_requests += 1
        request = Request(
            request_id,
            prompt_token_ids,
            params,
            max_num_tokens=self._max_num_tokens(prompt_token_ids, params),
            seed=self.config.seed * 1_000_003 + self._num_requests if params.seed is None else params.seed,
            arrival_time=time.monotonic(),
            prompt=prompt,
        )
        self.scheduler.add(request)
        if self.tokenizer is not None and params.detokenize:
            self._detokenizers[request_id] = Detokenizer(self.tokenizer, prompt_token_ids, params.skip_special_tokens)

    def abort_requests(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests; returns the outputs (finish_reason "abort") of those that were still unfinished."""
        aborted = [self.scheduler.abort(request_id) for request_id in request_ids]
        return [self._output(request) for request in aborted if request is not None]

    def has_unfinished_requests(self) -> bool:
        """Whether another step is needed."""
        return bool(self.scheduler.requests or self._pending)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the outputs that are due.

        If the runner raises, the requests are kept, to be computed again by later steps, and the error is passed on.
        """
        try:
            batch = self.scheduler.schedule()
            if batch is not None:
                self._pending.append(self.executor.execute(batch))
            if not self._pending or (batch is not None and len(self._pending) < self._max_in_flight):
                return []
            tokens = self._pending.popleft().wait()
        except BaseException:
            self._pending.clear()
            self.scheduler.recover()
            raise
        outputs = []
        for request in self.scheduler.update(tokens):
            if request.finished or request.params.output_kind != RequestOutputKind.FINAL_ONLY:
                outputs.append(self._output(request))
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests that run keep their blocks."""
        self.scheduler.block_manager.reset_prefix_cache()
        return True

    def _max_num_tokens(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        limit = self.config.max_model_len
        assert limit is not None
        return limit if params.max_tokens is None else min(len(prompt_token_ids) + params.max_tokens, limit)

    def _output(self, request: Request) -> RequestOutput:
        """The output of a request that got a token or was aborted."""
        delta = request.params.output_kind == RequestOutputKind.DELTA
        new_token_ids = request.token_ids[request.num_prompt_tokens + request.num_reported_tokens :]
        request.num_reported_tokens += len(new_token_ids)
        text = ""
        if request.request_id in self._detokenizers:
            detokenizer = self._detokenizers[request.request_id]
            new_text = detokenizer.append(new_token_ids, request.finished)
            text = new_text if delta else detokenizer.text
            if request.finished:
                del self._detokenizers[request.request_id]
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=new_token_ids if delta else request.output_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.token_ids[: request.num_prompt_tokens],
            outputs=[completion],
            finished=request.finished,
            metrics=request.metrics,
            num_cached_tokens=request.num_cached_tokens,
        )
