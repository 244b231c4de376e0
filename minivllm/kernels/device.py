"""What the launchers need to know of the GPU at hand, and how kernels follow one another."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Programmatic dependent launch: a kernel may start while the one before it still runs, and waits here until that
    has ended.  Before, it may read what that kernel does not write: weights, or what earlier kernels of the step wrote,
    since these ended before that kernel let this one start.  Now the next may start.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def softcap(x, cap):
    """cap · tanh(x / cap)."""
    return cap - 2.0 * cap / (tl.exp2(x * (2.8853900817779268 / cap)) + 1.0)


@functools.cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Arguments for every launch: PDL where the GPU has it (from Hopper on)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 4 for the interpreter on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may use; an H100's for the interpreter on a CPU."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.cache
def has_tensor_copies(device: torch.device) -> bool:
    """Whether the GPU copies whole tiles by descriptor (TMA, from Hopper on); the interpreter on a CPU does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def num_buffers(device: torch.device, tile_bytes: int, fixed_bytes: int, most: int) -> int:
    """How many tiles of a software pipeline fit in shared memory at once, beside `fixed_bytes`; 0 to `most`."""
    return max(0, min(most, (shared_memory(device) - fixed_bytes) // tile_bytes))


def dot_type(q: torch.Tensor, cache: torch.Tensor) -> tl.dtype:
    """What attention multiplies in: q's dtype.  With a cache of 8-bit floats, which GPUs turn into float16 in a single
    instruction and bfloat16 in several, float16; it holds a bfloat16 q exactly, up to 65504."""
    if cache.dtype == q.dtype or q.dtype == torch.float32:
        return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[q.dtype]
    return tl.float16
