"""OutputProcessor: from the tokens of requests to what users get: texts, logprobs, the n outputs of a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivllm.engine.batch import TokenLogprobs
from minivllm.engine.detokenizer import Detokenizer, decoder
from minivllm.engine.request import Request
from minivllm.outputs import CompletionOutput, FlatLogprobs, Logprob, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams

MAX_TOKENS_BEFORE = 3  # that a character can have begun in: it has four bytes at most


@dataclass(slots=True)
class Sample:
    """One of the n outputs of a prompt."""

    index: int
    request: Request
    detokenizer: Detokenizer | None
    logprobs: list[dict[int, Logprob]] | FlatLogprobs  # if asked for; of a stream, those to be reported
    num_reported_tokens: int = 0
    num_reported_characters: int = 0
    cumulative_logprob: float = 0.0
    has_ended: bool = False  # and its end was reported


@dataclass(slots=True)
class Group:
    """What a user knows as one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    samples: list[Sample]
    reported_prompt_logprobs: bool = False

    @property
    def finished(self) -> bool:
        return all(sample.request.finished for sample in self.samples)


class OutputProcessor:
    def __init__(self, tokenizer: Any) -> None:
        self.groups: dict[str, Group] = {}  # unfinished ones
        self._tokenizer = tokenizer
        self._places: dict[Request, tuple[Group, Sample]] = {}
        self._decode = decoder(tokenizer)
        self._token_texts: dict[int, str] = {}

    def add(self, request_id: str, prompt: str | None, params: SamplingParams, requests: list[Request]) -> None:
        """Take care of the n `requests` of a user's request."""
        first = requests[0]
        group = Group(request_id, prompt, first.token_ids[: first.num_prompt_tokens], params, [])
        for index, request in enumerate(requests):
            detokenizer = None
            if self._tokenizer is not None and params.detokenize:
                detokenizer = Detokenizer(self._tokenizer, request.token_ids, params)
            group.samples.append(Sample(index, request, detokenizer, FlatLogprobs() if params.flat_logprobs else []))
        self.groups[request_id] = group
        self._places |= {sample.request: (group, sample) for sample in group.samples}

    def find_stop(self, request: Request) -> str | None:
        """The stop string that the request's newest token completes."""
        detokenizer = self._places[request][1].detokenizer
        if detokenizer is None:
            return None
        self._detokenize(request, detokenizer)
        return detokenizer.find_stop(search=request.num_output_tokens > request.params.min_tokens)

    def outputs(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """The outputs that are due when `requests` got a token or ended."""
        changed: dict[str, list[Sample]] = {}
        for request in requests:
            group, sample = self._places[request]
            if request.logprobs:
                self._add_logprobs(sample)  # each step's own: at the end, all at once would hold up the next step
            if not request.finished and _is_to_wait(sample):
                continue
            changed.setdefault(group.request_id, []).append(sample)
        outputs = []
        for request_id, samples in changed.items():
            group = self.groups[request_id]
            if group.params.output_kind == RequestOutputKind.FINAL_ONLY:
                if not group.finished:
                    continue
                samples = group.samples
            outputs.append(self._output(group, samples))
            for sample in samples:
                sample.has_ended = sample.request.finished
            if group.finished:
                del self.groups[request_id]
                for sample in group.samples:
                    del self._places[sample.request]
        return outputs

    def ended(self) -> list[Request]:
        """Requests that have ended without their end being reported yet."""
        samples = (sample for group in self.groups.values() for sample in group.samples)
        return [sample.request for sample in samples if sample.request.finished and not sample.has_ended]

    def _output(self, group: Group, samples: list[Sample]) -> RequestOutput:
        first = group.samples[0].request
        prompt_logprobs: list[dict[int, Logprob] | None] | FlatLogprobs | None = None
        scores = None
        if first.params.num_prompt_logprobs is not None and not group.reported_prompt_logprobs:
            # Of the parts of an output, the first one has them: all are known once a token has been sampled.
            group.reported_prompt_logprobs = group.params.output_kind == RequestOutputKind.DELTA
            if first.params.prompt_logprobs is None:
                scores = _scores(first)
            else:
                prompt_logprobs = FlatLogprobs() if first.params.flat_logprobs else []
                prompt_logprobs.append(None)
                for place, entry in enumerate(first.prompt_logprobs, 1):
                    prompt_logprobs.append(self._logprobs(first, place, entry))
        return RequestOutput(
            request_id=group.request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=[self._completion(sample) for sample in samples],
            finished=group.finished,
            metrics=first.metrics,
            num_cached_tokens=first.num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
            prompt_token_id_logprobs=scores,
        )

    def _completion(self, sample: Sample) -> CompletionOutput:
        request = sample.request
        delta = request.params.output_kind == RequestOutputKind.DELTA
        begin = sample.num_reported_tokens if delta else 0
        sample.num_reported_tokens = request.num_output_tokens
        token_ids = request.token_ids[request.num_prompt_tokens + begin :]
        text = ""
        if sample.detokenizer is not None:
            self._detokenize(request, sample.detokenizer)
            text = sample.detokenizer.visible_text(request.finished)
            begin_text = sample.num_reported_characters if delta else 0
            sample.num_reported_characters, text = len(text), text[begin_text:]
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = sample.logprobs if delta or request.finished else sample.logprobs[:]
            if delta:
                sample.logprobs = type(sample.logprobs)()
        return CompletionOutput(
            index=sample.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=None if logprobs is None else sample.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )

    def _detokenize(self, request: Request, detokenizer: Detokenizer) -> None:
        """Bring the text up to date.  A token that ended the output is no part of it, unless asked for."""
        if request.finish_reason == "stop" and isinstance(request.stop_reason, str):
            return  # the text ends there
        end = len(request.token_ids)
        if request.finish_reason == "stop" and not request.params.include_stop_str_in_output:
            end -= 1
        begin = request.num_prompt_tokens + detokenizer.num_tokens
        detokenizer.append(request.token_ids[begin:end], request.finished)

    def _add_logprobs(self, sample: Sample) -> None:
        """Take those of the newest tokens from the request."""
        request = sample.request
        begin, are_top = len(request.token_ids) - len(request.logprobs), request.params.logprob_token_ids is None
        for place, entry in enumerate(request.logprobs, begin):
            sample.logprobs.append(self._logprobs(request, place, entry, are_top))
            sample.cumulative_logprob += entry.logprob
        request.logprobs.clear()

    def _logprobs(self, request: Request, place: int, entry: TokenLogprobs, are_top: bool = True) -> dict[int, Logprob]:
        """Of the token at a place of the request's, and of others in its stead."""
        token_id = request.token_ids[place]
        found = {token_id: Logprob(entry.logprob, entry.rank, self._text(token_id, request, place))}
        for rank, (other, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1):
            if are_top or other not in found:  # by itself a token ranks behind its equals; here it has its place
                found[other] = Logprob(logprob, rank if are_top else None, self._text(other, request, place))
        return found

    def _text(self, token_id: int, request: Request, place: int) -> str | None:
        """A token's text at a place of the request's.  Of a character that several tokens make up, the last one has
        all, the others have nothing."""
        if self._tokenizer is None or not request.params.detokenize:
            return None
        if token_id not in self._token_texts:
            self._token_texts[token_id] = self._decode([token_id])
        text = self._token_texts[token_id]
        if "\ufffd" not in text:
            return text
        for begin in range(place - 1, max(0, place - MAX_TOKENS_BEFORE) - 1, -1):
            whole = self._decode([*request.token_ids[begin:place], token_id])
            if "\ufffd" not in whole:
                return whole
        return "" if text.endswith("\ufffd") else text


def _scores(request: Request) -> np.ndarray | None:
    """Logprobs of prompt_logprob_token_ids; None if the request has ended before all were known."""
    token_ids = np.array(request.params.prompt_logprob_token_ids)
    entries = request.prompt_logprobs[request.params.prompt_logprob_start or 0 :]
    if len(entries) < len(token_ids):
        return None
    scores = np.array([entry.top_logprobs for entry in entries], np.float32)
    return np.where(token_ids < 0, np.float32("-inf"), scores)


def _is_to_wait(sample: Sample) -> bool:
    """Whether an output that goes on is not due yet."""
    params = sample.request.params
    if params.output_kind == RequestOutputKind.FINAL_ONLY:
        return True
    num_new = sample.request.num_output_tokens - sample.num_reported_tokens
    return sample.num_reported_tokens > 0 and num_new < (params.stream_interval or 1)
