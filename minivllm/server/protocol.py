"""The bodies of requests: OpenAI's fields, and those that vLLM adds.  What is not here is refused by name.

A field that is null counts as left out, and so does one that says what is the case anyway.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minivllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from minivllm.server.errors import ApiError
from minivllm.validation import NotSupported

# Fields that go to SamplingParams under their own names.
SAMPLING_FIELDS = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "truncate_prompt_tokens", "allowed_token_ids",
    "bad_words", "stream_interval",
)  # fmt: skip
# Fields that ask for something there is not, in bodies whose class has no such field: for each the values that do not
# ask, which clients send as defaults, and what to do instead.
NOT_SUPPORTED: NotSupported = {
    "add_special_tokens": ((False,), "the chat template writes them"),
    "echo": ((False,), "/v1/completions has it"),
    "function_call": (("none",), "use tool_choice"),
    "functions": (([],), "use tools"),
    "include_reasoning": ((True,), "reasoning is part of the text"),
    "length_penalty": ((1,), "beam search is LLM.beam_search"),
    "modalities": ((["text"],), "answers are text"),
    "parallel_tool_calls": ((True,), "/v1/chat/completions has it"),
    "priority": ((0,), "requests are served in the order they come"),
    "return_tokens_as_token_ids": ((False,), "use return_token_ids"),
    "service_tier": (("auto", "default"), "there is one"),
    "store": ((False,), "answers are not kept"),
    "top_logprobs": ((0,), "use logprobs"),
    "use_beam_search": ((False,), "beam search is LLM.beam_search"),
}
MAX_OUTPUTS = 128  # n, and prompts of one body
# Checked up to the first wrong entry: a long list of wrong ones would take as many errors.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)
    not_supported: ClassVar[NotSupported] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        kept = {name: value for name, value in body.items() if value is not None}
        for name in kept.keys() & (cls.not_supported.keys() - cls.model_fields.keys()):
            harmless, remedy = cls.not_supported[name]
            if kept.pop(name) not in harmless:
                raise ApiError(400, f"{name} is not supported; {remedy}", name, "unsupported_parameter")
        return kept


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    structures: Objects | None = None  # of a structural tag
    triggers: Texts | None = None

    def structured_outputs(self) -> StructuredOutputsParams | None:
        """What it asks of the text."""
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema_ is None:
                raise ApiError(400, "response_format.json_schema needs a schema", "response_format")
            return StructuredOutputsParams(json=self.json_schema.schema_)
        if self.type == "structural_tag":
            tag = {"structures": self.structures, "triggers": self.triggers}
            return StructuredOutputsParams(structural_tag=json.dumps(tag))
        return None


class StructuredOutputs(Body):
    """vLLM's structured_outputs, the fields of StructuredOutputsParams."""

    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None


class RepetitionDetection(Body):
    """vLLM's repetition_detection, the fields of RepetitionDetectionParams."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class SamplingBody(Body):
    """What chat and completions have in common."""

    not_supported = NOT_SUPPORTED
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MAX_OUTPUTS)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Texts | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    best_of: int | None = None
    # Who asks, and the like: they change nothing.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Texts | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    repetition_detection: RepetitionDetection | None = None
    stream_interval: int | None = None
    return_token_ids: bool = False
    request_id: str | None = Field(None, min_length=1, max_length=200)

    @model_validator(mode="after")
    def _check_best_of(self) -> SamplingBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported; use n", "best_of", "unsupported_parameter")
        return self

    def asked_tokens(self) -> int | None:
        """How many tokens of output the client wants to have room for, if it says so."""
        return self.max_tokens

    def sampling_params(self, defaults: dict[str, Any], **others: Any) -> SamplingParams:
        """`others` over what the body says over the model's `defaults`.  Raises ApiError for what makes no sense."""
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.logit_bias is not None:
            try:
                given["logit_bias"] = {int(t): min(max(bias, -100.0), 100.0) for t, bias in self.logit_bias.items()}
            except ValueError:
                raise ApiError(400, "logit_bias: its keys must be token ids", "logit_bias") from None
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs does not go with stream: true", "prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream: true only", "stream_options")
        options = defaults | given | {name: value for name, value in others.items() if value is not None}
        kind = RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY
        try:
            if self.repetition_detection is not None:
                options["repetition_detection"] = RepetitionDetectionParams(**self.repetition_detection.model_dump())
            asked = [*self._structured_outputs(), options.pop("structured_outputs", None)]
            asked = [one for one in asked if one is not None]
            if len(asked) > 1:
                raise ApiError(400, "structured_outputs, response_format and tool_choice ask for different texts; "
                               "give one", "structured_outputs")  # fmt: skip
            return SamplingParams(**options, structured_outputs=asked[0] if asked else None, output_kind=kind)
        except ValueError as error:
            raise self.refusal(str(error)) from None

    def refusal(self, message: str, otherwise: str | None = None) -> ApiError:
        """What SamplingParams or the engine find wrong, by the name that the field has here; `otherwise`: the field, if
        the message does not begin with one."""
        word = re.match(r"\w*", message)[0]  # type: ignore[index]
        name = self.own_names().get(word, word)
        if name not in type(self).model_fields:
            return ApiError(400, message, otherwise)
        return ApiError(400, name + message.removeprefix(word), name)

    def own_names(self) -> dict[str, str]:
        """Options of SamplingParams, and the fields that they come from, where these are called otherwise."""
        return {} if self.structured_outputs is not None else {"structured_outputs": "response_format"}

    def _structured_outputs(self) -> list[StructuredOutputsParams | None]:
        own = self.structured_outputs
        from_format = None if self.response_format is None else self.response_format.structured_outputs()
        if own is None:
            return [from_format]
        return [from_format, StructuredOutputsParams(json=own.json_, **own.model_dump(exclude={"json_"}))]


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> CompletionBody:
        if len(self.prompts()) > MAX_OUTPUTS:
            raise ValueError(f"prompt has more than {MAX_OUTPUTS} prompts")
        if not self.prompts():
            raise ValueError("prompt is empty")
        return self

    def own_names(self) -> dict[str, str]:
        """With echo, logprobs are those of the prompt too."""
        return super().own_names() | ({} if self.prompt_logprobs is not None else {"prompt_logprobs": "logprobs"})

    def prompts(self) -> list[str | list[int]]:
        """Each prompt: text, or token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
