"""The table of rotary position embeddings, for every position, computed once in float32.

Types whose frequencies hang on the length of the sequence (dynamic, longrope) are fixed for the longest there may be.
"""

from __future__ import annotations

import math

import torch

from minivllm.model_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """[positions, head_dim] float32: the cosines of each position's angles, then their sines."""
    frequencies, scale = _FREQUENCIES[rope.type](rope, head_dim, num_positions)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return (torch.cat([angles.cos(), angles.sin()], dim=-1) * scale).to(device)


def _base(theta: float, head_dim: int) -> torch.Tensor:
    """[head_dim / 2]: the frequency of each pair of dimensions."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _default(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    return _base(rope.theta, head_dim), 1.0


def _linear(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """Positions divided by `factor` (Chen et al. 2023)."""
    assert rope.factor is not None
    return _base(rope.theta, head_dim) / rope.factor, 1.0


def _dynamic(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """A larger theta (NTK-aware scaling), as at the longest sequence there may be; as it is, if all sequences fit the
    context of the training."""
    assert rope.factor is not None
    stretch = rope.factor * max(1.0, num_positions / rope.max_position_embeddings) - (rope.factor - 1)
    return _base(rope.theta * stretch ** (head_dim / (head_dim - 2)), head_dim), 1.0


def _llama3(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """Slow down long wavelengths by `factor`, leave short ones, and blend between (Llama 3.1 report, section 3.4)."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    frequencies = _base(rope.theta, head_dim)
    wavelengths = 2 * math.pi / frequencies
    # How many of its own turns a frequency makes over the context of the first training.
    turns = rope.original_max_position_embeddings / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies, 1.0


def _yarn(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """Like llama3, blended by dimension, with cosines and sines scaled (YaRN, Peng et al. 2023, sections 3.2-3.4)."""
    assert rope.factor is not None
    length = rope.original_max_position_embeddings or rope.max_position_embeddings

    def dimension(turns: float) -> float:
        """The pair of dimensions that makes so many turns over `length`."""
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    frequencies = _base(rope.theta, head_dim)
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    elif scale is None:
        scale = _yarn_scale(rope.factor, 1.0)
    return (1 - keep) * frequencies / rope.factor + keep * frequencies, scale


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[torch.Tensor, float]:
    """A factor found by search for each dimension (LongRoPE, Ding et al. 2024): the short ones if all sequences fit the
    context of the first training, else the long ones."""
    assert rope.factor and rope.original_max_position_embeddings
    length = rope.original_max_position_embeddings
    factors = rope.long_factor if num_positions > length else rope.short_factor
    assert factors is not None
    if len(factors) != head_dim // 2:
        raise ValueError(
            f"longrope needs {head_dim // 2} factors for heads of {head_dim}, the config has {len(factors)}"
        )
    scale = rope.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(length)) if rope.factor > 1 else 1.0
    return _base(rope.theta, head_dim) / torch.tensor(factors), scale


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
