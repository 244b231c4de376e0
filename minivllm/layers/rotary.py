"""The table of rotary position embeddings, for every position, computed once in float32."""

from __future__ import annotations

import math

import torch

from minivllm.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """[positions, head_dim] float32: the cosines of each position's angles, then their sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "llama3":
        frequencies = _llama3(frequencies, rope)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Slow down long wavelengths by `factor`, leave short ones, and blend between (Llama 3.1 report, section 3.4)."""
    wavelengths = 2 * math.pi / frequencies
    # How many of its own turns a frequency makes over the context of the first training.
    turns = rope.original_max_position_embeddings / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies
