"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): a model cut into shares, one a worker.

The first projections of attention and of the MLP are cut by their outputs, so each worker has heads and columns of its
own; the last ones by their inputs, so that their results are summands, added up over the workers.  The vocabulary is
cut in ranges.  Everything else (norms, the residual stream, sampling) every worker does for itself, with the same
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

Index = tuple[slice, ...]


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
class Parts:
    """A checkpoint tensor of which not all is wanted, or not in one place: what of it goes where."""

    shape: tuple[int, ...]
    pieces: tuple[tuple[Index, torch.Tensor], ...]


class TensorParallel:
    """A worker's place among `size`, and what it does together with the others.  Alone, nothing.

    The default process group of torch.distributed must have been made.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def share(self) -> Share:
        """Of query heads and of the MLP's columns."""
        return Share(self.rank, self.size)

    def kv_share(self, num_kv_heads: int) -> Share:
        """Of KV heads: with fewer of them than workers, several workers have the same one."""
        count = min(self.size, num_kv_heads)
        return Share(self.rank * count // self.size, count)

    def vocab_range(self, vocab_size: int) -> range:
        """Token ids whose embeddings and logits this worker has."""
        most = self.rows_of_vocab(vocab_size)
        return range(min(self.rank * most, vocab_size), min((self.rank + 1) * most, vocab_size))

    def rows_of_vocab(self, vocab_size: int) -> int:
        """The most that any worker has."""
        return -(-vocab_size // self.size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the workers' x, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather_logits(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """The workers' logits [rows, rows_of_vocab] side by side: [rows, vocab_size], the same for all."""
        if self.size == 1:
            return logits
        gathered = torch.empty(self.size * len(logits), logits.shape[1], dtype=logits.dtype, device=logits.device)
        # The same function, renamed in torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, logits.contiguous())
        together = gathered.view(self.size, len(logits), -1).transpose(0, 1).reshape(len(logits), -1)
        return together[:, :vocab_size]

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the workers' values."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor.item())


ALONE = TensorParallel()
