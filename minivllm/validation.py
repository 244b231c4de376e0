"""Checks of what users give."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any


def reject_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError for the names in `given` that are not in `known`, with the nearest known name."""
    known = dict.fromkeys(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{what} has no argument {name!r}{hint}")


# Options of vLLM's that ask for something there is not: for each the values that do not ask, and what to do instead.
NotSupported = Mapping[str, tuple[tuple[Any, ...], str]]


def take_options(
    given: Mapping[str, Any], what: str, not_supported: NotSupported, taken: Iterable[str] = ()
) -> dict[str, Any]:
    """Those of the options in `given` that are `taken`.  Raises ValueError for any others, but for those that are not
    supported and do not ask for anything either."""
    taken = dict.fromkeys(taken)
    reject_unknown(given, [*taken, *not_supported], what)
    for name in not_supported.keys() & given.keys():
        harmless, remedy = not_supported[name]
        if given[name] not in harmless:
            raise ValueError(f"{what}: {name}={given[name]!r} is not supported: {remedy}")
    return {name: value for name, value in given.items() if name in taken}


def check_int(name: str, value: Any, least: int, most: int = (1 << 63) - 1) -> None:
    """Raise ValueError unless `value` is an int (not a bool) of at least `least` and at most `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")


def check_text(name: str, text: str) -> None:
    """Raise ValueError for a text that UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be text, and has half a surrogate pair at {error.start}: {text!r:.80}") from None


def refuses_unknown_options(not_supported: NotSupported | None = None) -> Callable[[type], type]:
    """Let the constructor of a dataclass refuse options it does not have with a ValueError that says why."""

    def change(cls: Any) -> Any:
        init = cls.__init__
        names = [field.name for field in fields(cls)]

        @functools.wraps(init)
        def __init__(self: Any, **options: Any) -> None:
            init(self, **take_options(options, cls.__name__, not_supported or {}, names))

        cls.__init__ = __init__
        return cls

    return change
