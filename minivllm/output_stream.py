"""OutputStream: the outputs of one request of `AsyncLLM`, as they come.

A reader that falls behind finds what came meanwhile put together in one output.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from minivllm.engine_process import Packed, unpack
from minivllm.outputs import CompletionOutput, RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from minivllm.async_llm import AsyncLLM


class OutputStream:
    """The outputs of one request, as they come: `async for output in stream`.  Raises EngineDeadError if the engine
    fails, ValueError if one of the request's own functions does.

    Each carries what is new since the one before, all so far, or only the end, as `output_kind` of the params says.
    """

    def __init__(
        self, llm: AsyncLLM, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self._cumulative = params.output_kind == RequestOutputKind.CUMULATIVE
        self._llm = llm
        self.loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._pending: list[Packed] = []
        self._so_far: dict[int, CompletionOutput] = {}
        self._first: RequestOutput | None = None  # which alone has what is known of the prompt
        self._finished = False
        self.accepted: asyncio.Future[None] = self.loop.create_future()

    def put(self, packed: Packed) -> None:
        self._pending.append(packed)
        self._news.set()

    def fail(self) -> None:
        """The engine is dead: whoever waits is to see."""
        if not self.accepted.done():
            self.accepted.set_exception(self._llm.dead_error())
        self._news.set()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._finished:
            raise StopAsyncIteration
        while not self._pending:
            if self._llm.errored:
                raise self._llm.dead_error()
            self._news.clear()
            await self._news.wait()
        packed, self._pending = self._pending, []
        output = merge([unpack(one, self.prompt, self.prompt_token_ids) for one in packed])
        self._finished = output.finished
        try:
            output.raise_failure()
        except ValueError:
            await self.aclose()
            raise
        if self._cumulative:
            for new in output.outputs:
                old = self._so_far.get(new.index)
                self._so_far[new.index] = new if old is None else _joined(old, new)
            output.outputs = [self._so_far[new.index] for new in output.outputs]
            self._first = self._first or output
            output.prompt_logprobs = self._first.prompt_logprobs
            output.prompt_token_id_logprobs = self._first.prompt_token_id_logprobs
        return output

    async def aclose(self) -> None:
        """Abort the request if it is unfinished."""
        if not self._finished:
            self._finished = True
            if self._llm.is_running(self):
                await self._llm.abort(self.request_id)


def merge(outputs: list[RequestOutput]) -> RequestOutput:
    """One output that carries the news of several of the same request, in their order."""
    last = outputs[-1]
    if len(outputs) > 1:
        completions: dict[int, CompletionOutput] = {}
        for output in outputs:
            for new in output.outputs:
                old = completions.get(new.index)
                completions[new.index] = new if old is None else _joined(old, new)
            last.prompt_logprobs = last.prompt_logprobs or output.prompt_logprobs
            if output.prompt_token_id_logprobs is not None:
                last.prompt_token_id_logprobs = output.prompt_token_id_logprobs
        last.outputs = list(completions.values())
    return last


def _joined(old: CompletionOutput, new: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if new.logprobs is not None:
        logprobs = type(new.logprobs)()
        logprobs.extend([*(old.logprobs or ()), *new.logprobs])
    return CompletionOutput(
        index=new.index,
        text=old.text + new.text,
        token_ids=old.token_ids + new.token_ids,
        cumulative_logprob=new.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=new.finish_reason,
        stop_reason=new.stop_reason,
    )
