"""Scheduler: decides what each step computes.  The only code that changes a request's progress.

There are no phases.  Every request has `num_computed_tokens` chasing `num_tokens`, and a step computes some of the
difference, within one token budget: chunked prefill, decode, prefix hits and recomputation after preemption are all
that one rule (after vLLM's V1 scheduler).  Running requests are served first, oldest first; what the budget leaves
goes to the waiting ones in order of arrival.  When blocks run out, the newest running request is preempted: it gives
back its blocks and waits, at the head of the queue, to be computed again.

Steps may be scheduled before the tokens of earlier ones are known.  Such tokens are in flight: they count as
placeholders in `num_tokens` until `update()` fills them in.  Blocks freed while a step in flight still writes to them
may be given out again at once, since the runner executes steps in order.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from minivllm.engine.batch import AdmittedRequest, ScheduledBatch, StepResult, TokenLogprobs
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.ngram import NO_DRAFTS, DraftLimits, accepted
from minivllm.engine.request import Request

RIDING_TOKENS = 768  # of a step whose prompts only ride along: more hold up the decodes, fewer the requests to come


Draft = tuple[Request, list[int]]


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0  # computed before, lost to preemption
    num_prompt_tokens: int = 0  # of admitted requests
    num_cached_tokens: int = 0  # of those, found in the prefix cache
    num_generated_tokens: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of the draft tokens


class Scheduler:
    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Collection[int],
        window: int | None = None,
        draft_limits: DraftLimits = NO_DRAFTS,
    ) -> None:
        """`window`: no layer attends to more than so many of the last tokens."""
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self._main_eos_token_id = next(iter(eos_token_ids), None)  # which is no reason to be told
        self.window = window
        self.draft_limits = draft_limits
        self.requests: dict[str, Request] = {}  # unfinished ones, by id
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.stats = SchedulerStats()
        self.num_needing_tokens = 0  # running requests whose next step cannot be launched before their tokens are known
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        # For each step in flight: the requests that sampled a token; those whose prompt's logprobs it finds, each with
        # the number of prompt tokens before those; the drafts.
        self._in_flight: deque[tuple[list[Request], list[tuple[Request, int]], list[Draft]]] = deque()

    def add(self, request: Request) -> None:
        """Queue a request.  Raises ValueError for an id in use."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id {request.request_id!r} is in use; choose another")
        self.requests[request.request_id] = request
        self.waiting.append(request)

    @property
    def max_num_tokens(self) -> int:
        """To which a request may grow, alone in the KV cache.  Its last token is never computed."""
        return self.block_manager.num_blocks * self.block_manager.block_size + 1

    def check_fits(self, max_num_tokens: int) -> None:
        """Raise ValueError if a request that may grow to so many tokens could never fit the KV cache."""
        if max_num_tokens > self.max_num_tokens:
            raise ValueError(
                f"prompt and max_tokens come to {max_num_tokens} tokens, but the KV cache holds "
                f"{self.max_num_tokens - 1}; shorten the prompt, lower max_tokens, or raise "
                "kv_cache_memory_bytes or gpu_memory_utilization"
            )

    def schedule(self) -> ScheduledBatch | None:
        """The next step, or None if nothing can be computed before tokens in flight are known."""
        batch = ScheduledBatch()
        decodes: list[tuple[Request, int]] = []
        prefills: list[tuple[Request, int]] = []
        budget = self._budget()
        preempted = False
        i = 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            i += 1
            num_tokens = request.num_tokens
            num_new = min(num_tokens - request.num_computed_tokens, budget)
            if num_new <= 0 or num_tokens >= request.max_num_tokens:
                continue  # its last token is in flight
            if self.window is not None:
                self.block_manager.drop(request, request.num_computed_tokens - self.window + 1)
            column = len(request.block_ids)
            while (blocks := self.block_manager.grow(request, request.num_computed_tokens + num_new)) is None:
                preempted = True
                if self._preempt_newest() is request:
                    break
            if blocks is None:
                break
            if blocks:
                batch.new_blocks.append((request.slot, column, blocks))
            is_decode = request.num_computed_tokens >= request.num_admitted_tokens
            (decodes if is_decode else prefills).append((request, num_new))
            self._advance(request, num_new)
            budget -= num_new
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and not preempted:
            request = self.waiting[0]
            if request.num_in_flight or not self._admit(request, batch):
                break
            num_new = min(request.num_tokens - request.num_computed_tokens, budget)
            prefills.append((request, num_new))
            self._advance(request, num_new)
            budget -= num_new
        if not decodes and not prefills:
            return None
        batch.num_decodes = len(decodes)
        sampled, asking = self._write_rows(batch, decodes + prefills)
        drafts = [] if prefills else self._draft(batch, [request for request, _ in decodes], budget)
        for request in sampled:
            request.num_in_flight += 1
        self._in_flight.append((sampled, asking, drafts))
        self.stats.num_steps += 1
        return batch

    def update(self, result: StepResult) -> list[Request]:
        """Enter what the oldest step in flight found out.

        Returns the requests that got a token or failed.  Tokens of requests that ended meanwhile are dropped.
        """
        now = time.monotonic()
        sampled, asking, drafts = self._in_flight.popleft()
        for (request, num_before), entries in zip(asking, result.prompt_logprobs, strict=True):
            num_known = len(request.prompt_logprobs)  # more than num_before if it was preempted since
            request.prompt_logprobs.extend(entries[num_known - num_before :])
        more = self._accept(result, sampled, drafts)
        watches_drafters = self._room_for_drafts > 0
        progressed = []
        all_logprobs: list[TokenLogprobs | None] = result.logprobs or [None] * len(sampled)
        for place, (request, token, logprobs) in enumerate(zip(sampled, result.tokens, all_logprobs, strict=True)):
            if request.finished:
                continue
            request.num_in_flight -= 1
            if place in result.failed:
                request.stop_reason = result.failed[place]
                self._finish(request, "error")
                progressed.append(request)
                continue
            metrics = request.metrics
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now
            for own in (token, *more.get(request, ())):
                request.token_ids.append(own)
                if request.drafter is not None and watches_drafters:
                    request.drafter.watch(request.token_ids)
                self.stats.num_generated_tokens += 1
                if logprobs is not None:
                    request.logprobs.append(logprobs)
                self.block_manager.publish(request)
                self._check_stop(request, own)
                if request.grammar is not None and not request.grammar.accept(own) and not request.finished:
                    self._give_up(request, request.grammar.error)
                if request.finished:
                    break
            progressed.append(request)
        return progressed

    def stop(self, request: Request, stop_string: str) -> None:
        """End a request whose text has come to a stop string."""
        request.stop_reason = stop_string
        if request.finished:
            request.finish_reason = "stop"
        else:
            self._finish(request, "stop")

    def abort(self, requests: Iterable[Request]) -> None:
        """End requests; their blocks are free at once.  Some may have finished."""
        for request in requests:
            if not request.finished:
                self._end(request, "abort")
        self.waiting = deque(request for request in self.waiting if not request.finished)  # they may be many

    def recover(self) -> None:
        """After a step that failed: forget the steps in flight and compute every running request again.

        What the prefix cache holds may never have been computed, so it is dropped too.  No request is lost.
        """
        for request in self.requests.values():
            request.num_in_flight = 0
        self._in_flight.clear()
        while self.running:
            self._preempt_newest()
        self.block_manager.reset_prefix_cache()

    def check_integrity(self) -> None:
        """Raise AssertionError if requests, slots and blocks do not agree.  Meant for tests and for an idle engine."""
        self.block_manager.check_integrity(self.running)
        slots = [request.slot for request in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.max_num_seqs)), "a slot leaked or is shared"
        assert {*self.waiting, *self.running} == set(self.requests.values()), "a request is in no queue"
        assert not any(request.block_ids or request.slot >= 0 for request in self.waiting)

    def _budget(self) -> int:
        """How many tokens the next step may take.

        Prompts of requests that will end before the longest of those that decode hold nobody up.  They ride along,
        spread over more steps, with decodes that need the weights read anyway, and let these wait less.
        """
        decoding = [r for r in self.running if r.num_computed_tokens >= r.num_admitted_tokens]
        prompts = [r for r in self.running if r.num_computed_tokens < r.num_admitted_tokens] or list(
            itertools.islice(self.waiting, 1)
        )
        if decoding and prompts:
            longest, needed = (max(r.max_num_tokens - r.num_tokens for r in group) for group in (decoding, prompts))
            if needed < longest:
                return min(self.max_num_batched_tokens, max(RIDING_TOKENS, 2 * len(decoding)))
        return self.max_num_batched_tokens

    def _admit(self, request: Request, batch: ScheduledBatch) -> bool:
        """Move the first waiting request to the running ones, if the blocks for all its tokens are free."""
        hits = self.block_manager.cached_prefix(request) if request.params.reads_prefix_cache else []
        num_spare = len(self.running)  # each running request may need a block soon: do not admit only to preempt
        if not self.block_manager.admit(request, hits, num_spare):
            return False
        self.waiting.popleft()
        self.running.append(request)
        self.num_needing_tokens += request.needs_tokens
        request.slot = self._free_slots.pop()
        request.num_computed_tokens = len(hits) * self.block_manager.block_size
        request.num_admitted_tokens = len(request.token_ids)
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = time.monotonic()
            request.num_cached_tokens = request.num_computed_tokens
            self.stats.num_prompt_tokens += request.num_prompt_tokens
            self.stats.num_cached_tokens += request.num_cached_tokens
        params = request.params
        stop_token_ids = [*params.stop_token_ids, *self.eos_token_ids]  # with ignore_eos too, as in vLLM
        batch.admitted.append(
            AdmittedRequest(
                request.slot,
                list(request.token_ids),
                request.num_prompt_tokens,
                params,
                request.seed,
                stop_token_ids,
                request.bad_word_ids,
            )
        )
        batch.new_blocks.append((request.slot, 0, list(request.block_ids)))
        return True

    def _write_rows(
        self, batch: ScheduledBatch, rows: list[tuple[Request, int]]
    ) -> tuple[list[Request], list[tuple[Request, int]]]:
        """Enter rows, each a request and how many tokens of it are new.  Returns the requests that sample a token, and
        those whose prompt's logprobs the step finds, each with the number of its tokens before it."""
        sampled = []
        asking = []
        for row, (request, num_new) in enumerate(rows):
            num_before = request.num_computed_tokens - num_new
            batch.slots.append(request.slot)
            batch.num_computed.append(num_before)
            batch.num_scheduled.append(num_new)
            if request.num_computed_tokens == request.num_tokens:
                place = len(batch.sampled_rows)
                assert not (request.needs_tokens and request.num_in_flight), "the token before must be known"
                if request.grammar is not None:
                    batch.token_masks.add(place, request.grammar)
                if request.params.logits_processors is not None:
                    num_prompt = request.num_prompt_tokens
                    batch.processed.append((place, request.token_ids[:num_prompt], request.token_ids[num_prompt:]))
                batch.sampled_rows.append(row)
                sampled.append(request)
            if request.params.num_prompt_logprobs is not None and num_before + 1 < request.num_prompt_tokens:
                batch.prompt_logprobs_rows.append(row)
                asking.append((request, num_before))
        return sampled, asking

    def _advance(self, request: Request, num_tokens: int) -> None:
        """Count `num_tokens` as computed.  A step writes the K and V of all its tokens, layer by layer, before any
        attention reads them, so requests admitted from now on, in this same step too, can share the full blocks."""
        request.num_computed_tokens += num_tokens
        self.block_manager.publish(request)

    @property
    def waits_for_tokens(self) -> bool:
        """Whether what comes next hangs on the values of tokens: the call of a function, or a draft."""
        in_flight = any(drafts for _, _, drafts in self._in_flight)
        return self.num_needing_tokens > 0 or in_flight or self._drafts_pay()

    @property
    def _room_for_drafts(self) -> int:
        """Draft tokens that a step of all running requests may have; 0 or less: none."""
        return self.draft_limits.max_rows - len(self.running)

    def _drafts_pay(self) -> bool:
        """All running requests wait for the drafts of a few, which must be worth that to all."""
        if self._room_for_drafts <= 0:
            return False
        expected = sum(request.drafter.expected for request in self.running if request.drafter is not None)
        return self.draft_limits.pay(min(expected, self._room_for_drafts), len(self.running))

    def _draft(self, batch: ScheduledBatch, decodes: list[Request], budget: int) -> list[Draft]:
        """Add drafts to a step of decodes: an equal share of the room for each request that may have one."""
        drafts: list[Draft] = []
        if not self._drafts_pay():
            return drafts
        room = min(budget, self.draft_limits.max_rows - len(decodes))
        places = [
            (row, request, request.drafter)
            for row, request in enumerate(decodes)
            if request.drafter is not None and not request.num_in_flight
        ]
        if room <= 0 or not places:
            return drafts
        first = self.stats.num_steps % len(places)  # takes turns where there is no room for all
        for i, (row, request, drafter) in enumerate(places[first:] + places[:first]):
            share = max(1, room // (len(places) - i))
            # The last token that a request may have is never computed.
            most = min(room, share, request.max_num_tokens - request.num_tokens - 1)
            tokens = drafter.propose(request.token_ids, most) if most > 0 else []
            column = len(request.block_ids)
            blocks = self.block_manager.grow(request, request.num_computed_tokens + len(tokens))
            if not tokens or blocks is None:
                continue
            if blocks:
                batch.new_blocks.append((request.slot, column, blocks))
            batch.drafts.append((row, tokens))
            drafts.append((request, tokens))
            room -= len(tokens)
            if room == 0:
                break
        return drafts

    def _accept(self, result: StepResult, sampled: list[Request], drafts: list[Draft]) -> dict[Request, list[int]]:
        """The tokens beyond their first of the requests whose drafts were right; these count as computed now."""
        more = {}
        first = dict(zip(sampled, result.tokens, strict=True)) if drafts else {}
        for (request, drafted), after in zip(drafts, result.draft_tokens, strict=True):
            if request.finished:
                continue
            more[request] = accepted(drafted, [first[request], *after])[1:]
            request.num_computed_tokens += len(more[request])
            self.stats.num_drafts += 1
            self.stats.num_draft_tokens += len(drafted)
            self.stats.num_accepted_tokens += len(more[request])
        return more

    def _preempt_newest(self) -> Request:
        request = self.running.pop()
        self.stats.num_preemptions += 1
        self.stats.num_recomputed_tokens += request.num_computed_tokens
        request.metrics.num_preemptions += 1
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.appendleft(request)
        return request

    def _check_stop(self, request: Request, token: int) -> None:
        params = request.params
        if request.grammar is not None and token in self.eos_token_ids:  # the grammar ends here, or cannot go on
            if (error := request.grammar.error) is not None:
                return self._give_up(request, error)
            return self._finish(request, "stop")
        if request.num_output_tokens >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                request.stop_reason = None if token == self._main_eos_token_id else token
                return self._finish(request, "stop")
            if token in params.stop_token_ids:
                request.stop_reason = token
                return self._finish(request, "stop")
        if len(request.token_ids) >= request.max_num_tokens:
            return self._finish(request, "length")
        circles = params.repetition_detection
        if circles and request.num_output_tokens >= params.min_tokens and circles.found_in(request.output_token_ids):
            request.stop_reason = "repetition_detected"
            self._finish(request, "repetition")

    def _give_up(self, request: Request, error: str | None) -> None:
        """End a request for which its grammar allows no token; error: what has become of the grammar."""
        why = "the request's other options leave none that it allows" if error is None else error
        request.stop_reason = f"structured_outputs: the grammar could not go on ({why})"
        self._finish(request, "abort")

    def _finish(self, request: Request, reason: str) -> None:
        if request.slot < 0:
            self.waiting.remove(request)
        self._end(request, reason)

    def _end(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        del self.requests[request.request_id]
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request)

    def _release(self, request: Request) -> None:
        self.block_manager.free(request)
        self.num_needing_tokens -= request.needs_tokens
        self._free_slots.append(request.slot)
        request.slot = -1
