"""What requests ask to be done to logits before a token is drawn, and the log probabilities they want to see.

In vLLM's order: allowed_token_ids, bad_words, min_tokens, logit_bias, logits_processors, penalties, and then min_p,
top_k, top_p.  A batch in which nobody asks for any of it never comes here.  What hangs on tokens that only the device
knows yet (penalties, bad words) is worked out there, from `history`: the tokens of each slot, [slots, max_model_len]
int32.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minivllm.backends import Backend
from minivllm.engine.batch import ScheduledBatch, TokenLogprobs
from minivllm.parallel import ALONE, TensorParallel
from minivllm.runner.slots import Slots
from minivllm.sampling_params import LogitsProcessor

NEVER = float("-inf")


def needs_processing(slots: Slots, rows: np.ndarray, seq_lens: np.ndarray) -> bool:
    """Whether any of the requests in slots `rows` asks for more than the backend's own sampling."""
    return bool(slots.processes[rows].any() or (_num_outputs(slots, rows, seq_lens) < slots.min_tokens[rows]).any())


def process_logits(
    backend: Backend,
    logits: torch.Tensor,
    slots: Slots,
    rows: np.ndarray,
    seq_lens: np.ndarray,
    temperature: torch.Tensor,
    history: torch.Tensor | None = None,
    batch: ScheduledBatch | None = None,
    tp: TensorParallel = ALONE,
) -> tuple[torch.Tensor, dict[int, str]]:
    """A float32 copy of the logits [R, vocab] of slots `rows` [R], now `seq_lens` [R] tokens long, with what they ask
    for done; and rows whose functions have raised, with what.

    batch: with what the host has worked out for some rows: the tokens they may sample at all, functions to call, which
    the first worker of `tp` does for all.  Masks are worked out when they are needed here, while a GPU still computes
    the logits.
    """
    batch = batch or ScheduledBatch()
    logits = logits.to(torch.float32, copy=True)
    if batch.token_masks:
        _apply_masks(logits, batch)
    allowed = [(i, ids) for i, slot in enumerate(rows.tolist()) if (ids := slots.allowed_token_ids[slot]) is not None]
    if allowed:
        index = _pairs(allowed, logits.device)
        kept = logits[index]
        logits[to_device(np.array([i for i, _ in allowed]), logits.device)] = NEVER
        logits[index] = kept
    _exclude_bad_words(logits, slots, rows, seq_lens, history)
    masked = set(batch.token_masks.places)  # a grammar may allow nothing but the end
    short = np.flatnonzero(_num_outputs(slots, rows, seq_lens) < slots.min_tokens[rows]).tolist()
    short = [i for i in short if i not in masked]
    if any(slots.stop_token_ids[rows[i]] for i in short):
        logits[_pairs([(i, slots.stop_token_ids[rows[i]]) for i in short], logits.device)] = NEVER
    biased = [(i, slots.logit_bias[slot]) for i, slot in enumerate(rows.tolist()) if slots.logit_bias[slot]]
    if biased:
        values = np.concatenate([np.array(list(bias.values()), np.float32) for _, bias in biased])
        index = _pairs([(i, list(bias)) for i, bias in biased], logits.device)
        logits[index] += to_device(values, logits.device)
    failed = {}
    for i, prompt_token_ids, output_token_ids in batch.processed:
        try:
            for function in slots.logits_processors[rows[i]] if tp.rank == 0 else ():
                logits[i] = _call(function, prompt_token_ids, output_token_ids, logits[i].clone())
        except Exception as error:
            failed[i] = str(error)
        tp.take_first(logits[i])
    if slots.penalizes[rows].any():
        _penalize(logits, slots, rows, seq_lens, history)
    if slots.truncates[rows].any():
        top_k, top_p, min_p = (
            to_device(values[rows], logits.device) for values in (slots.top_k, slots.top_p, slots.min_p)
        )
        backend.truncate(logits, temperature, top_k, top_p, min_p)
    return logits, failed


