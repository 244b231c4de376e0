"""Processes of our own, each at the end of a connection: the engine of `AsyncLLM`, the workers of tensor parallelism.

Not multiprocessing: that would import the caller's main module once more.
"""

from __future__ import annotations

import math
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection

# Signals that end programs are meant for the parent, which ends the process when it is done.
QUIET = "import signal as s; s.signal(s.SIGINT, s.SIG_IGN); s.signal(s.SIGTERM, s.SIG_IGN)"


class WorkerError(RuntimeError):
    """A worker has failed, ended or given no answer in time; the model is lost."""


def start_process(
    module: str, environment: Mapping[str, str] | None = None, file_descriptors: Sequence[int] = ()
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start `main` of a module in a process of its own; returns it, and our end of a Connection.  `main` gets the file
    descriptor of the other end, and `file_descriptors`, which it inherits.  `environment`: variables that it gets
    unless they are set here."""
    ours, theirs = socket.socketpair()
    with theirs:
        inherited = [theirs.fileno(), *file_descriptors]
        # -P: the caller's path decides which modules are found, not the folder it is in.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"{QUIET}; from {module} import main; main(*{inherited})"],
            pass_fds=inherited,
            env={
                **(environment or {}),
                **os.environ,
                "PYTHONPATH": os.pathsep.join(_module_path()),
            },
            stdin=subprocess.DEVNULL,
        )
    return process, Connection(ours.detach())


def _module_path() -> list[str]:
    """Where this process finds modules."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        here = ""
    return [found for path in sys.path if isinstance(path, str) and (found := path or here)]


def set_write_timeout(connection: Connection, seconds: float) -> None:
    """Let sending raise BlockingIOError when the other end does not read for so long."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(seconds), 0))


def check_importable(name: str, functions: Iterable[Callable[..., object]]) -> None:
    """Raise ValueError for functions, given as `name`, that such a process could not import."""
    for function in functions:
        try:
            is_importable = b"__main__" not in pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, say
            is_importable = False
        if not is_importable:
            raise ValueError(
                f"{name}: {function!r} has to run in another process, which cannot import it; define it at the top of "
                "a module other than the script"
            )
