"""Rows shared out: how tensor parallelism adds up in steps of many tokens (sequence parallelism, Korthikanti et al.
2022).

There a worker adds up and norms some rows of the residual stream alone, its own.  Of a product whose results are
summands it works out the others' rows first, and sends each its own while it multiplies the next; of the product that
follows, its own rows, while those come in that the others have normed.  Copies between GPUs are done by their copy
engines, which take no multiprocessor from the products, and a flag follows each, so that one kernel waits.

Places for what comes in are used again each time, and flags go from 0 to 1 and back: sums and products alternate, and
before a worker sends for the next sum it has got the rows that its receiver normed after the last one, and the other
way round.  A step has an even number of either, so CUDA graphs, in which the flags' values are fixed, find them as they
were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minivllm.parallel.shared_tensors import SharedTensors, all_ready

SUMMANDS, ROWS = 0, 1  # kinds of messages


@dataclass(frozen=True)
class RowShare:
    """This worker's rows of [num_rows, size]."""

    value: torch.Tensor  # [own rows, size]
    num_rows: int
    exchange: RowExchange
    addends: torch.Tensor | None = None  # [workers − 1, own rows, size]: what the norm that comes next has to add

    @property
    def rows(self) -> slice:
        return self.exchange.rows_of(self.exchange.rank, self.num_rows)

    def with_value(self, value: torch.Tensor) -> RowShare:
        """Other values of the same rows."""
        return RowShare(value, self.num_rows, self.exchange)

    def product(self, multiply: Callable[[torch.Tensor, torch.Tensor], object], out_size: int) -> torch.Tensor:
        """[num_rows, out_size]: what `multiply(values, out)` makes of all workers' rows, part by part."""
        out = torch.empty(self.num_rows, out_size, dtype=self.value.dtype, device=self.value.device)
        for rows, values in self.exchange.all_rows(self):
            multiply(values, out[rows])
        return out

    def whole(self) -> torch.Tensor:
        """All rows, on all workers."""
        return self.product(lambda values, out: out.copy_(values), self.value.shape[1])

    def __getitem__(self, wanted: torch.Tensor) -> torch.Tensor:
        """Rows `wanted` [S], on all workers: [S, size].  All must call it."""
        places = wanted - self.rows.start
        is_own = (places >= 0) & (places < len(self.value))
        found = torch.where(is_own[:, None], self.value[places.clamp(0, len(self.value) - 1)], 0)
        dist.all_reduce(found)
        return found


Rows = torch.Tensor | RowShare  # of a step: all of them, or this worker's


class RowExchange:
    """What workers need to share rows out in steps of more than `more_than` and at most `max_rows` rows of `width`
    elements.  All must make it."""

    def __init__(
        self, rank: int, size: int, more_than: int, max_rows: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rank = rank
        self.more_than = more_than
        self._size = size
        self._peers = [(rank + i) % size for i in range(1, size)]  # so that no two send to the same one first
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        most = -(-max_rows // size)
        self._summands = SharedTensors((size - 1, most, width), dtype, rank, size, device)
        self._rows = SharedTensors((max_rows, width), dtype, rank, size, device)
        self._flags = SharedTensors((2, size - 1), torch.int32, rank, size, device)  # by kind of message and sender
        self._flag_values = torch.tensor([0, 1], dtype=torch.int32, device=device)
        self._turns = [0, 0]  # by kind: the value of the last flags
        all_ready(device)

    @property
    def is_at_rest(self) -> bool:
        """Whether all flags are as they were at first."""
        return self._turns == [0, 0]

    def rows_of(self, rank: int, num_rows: int) -> slice:
        """Those that are the worker's own."""
        return slice(rank * num_rows // self._size, (rank + 1) * num_rows // self._size)

    def sum(self, linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> RowShare:
        """The workers' linear(x) [num_rows, width], to be added up by a norm."""
        num_rows = x.shape[0]
        self._turns[SUMMANDS] ^= 1
        sent = []
        for peer in self._peers:
            sent.append(linear(x[self.rows_of(peer, num_rows)]))
            self._send(sent[-1], self._summands[peer][self._place(self.rank, peer)], peer, SUMMANDS)
        own = linear(x[self.rows_of(self.rank, num_rows)])
        self._await(SUMMANDS)
        return RowShare(own, num_rows, self, self._summands[self.rank][:, : len(own)])

    def all_rows(self, share: RowShare) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their values), first of this worker, then of the others."""
        rows = share.rows
        self._turns[ROWS] ^= 1
        for peer in self._peers:
            self._send(share.value, self._rows[peer][rows], peer, ROWS)
        yield rows, share.value
        self._await(ROWS)
        for others in (slice(0, rows.start), slice(rows.stop, share.num_rows)):
            if others.start < others.stop:
                yield others, self._rows[self.rank][others]

    def _place(self, sender: int, receiver: int) -> int:
        return sender - (sender > receiver)

    def _send(self, values: torch.Tensor, to: torch.Tensor, peer: int, kind: int) -> None:
        """Copy `values` to the first rows of `to` once they are there, and tell.  They are not to be freed before
        `_await` of this kind."""
        flag = self._flags[peer][kind, self._place(self.rank, peer)]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # None: no other
            to[: len(values)].copy_(values)
            flag.copy_(self._flag_values[self._turns[kind]])

    def _await(self, kind: int) -> None:
        """Wait, on the device, for what the others send and for what is sent to them."""
        from minivllm import kernels

        kernels.await_flags(self._flags[self.rank][kind], self._turns[kind])
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
