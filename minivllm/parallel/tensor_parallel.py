"""Shares of a model, and what a worker does together with the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minivllm.backends.base import SPLIT_SIZE
from minivllm.parallel.row_shares import RowExchange, Rows
from minivllm.parallel.shared_tensors import SharedTensors, all_ready

if TYPE_CHECKING:
    from minivllm.kernels import Inbox, VocabShare

Index = tuple[slice, ...]
SENT_ROWS = 2048  # of a sum that norms exchange by themselves; of more, workers share the rows out


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
    addends: torch.Tensor | Inbox  # of the other workers: [workers − 1, rows, size], or where they come


@dataclass(frozen=True)
class Parts:
    """A checkpoint tensor of which not all is wanted, or not in one place: what of it goes where."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Index, torch.Tensor], ...]


class TensorParallel:
    """A worker's place among `size`, and what it does together with the others.  Alone, nothing.

    The default process group of torch.distributed must have been made.  `sums`, `draws`: inboxes for sums and for
    sampled tokens; both, where the workers' kernels see each other's memory, or none.  `rows`: what larger sums take.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        sums: Inbox | None = None,
        draws: Inbox | None = None,
        rows: RowExchange | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.sums = sums
        self.draws = draws
        self.rows = rows

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

    def sum(self, linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Rows | Summand:
        """The workers' linear(x), rows of which do not depend on others, added up, or left to the norm that comes
        next."""
        if self.size == 1:
            return linear(x)
        if self.rows is not None and x.shape[0] > self.rows.more_than:
            return self.rows.sum(linear, x)
        summand = linear(x)
        if self.sums is not None and x.shape[0] <= self.sums.num_rows:
            return Summand(summand, self.sums)
        dist.all_reduce(summand)
        return summand

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

    def take_first(self, values: torch.Tensor) -> None:
        """Overwrite `values`, contiguous, with those of the first worker."""
        if self.size > 1:
            dist.broadcast(values, 0)

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the workers' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor.item())


ALONE = TensorParallel()


def open_inbox(rows: int, senders: int, width: int, bits: int, rank: int, size: int, device: torch.device) -> Inbox:
    """This worker's inbox for values of so many bits, in memory that all `size` workers reach.  All must call it."""
    from minivllm.kernels import Inbox

    dtype = torch.int16 if bits == 16 else torch.int32
    shared = SharedTensors((rows, 2, senders, width), dtype, rank, size, device, fill=Inbox.empty(bits))
    inbox = Inbox(
        places=shared[rank],
        addresses=torch.tensor([one.data_ptr() for one in shared], dtype=torch.int64, device=device),
        turns=torch.zeros(rows, dtype=torch.int32, device=device),
        rank=rank,
        shared=shared,
    )
    all_ready(device)  # empty everywhere before anything is sent
    return inbox
