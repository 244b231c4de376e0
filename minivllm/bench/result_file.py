"""What --json writes."""

from __future__ import annotations

import json
from typing import Any


def write_json(path: str, content: Any, indent: int | None = 1) -> None:
    """Write `content` to the file of --json, which an OSError names."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=indent) + "\n")
    except OSError as error:
        raise OSError(f"--json {path}: {error.strerror}") from error
