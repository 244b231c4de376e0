"""What clients of an OpenAI-compatible server send and read: a key, events of a stream, errors in various forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

DONE = b"[DONE]"


def payloads(lines: Iterable[bytes]) -> Iterator[bytes]:
    """What the lines of a stream carry; those that are no events carry nothing."""
    for line in lines:
        if line.startswith(b"data:") and (payload := line[len(b"data:") :].strip()):
            yield payload


def decode(payload: bytes) -> dict[str, Any]:
    """The event's JSON; {} for the last one, DONE.  Raises ValueError if it is an error, or no JSON."""
    if payload == DONE:
        return {}
    try:
        event = json.loads(payload)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ValueError(f"the server sent an event that is no JSON object: {shortened(payload)}")
    if event.get("error"):
        raise ValueError(f"the server reported an error: {error_message(event, payload)}")
    return event


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries a key, if there is one.  Raises ValueError for a key that no header can hold."""
    if not api_key:
        return {}
    if not all(" " <= character <= "~" for character in api_key):
        raise ValueError("--api-key (or $OPENAI_API_KEY) has characters that an HTTP header cannot hold")
    return {"Authorization": f"Bearer {api_key}"}


def http_error(status: int, body: bytes, reason: str | None) -> str:
    """What a server says with an answer of such a status."""
    try:
        message = error_message(json.loads(body), body)
    except ValueError:
        message = shortened(body)
    return f"HTTP {status}: {message or reason}"


def error_message(answer: Any, raw: bytes) -> str:
    """The message in an OpenAI error, or in what others send in its place."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return error if isinstance(error, str) else shortened(raw)


def shortened(raw: bytes) -> str:
    """The beginning of bytes that should not be long, on one line."""
    text = " ".join(raw.decode("utf-8", "replace").split())
    return text if len(text) <= 200 else f"{text[:200]}…"