def _call(
    function: LogitsProcessor, prompt_token_ids: list[int], output_token_ids: list[int], logits: torch.Tensor
) -> torch.Tensor:
    try:
        takes_prompt = len(inspect.signature(function).parameters) == 3
        changed = function(*([list(prompt_token_ids)] if takes_prompt else []), list(output_token_ids), logits)
    except Exception:
        raise ValueError(f"logits_processors: {function!r} has failed:\n{traceback.format_exc()}") from None
    if not isinstance(changed, torch.Tensor) or changed.shape != logits.shape:
        what = list(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
        raise ValueError(f"logits_processors: {function!r} must return logits {list(logits.shape)}, returned {what}")
    return changed


def _apply_masks(logits: torch.Tensor, batch: ScheduledBatch) -> None:
    words, device = batch.token_masks.words(), logits.device
    if words is None:
        return
    rows = to_device(np.array(batch.token_masks.places, np.int64), device)
    bits = (to_device(words, device)[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, NEVER)


def _exclude_bad_words(
    logits: torch.Tensor, slots: Slots, rows: np.ndarray, seq_lens: np.ndarray, history: torch.Tensor | None
) -> None:
    """Rule out the last token of a bad word where the output ends with the tokens before it."""
    words = [(i, own) for i, slot in enumerate(rows) if (own := slots.bad_words[slot]) is not None]
    if not words:
        return
    assert history is not None
    owners = np.repeat([i for i, _ in words], [len(own.last) for _, own in words])
    last = np.concatenate([own.last for _, own in words])
    longest = max(own.before.shape[1] for _, own in words)
    before = np.concatenate(
        [np.pad(own.before, ((0, 0), (longest - own.before.shape[1], 0)), constant_values=-1) for _, own in words]
    )
    possible = (before >= 0).sum(1) <= _num_outputs(slots, rows, seq_lens)[owners]
    owners, last, before = owners[possible], last[possible], before[possible]
    places = np.maximum(seq_lens[owners, None] - longest + np.arange(longest), 0)
    device = logits.device
    found = history[to_device(rows[owners].astype(np.int64), device)[:, None], to_device(places, device)]
    expected = to_device(before, device)
    matches = ((found == expected) | (expected < 0)).all(1)
    index = to_device(owners, device), to_device(last, device)
    logits.index_put_(index, torch.where(matches, NEVER, 0.0), accumulate=True)  # a token may end several words


def _penalize(
    logits: torch.Tensor, slots: Slots, rows: np.ndarray, seq_lens: np.ndarray, history: torch.Tensor | None
) -> None:
    """Repetition penalty (Keskar et al. 2019) on the tokens of prompt and output, frequency and presence penalties on
    those of the output."""
    assert history is not None
    chosen = np.flatnonzero(slots.penalizes[rows])
    own, lens, device, vocab_size = rows[chosen], seq_lens[chosen], logits.device, logits.shape[1]
    index = to_device(chosen, device)
    repetition, frequency, presence = (
        to_device(values[own], device)[:, None]
        for values in (slots.repetition_penalty, slots.frequency_penalty, slots.presence_penalty)
    )
    longest = int(lens.max())
    tokens = history[to_device(own.astype(np.int64), device), :longest].long()
    places = torch.arange(longest, device=device)[None, :]
    is_known = places < to_device(lens, device)[:, None]
    is_output = is_known & (places >= to_device(slots.num_prompt_tokens[own], device)[:, None])
    counts = torch.zeros(len(own), vocab_size + 1, device=device)  # the last column is for what does not count
    counts.scatter_add_(1, torch.where(is_output, tokens, vocab_size), torch.ones(tokens.shape, device=device))
    is_there = torch.zeros(len(own), vocab_size + 1, dtype=torch.bool, device=device)
    is_there.scatter_(1, torch.where(is_known, tokens, vocab_size), True)
    counts, is_there = counts[:, :-1], is_there[:, :-1]
    values = logits[index]
    values = torch.where(is_there, torch.where(values > 0, values / repetition, values * repetition), values)
    logits[index] = values - frequency * counts - presence * (counts > 0)


@dataclass(slots=True)
class LogprobTensors:
    """Log probabilities on their way to the host, for some tokens: [N] each, and [N, K] for the most likely ones, or
    those that were named."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_token_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def entries(self) -> list[TokenLogprobs]:
        """To be called when the copies to the host are done."""
        columns = (self.logprobs, self.ranks, self.top_token_ids, self.top_logprobs)
        return [TokenLogprobs(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, named: Sequence[list[int] | None] = ()
) -> LogprobTensors:
    """Of `token_ids` [N] and of the `num_top` most likely tokens, by the softmax of logits [N, vocab]; in rows for
    which `named` has token ids, at most so many, of these instead.  The copies to the host are started, not waited for.
    """
    logits = logits.float()
    normalizer = logits.logsumexp(-1)
    own = logits.gather(1, token_ids.long()[:, None])
    values, ids = logits.topk(num_top)
    if by_row := {row: own_ids for row, own_ids in enumerate(named) if own_ids is not None}:
        padded = np.array([own_ids + [0] * (num_top - len(own_ids)) for own_ids in by_row.values()], np.int64)
        ids[to_device(np.array(list(by_row)), logits.device)] = to_device(padded, logits.device)
        values = logits.gather(1, ids)
    return LogprobTensors(
        _to_host(own[:, 0] - normalizer),
        _to_host((logits >= own).sum(-1)),
        _to_host(ids),
        _to_host(values - normalizer[:, None]),
    )


def _num_outputs(slots: Slots, rows: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
    return seq_lens - slots.num_prompt_tokens[rows]


def _pairs(items: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) that index the given columns of each row."""
    columns = [np.asarray(ids, np.int64) for _, ids in items]
    rows = np.repeat(np.array([row for row, _ in items], np.int64), [len(ids) for ids in columns])
    index = to_device(np.stack([rows, np.concatenate(columns)]), device)
    return index[0], index[1]


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for the copy there; on a CPU the array's own memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    np.copyto(pinned.numpy(), array)  # torch would wake its threads to copy a step's masks, which takes longer
    return pinned.to(device, non_blocking=True)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, without waiting for it."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
