"""Checks of what users give."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def reject_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ValueError for the names in `given` that are not in `known`, with the nearest known name."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ValueError(f"{what} has no argument {name!r}{hint}")


def check_int(name: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is an int (not a bool) of at least `least`, and of 64 bits at most."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 63:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
