"""The files of --json and --plot.  Any may be a pipe, which is opened once and goes forward only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: str, content: Any, indent: int | None = 1) -> None:
    """Write `content` to the file of --json, which an OSError names."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=indent) + "\n")
    except OSError as error:
        raise OSError(f"--json {path}: {error.strerror}") from error


def save_picture(path: str, figure: Any) -> None:
    """Draw a figure of matplotlib's into the file of --plot, in the format of its suffix, else as PNG."""
    with open(path, "wb") as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower() or "png", dpi=150)
