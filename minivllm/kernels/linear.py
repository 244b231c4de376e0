"""x Wᵀ + b for few rows, where reading W is all the time goes to and cuBLAS leaves a tenth of the bandwidth unused.

One row: a program takes VECTOR_ROWS rows of W, VECTOR_COLUMNS columns at a time, multiplies and adds elementwise, and
sums at the end: no tensor cores, many small programs, all loads in flight at once.  Up to 64 rows: a program takes 64
or 32 rows of W as the left operand of `tl.dot`, so that the few rows of x are the narrow side of the tensor cores'
tile.

Weights in 8-bit floats: one row is multiplied as it is; more are rounded to 8 bits first, since what the tensor cores
take costs no conversion of the weights, which would take longer than to read them.

`has_kernel` says which shapes these kernels are faster for than cuBLAS: measured on H100 (the shapes of Llama 1B, 7B
and 8B, whole or halved, in bfloat16, inputs rotating beyond the L2, inside a CUDA graph).  On other chips nothing was
measured, and cuBLAS is used.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from minivllm.kernels.device import launch_options, num_multiprocessors, wait_for_inputs
from minivllm.kernels.quantize import quantize_rows

MEASURED_ON = (9, 0)  # compute capability
MAX_ROWS = 64
VECTOR_ROWS, VECTOR_COLUMNS, VECTOR_COLUMNS_8BIT = 4, 2048, 1024
DOT_ROWS, DOT_BYTES, DOT_STAGES = 64, 256, 5
FLAT_ROWS, FLAT_BYTES, FLAT_STAGES = 32, 512, 4  # for at most MAX_FLAT_ROWS rows of x
MAX_FLAT_ROWS = 16
MAX_IN_SIZE = 12288  # of which 17 rows and more are multiplied here, if W has fewer outputs than inputs
PREFETCH_LINES = 4


@triton.jit
def _vector_kernel(
    x, weight, scale, bias, out, in_size,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    w_ptrs = weight + rows[:, None].to(tl.int64) * in_size + columns[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    w = tl.load(w_ptrs, (columns < in_size)[None, :], 0.0, eviction_policy="evict_first")
    wait_for_inputs(PDL)
    for start in range(0, in_size, COLUMNS):
        v = tl.load(x + start + columns, start + columns < in_size, 0.0)
        product = w.to(tl.float32) * v.to(tl.float32)[None, :]
        more = start + COLUMNS + columns < in_size
        w = tl.load(w_ptrs + start + COLUMNS, more[None, :], 0.0, eviction_policy="evict_first")
        acc += product
    result = tl.sum(acc, 1)
    if HAS_SCALE:
        result *= tl.load(scale + rows)
    if HAS_BIAS:
        result += tl.load(bias + rows).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows"])
def _dot_kernel(
    x, row_scale, weight, scale, bias, out, num_rows, out_size, in_size, stride_x,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    w_base = weight + tl.program_id(0).to(tl.int64) * ROWS * in_size
    w_offs = tl.arange(0, ROWS)[:, None] * in_size + columns[None, :]
    x_offs = offs_m[:, None] * stride_x + columns[None, :]
    mask = (offs_m < num_rows)[:, None]
    acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    if PREFETCH:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # elements in 128 bytes
        lines = tl.arange(0, ROWS)[:, None] * in_size + tl.arange(0, PREFETCH)[None, :] * LINE
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [w_base + lines], dtype=tl.int32, is_pure=False, pack=1
        )
    wait_for_inputs(PDL)
    for start in tl.range(0, in_size, COLUMNS, num_stages=STAGES):
        w = tl.load(w_base + start + w_offs, eviction_policy="evict_first")
        v = tl.load(x + start + x_offs, mask, 0.0)
        acc = tl.dot(w, tl.trans(v), acc)
    if HAS_SCALE:
        acc *= tl.load(scale + offs_n)[:, None] * tl.load(row_scale + offs_m, offs_m < num_rows, 0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + offs_n).to(tl.float32)[:, None]
    place = offs_m[None, :] * out_size + offs_n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), (offs_m < num_rows)[None, :])


@functools.cache
def _is_measured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == MEASURED_ON


def has_kernel(rows: int, weight: torch.Tensor) -> bool:
    """Whether `small_linear` is the faster way to multiply `rows` rows with `weight` [out, in] on its GPU."""
    if rows > MAX_ROWS or weight.element_size() > 2 or not _is_measured(weight.device):
        return False
    out_size, in_size = weight.shape
    if rows == 1:
        return out_size % VECTOR_ROWS == 0 and in_size >= 1024
    if out_size % DOT_ROWS or in_size % _columns(weight):
        return False
    if in_size <= out_size or weight.element_size() == 1:
        return True
    return out_size >= (3072 if rows <= 32 else 4096) and (rows <= MAX_FLAT_ROWS or in_size <= MAX_IN_SIZE)


def _columns(weight: torch.Tensor) -> int:
    """Of a tile of `_dot_kernel`."""
    return DOT_BYTES // weight.element_size()


def _takes_flat_tiles(rows: int, weight: torch.Tensor) -> bool:
    """Whether tiles of 32 rows of W are better: where all programs run at once, so that the multiprocessor that has
    most to read decides, and it has less that way."""
    out_size, in_size = weight.shape
    if rows > MAX_FLAT_ROWS or weight.element_size() != 2 or in_size % (FLAT_BYTES // 2):
        return False
    num = num_multiprocessors(weight.device)
    most_rows = [-(-out_size // (tile * num)) * tile for tile in (FLAT_ROWS, DOT_ROWS)]
    return out_size <= 2 * DOT_ROWS * num and most_rows[0] < most_rows[1]


def small_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """x Wᵀ + b.  x: [rows, in], rows ≤ 64; weight: [out, in], contiguous, out a multiple of 4 (one row) or 64, in, for
    more than one row, of 128, in 8 bits 256; bias: [out] or None; scale: [out] float32, by which the rows of a weight
    in 8 bits are multiplied.  Returns [rows, out] in x's dtype."""
    rows, in_size = x.shape
    out_size = weight.shape[0]
    out = torch.empty(rows, out_size, dtype=x.dtype, device=x.device)
    options = launch_options(x.device) | {"HAS_SCALE": scale is not None, "HAS_BIAS": bias is not None}
    tensors = weight, weight if scale is None else scale, weight if bias is None else bias, out
    if rows == 1:
        columns = VECTOR_COLUMNS if scale is None else VECTOR_COLUMNS_8BIT
        columns = min(columns, triton.next_power_of_2(in_size))
        _vector_kernel[(out_size // VECTOR_ROWS,)](
            x, *tensors, in_size, ROWS=VECTOR_ROWS, COLUMNS=columns, num_warps=4, **options
        )
    else:
        x, row_scale = (x, x) if scale is None else quantize_rows(x)
        tile_rows, columns, stages = DOT_ROWS, _columns(weight), DOT_STAGES
        if _takes_flat_tiles(rows, weight):
            tile_rows, columns, stages = FLAT_ROWS, FLAT_BYTES // 2, FLAT_STAGES
        _dot_kernel[(out_size // tile_rows,)](
            x, row_scale, *tensors, rows, out_size, in_size, x.stride(0),
            BLOCK_M=max(16, triton.next_power_of_2(rows)), ROWS=tile_rows, COLUMNS=columns, STAGES=stages,
            PREFETCH=PREFETCH_LINES if options["PDL"] else 0, num_warps=4, **options,
        )  # fmt: skip
    return out
