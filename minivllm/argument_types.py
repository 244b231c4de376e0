"""Types of command-line arguments, for argparse: each says what is wrong with a text that is none."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    """An integer of at least `least`, and of at most `most`."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be an integer {bounds}, got {text!r}")
        return value

    return parse


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    value = _json(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def json_texts(text: str) -> list[str]:
    """A JSON list of texts."""
    value = _json(text)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise argparse.ArgumentTypeError(f"must be a JSON list of texts, got {text!r}")
    return value


def _json(text: str) -> Any:
    """What it stands for; None if it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def output_file(text: str) -> str:
    """A file that can be written, found out before a long run and not after it."""
    path = Path(text)
    try:
        if not path.exists():
            path = path.resolve()  # where a link leads; that of an open pipe leads to no path
            path.touch()
            path.unlink()
        elif path.is_dir() or not os.access(path, os.W_OK):
            raise PermissionError(None, "it is a folder, or not yours to write")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    return text


def picture_file(text: str) -> str:
    """The same for a picture, whose suffix says its format; a pipe needs none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install 'minivllm[plot]', or leave it out")
    if Path(text).suffix.lower() not in PICTURE_SUFFIXES and not Path(text).is_fifo():
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PICTURE_SUFFIXES)}, got {text!r}")
    return output_file(text)
