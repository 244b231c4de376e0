"""The host arrays of a mixed step: decodes, one token a row, and then chunks of prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivllm.engine.batch import ScheduledBatch
from minivllm.runner.forward_batch import QUERY_TILE
from minivllm.runner.slots import Slots

MAX_PADDED_PREFILLS = 16  # prompts in a mixed step that is padded to a graph's size


def mixed_arrays(state: Slots, batch: ScheduledBatch, size: int | None) -> dict[str, np.ndarray]:
    """What the model reads.  For a `size`, all shapes depend on it alone: tokens, rows and tiles are padded."""
    slots = np.array(batch.slots, np.int32)
    num_computed = np.array(batch.num_computed, np.int32)
    num_scheduled = np.array(batch.num_scheduled, np.int32)
    query_start_loc = np.zeros(len(slots) + 1, np.int32)
    np.cumsum(num_scheduled, out=query_start_loc[1:])
    num_tokens, num_decodes = query_start_loc[-1], batch.num_decodes
    row_of_token = np.repeat(np.arange(len(slots)), num_scheduled)
    positions = np.arange(num_tokens, dtype=np.int32)
    positions += (num_computed - query_start_loc[:-1])[row_of_token]
    token_ids = np.full(num_tokens, -1, np.int32)  # of decodes, only the device knows them
    for row in range(num_decodes, len(slots)):
        known = state.token_ids[slots[row]]
        begin = num_computed[row]
        token_ids[query_start_loc[row] : query_start_loc[row + 1]] = known[begin : begin + num_scheduled[row]]
    seq_lens = num_computed + num_scheduled
    tiles = query_tiles(num_scheduled, num_decodes)
    tokens, rows, decodes, num_tiles = num_tokens, len(slots), num_decodes, len(tiles)
    if size is not None:
        tokens, decodes = size, min(size, state.padding)
        rows = decodes + 1  # the last one is padding, to which padded tiles belong
        num_tiles = size // QUERY_TILE + MAX_PADDED_PREFILLS
    return {
        "slots": _pad(slots, rows, state.padding),
        "seq_lens": _pad(seq_lens, rows, 0),
        "decode_seq_lens": _pad(seq_lens[:num_decodes], decodes, -1),
        "positions": _pad(positions, tokens, 0),
        "slot_mapping": _pad(state.slot_mapping(slots[row_of_token], positions), tokens, -1),
        "token_ids": _pad(token_ids, tokens, 0),
        "token_slots": _pad(slots[row_of_token], tokens, state.padding),
        "query_start_loc": _pad(query_start_loc, rows + 1, num_tokens),
        "query_tiles": _pad(tiles, num_tiles, [rows - 1, 0]),
    }


def prompt_part(slots: Slots, batch: ScheduledBatch, row: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Of a row that wants its prompt's logprobs: the row, its tokens in this step, the offsets of those which a
    token of the prompt follows, and these tokens."""
    slot, num_computed, num_scheduled = batch.slots[row], batch.num_computed[row], batch.num_scheduled[row]
    count = min(num_scheduled, int(slots.num_prompt_tokens[slot]) - 1 - num_computed)
    targets = slots.token_ids[slot][num_computed + 1 : num_computed + 1 + count]
    return row, num_scheduled, np.arange(count), targets


def query_tiles(num_scheduled: np.ndarray, num_decodes: int) -> np.ndarray:
    """[tiles, 2] int32: the row and first query of every tile of prefill attention; in a row, the last tile first."""
    num_tiles = -(-num_scheduled // QUERY_TILE)
    num_tiles[:num_decodes] = 0
    rows = np.repeat(np.arange(len(num_tiles)), num_tiles)
    tiles_left = np.cumsum(num_tiles)[rows] - np.arange(len(rows)) - 1
    return np.stack([rows, tiles_left * QUERY_TILE], 1).astype(np.int32)


def _pad(array: np.ndarray, size: int, value: Any) -> np.ndarray:
    """`array`, with rows of `value` up to `size`."""
    if len(array) == size:
        return array
    padded = np.empty((size, *array.shape[1:]), array.dtype)
    padded[: len(array)] = array
    padded[len(array) :] = value
    return padded
