"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): a model cut into shares, one a worker.

The first projections of attention and of the MLP are cut by their outputs, so each worker has heads and columns of its
own; the last ones by their inputs, so that their results are summands, added up over the workers.  The vocabulary is
cut in ranges, but for the embedding, which every worker has: half a GB for an 8B model, against an exchange a step.
Everything else (norms, the residual stream, sampling) every worker does for itself, with the same numbers.

Where GPUs see each other's memory, no library is called between kernels: the sums are left to the norm that comes
next, whose kernel exchanges the summands (`kernels/inbox.py`), as that of sampling does the tokens that each worker
has drawn from its logits.  Elsewhere, for more rows than SENT_ROWS, and to gather the logits of rows that ask for more
than a draw, it is NCCL, or gloo on CPUs.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minivllm.backends.base import SPLIT_SIZE

if TYPE_CHECKING:
    from minivllm.kernels import Inbox, VocabShare

Index = tuple[slice, ...]
SENT_ROWS = 8192  # of a sum, to all others together, that norms exchange; NCCL moves fewer bytes for more of them


@dataclass(frozen=True)
class Share:
    """One of `count` equal parts."""

    index: int = 0
    count: int = 1

    def of(self, total: int, start: int = 0) -> slice:
        """This share of `total` rows that begin at `start`."""
        size = total // self.count
        return slice(start + self.index * size, start + (self.index + 1) * size)


WHOLE = Share()


@dataclass(frozen=True)
class Summand:
    """What one worker adds to a sum [rows, size] that the norm which takes it works out."""

    value: torch.Tensor
    inbox: Inbox


@dataclass(frozen=True)
class Parts:
    """A checkpoint tensor of which not all is wanted, or not in one place: what of it goes where."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Index, torch.Tensor], ...]


class TensorParallel:
    """A worker's place among `size`, and what it does together with the others.  Alone, nothing.

    The default process group of torch.distributed must have been made.  `sums`, `draws`: inboxes for sums and for
    sampled tokens; both, where the workers' kernels see each other's memory, or none.
    """

    def __init__(self, rank: int = 0, size: int = 1, sums: Inbox | None = None, draws: Inbox | None = None) -> None:
        self.rank = rank
        self.size = size
        self.sums = sums
        self.draws = draws

    @property
    def share(self) -> Share:
        """Of query heads and of the MLP's columns."""
        return Share(self.rank, self.size)

    def kv_share(self, num_kv_heads: int) -> Share:
        """Of KV heads: with fewer of them than workers, several workers have the same one."""
        count = min(self.size, num_kv_heads)
        return Share(self.rank * count // self.size, count)

    def vocab_range(self, vocab_size: int) -> range:
        """Token ids whose logits this worker has; the last workers may have fewer, or none."""
        most = self._most_logits(vocab_size)
        return range(min(self.rank * most, vocab_size), min((self.rank + 1) * most, vocab_size))

    def vocab_share(self, vocab_size: int) -> VocabShare | None:
        """What sampling has to know to draw from that range; None: it needs all logits."""
        if self.draws is None:
            return None
        from minivllm.kernels import VocabShare

        return VocabShare(self.vocab_range(vocab_size).start, self.draws)

    def _most_logits(self, vocab_size: int) -> int:
        unit = 1 if self.draws is None else SPLIT_SIZE  # of which sampling takes whole ones
        return -(-vocab_size // (unit * self.size)) * unit

    def sum(self, x: torch.Tensor) -> torch.Tensor | Summand:
        """The workers' x added up, in place, or left to the norm that comes next."""
        if self.size == 1:
            return x
        if self.sums is not None and x.shape[0] <= self.sums.num_rows:
            return Summand(x, self.sums)
        dist.all_reduce(x)
        return x

    def gather_logits(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """The workers' logits [rows, own ids] side by side: [rows, vocab_size], the same for all."""
        if self.size == 1:
            return logits
        rows, num_own = logits.shape
        most = self._most_logits(vocab_size)
        own = logits.contiguous() if num_own == most else F.pad(logits, (0, most - num_own))
        gathered = torch.empty(self.size * rows, most, dtype=logits.dtype, device=logits.device)
        # The same function, renamed in torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, own)
        return gathered.view(self.size, rows, most).transpose(0, 1).reshape(rows, -1)[:, :vocab_size]

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the workers' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor.item())


ALONE = TensorParallel()


def see_each_other(device: torch.device, rank: int, size: int) -> bool:
    """Whether the workers' kernels can reach each other's memory: on a CPU, and where all GPUs have a way to all."""
    if device.type == "cpu":
        return True
    gpus = range(device.index - rank, device.index - rank + size)
    return all(a == b or torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus)


def open_inbox(rows: int, senders: int, width: int, bits: int, rank: int, size: int, device: torch.device) -> Inbox:
    """This worker's inbox for values of so many bits, in memory that all `size` workers reach.  All must call it."""
    from minivllm.kernels import Inbox

    shape, dtype = (rows, 2, senders, width), torch.int16 if bits == 16 else torch.int32
    places, addresses, shared = (_shared_on_cpu if device.type == "cpu" else _shared_by_gpus)(
        shape, dtype, rank, size, device
    )
    places.fill_(Inbox.empty(bits))
    inbox = Inbox(
        places=places,
        addresses=torch.tensor(addresses, dtype=torch.int64, device=device),
        turns=torch.zeros(rows, dtype=torch.int32, device=device),
        rank=rank,
        shared=shared,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()  # empty everywhere before anything is sent
    return inbox


def _shared_by_gpus(
    shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, device: torch.device
) -> tuple[torch.Tensor, list[int], object]:
    """A tensor of this worker, the addresses of all workers' ones, and what keeps these in reach."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    tensor = symmetric_memory.empty(shape, dtype=dtype, device=device)
    assert dist.group.WORLD is not None
    handle = symmetric_memory.rendezvous(tensor, dist.group.WORLD)
    assert handle.buffer_ptrs[rank] == tensor.data_ptr()
    return tensor, handle.buffer_ptrs, handle


def _shared_on_cpu(
    shape: tuple[int, ...], dtype: torch.dtype, rank: int, size: int, device: torch.device
) -> tuple[torch.Tensor, list[int], object]:
    """The same for kernels in Triton's interpreter: mapped files."""
    with tempfile.TemporaryDirectory() as folder:
        folders: list[Any] = [None] * size
        dist.all_gather_object(folders, folder)
        files = [os.path.join(one, "inbox") for one in folders]
        own = torch.from_file(files[rank], shared=True, size=math.prod(shape), dtype=dtype)
        dist.barrier()  # all files are there
        tensors = [
            own if peer == rank else torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype)
            for peer, file in enumerate(files)
        ]
        dist.barrier()
    return own.view(shape), [tensor.data_ptr() for tensor in tensors], tensors
