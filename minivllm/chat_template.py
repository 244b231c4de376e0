"""From a conversation to a prompt, by the chat template of a tokenizer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]


class ContentFormat(NamedTuple):
    """What a template is given for the content of messages."""

    keeps_parts: bool  # parts; else the texts of parts, joined to one
    takes_text: bool  # a text as it is; else as a part


FORMATS = {"string": ContentFormat(False, True), "openai": ContentFormat(True, False)}
# Parts of a content that are text, by type, and where it stands in them.
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}


def load_template(template: str | Path | None) -> str | None:
    """A chat template given as text or as the path of a file.  Raises ValueError for what is no template."""
    if template is None:
        return None
    import jinja2

    if isinstance(template, Path) or (isinstance(template, str) and "{" not in template):
        try:
            template = Path(template).read_text(encoding="utf-8")
        except OSError:
            raise ValueError(f"chat_template {str(template)!r:.200} is neither a Jinja template nor a file") from None
    if not isinstance(template, str):
        raise ValueError(f"chat_template must be a Jinja template or the path of one, got {template!r}")
    try:
        _parsed(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat_template, line {error.lineno}: {error.message}") from None
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
    chat_template_content_format: str = "auto",
) -> str:
    """The text of the prompt.

    chat_template: in place of the tokenizer's own.
    continue_final_message: leave the last message open, for the model to go on with.
    tools: descriptions of functions (JSON schema), handed to the template, as chat_template_kwargs are, in which the
    other two may be too.
    chat_template_content_format: what the template is given for contents: texts ("string"), lists of parts ("openai"),
    or what it is made for ("auto").
    """
    if chat_template_content_format not in ("auto", *FORMATS):
        raise ValueError(
            f"chat_template_content_format must be 'auto', 'string' or 'openai', got {chat_template_content_format!r}"
        )
    if not isinstance(chat_template_kwargs, (Mapping, type(None))):
        raise ValueError(f"chat_template_kwargs must be a dict, got {chat_template_kwargs!r}")
    if not isinstance(tools, (list, tuple, type(None))) or not all(
        isinstance(tool, Mapping) or callable(tool) for tool in tools or ()
    ):
        raise ValueError(f"tools must be a list of JSON schemas, got {tools!r:.200}")
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
    content_format = FORMATS.get(chat_template_content_format) or _content_format(
        tokenizer.get_chat_template(chat_template, own["tools"])
    )
    try:
        return tokenizer.apply_chat_template(
            [_checked(message, content_format) for message in messages], **own, **given
        )
    except ValueError:
        raise
    except Exception as error:  # whatever a template comes to
        raise ValueError(f"the chat template cannot render these messages: {error}") from error


@functools.lru_cache
def _parsed(template: str) -> Any:
    """Its syntax tree, without the marks of what an assistant has said, which are transformers' own."""
    import jinja2

    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


@functools.lru_cache
def _content_format(template: str) -> ContentFormat:
    """What a template is made for, by what it does: whether it goes through contents, and asks if they are strings."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = _parsed(template)
    except jinja2.TemplateError:
        return FORMATS["string"]

    def is_content(node: nodes.Node, names: Collection[str] = ()) -> bool:
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Name) and node.name in names

    assigned = [(node.target, node.node) for node in tree.find_all(nodes.Assign)]
    names = {target.name for target, value in assigned if isinstance(target, nodes.Name) and is_content(value)}
    asks = any(test.name == "string" and is_content(test.node, names) for test in tree.find_all(nodes.Test))
    goes_through = any(is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    return ContentFormat(keeps_parts=goes_through, takes_text=asks or not goes_through)


def _checked(message: Message, content_format: ContentFormat) -> Message:
    """The message as the template wants it, the arguments of earlier calls as objects.  Results of tools are always
    texts, as most templates take nothing else for them (vLLM does likewise)."""
    if message["role"] == "tool":
        content_format = FORMATS["string"]
    content = message.get("content")
    if content is None:
        content = "" if content_format.takes_text else []
    if isinstance(content, list):
        parts = [_text_part(part) for part in content]
        content = parts if content_format.keeps_parts else "\n".join(part["text"] for part in parts)
    elif not isinstance(content, str):
        raise ValueError(f"messages: content must be text or a list of parts, got {content!r:.200}")
    elif not content_format.takes_text:
        content = [{"type": "text", "text": content}]
    own = {**message, "content": content}
    if calls := own.pop("tool_calls", None):  # templates ask whether they are there, not whether there are any
        if not isinstance(calls, list) or not all(
            isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls
        ):
            raise ValueError("messages: tool_calls must be a list of calls, each with a function")
        own["tool_calls"] = [{**call, "function": _with_arguments(call["function"])} for call in calls]
    return own


def _text_part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    name = TEXTS.get(str(part.get("type"))) if isinstance(part, dict) else None
    if name is None or not isinstance(part.get(name), str):
        raise ValueError("messages: only content of text is supported, not images or the like")
    return part if part["type"] == "text" else {"type": "text", "text": part[name]}


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
