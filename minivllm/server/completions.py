"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from minivllm.inputs import Prompt
from minivllm.outputs import CompletionOutput, Logprob, RequestOutput
from minivllm.server.errors import ApiError
from minivllm.server.protocol import CompletionBody
from minivllm.server.service import Service, Usage, Work, finite, prompt_logprobs_json

DEFAULT_MAX_TOKENS = 16  # OpenAI's
KIND = "text_completion"


class Completion(Work):
    prefix = "cmpl"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        super().__init__(service, body)
        self._body = body
        # With max_tokens 0 only the prompt is wanted back; the engine always generates one token.
        self._drops_output = body.max_tokens == 0
        if self._drops_output and not body.echo:
            raise ApiError(400, "max_tokens must be at least 1, or 0 with echo", "max_tokens")
        wants_prompt = body.echo and body.logprobs is not None
        self._params = body.sampling_params(
            {"max_tokens": DEFAULT_MAX_TOKENS} | service.llm.inputs.default_options(),
            max_tokens=1 if self._drops_output else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if wants_prompt else body.prompt_logprobs,
        )
        self._n = self._params.n
        self._offsets: dict[int, int] = {}  # by choice: characters of its text, or of its tokens', so far
        self._prompt_logprobs: dict[int, Any] = {}  # by prompt; they come once
        self._texts: dict[int, str] = {}  # by prompt, with echo
        self._first_texts: dict[int, str] = {}  # by prompt: of its first token

    async def start(self) -> None:
        try:
            prompts: list[Prompt] = [await self._prompt(prompt) for prompt in self._body.prompts()]
        except ValueError as error:
            raise ApiError(400, f"prompt: {error}", "prompt") from None
        self._running = await self._service.start(prompts, self._params, self._body, self._id, "prompt")

    async def answer(self) -> dict[str, Any]:
        usage = Usage()
        choices: list[dict[str, Any]] = []
        async for i, output in self._outputs():
            await self._decode_prompt(i, output)
            usage.see(output, is_first=True)
            for completion in output.outputs:
                choice = self._choice(i, output, completion, is_first=True)
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs_json(output.prompt_logprobs)
                choices.append(choice)
        if self._drops_output:
            usage.completion = 0
        choices.sort(key=lambda choice: choice["index"])
        return self._envelope(KIND, choices) | {"usage": usage.json()}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        usage, seen = Usage(), set()
        options = self._body.stream_options
        outputs = self._outputs()
        try:
            async for i, output in outputs:
                await self._decode_prompt(i, output)
                usage.see(output, is_first=i not in seen)
                seen.add(i)
                if self._drops_output:
                    usage.completion = 0
                for completion in output.outputs:
                    is_first = i * self._n + completion.index not in self._offsets
                    chunk = self._envelope(KIND, [self._choice(i, output, completion, is_first)])
                    if options is not None and options.include_usage:
                        chunk["usage"] = usage.json() if options.continuous_usage_stats else None
                    yield chunk
            if options is not None and options.include_usage:
                yield self._envelope(KIND, []) | {"usage": usage.json()}
        finally:
            await outputs.aclose()

    async def _prompt(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str) and not self._body.add_special_tokens:
            tokenize = partial(self._llm.get_tokenizer(), prompt, add_special_tokens=False)
            ids = (await self._llm.with_tokenizer(tokenize)).input_ids
            return {"prompt": prompt, "prompt_token_ids": ids}
        if self._body.echo:
            self._llm.get_tokenizer()  # or a ValueError
        return prompt

    async def _decode_prompt(self, i: int, output: RequestOutput) -> None:
        """With echo: the prompt's text, if token ids were given, and that of its first token, of which nothing else is
        known."""
        if self._body.echo and i not in self._first_texts:
            decode, ids = self._llm.get_tokenizer().decode, output.prompt_token_ids
            first = await self._llm.with_tokenizer(decode, ids[:1])
            # The text of a character that several tokens make up is its last one's.
            self._first_texts[i] = "" if first.endswith("\ufffd") else first
            self._texts[i] = str(output.prompt or await self._llm.with_tokenizer(decode, ids))

    def _choice(self, i: int, output: RequestOutput, completion: CompletionOutput, is_first: bool) -> dict[str, Any]:
        """What is new of one choice; with echo, its first part begins with the prompt."""
        index = i * self._n + completion.index
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[i] = output.prompt_logprobs
        text = completion.text
        entries: list[tuple[int, dict[int, Logprob] | None]] = []
        entries += zip(completion.token_ids, completion.logprobs or (), strict=False)
        if self._drops_output:
            text, entries = "", []
        if self._body.echo and is_first:
            text = self._texts[i] + text
            entries = [*zip(output.prompt_token_ids, self._prompt_logprobs.get(i, ()), strict=False), *entries]
        offset = self._offsets.get(index, 0)
        logprobs = None
        self._offsets[index] = offset + len(text)
        if self._body.logprobs is not None:
            logprobs = self._logprobs(entries, offset, self._first_texts.get(i, ""))
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason if not self._drops_output else "length",
            "stop_reason": completion.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [] if self._drops_output else completion.token_ids
            choice["prompt_token_ids"] = output.prompt_token_ids if is_first else None
        return choice

    def _logprobs(
        self, entries: Sequence[tuple[int, dict[int, Logprob] | None]], offset: int, first_text: str
    ) -> dict[str, Any]:
        """OpenAI's older form: four lists, an entry a token.  `first_text`: of a prompt's first token."""
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        top_logprobs: list[dict[str, float] | None] = []
        offsets: list[int] = []
        most = self._body.logprobs or 0
        for token_id, entry in entries:
            if entry is None:  # of the first token of a prompt nothing can be said
                text = first_text
                token_logprobs.append(None)
                top_logprobs.append(None)
            else:
                text = entry[token_id].decoded_token or ""
                token_logprobs.append(finite(entry[token_id].logprob))
                top = {text: finite(entry[token_id].logprob)}
                for one in entry.values():
                    if one.rank is not None and one.rank <= most:  # of several with the same text, the most likely
                        top.setdefault(one.decoded_token or "", finite(one.logprob))
                top_logprobs.append(top)
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": offsets,
        }
