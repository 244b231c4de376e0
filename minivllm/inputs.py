"""InputProcessor: from prompts and conversations as users give them to what the engine takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict

from minivllm.chat_template import Message, is_conversation, load_template, render
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.validation import NotSupported, check_text


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids; `prompt`: its text, to be found in the output."""

    prompt_token_ids: Required[list[int]]
    prompt: NotRequired[str]


Prompt = str | list[int] | dict[str, Any] | TextPrompt | TokensPrompt
PromptType = Prompt  # vLLM's name
# Entries of a generation config that a model may recommend, and the fields of SamplingParams they are.
RECOMMENDED = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")} | {
    "max_new_tokens": "max_tokens"
}
CheckedRequest = tuple[list[int], SamplingParams, str | None]  # token ids, params, text if known


class TooLongError(ValueError):
    """A text that is longer than max_model_len, whatever its tokens."""


class InputProcessor:
    """Of one model.  tokenizer: a Hugging Face one, or None; chat_template: in place of the tokenizer's own, text or
    file; generation_config: what recommends the options of requests that bring none."""

    def __init__(
        self, tokenizer: Any, chat_template: str | Path | None, generation_config: Mapping[str, Any], max_model_len: int
    ) -> None:
        self.tokenizer = tokenizer
        if tokenizer is not None:
            tokenizer.truncation_side = "left"  # for truncate_prompt_tokens
        self.chat_template = load_template(chat_template)
        self.max_model_len = max_model_len
        self._generation_config = generation_config

    def get_tokenizer(self) -> Any:
        """The tokenizer; ValueError if there is none (skip_tokenizer_init)."""
        if self.tokenizer is None:
            raise ValueError("skip_tokenizer_init=True: there is no tokenizer; give token ids as prompts")
        return self.tokenizer

    def default_options(self) -> dict[str, Any]:
        """The options of SamplingParams that the generation config recommends."""
        given = {ours: self._generation_config.get(theirs) for theirs, ours in RECOMMENDED.items()}
        return {name: value for name, value in given.items() if value is not None}

    def preprocess_chat(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        chat_template_content_format: str = "auto",
    ) -> Prompt:
        """The prompt that a conversation becomes.

        chat_template: text or file, in place of the model's own.  add_generation_prompt: begin the answer.
        continue_final_message: go on with the last message instead.  tools: functions that the model may call, as JSON
        schemas.  chat_template_kwargs: further arguments of the template.  chat_template_content_format: contents are
        given to the template as "string", as lists of parts ("openai"), or as it is made for ("auto").
        """
        tokenizer = self.get_tokenizer()
        if not is_conversation(messages):
            raise ValueError('messages must be a list of {"role": …, "content": …}, with at least one of them')
        text = render(
            tokenizer,
            messages,
            chat_template=load_template(chat_template) or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            chat_template_content_format=chat_template_content_format,
        )
        check_text("messages", text)
        self._check_length(text)
        ids = tokenizer(text, add_special_tokens=False).input_ids  # the template wrote the special tokens
        return {"prompt": text, "prompt_token_ids": ids}

    def check(self, prompt: Any, params: SamplingParams, output_kind: RequestOutputKind) -> CheckedRequest:
        """A prompt and its params as the engine takes them.  Raises ValueError for a prompt that is none."""
        params = replace(params, output_kind=output_kind)  # checks them again: they may have been changed since
        most = params.truncate_prompt_tokens
        if most == -1:  # what leaves room for the output
            most = max(1, self.max_model_len - (params.max_tokens or 1))
        text, token_ids = self._tokenize(prompt, most)
        return token_ids, params, text

    def _tokenize(self, prompt: Any, most: int | None) -> tuple[str | None, list[int]]:
        """(text if known, token ids) of one prompt: its last `most` ones, of a text beside the special tokens that the
        tokenizer puts before it."""
        text = None
        if isinstance(prompt, dict):
            keys = {key for key, value in prompt.items() if value is not None}
            if not prompt.keys() & {"prompt", "prompt_token_ids"} or keys - {"prompt", "prompt_token_ids"}:
                raise ValueError(f'a prompt dict has "prompt" or "prompt_token_ids", got the keys {list(prompt)}')
            text = prompt.get("prompt")
            if not isinstance(text, (str, type(None))):
                raise ValueError(f'"prompt" must be text, got {text!r:.80}')
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in keys else text
            if isinstance(prompt, str) and prompt is not text:
                raise ValueError(f'"prompt_token_ids" must be token ids, got {prompt!r:.80}')
        if isinstance(prompt, str):
            check_text("a prompt", prompt)
            tokenizer = self.get_tokenizer()
            if most is None:
                self._check_length(prompt)
                return prompt, tokenizer(prompt).input_ids
            num_special = tokenizer.num_special_tokens_to_add()
            if most < num_special:
                raise ValueError(f"truncate_prompt_tokens ({most}) has no room for {num_special} special tokens")
            return prompt, tokenizer(prompt, truncation=True, max_length=most).input_ids
        if not isinstance(prompt, (list, tuple)) or not all(type(token) is int for token in prompt):
            raise ValueError(f"a prompt must be text, token ids (ints) or a dict with one of them, got {prompt!r:.80}")
        return text, list(prompt[-most:] if most else prompt)

    def _check_length(self, text: str) -> None:
        """Raise TooLongError for a text that needs not be tokenized, which may take long, to be known as too long."""
        if len(text) > self.max_model_len and len(text) > (most := self.max_model_len * self._longest_token):
            raise TooLongError(
                f"the prompt has {len(text):,} characters, and max_model_len ({self.max_model_len}) tokens {most:,} at "
                "most; shorten the prompt or raise max_model_len"
            )

    @cached_property
    def _longest_token(self) -> int:
        """In characters; of byte-level tokenizers, in bytes, which are no fewer."""
        return max(map(len, self.get_tokenizer().get_vocab()))


# Of vLLM's methods: arguments for what there is not.
NOT_SUPPORTED: NotSupported = {
    "data_parallel_rank": ((None,), "start several engines, or examples/ray_serve.py --replicas N"),
    "lora_request": ((None, []), "merge the adapter into its base model"),
    "mm_processor_kwargs": ((None, {}), "only text is supported"),
    "priority": ((None, 0), "requests are served in the order they come"),
    "tokenization_kwargs": ((None, {}), "give token ids"),
    "trace_headers": ((None, {}), "leave it out"),
}
CHAT_OPTIONS = tuple(InputProcessor.preprocess_chat.__kwdefaults__ or ())


def checked_model(model: Any) -> str | None:
    """A reference to a model as text, or ValueError for what is none."""
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise ValueError(f"model must be a folder, a hub id, a .gguf file or None, got {model!r}")
    return None if model is None else os.fspath(model)


def is_one_prompt(prompts: Any) -> bool:
    """Whether this is one prompt and not a list of them."""
    return isinstance(prompts, (str, dict)) or (
        isinstance(prompts, list) and len(prompts) > 0 and all(isinstance(token, int) for token in prompts)
    )
