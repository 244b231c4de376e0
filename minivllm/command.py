"""How a command on the command line begins and ends: what it prints, and its exit status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from minivllm.child_process import WorkerError


def print_any_text() -> None:
    """Let what the terminal's encoding lacks be printed as escapes, not be an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Let what is still to be printed go nowhere, since whoever read it has gone: at its end Python would try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_status(name: str, run: Callable[[], int | None]) -> int:
    """Run a command: its own status (None: 0), or that of how it failed.  A user's mistakes are one line on stderr."""
    try:
        status = run()
        print(end="", flush=True)  # a reader that has gone shows here, not after the end
    except BrokenPipeError:
        discard_output()
        return 141  # what a shell makes of SIGPIPE
    except (ValueError, OSError, ImportError, MemoryError, WorkerError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return status or 0
