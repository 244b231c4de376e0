"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from minivllm.outputs import CompletionOutput, Logprob
from minivllm.server.chat_protocol import ChatBody
from minivllm.server.errors import ApiError
from minivllm.server.service import Service, Usage, Work, finite, prompt_logprobs_json
from minivllm.server.tool_parsers import PARSERS, ToolCall, ToolParser, guess_parser, needs_special_tokens


@dataclass
class Choice:
    """One of the n answers, as far as it has come."""

    parser: ToolParser | None  # of calls in the text, where the model may make some
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)  # or pieces of the one that there must be
    token_ids: list[int] = field(default_factory=list)  # not handed out yet, and their logprobs
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class ChatCompletion(Work):
    prefix = "chatcmpl"

    def __init__(self, service: Service, body: ChatBody) -> None:
        super().__init__(service, body)
        self._body = body
        self._forced = body.forced_function()  # its arguments are all that the model may write
        self._requires_calls = body.tool_choice == "required"
        self._parser = self._find_parser() if body.tools and body.tool_choice in (None, "auto") else None
        others: dict[str, Any] = {}
        if self._parser is not None and needs_special_tokens(self._parser):
            others["skip_special_tokens"] = False
        self._params = body.sampling_params(
            {"max_tokens": None} | service.llm.inputs.default_options(),  # None: up to max_model_len
            max_tokens=body.asked_tokens(),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
            structured_outputs=body.forced_output(),
            **others,
        )
        self._choices: dict[int, Choice] = {}

    async def start(self) -> None:
        prompt = await self._service.render(self._body.messages, self._body)
        self._running = await self._service.start([prompt], self._params, self._body, self._id, "messages")

    async def answer(self) -> dict[str, Any]:
        usage, choices, prompt_logprobs, prompt_token_ids = Usage(), [], None, None
        async for _, output in self._outputs():
            usage.see(output, is_first=True)
            prompt_logprobs, prompt_token_ids = output.prompt_logprobs, output.prompt_token_ids
            for completion in output.outputs:
                choice = self._choice(completion.index)
                content, calls = self._see(choice, completion)
                message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
                if calls:
                    message["tool_calls"] = [self._call_json(call) for call in calls]
                choices.append(
                    {
                        "index": completion.index,
                        "message": message,
                        "finish_reason": self._finish_reason(choice, completion),
                        "stop_reason": completion.stop_reason,
                    }
                    | self._take_tokens(choice)
                )
        answer = self._envelope("chat.completion", choices) | {"usage": usage.json()}
        if self._body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs_json(prompt_logprobs)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = prompt_token_ids
        return answer

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        usage, is_first = Usage(), True
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        outputs = self._outputs()

        def chunk(index: int, delta: dict[str, Any], **others: Any) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | others
            made = self._envelope("chat.completion.chunk", [choice])
            if with_usage:
                assert options is not None
                made["usage"] = usage.json() if options.continuous_usage_stats else None
            return made

        try:
            async for _, output in outputs:
                usage.see(output, is_first)
                of_prompt = {}
                if is_first and self._body.return_token_ids:
                    of_prompt = {"prompt_token_ids": output.prompt_token_ids}
                is_first = False
                for completion in output.outputs:
                    index = completion.index
                    if index not in self._choices:
                        yield chunk(index, {"role": "assistant", "content": ""}) | of_prompt
                        of_prompt = {}
                    choice = self._choice(index)
                    num_calls = len(choice.calls)
                    content, calls = self._see(choice, completion)
                    reason = self._finish_reason(choice, completion)
                    if not content and not calls and reason is None:
                        continue
                    if content:
                        yield chunk(index, {"content": content}, **self._take_tokens(choice))
                    if calls:
                        deltas = [self._call_delta(num_calls + k, call) for k, call in enumerate(calls)]
                        yield chunk(index, {"tool_calls": deltas}, **self._take_tokens(choice))
                    if reason is not None:
                        end = dict(finish_reason=reason, stop_reason=completion.stop_reason)
                        yield chunk(index, {}, **self._take_tokens(choice), **end)
            if with_usage:
                yield self._envelope("chat.completion.chunk", []) | {"usage": usage.json()}
        finally:
            await outputs.aclose()

    def _find_parser(self) -> str:
        name = self._service.options.tool_call_parser
        if name is None:
            inputs = self._llm.inputs
            try:
                name = guess_parser(inputs.chat_template or inputs.get_tokenizer().chat_template)
            except ValueError as error:
                raise ApiError(400, f"tools: {error}", "tools") from None
        if name is None:
            raise ApiError(
                400,
                "tools: how this model writes calls is not known; start the server with --tool-call-parser, or use "
                "tool_choice 'required' or a named function",
                "tools",
            )
        return name

    def _choice(self, index: int) -> Choice:
        if index not in self._choices:
            self._choices[index] = Choice(None if self._parser is None else PARSERS[self._parser]())
        return self._choices[index]

    def _see(self, choice: Choice, completion: CompletionOutput) -> tuple[str, list[ToolCall]]:
        """Take in what is new; returns what of it is content that can be shown, and the calls completed by it, or the
        next piece of the one call that there must be."""
        choice.token_ids += completion.token_ids
        for token_id, entry in zip(completion.token_ids, completion.logprobs or (), strict=False):
            choice.logprobs.append(self._logprobs(token_id, entry))
        ended = completion.finish_reason is not None
        content = completion.text
        calls: list[ToolCall] = []
        if choice.parser is not None:
            content, calls = choice.parser.feed(completion.text)
            if ended:
                rest, more = choice.parser.finish()
                content, calls = content + rest, calls + more
            if not self._body.parallel_tool_calls:
                calls = calls[: max(0, 1 - len(choice.calls))]
        elif self._forced is not None:
            calls = [ToolCall(self._forced.name, content)] if content or not choice.calls else []
            content = ""
        elif self._requires_calls:
            choice.content += content  # no call can be told before its end
            if not ended:
                return "", []
            calls = self._required_calls(choice.content)
            content = "" if calls else choice.content
        choice.calls += calls
        return content, calls

    def _take_tokens(self, choice: Choice) -> dict[str, Any]:
        """What the body wants to know of the tokens since the last time; null if there are none."""
        token_ids, choice.token_ids = choice.token_ids, []
        logprobs, choice.logprobs = choice.logprobs, []
        taken: dict[str, Any] = {"logprobs": {"content": logprobs} if self._body.logprobs and logprobs else None}
        return taken | ({"token_ids": token_ids} if self._body.return_token_ids else {})

    def _required_calls(self, text: str) -> list[ToolCall]:
        """The calls that tool_choice made the model write; none if it was cut short."""
        try:
            return [
                ToolCall(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in json.loads(text)
            ]
        except (ValueError, RecursionError):
            return []

    def _call_json(self, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}

    def _call_delta(self, number: int, call: ToolCall) -> dict[str, Any]:
        if self._forced is not None and number > 0:  # goes on with the arguments
            return {"index": 0, "function": {"arguments": call.arguments}}
        return {"index": number} | self._call_json(call)

    def _finish_reason(self, choice: Choice, completion: CompletionOutput) -> str | None:
        made_calls = choice.calls and self._forced is None
        return "tool_calls" if made_calls and completion.finish_reason == "stop" else completion.finish_reason

    def _logprobs(self, token_id: int, entry: dict[int, Logprob]) -> dict[str, Any]:
        def one(logprob: Logprob) -> dict[str, Any]:
            text = logprob.decoded_token or ""
            return {"token": text, "logprob": finite(logprob.logprob), "bytes": list(text.encode())}

        most = self._body.top_logprobs or 0
        top = sorted((e for e in entry.values() if e.rank is not None and e.rank <= most), key=lambda e: e.rank or 0)
        return one(entry[token_id]) | {"top_logprobs": [one(e) for e in top]}
