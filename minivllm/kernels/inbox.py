"""Inbox: how kernels on GPUs that see each other's memory exchange values, without a call to a library between them.

Every rank has an inbox that all ranks write to: for each row of a step, a place for what each rank sends.  A place is
empty while it holds EMPTY (−0.0), so a value tells of its arrival by itself: the receiver reads until no element is
empty, takes what is there, and empties the place for a later turn.  One trip over NVLink, and no flag beside the data
(the "Lamport" exchange of TensorRT-LLM's one-shot all-reduce).  A −0.0 is sent as 0.0.

Program r of a kernel exchanges row r.  A row has two sets of places, used in turn.  Who sends to a set again has
received what was sent to the other one since, by kernels that began after those which emptied this set: so it is empty.
(If one of the ranks adds up a row for all, each of them hears from that one only, which has heard from all.)
Turns are counted on the device, row by row, so replays of CUDA graphs and eager launches may follow in any order, as
long as all ranks run the same kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Inbox:
    """This rank's inbox and the way to those of the others."""

    places: torch.Tensor  # [rows, 2 turns, senders, width]: integers as wide as the elements; all empty at first
    addresses: torch.Tensor  # [ranks] int64: of all ranks' `places`, as this rank reaches them
    turns: torch.Tensor  # [rows] int32: exchanges so far
    rank: int
    shared: object = None  # keeps the others' memory in reach

    @staticmethod
    def empty(bits: int) -> int:
        """What an empty place holds: −0.0 in floats of so many bits, read as an integer."""
        return -1 << (bits - 1)

    @property
    def num_rows(self) -> int:
        return self.places.shape[0]

    @property
    def size(self) -> int:
        """Ranks."""
        return self.addresses.shape[0]

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What kernels take of it."""
        return self.places, self.addresses, self.turns, self.rank


def await_flags(flags: torch.Tensor, value: int) -> None:
    """Wait on the device until all `flags` [count] int32, which others write to, are `value`."""
    count = flags.shape[0]
    _await_kernel[(1,)](flags, value, COUNT=count, BLOCK=triton.next_power_of_2(count), num_warps=1)


@triton.jit(do_not_specialize=["value"])
def _await_kernel(flags, value, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    found = tl.load(flags + offs, offs < COUNT, value, volatile=True)
    while tl.max((found != value).to(tl.int32), 0) > 0:
        found = tl.load(flags + offs, offs < COUNT, value, volatile=True)


@triton.jit
def places_of_turn(row, turn, WIDTH: tl.constexpr, SENDERS: tl.constexpr):
    """Where in an inbox the places of a row's exchange number `turn` begin."""
    return (row * 2 + turn % 2) * (SENDERS * WIDTH)


@triton.jit
def send(bits, addresses, peer, offs, mask):
    """Write `bits` [BLOCK], integers, to the places at `offs` of a rank's inbox."""
    EMPTY: tl.constexpr = -(2 ** (bits.dtype.primitive_bitwidth - 1))
    bits = tl.where(bits == EMPTY, 0, bits).to(bits.dtype)
    inbox = tl.load(addresses + peer).to(tl.pointer_type(bits.dtype))
    tl.store(tl.multiple_of(inbox, 16) + offs, bits, mask)


@triton.jit
def receive(place, mask):
    """What comes to the places [BLOCK], which are empty again then."""
    EMPTY: tl.constexpr = -(2 ** (place.dtype.element_ty.primitive_bitwidth - 1))
    bits = tl.load(place, mask, 0, volatile=True)
    while tl.max((bits == EMPTY).to(tl.int32), 0) > 0:
        bits = tl.load(place, mask, 0, volatile=True)
    tl.debug_barrier()  # warps may have read the same places, and none may find them empty again
    tl.store(place, tl.full(bits.shape, EMPTY, bits.dtype), mask)
    return bits


@triton.jit
def _place_of(sender, receiver):
    """Which of a receiver's places is the sender's: an inbox has one for each other rank, in their order."""
    return sender - (sender > receiver).to(tl.int32)


@triton.jit
def _received_sum(value, places, begin, rank, offs, mask, SIZE: tl.constexpr, RANKS: tl.constexpr):
    """`value` and what comes from all other ranks, added up in the ranks' order; float32."""
    total = tl.zeros(value.shape, tl.float32)
    for peer in tl.static_range(RANKS):
        if peer == rank:
            total += value.to(tl.float32)
        else:
            received = receive(places + begin + _place_of(peer, rank) * SIZE + offs, mask)
            total += received.to(value.dtype, bitcast=True).to(tl.float32)
    return total


@triton.jit
def _send_to_others(value, places, addresses, begin, rank, offs, mask, SIZE: tl.constexpr, RANKS: tl.constexpr):
    bits = value.to(places.dtype.element_ty, bitcast=True)
    for i in tl.static_range(1, RANKS):
        peer = (rank + i) % RANKS  # not all to the same one first
        send(bits, addresses, peer, begin + _place_of(rank, peer) * SIZE + offs, mask)


@triton.jit
def exchange_sum(
    value, before, places, addresses, turns, row, rank, offs, mask,
    SIZE: tl.constexpr, RANKS: tl.constexpr, OWNED: tl.constexpr,
):  # fmt: skip
    """`before` and the sum over the ranks of `value` [BLOCK], elements `offs` of a row of SIZE; in value's type, and
    the same on all ranks.  OWNED: added up by one of the ranks, which sends the others the result: one trip more, but
    among many ranks fewer bytes."""
    turn = tl.load(turns + row)
    begin = places_of_turn(row, turn, SIZE, RANKS - 1)
    owner = (row % RANKS).to(tl.int32)
    if OWNED:
        if rank == owner:
            total = _received_sum(value, places, begin, rank, offs, mask, SIZE, RANKS)
            result = (total + before).to(value.dtype)
            _send_to_others(result, places, addresses, begin, rank, offs, mask, SIZE, RANKS)
        else:
            bits = value.to(places.dtype.element_ty, bitcast=True)
            send(bits, addresses, owner, begin + _place_of(rank, owner) * SIZE + offs, mask)
            received = receive(places + begin + _place_of(owner, rank) * SIZE + offs, mask)
            result = received.to(value.dtype, bitcast=True)
    else:
        _send_to_others(value, places, addresses, begin, rank, offs, mask, SIZE, RANKS)
        total = _received_sum(value, places, begin, rank, offs, mask, SIZE, RANKS)
        result = (total + before).to(value.dtype)
    tl.store(turns + row, turn + 1)  # behind the barrier in `receive`: all warps have read it
    return result
