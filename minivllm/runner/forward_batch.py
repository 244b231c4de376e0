"""ForwardBatch: the tensors of one step, handed down through the model explicitly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    decode_seq_lens: torch.Tensor | None = None  # [num_decodes] int32, −1 for a row that is none; None: of `seq_lens`
    output_tokens: torch.Tensor | None = None  # [S]: of which tokens the model's output is wanted; None: all
    host_seq_lens: Sequence[int] = ()  # seq_lens and query_start_loc on the host, for the torch backend
    host_query_start_loc: Sequence[int] = ()
    plan: Any = None  # what the backend works out in the first layer, for all layers
