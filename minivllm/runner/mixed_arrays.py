"""The host arrays of a mixed step: decodes, one token a row, and then chunks of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivllm.engine.batch import ScheduledBatch
from minivllm.runner.forward_batch import QUERY_TILE
from minivllm.runner.slots import Slots


def padded_size(batch: ScheduledBatch, sizes: Sequence[int]) -> int | None:
    """The least of `sizes` that the step can be padded to; None: it is run as it is."""
    if batch.prompt_logprobs_rows:
        return None
    num_tokens, num_prefills = batch.num_tokens, len(batch.slots) - batch.num_decodes
    return next((size for size in sizes if size >= num_tokens and _max_prefills(size) >= num_prefills), None)


def _max_prefills(size: int) -> int:
    """Prompts that a step of so many tokens may have: each takes a tile of attention more than its tokens would."""
    return 8 + size // 64


def mixed_arrays(state: Slots, batch: ScheduledBatch, size: int | None) -> dict[str, np.ndarray]:
    """What the model reads.  For a `size`, which `padded_size` has found, all shapes depend on it alone: tokens, rows,
    tiles and outputs are padded.

    The model's outputs are those of the rows that sample, and then of the tokens whose logprobs are wanted.
    """
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
    ends = query_start_loc[1:]
    outputs = [ends[batch.sampled_rows] - 1]
    for row in batch.prompt_logprobs_rows:
        outputs.append(query_start_loc[row] + np.arange(len(prompt_targets(state, batch, row))))
    wanted = np.concatenate(outputs).astype(np.int32)
    if not len(wanted):
        wanted = ends[:1] - 1
    tokens, rows, decodes, num_tiles, num_outputs = num_tokens, len(slots), num_decodes, len(tiles), len(wanted)
    if size is not None:
        tokens, decodes = size, min(size, state.padding)
        num_outputs = decodes  # a row samples once at most
        rows = decodes + 1  # the last one is padding, to which padded tiles belong
        num_tiles = size // QUERY_TILE + _max_prefills(size)
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
        "output_tokens": _pad(wanted, num_outputs, 0),
    }


def prompt_targets(state: Slots, batch: ScheduledBatch, row: int) -> np.ndarray:
    """Of a row that wants its prompt's logprobs: the tokens of the prompt that follow those of this step."""
    begin = batch.num_computed[row] + 1
    end = min(begin + batch.num_scheduled[row], int(state.num_prompt_tokens[batch.slots[row]]))
    return state.token_ids[batch.slots[row]][begin:end]


def named_targets(state: Slots, batch: ScheduledBatch, row: int) -> list[list[int] | None]:
    """For each of `prompt_targets`: the token ids that the request names there, if it does."""
    first, rows = state.prompt_rows[batch.slots[row]]
    if not rows:
        return []
    begin = batch.num_computed[row] - first
    places = range(begin, begin + len(prompt_targets(state, batch, row)))
    return [[max(token_id, 0) for token_id in rows[i]] if 0 <= i < len(rows) else None for i in places]


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
