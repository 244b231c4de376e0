"""What a call changes of its process: for as long as it runs the garbage collector, and what Ctrl-C does; the limit of
open files."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def heap_left_alone() -> Iterator[None]:
    """Keep the garbage collector off what is there already: to go through all of it takes a dozen steps' time."""
    if gc.get_freeze_count():  # the program has seen to it
        yield
        return
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Let Ctrl-C take effect after the block, which is thus never left half done.  A second one takes effect at
    once."""
    # Where no function of Python's handles it, the system does, or another language, and it stays so.
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    received: list[Any] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            signal.default_int_handler(number, frame)
        received.append(frame)

    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if received:
        previous(signal.SIGINT, received[0])


def allow_open_files(num_connections: int) -> None:
    """Let this process have so many connections, as far as it may: each is an open file, of which the usual limit is
    1,024."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + 256
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
