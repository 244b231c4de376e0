"""Backend: the interface of a model step's operators.

Shapes: T tokens of a step, R rows (requests), H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from minivllm.kernels import VocabShare
    from minivllm.parallel import Summand
    from minivllm.runner.forward_batch import ForwardBatch

KVCache = tuple[torch.Tensor, torch.Tensor]  # K and V of one layer, each [blocks, block_size, K, D]

SPLIT_SIZE = 4096  # token ids that sampling takes together

QKNorm = tuple[torch.Tensor, torch.Tensor, float]  # the weights for heads of Q and of K, each [D]; epsilon


FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale in float8_e4m3fn [rows, size], scale [rows] float32), scale being a row's largest magnitude / 448."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-12) / FP8_MAX
    return (x / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


class Backend(ABC):
    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """A loaded weight [out, in] in the layout that `linear` likes best."""
        return weight

    @abstractmethod
    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x Wᵀ + b.  x: [T, in]; weight: [out, in], of `pack`; bias: [out].  Returns [T, out]."""

    def linear_into(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """The same of many rows, written to `out` [T, out]; weight: not packed."""
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)

    def fp8_linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x Wᵀ + b, W = weight · scale.  x: [T, in]; weight: [out, in] float8_e4m3fn; scale: [out] float32; bias:
        [out].  Returns [T, out] in x's dtype.  Here: what 8-bit products compute, worked out in float32."""
        rounded, row_scale = quantize_rows(x)
        out = F.linear(rounded.float(), weight.float()) * row_scale[:, None] * scale
        return (out if bias is None else out + bias).to(x.dtype)

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / rms(x) · weight over the last dimension.  x: [T, size]."""

    @abstractmethod
    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(x + residual), x + residual); `residual` may be overwritten."""

    def sum_rms_norm(
        self, x: Summand, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the sum of all workers' x, without a residual or with one; x or `residual` may be overwritten.
        Only for backends whose kernels exchange values between GPUs."""
        raise NotImplementedError

    @abstractmethod
    def activate_and_mul(self, gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
        """activation(gate) · up of [T, 2 · size], gate first; "silu" or "gelu_pytorch_tanh".  Returns [T, size]."""

    @abstractmethod
    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        num_heads: int,
        kv_cache: KVCache,
        batch: ForwardBatch,
        qk_norm: QKNorm | None = None,
    ) -> torch.Tensor:
        """Rotate Q and K by position, after RMSNorm on each head if `qk_norm` is given, and write K and V to the cache.
        qkv: [T, (H + 2K) · D], changed in place; cos_sin: [positions, D] float32.  Returns Q: [T, H, D]."""

    @abstractmethod
    def attention(
        self,
        q: torch.Tensor,
        kv_cache: KVCache,
        batch: ForwardBatch,
        scale: float,
        window: int | None = None,
        cap: float | None = None,
    ) -> torch.Tensor:
        """Causal softmax(scale · q Kᵀ) V over each row's cached keys, or the last `window` of them, the query's own
        included.  The only place the scale is applied.  With a `cap`, softmax(cap · tanh(scale · q Kᵀ / cap)) V.
        q: [T, H, D].  Returns [T, H, D]."""

    @abstractmethod
    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        last_token: torch.Tensor,
        slots: torch.Tensor,
        share: VocabShare | None = None,
    ) -> torch.Tensor:
        """A token a row of logits [R, vocab], greedy where temperature is 0, also stored as last_token[slots].
        Stateless: the random numbers are a hash of (seed, position in the output).  Returns [R] int32.

        `share`: of which token ids the logits are, and the way to the workers that have the others; only for backends
        whose kernels exchange values between GPUs."""

    @abstractmethod
    def truncate(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> None:
        """Set to −inf, in place, what min_p, then top_k, then top_p (Holtzman et al. 2020) rule out, in vLLM's order.
        Equal logits are kept or dropped together.

        logits: [R, vocab] float32; the others: [R], top_k ≤ 0, top_p = 1 and min_p = 0 meaning off; a temperature of 0
        counts as 1."""
