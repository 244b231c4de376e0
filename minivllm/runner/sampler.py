"""Sampler: from logits to tokens.

The backend draws a token a row (greedy, or by temperature and seed); rows that ask for more have their logits masked
first.  A batch in which no row asks for more pays nothing for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from minivllm.backends import Backend
from minivllm.runner.slots import Slots


@dataclass(slots=True)
class SamplingInputs:
    """What the backend draws by, one entry a row of logits."""

    slots: torch.Tensor  # [R] int32
    temperature: torch.Tensor  # [R] float32
    seeds: torch.Tensor  # [R] int64
    positions: torch.Tensor  # [R] int32: place of the new token in the request's output


def sampling_arrays(slots: Slots, rows: np.ndarray, seq_lens: np.ndarray) -> dict[str, np.ndarray]:
    """The host arrays of SamplingInputs for the requests in slots `rows` (int32), now `seq_lens` tokens long."""
    return {
        "sample_slots": rows,
        "temperature": slots.temperature[rows],
        "seeds": slots.seed[rows],
        "sample_positions": seq_lens - slots.num_prompt_tokens[rows],
    }


def sampling_inputs(tensors: dict[str, torch.Tensor], num_rows: int) -> SamplingInputs:
    """The first `num_rows` rows of the uploaded `sampling_arrays`."""
    names = ("sample_slots", "temperature", "seeds", "sample_positions")
    return SamplingInputs(*(tensors[name][:num_rows] for name in names))


def sample(backend: Backend, logits: torch.Tensor, inputs: SamplingInputs, last_token: torch.Tensor) -> torch.Tensor:
    """A token for each row of logits [R, vocab]; also written to last_token[slot].  Returns [R] int32."""
    return backend.sample(logits, inputs.temperature, inputs.seeds, inputs.positions, last_token, inputs.slots)


def needs_masks(slots: Slots, rows: np.ndarray, seq_lens: np.ndarray) -> bool:
    """Whether any of the requests in slots `rows` asks for more than the backend's own sampling."""
    return bool(
        slots.truncates[rows].any() or (seq_lens - slots.num_prompt_tokens[rows] < slots.min_tokens[rows]).any()
    )


def mask_logits(
    logits: torch.Tensor, slots: Slots, rows: np.ndarray, seq_lens: np.ndarray, temperature: torch.Tensor
) -> torch.Tensor:
    """A float32 copy of the logits [R, vocab] with −inf for tokens that min_tokens, top_k, top_p or min_p rule out."""
    logits = logits.float().clone() if logits.dtype == torch.float32 else logits.float()
    too_short = seq_lens - slots.num_prompt_tokens[rows] < slots.min_tokens[rows]
    banned = [(i, token) for i in np.flatnonzero(too_short) for token in slots.stop_token_ids[rows[i]]]
    if banned:
        index = _to_device(np.array(banned, np.int64).T.copy(), logits.device)
        logits[index[0], index[1]] = float("-inf")
    if slots.truncates[rows].any():
        top_k, top_p, min_p = (
            _to_device(values[rows], logits.device) for values in (slots.top_k, slots.top_p, slots.min_p)
        )
        truncate(logits, temperature, top_k, top_p, min_p)
    return logits


def truncate(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> None:
    """Set to −inf, in place, what min_p, then top_k, then top_p (Holtzman et al. 2020) rule out, in vLLM's order.

    logits: [R, vocab] float32; the others: [R], top_k ≤ 0, top_p = 1 and min_p = 0 meaning off.
    """
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    best = scaled.amax(-1, keepdim=True)
    # p < min_p · p_best  <=>  logit < best + log(min_p)
    scaled.masked_fill_(scaled < best + min_p.clamp(min=1e-30).log()[:, None], float("-inf"))
    values, order = scaled.sort(-1, descending=True)
    ranks = torch.arange(values.shape[1], device=values.device)
    limit = torch.where(top_k > 0, top_k, values.shape[1])
    values.masked_fill_(ranks[None, :] >= limit[:, None], float("-inf"))
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the more likely tokens
    values.masked_fill_((before >= top_p[:, None]) & (top_p < 1)[:, None] & (ranks > 0), float("-inf"))
    dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter_(1, order, values == float("-inf"))
    logits.masked_fill_(dropped, float("-inf"))


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
