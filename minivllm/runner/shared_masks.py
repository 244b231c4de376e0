"""The masks of grammars, which the engine's process writes and the workers of tensor parallelism read.

They lie in memory that all map, for a step's masks may be a megabyte and more.  It has no name, and goes with the last
process that maps it.  A step's masks are written when the step before is answered: a worker may be reading the masks of
that one still, but none older, so two sets take turns.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from io import FileIO

import numpy as np


class SharedMasks:
    """`array`: [2, max_num_seqs, vocab_size / 32] int32.  `file`: the memory, for processes that are to inherit it; may
    be closed then.  `descriptor`: the file's in a process that has inherited it; without, it is made."""

    def __init__(self, max_num_seqs: int, vocab_size: int, descriptor: int | None = None) -> None:
        shape = 2, max_num_seqs, -(-vocab_size // 32)
        self.file = FileIO(_nameless_file() if descriptor is None else descriptor, "r+")
        self.file.truncate(4 * math.prod(shape))
        self.array = np.frombuffer(mmap.mmap(self.file.fileno(), 0), np.int32).reshape(shape)


def _nameless_file() -> int:
    """A file descriptor; in memory on Linux, elsewhere on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("token masks")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
