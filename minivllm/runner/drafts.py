"""The rows of a decode step that compute drafts, behind those of the requests.

A request with a draft of d tokens takes d rows more: each is a row of its own to the kernels, with the request's blocks
and one token more than the row before.  All K and V of a step are written before attention reads them, layer by layer,
so every row sees those before it.  Draft tokens lie in `last_token` behind the slots, in places that the graph reads
like any slot's, and where the tokens sampled after them land.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.engine.batch import ScheduledBatch
from minivllm.runner.logits import to_device


@dataclass(slots=True)
class DraftRows:
    slots: np.ndarray  # [rows] int32: of the requests, as their tokens' K and V, blocks and options go
    places: np.ndarray  # [rows] int32: of the tokens in `last_token`
    seq_lens: np.ndarray  # [rows] int32


def expand(batch: ScheduledBatch, first_place: int) -> DraftRows:
    """All rows of a decode step: a row for each request, then one for each draft token, whose places in `last_token`
    count up from `first_place`."""
    slots, seq_lens = list(batch.slots), [num + 1 for num in batch.num_computed]
    for row, tokens in batch.drafts:
        slots += [batch.slots[row]] * len(tokens)
        seq_lens += range(seq_lens[row] + 1, seq_lens[row] + 1 + len(tokens))
    places = [*batch.slots, *range(first_place, first_place + len(slots) - len(batch.slots))]
    return DraftRows(*(np.array(values, np.int32) for values in (slots, places, seq_lens)))


def put_drafts(batch: ScheduledBatch, last_token: torch.Tensor, first_place: int) -> None:
    """Write the draft tokens to their places."""
    tokens = np.array([token for _, tokens in batch.drafts for token in tokens], np.int32)
    last_token[first_place : first_place + len(tokens)] = to_device(tokens, last_token.device)


def keep_last_accepted(batch: ScheduledBatch, tokens: torch.Tensor, last_token: torch.Tensor) -> None:
    """Leave in last_token[slot] the last right one of the tokens [rows] that were sampled: the one after the draft
    tokens that are what was sampled before them."""
    longest = max(len(drafted) for _, drafted in batch.drafts)
    rows = np.zeros((len(batch.drafts), longest + 1), np.int64)  # where in `tokens` those of a request are
    drafts = np.full((len(batch.drafts), longest), -1, np.int32)
    end = len(batch.slots)
    for i, (row, drafted) in enumerate(batch.drafts):
        rows[i, 0] = row
        rows[i, 1 : len(drafted) + 1] = np.arange(end, end + len(drafted))
        drafts[i, : len(drafted)] = drafted
        end += len(drafted)
    device = tokens.device
    sampled = tokens[to_device(rows, device)]  # [drafts, longest + 1]
    num_right = (sampled[:, :-1] == to_device(drafts, device)).int().cumprod(1).sum(1, keepdim=True)
    slots = to_device(np.array([batch.slots[row] for row, _ in batch.drafts], np.int64), device)
    last_token[slots] = sampled.gather(1, num_right.long())[:, 0]
