"""Checks of what users give."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any


def reject_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError for the names in `given` that are not in `known`, with the nearest known name."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{what} has no argument {name!r}{hint}")


def take_options(
    given: Mapping[str, Any], what: str, nothing: Mapping[str, tuple[Any, ...]], taken: Iterable[str] = ()
) -> dict[str, Any]:
    """Those of the options in `given` that are `taken`.  Raises ValueError for others but those in `nothing`, with one
    of the values there."""
    reject_unknown(given, [*taken, *nothing], what)
    for name, value in given.items():
        if name not in taken and value not in nothing[name]:
            raise ValueError(f"{what}: {name} is not supported; leave it out")
    return {name: value for name, value in given.items() if name in taken}


def check_int(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an int (not a bool) of at least `least`, and of 64 bits at most."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_text(name: str, text: str) -> None:
    """Raise ValueError for a text that UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text, and has half a surrogate pair at {error.start}: {text!r:.80}") from None


def refuses_unknown_options(not_supported: Mapping[str, Any] | None = None) -> Callable[[type], type]:
    """Let the constructor of a dataclass refuse options it does not have with a ValueError that says why; those in
    `not_supported` are accepted with the value there, which asks for nothing."""

    def change(cls: Any) -> Any:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, **options: Any) -> None:
            for name, nothing in (not_supported or {}).items():
                value = options.pop(name, nothing)
                if value != nothing and value not in ([], {}):
                    raise ValueError(f"{cls.__name__}: {name} is not supported yet")
            reject_unknown(options, [f.name for f in fields(cls)], cls.__name__)
            init(self, **options)

        cls.__init__ = __init__
        return cls

    return change
