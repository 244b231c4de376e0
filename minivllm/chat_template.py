"""From a conversation to a prompt, by the chat template of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]


def load_template(template: str | Path | None) -> str | None:
    """A chat template given as text or as the path of a file."""
    if template is None:
        return None
    if isinstance(template, Path) or (isinstance(template, str) and "{" not in template):
        if not Path(template).is_file():
            raise ValueError(f"chat_template {str(template)!r} is neither a Jinja template nor a file")
        return Path(template).read_text(encoding="utf-8")
    if not isinstance(template, str):
        raise ValueError(f"chat_template must be a Jinja template or the path of one, got {template!r}")
    return template


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text of the prompt.

    chat_template: in place of the tokenizer's own.
    continue_final_message: leave the last message open, for the model to go on with.
    tools: descriptions of functions (JSON schema), handed to the template, as chat_template_kwargs are, in which the
    other two may be too.
    """
    own = dict(chat_template=chat_template, tools=None if tools is None else list(tools), tokenize=False)
    given = dict(add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message)
    given |= chat_template_kwargs or {}
    if taken := own.keys() & given.keys():
        raise ValueError(f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be given to the chat template so")
    if given["continue_final_message"] and given["add_generation_prompt"]:
        raise ValueError(
            "continue_final_message goes on with the last message; set add_generation_prompt=False with it"
        )
    if not (chat_template or tokenizer.chat_template):
        raise ValueError("the tokenizer has no chat template; give one as chat_template, or use generate")
    try:
        return tokenizer.apply_chat_template([_checked(message) for message in messages], **own, **given)
    except ValueError:
        raise
    except Exception as error:  # whatever a template comes to
        raise ValueError(f"the chat template cannot render these messages: {error}") from error


def _checked(message: Message) -> Message:
    """The message as templates want it: text parts joined to one text, the arguments of earlier calls as objects."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(
            isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text") for part in content
        ):
            raise ValueError("messages: only content of text is supported, not images or the like")
        content = "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    own = {**message, "content": "" if content is None else content}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list) or not all(
            isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
        ):
            raise ValueError("messages: tool_calls must be a list of calls, each with a function")
        own["tool_calls"] = [{**call, "function": _with_arguments(call["function"])} for call in calls]
    return own


def _with_arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        return {**function, "arguments": json.loads(arguments or "{}")}
    except (ValueError, RecursionError):
        raise ValueError("messages: a tool call's arguments are not JSON") from None


def is_conversation(messages: Any) -> bool:
    """Whether `messages` is a list of messages, each with a role, and content or a call of a tool."""
    return (
        isinstance(messages, Sequence)
        and len(messages) > 0
        and all(isinstance(m, dict) and "role" in m and ("content" in m or "tool_calls" in m) for m in messages)
    )
