"""The bodies of chat/completions, and of what else takes conversations."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from minivllm.sampling_params import StructuredOutputsParams
from minivllm.server.protocol import Body, Objects, SamplingBody


class Function(Body):
    model_config = ConfigDict(extra="allow")  # the template's to understand

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function

    def given(self) -> dict[str, Any]:
        """As the client wrote it."""
        return {"type": self.type, **self.model_dump(exclude_unset=True)}


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class Conversation(Body):
    """What makes a prompt of messages."""

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def template_options(self) -> dict[str, Any]:
        """Those of preprocess_chat."""
        return dict(
            chat_template=self.chat_template,
            add_generation_prompt=self.add_generation_prompt and not self.continue_final_message,
            continue_final_message=self.continue_final_message,
            tools=[tool.given() for tool in self.tools or ()] or None,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class ChatBody(SamplingBody, Conversation):
    """POST /v1/chat/completions."""

    messages: Objects = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.forced_function() is None:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among tools")
        return self

    def asked_tokens(self) -> int | None:
        """OpenAI's newer name comes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def own_names(self) -> dict[str, str]:
        """Tools may ask for a form too."""
        names = super().own_names() | {"logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.structured_outputs is None and self.forced_output() is not None:
            names["structured_outputs"] = "tools"
        return names

    def forced_function(self) -> Function | None:
        """The function that tool_choice names."""
        if not isinstance(self.tool_choice, NamedTool):
            return None
        name = self.tool_choice.function.name
        return next((tool.function for tool in self.tools or () if tool.function.name == name), None)

    def forced_output(self) -> StructuredOutputsParams | None:
        """What tool_choice makes the text: the arguments of the function it names, or a list of calls."""
        if (function := self.forced_function()) is not None:
            return StructuredOutputsParams(json=function.parameters or {"type": "object"})
        if self.tool_choice != "required":
            return None
        call = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    "parameters": tool.function.parameters or {"type": "object"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in self.tools or ()
        ]
        calls: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": call}}
        return StructuredOutputsParams(json=calls | ({} if self.parallel_tool_calls else {"maxItems": 1}))


class TokenizeBody(Conversation):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    add_special_tokens: bool = True  # to a prompt
    return_token_strs: bool = False
