"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): a model cut into shares, one a worker.

The first projections of attention and of the MLP are cut by their outputs, so each worker has heads and columns of its
own; the last ones by their inputs, so that their results are summands, added up over the workers.  The vocabulary is
cut in ranges, but for the embedding, which every worker has: half a GB for an 8B model, against an exchange a step.
Everything else (norms, the residual stream, sampling) every worker does for itself, with the same numbers.

Sums take two ways.  Those of few rows, which a decode step has two of a layer, are left to the norm that comes next:
its kernel exchanges summands by itself (`kernels/inbox.py`).  Larger ones go through NCCL, in parts, so that the
product of one part runs while the part before is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minivllm.backends.base import SPLIT_SIZE

if TYPE_CHECKING:
    from minivllm.kernels import Inbox

Index = tuple[slice, ...]
MAX_SUM_ROWS = 256  # of a sum that norms work out
NUM_PARTS, MIN_PART_ROWS = 4, 512  # of a larger one


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

    The default process group of torch.distributed must have been made.  `sums`, `draws`: inboxes for sums of few rows
    and for sampled tokens, both or none, by whether the GPUs see each other's memory.
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

    def _most_logits(self, vocab_size: int) -> int:
        unit = 1 if self.draws is None else SPLIT_SIZE  # of which sampling takes whole ones
        return -(-vocab_size // (unit * self.size)) * unit

    def sum(self, product: Callable[..., torch.Tensor], x: torch.Tensor, size: int) -> torch.Tensor | Summand:
        """The workers' product(x) added up.  x: [rows, in]; product(x, out=None): [rows, size], written to `out`."""
        rows = x.shape[0]
        if self.size == 1:
            return product(x)
        if self.sums is not None and rows <= self.sums.max_rows:
            return Summand(product(x), self.sums)
        total = torch.empty(rows, size, dtype=x.dtype, device=x.device)
        part_rows = max(MIN_PART_ROWS, -(-rows // NUM_PARTS))
        works = []
        for part, target in zip(x.split(part_rows), total.split(part_rows), strict=True):
            product(part, out=target)
            works.append(dist.all_reduce(target, async_op=True))  # on a stream of its own, once `target` is there
        for work in works:
            work.wait()
        return total

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


def see_each_other(first_gpu: int, size: int) -> bool:
    """Whether so many GPUs from the first on can read and write each other's memory."""
    gpus = range(first_gpu, first_gpu + size)
    return all(a == b or torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus)


def open_inbox(rows: int, width: int, bits: int, rank: int, size: int, device: torch.device) -> Inbox:
    """This worker's inbox for values of so many bits, in memory that all workers reach.  All must call it."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    from minivllm.kernels import Inbox

    dtype = torch.int16 if bits == 16 else torch.int32
    places = symmetric_memory.empty((rows, 2, size, width), dtype=dtype, device=device)
    assert dist.group.WORLD is not None
    handle = symmetric_memory.rendezvous(places, dist.group.WORLD)
    places.fill_(Inbox.empty(bits))
    assert handle.buffer_ptrs[rank] == places.data_ptr()
    inbox = Inbox(
        places=places,
        addresses=torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device),
        turns=torch.zeros(rows, dtype=torch.int32, device=device),
        rank=rank,
    )
    torch.cuda.synchronize()
    dist.barrier()  # empty everywhere before anything is sent
    return inbox
