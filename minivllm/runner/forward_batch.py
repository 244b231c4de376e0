"""ForwardBatch: the tensors of one step, handed down through the model explicitly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from minivllm.kernels import DecodePlan

QUERY_TILE = 128  # queries of one row that prefill attention takes together


@dataclass(slots=True)
class ForwardBatch:
    """T tokens of R rows (requests).  The first `num_decodes` rows have one token each and use decode attention.

    Rows may be padding: seq_len 0, slot_mapping −1.  They compute garbage and write nothing.
    """

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    slot_mapping: torch.Tensor  # [T] int64: where the token's K and V go, block · block_size + offset
    block_tables: torch.Tensor  # [R, columns] int32
    seq_lens: torch.Tensor  # [R] int32, this step's tokens included
    num_decodes: int
    query_start_loc: torch.Tensor | None = None  # [R + 1] int32; None: all rows are decodes
    query_tiles: torch.Tensor | None = None  # [tiles, 2] int32: the tiles of prefill attention
    decode_plan: DecodePlan | None = None  # made by the first layer that needs it
    host_seq_lens: Sequence[int] = ()  # the same on the host, for the torch backend
    host_query_start_loc: Sequence[int] = ()
    _decode_groups: list[tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)

    def decode_groups(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The decode rows in groups of similar length, so that padding to the longest costs little.

        Yields (rows [R'], mask [R', 1, 1, keys]), mask True where a row has a key.  Made once, for all layers.
        """
        if self._decode_groups is None:
            self._decode_groups = []
            lengths: dict[int, list[int]] = {}
            for row in range(self.num_decodes):
                lengths.setdefault(max(self.host_seq_lens[row], 128).bit_length(), []).append(row)
            for members in lengths.values():
                rows = torch.tensor(members, device=self.seq_lens.device)
                num_keys = max(max(self.host_seq_lens[row] for row in members), 1)
                keys = torch.arange(num_keys, device=self.seq_lens.device)
                mask = keys[None, :] < self.seq_lens[rows].clamp(min=1)[:, None]
                self._decode_groups.append((rows, mask[:, None, None, :]))
        yield from self._decode_groups
