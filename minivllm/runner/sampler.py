"""Sampler: from logits to tokens.

The backend draws a token a row, greedy or by temperature and seed; where rows ask for more, `logits.py` has changed
their logits before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from minivllm.backends import Backend
from minivllm.runner.slots import Slots

if TYPE_CHECKING:
    from minivllm.kernels import VocabShare


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


def sample(
    backend: Backend,
    logits: torch.Tensor,
    inputs: SamplingInputs,
    last_token: torch.Tensor,
    share: VocabShare | None = None,
) -> torch.Tensor:
    """A token for each row of logits [R, vocab], or of this worker's `share` of the vocabulary; also written to
    last_token[slot].  Returns [R] int32."""
    return backend.sample(logits, inputs.temperature, inputs.seeds, inputs.positions, last_token, inputs.slots, share)
