"""Tensors that all workers of tensor parallelism reach: GPUs see each other's memory, processes on a CPU map files."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


class SharedTensors:
    """A tensor in each worker, as this worker reaches them: `shared[rank]`.

    All workers must make it, at the same time; the default process group of torch.distributed must have been made.
    `all_ready` has to follow before the first use by another worker.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, device: torch.device, fill: int = 0
    ) -> None:
        open_all = _mapped if device.type == "cpu" else _symmetric
        self._tensors, self._handle = open_all(shape, dtype, rank, size, device)
        self._tensors[rank].fill_(fill)

    def __getitem__(self, rank: int) -> torch.Tensor:
        return self._tensors[rank]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._tensors)


def all_ready(device: torch.device) -> None:
    """Wait until every worker has come here, and its device with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def see_each_other(device: torch.device, rank: int, size: int) -> bool:
    """Whether the workers can reach each other's memory: on a CPU, and where all GPUs have a way to all."""
    if device.type == "cpu":
        return True
    gpus = range(device.index - rank, device.index - rank + size)
    return all(a == b or torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus)


def _symmetric(
    shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, device: torch.device
) -> tuple[list[torch.Tensor], object]:
    """The tensors, and what keeps those of the others in reach."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(shape, dtype=dtype, device=device)
    assert dist.group.WORLD is not None
    handle = symmetric_memory.rendezvous(own, dist.group.WORLD)
    assert handle.buffer_ptrs[rank] == own.data_ptr()
    return [own if peer == rank else handle.get_buffer(peer, shape, dtype) for peer in range(size)], handle


def _mapped(
    shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, device: torch.device
) -> tuple[list[torch.Tensor], object]:
    """The same on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        folders: list[Any] = [None] * size
        dist.all_gather_object(folders, folder)
        files = [os.path.join(one, "tensor") for one in folders]
        length = math.prod(shape)
        own = torch.from_file(files[rank], shared=True, size=length, dtype=dtype)
        dist.barrier()  # all files are there
        tensors = [
            own if peer == rank else torch.from_file(file, shared=True, size=length, dtype=dtype)
            for peer, file in enumerate(files)
        ]
        dist.barrier()
    return [tensor.view(shape) for tensor in tensors], None
