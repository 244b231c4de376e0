"""What the endpoints share: prompts, and requests from their start to their end."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from minivllm.async_llm import AsyncLLM
from minivllm.inputs import Prompt, TooLongError
from minivllm.output_stream import OutputStream
from minivllm.outputs import Logprob, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.server.chat_protocol import Conversation
from minivllm.server.errors import ApiError
from minivllm.server.metrics import RequestWatch, ServerMetrics
from minivllm.server.protocol import SamplingBody


@dataclass(frozen=True)
class ServerOptions:
    """What `minivllm serve` was told beside the engine's arguments."""

    model_names: Sequence[str]  # that clients may ask for; the first is what answers call it
    api_keys: Sequence[str] = ()  # none: everybody may
    max_queued_requests: int = 1024  # beyond those that run; more are told to come back later
    max_body_bytes: int = 32 << 20
    tool_call_parser: str | None = None
    allowed_origins: Sequence[str] = ()  # of pages that browsers let read answers, beside the server's own
    trust_request_chat_template: bool = False  # a template of a client's may run for long, or take much memory
    chat_template_content_format: str = "auto"


@dataclass
class Usage:
    """Tokens of the requests of one body."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def see(self, output: RequestOutput, is_first: bool) -> None:
        """Count an output's new tokens, and with the first those of the prompt."""
        if is_first:
            self.prompt += len(output.prompt_token_ids)
            self.cached += output.num_cached_tokens
        self.completion += sum(len(completion.token_ids) for completion in output.outputs)

    def json(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Service:
    llm: AsyncLLM
    options: ServerOptions
    metrics: ServerMetrics
    started: int = field(default_factory=lambda: int(time.time()))
    num_open: int = 0  # outputs that clients wait for

    def check_model(self, name: str | None) -> str:
        """The name to answer with.  A 404 if clients may not ask for `name`."""
        names = self.options.model_names
        if name is not None and name not in names:
            raise ApiError(
                404, f"the model {name!r} does not exist; there is {', '.join(names)}", "model", "model_not_found"
            )
        return name or names[0]

    async def render(self, messages: Sequence[dict[str, Any]], body: Conversation) -> Prompt:
        """The prompt that messages become.  A 400 if they cannot, or the body has a template that may not be used."""
        if body.chat_template is not None and not self.options.trust_request_chat_template:
            raise ApiError(
                400, "chat_template needs a server started with --trust-request-chat-template", "chat_template"
            )
        if body.chat_template is not None and "{" not in body.chat_template:
            raise ApiError(400, "chat_template must be the text of a Jinja template", "chat_template")  # never a path
        content_format = self.options.chat_template_content_format
        render = partial(
            self.llm.inputs.preprocess_chat,
            messages,
            chat_template_content_format=content_format,
            **body.template_options(),
        )
        try:
            return await self.llm.with_tokenizer(render)
        except TooLongError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None

    async def start(
        self, prompts: Sequence[Prompt], params: SamplingParams, body: SamplingBody, request_id: str, param: str
    ) -> Running:
        """Queue a request for each prompt.  `param`: the field that they come from.  A 429 if too many wait already, a
        400 if one of them cannot be run."""
        most = self.llm.facts.max_num_seqs + self.options.max_queued_requests
        num_outputs = len(prompts) * params.n
        if num_outputs > most:
            raise ApiError(
                400, f"{num_outputs} outputs are more than the server ever takes at once ({most})",
                "n" if params.n > 1 else param,
            )  # fmt: skip
        if self.num_open + num_outputs > most:
            raise ApiError(
                429, "too many requests are waiting; come back later", code="queue_full", headers={"Retry-After": "1"}
            )
        self.num_open += num_outputs
        num_asked = body.asked_tokens() or 0
        adding = [
            asyncio.ensure_future(self._add(prompt, params, num_asked, f"{request_id}-{i}", param))
            for i, prompt in enumerate(prompts)
        ]
        running = Running(self, [], num_outputs)
        try:
            started = await asyncio.gather(*adding, return_exceptions=True)
        except asyncio.CancelledError:
            running.streams += [
                one.result() for one in adding if one.done() and not one.cancelled() and not one.exception()
            ]
            await running.close()
            raise
        running.streams += [one for one in started if isinstance(one, OutputStream)]
        for failure in started:
            if isinstance(failure, BaseException):
                await running.close()
                if isinstance(failure, ValueError):
                    raise body.refusal(str(failure), param) from None
                raise failure
        return running

    async def _add(
        self, prompt: Any, params: SamplingParams, num_asked: int, request_id: str, param: str
    ) -> OutputStream:
        """Queue one request.  A 400 if the tokens that its body asks for do not fit behind the prompt, where LLM would
        cut the answer: clients of OpenAI's API then shorten the conversation."""
        try:
            token_ids, _, text = await self.llm.check(prompt, params, params.output_kind)
        except TooLongError as error:
            raise ApiError(400, str(error), param, "context_length_exceeded") from None
        limit = self.llm.facts.max_model_len
        if len(token_ids) + max(1, num_asked) > limit:
            raise ApiError(
                400,
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{num_asked or 'at least 1'} output tokens and your prompt contains {len(token_ids)} tokens. "
                "Shorten the prompt, lower max_tokens, or start the server with a larger max_model_len.",
                param,
                "context_length_exceeded",
            )
        return await self.llm.add_request({"prompt": text, "prompt_token_ids": token_ids}, params, request_id)


class Running:
    """The requests of one body, from their start until `close`, which aborts what is unfinished."""

    def __init__(self, service: Service, streams: list[OutputStream], num_outputs: int) -> None:
        self._service = service
        self.streams = streams
        self._num_outputs = num_outputs

    async def outputs(self, arrival: float) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(number of the prompt, output) of all requests, which came at `arrival`, as they come."""
        watches = [RequestWatch(self._service.metrics, arrival) for _ in self.streams]
        async for i, output in _merged(self.streams):
            watches[i].see(output)
            yield i, output

    async def close(self) -> None:
        """The answer has been given, or nobody wants it."""
        self._service.num_open -= self._num_outputs
        self._num_outputs = 0
        for stream in self.streams:
            await stream.aclose()


class Work(ABC):
    """One request on its way to an answer, whose id begins with `prefix`."""

    prefix: str

    def __init__(self, service: Service, body: SamplingBody) -> None:
        self._service = service
        self._llm = service.llm
        self._model = service.check_model(body.model)
        self._id = f"{self.prefix}-{body.request_id or uuid.uuid4().hex}"
        self._created = int(time.time())  # seconds since 1970
        self._arrival = time.monotonic()
        self._running: Running | None = None

    @abstractmethod
    async def start(self) -> None:
        """Queue it; errors show before anything of the answer is sent."""

    @abstractmethod
    async def answer(self) -> dict[str, Any]:
        """The whole answer."""

    @abstractmethod
    def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer."""

    async def close(self) -> None:
        """To be called once it has started, however it ends."""
        if self._running is not None:
            await self._running.close()

    def _outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        assert self._running is not None, "not started"
        return self._running.outputs(self._arrival)

    def _envelope(self, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


async def _merged(streams: Sequence[OutputStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, output
    finally:
        for task in waiting:
            task.cancel()


def prompt_logprobs_json(entries: Sequence[dict[int, Logprob] | None] | None) -> list[Any] | None:
    """vLLM's prompt_logprobs."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {"logprob": finite(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
            for token, one in entry.items()
        }
        for entry in entries
    ]


def finite(logprob: float) -> float:
    """JSON has no −inf; OpenAI's API says −9999."""
    return max(logprob, -9999.0)
