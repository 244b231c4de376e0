"""Kernels against float32 references on fresh random inputs: in Triton's interpreter on a CPU, for real on a GPU."""

import math

import pytest
import torch

from minivllm import kernels
from minivllm.backends.base import quantize_rows
from minivllm.backends.torch_backend import TorchBackend
from minivllm.backends.triton_backend import TritonBackend
from minivllm.runner.forward_batch import ForwardBatch
from minivllm.runner.mixed_arrays import query_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's tl.dot is wrong on bfloat16.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(out, ref):
    return ((out.float() - ref.float()).norm() / ref.float().norm()).item()


FP8 = torch.float8_e4m3fn
ROUNDING = 1e-2 if DEVICE == "cuda" else 0.1  # the interpreter cuts off what a GPU rounds
CACHES = [(dtype, dtype) for dtype in DTYPES] + [(dtype, FP8) for dtype in DTYPES]  # of q, of the KV cache


def paged(seq_lens, kv_heads, head_dim, block_size, dtype, *, num_columns=None, layout="nhd"):
    """(k_cache, v_cache, block_tables, keys, values): random caches under permuted blocks, every slot that no sequence
    uses poisoned: K with NaN, V, which must be finite, with a large number; keys[r], values[r]: [len, kv_heads,
    head_dim]."""
    columns = num_columns or max(1, max(-(-n // block_size) for n in seq_lens))
    num_blocks = sum(-(-n // block_size) for n in seq_lens) + 3
    shape = (num_blocks, block_size, kv_heads, head_dim)
    if layout == "hnd":
        shape = (num_blocks, kv_heads, block_size, head_dim)
    largest = 400.0 if dtype == FP8 else 6e4
    k, v = (torch.full(shape, poison, device=DEVICE).to(dtype) for poison in (float("nan"), largest))
    if layout == "hnd":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    order = iter(torch.randperm(num_blocks).tolist())
    tables = torch.full((len(seq_lens), columns), next(order), dtype=torch.int32, device=DEVICE)
    keys, values = [], []
    for row, n in enumerate(seq_lens):
        keys.append(torch.randn(n, kv_heads, head_dim, device=DEVICE).to(dtype))
        values.append(torch.randn(n, kv_heads, head_dim, device=DEVICE).to(dtype))
        for start in range(0, n, block_size):
            block = next(order)
            tables[row, start // block_size] = block
            end = min(start + block_size, n)
            k[block, : end - start], v[block, : end - start] = keys[-1][start:end], values[-1][start:end]
    return k, v, tables, keys, values


def reference(q, keys, values, scale, window=None, cap=None):
    """Causal attention of the last queries of a sequence in float64, each to the last `window` tokens.  q: [queries,
    heads, head_dim]."""
    group = q.shape[1] // keys.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    scores = scores if cap is None else cap * (scores / cap).tanh()
    n_q, n_k = q.shape[0], keys.shape[0]
    mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
    mask = mask if window is None else mask.triu(n_k - n_q - window + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


DECODE_LENGTHS = [1, 2, 63, 64, 65, 128, 200, 17]


@pytest.mark.parametrize(("dtype", "cache"), CACHES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size",
    [
        (4, 4, 64, 64),
        (8, 2, 128, 64),
        (3, 1, 80, 16),
        (16, 2, 96, 32),
        (2, 2, 256, 128),
        (9, 3, 64, 64),
        (4, 2, 20, 16),
        (10, 10, 32, 64),  # more KV heads than the interpreter has workers
    ],
)
def test_decode(heads, kv_heads, head_dim, block_size, dtype, cache):
    k, v, tables, keys, values = paged(DECODE_LENGTHS, kv_heads, head_dim, block_size, cache)
    q = torch.randn(len(DECODE_LENGTHS), heads, head_dim, dtype=dtype, device=DEVICE)
    scale = 1 / math.sqrt(head_dim)
    out = torch.full_like(q, float("nan"))
    kernels.paged_attention_decode(q, k, v, tables, int32(DECODE_LENGTHS), scale, out=out)
    ref = torch.cat([reference(q[i : i + 1], keys[i], values[i], scale) for i in range(len(q))])
    assert error(out, ref) < TOLERANCE[dtype]


@pytest.mark.parametrize("layout", ["nhd", "hnd"])
@pytest.mark.parametrize("seq_lens", [[1], [700], [0], [0, 5, 0], [300, 1, 0, 64], [1000] + [3] * 7])
def test_decode_splits(seq_lens, layout):
    """One row cut into many pieces, many rows in one piece, and empty rows: zeros, never NaN."""
    k, v, tables, keys, values = paged(seq_lens, 2, 32, 64, torch.float32, num_columns=20, layout=layout)
    q = torch.randn(len(seq_lens), 4, 32, device=DEVICE)
    q[::2] *= 30  # no maximum of a row is near that of the next
    out = torch.full_like(q, float("nan"))
    plan = kernels.plan_paged_decode(q, k, tables, int32(seq_lens))
    plan.tiles[plan.total.item() :] = int32([0, 0, 0, 1000])  # a row's beginning, if it were read
    plan.partial.fill_(float("nan"))
    kernels.paged_attention_decode(q, k, v, tables, int32(seq_lens), 0.3, plan=plan, out=out)
    for i, n in enumerate(seq_lens):
        ref = reference(q[i : i + 1], keys[i], values[i], 0.3)[0] if n else torch.zeros_like(out[i])
        torch.testing.assert_close(out[i].double(), ref.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("window", [1, 5, 64, 65, 130, 1000])
def test_decode_window(window, block_size):
    """Blocks before the window are not looked at: their entries in the block table lead nowhere."""
    seq_lens = [1, 5, 64, 129, 300, 0, 700]
    k, v, tables, keys, values = paged(seq_lens, 2, 32, block_size, torch.float32, num_columns=50)
    for row, n in enumerate(seq_lens):
        tables[row, : max(0, n - window) // block_size] = 1 << 30
    q = torch.randn(len(seq_lens), 4, 32, device=DEVICE)
    out = torch.full_like(q, float("nan"))
    plan = kernels.plan_paged_decode(q, k, tables, int32(seq_lens), window)
    kernels.paged_attention_decode(q, k, v, tables, int32(seq_lens), 0.3, plan, out)
    for i, n in enumerate(seq_lens):
        ref = reference(q[i : i + 1], keys[i], values[i], 0.3, window)[0] if n else torch.zeros_like(out[i])
        torch.testing.assert_close(out[i].double(), ref.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cap", [0.5, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_soft_cap(cap, dtype):
    """On scores of up to 100, in both kernels."""
    seq_lens, queries = [1, 70, 130], [1, 40, 130]
    k, v, tables, keys, values = paged(seq_lens, 2, 64, 64, dtype, num_columns=4)
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    q = 20 * torch.randn(starts[-1], 4, 64, dtype=dtype, device=DEVICE)
    last = torch.tensor(starts[1:], device=DEVICE) - 1
    decoded = kernels.paged_attention_decode(q[last], k, v, tables, int32(seq_lens), 0.15, cap=cap)
    tiles = torch.from_numpy(query_tiles(int32(queries).cpu().numpy(), 0)).to(DEVICE)
    out = kernels.paged_attention_prefill(
        q, k, v, tables, int32(seq_lens), int32(starts), tiles, 0.15, window=50, cap=cap
    )
    for i in range(len(queries)):
        own = q[starts[i] : starts[i + 1]]
        assert error(decoded[i : i + 1], reference(own[-1:], keys[i], values[i], 0.15, cap=cap)) < TOLERANCE[dtype]
        ref = reference(own, keys[i], values[i], 0.15, 50, cap)
        assert error(out[starts[i] : starts[i + 1]], ref) < TOLERANCE[dtype]


def test_decode_rows_that_are_none():
    """A length of −1: the row's output is left alone; a step of such rows only does nothing."""
    k, v, tables, keys, values = paged([70, 1, 200], 2, 32, 64, torch.float32, num_columns=4)
    q = torch.randn(3, 4, 32, device=DEVICE)
    for seq_lens in ([70, -1, 200], [-1, -1, -1]):
        out = torch.full_like(q, 7.0)
        kernels.paged_attention_decode(q, k, v, tables, int32(seq_lens), 0.3, out=out)
        for i, n in enumerate(seq_lens):
            ref = (
                torch.full_like(out[i], 7.0).double() if n < 0 else reference(q[i : i + 1], keys[i], values[i], 0.3)[0]
            )
            torch.testing.assert_close(out[i].double(), ref, atol=1e-5, rtol=1e-4)


def test_decode_last_column():
    """A sequence that fills every column of its block table, the last block to the last token."""
    k, v, tables, keys, values = paged([256], 1, 64, 64, torch.float32, num_columns=4)
    q = torch.randn(1, 2, 64, device=DEVICE)
    out = kernels.paged_attention_decode(q, k, v, tables, int32([256]), 0.1)
    assert error(out, reference(q, keys[0], values[0], 0.1)) < 1e-5


PREFILL = [(1, 1), (5, 5), (64, 64), (130, 130), (1, 90), (33, 97), (70, 200)]  # queries, keys


@pytest.mark.parametrize(("dtype", "cache"), CACHES, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size",
    [(2, 2, 64, 64), (4, 1, 128, 32), (3, 1, 80, 16), (2, 1, 256, 64), (2, 2, 20, 16)],
)
def test_prefill(heads, kv_heads, head_dim, block_size, dtype, cache):
    """Rows of different lengths, with and without a cached prefix, behind two rows that are decodes (no tiles)."""
    queries, seq_lens = [1, 1, *(n for n, _ in PREFILL)], [9, 70, *(n for _, n in PREFILL)]
    k, v, tables, keys, values = paged(seq_lens, kv_heads, head_dim, block_size, cache)
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    q = torch.randn(starts[-1], heads, head_dim, dtype=dtype, device=DEVICE)
    tiles = torch.from_numpy(query_tiles(int32(queries).cpu().numpy(), 2)).to(DEVICE)
    out = torch.full_like(q, float("nan"))
    kernels.paged_attention_prefill(q, k, v, tables, int32(seq_lens), int32(starts), tiles, 0.11, out)
    assert out[:2].isnan().all()
    for i in range(2, len(queries)):
        ref = reference(q[starts[i] : starts[i + 1]], keys[i], values[i], 0.11)
        assert error(out[starts[i] : starts[i + 1]], ref) < TOLERANCE[dtype], PREFILL[i - 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("window", [1, 17, 64, 100, 1000])
def test_prefill_window(window, dtype):
    """float16 takes tiles by descriptor, float32 by pointers."""
    queries, seq_lens = [1, *(n for n, _ in PREFILL)], [9, *(n for _, n in PREFILL)]
    k, v, tables, keys, values = paged(seq_lens, 1, 64, 64, dtype)
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    q = torch.randn(starts[-1], 2, 64, dtype=dtype, device=DEVICE)
    tiles = torch.from_numpy(query_tiles(int32(queries).cpu().numpy(), 1)).to(DEVICE)
    out = torch.full_like(q, float("nan"))
    kernels.paged_attention_prefill(q, k, v, tables, int32(seq_lens), int32(starts), tiles, 0.11, out, window)
    for i in range(1, len(queries)):
        ref = reference(q[starts[i] : starts[i + 1]], keys[i], values[i], 0.11, window)
        assert error(out[starts[i] : starts[i + 1]], ref) < TOLERANCE[dtype], PREFILL[i - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (3, 1, 80), (32, 32, 128)])
def test_rope_and_store_kv(heads, kv_heads, head_dim, qk_norm, dtype):
    """Against the torch backend; a slot of −1 writes nothing, all other slots keep what they had, and V gets finite."""
    tokens, block_size = 5, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=DEVICE)
    qkv[2, -1], qkv[3, -2], qkv[1, -head_dim] = float("nan"), float("-inf"), float("nan")
    cos_sin = torch.randn(40, head_dim, device=DEVICE)
    norms = tuple(torch.randn(head_dim, device=DEVICE).to(dtype) for _ in range(2))
    norms = (*norms, 1e-5) if qk_norm else None
    positions, slots = int32([0, 39, 7, 7, 0]), torch.tensor([3, 40, 17, 0, -1], device=DEVICE)
    caches = [torch.randn(4, block_size, kv_heads, head_dim, device=DEVICE).to(dtype) for _ in range(2)]
    expected = [c.clone() for c in caches]
    batch = ForwardBatch(positions, positions, slots, positions, positions, 0)
    ref_q = TorchBackend().rotate_and_store(qkv.clone(), cos_sin, heads, tuple(expected), batch, norms)
    q = kernels.rope_and_store_kv(qkv, positions, cos_sin, *caches, slots, heads, norms)
    assert error(q, ref_q) < TOLERANCE[dtype] and caches[1].isfinite().all()
    for cache in (*caches, *expected):  # what the infinite became is a backend's own affair
        cache[1, 1, -1, -1] = cache[0, 0, -1, -2] = cache[2, 8, -1, 0] = 0
    for cache, ref in zip(caches, expected, strict=True):
        torch.testing.assert_close(cache, ref, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_and_store_kv_in_8_bits(dtype):
    """The cache gets what the torch backend writes; what is too large, K or V, saturates."""
    heads, kv_heads, head_dim = 2, 2, 64
    qkv = 100 * torch.randn(3, (heads + 2 * kv_heads) * head_dim, device=DEVICE).to(dtype)
    qkv[0, heads * head_dim], qkv[1, -1] = 30000.0, -30000.0  # in K, in V
    cos_sin, positions, slots = torch.ones(5, head_dim, device=DEVICE), int32([0, 4, 2]), torch.tensor([3, 40, 17])
    slots = slots.to(DEVICE)
    caches = [torch.zeros(4, 16, kv_heads, head_dim, device=DEVICE).to(FP8) for _ in range(2)]
    expected = [c.clone() for c in caches]
    batch = ForwardBatch(positions, positions, slots, positions, positions, 0)
    ref_q = TorchBackend().rotate_and_store(qkv.clone(), cos_sin, heads, tuple(expected), batch)
    q = kernels.rope_and_store_kv(qkv, positions, cos_sin, *caches, slots, heads)
    assert error(q, ref_q) < TOLERANCE[dtype]
    for cache, ref in zip(caches, expected, strict=True):
        assert error(cache, ref) < ROUNDING
        assert ref.float().abs().max() == 448 == cache.float().abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 576, 4096])
def test_norms(size, dtype):
    x, residual = (torch.randn(3, size, dtype=dtype, device=DEVICE) for _ in range(2))
    weight = torch.randn(size, dtype=dtype, device=DEVICE)
    backend = TorchBackend()
    assert error(kernels.rms_norm(x, weight, 1e-5), backend.rms_norm(x, weight, 1e-5)) < TOLERANCE[dtype]
    ref, ref_sum = backend.add_rms_norm(x, residual, weight, 1e-5)
    out, total = kernels.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert error(out, ref) < TOLERANCE[dtype] and error(total, ref_sum) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [48, 1536])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_activate_and_mul(size, dtype, activation):
    x = torch.randn(3, 2 * size, dtype=dtype, device=DEVICE)
    ref = TorchBackend().activate_and_mul(x, activation)
    assert error(kernels.activate_and_mul(x, activation), ref) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # float32 is left to cuBLAS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "rows, in_size, out_size", [(1, 256, 8), (1, 3000, 12), (2, 128, 64), (16, 512, 64), (17, 384, 128), (64, 256, 64)]
)
def test_small_linear(rows, in_size, out_size, bias, dtype):
    x, weight = torch.randn(rows, in_size, device=DEVICE), torch.randn(out_size, in_size, device=DEVICE)
    x, weight = x.to(dtype), weight.to(dtype)
    b = torch.randn(out_size, device=DEVICE).to(dtype) if bias else None
    ref = x.double() @ weight.double().T + (b.double() if bias else 0)
    assert error(kernels.small_linear(x, weight, b), ref) < TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [64, 65, 384, 385])
def test_linear_whoever_multiplies(rows, bias):
    dtype = DTYPES[-1]
    x, weight = torch.randn(rows, 4352, device=DEVICE).to(dtype), torch.randn(4096, 4352, device=DEVICE).to(dtype)
    b = 50 * torch.randn(4096, device=DEVICE).to(dtype) if bias else None
    ref = x.float() @ weight.float().T + (b.float() if bias else 0)
    backend = TritonBackend()
    assert error(backend.linear(x, backend.pack(weight), b), ref) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("rows, in_size, out_size", [(1, 256, 8), (1, 3000, 16), (2, 256, 64), (40, 512, 128)])
def test_small_linear_of_8_bits(rows, in_size, out_size, dtype):
    x = torch.randn(rows, in_size, device=DEVICE).to(dtype)
    weight, scale = quantize_rows(torch.randn(out_size, in_size, device=DEVICE))
    rounded, row_scale = (x, torch.ones(rows, device=DEVICE)) if rows == 1 else quantize_rows(x)
    ref = (rounded.double() * row_scale.double()[:, None]) @ (weight.double() * scale.double()[:, None]).T
    tolerance = TOLERANCE[dtype] + (2 * ROUNDING if rows > 1 else 0)
    assert error(kernels.small_linear(x, weight, None, scale), ref) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [100, 4096])
def test_quantize_rows(size, dtype):
    x = torch.randn(5, 2 * size, device=DEVICE).to(dtype)[:, :size]
    x[3] = 0
    x[4] *= 1000
    rounded, scale = kernels.quantize_rows(x)
    ref, ref_scale = quantize_rows(x)
    torch.testing.assert_close(scale, ref_scale)
    assert error(rounded, ref) < ROUNDING and error(rounded.float() * scale[:, None], x) < 0.03 + ROUNDING
    assert rounded.is_contiguous() and rounded.float().abs().amax(-1).tolist() == [448, 448, 448, 0, 448]


@pytest.mark.skipif(DEVICE == "cpu", reason="the triton backend's 8-bit products are the torch backend's on a CPU")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 64, 65, 130, 256, 1000])
def test_fp8_linear(rows, bias):
    x = torch.randn(rows, 1024, device=DEVICE).bfloat16()
    weight, scale = quantize_rows(torch.randn(512, 1024, device=DEVICE))
    b = torch.randn(512, device=DEVICE).bfloat16() if bias else None
    out = TritonBackend().fp8_linear(x, weight, scale, b)
    assert out.dtype == x.dtype and error(out, TorchBackend().fp8_linear(x, weight, scale, b)) < 0.04
    if rows > 1:  # the very numbers that the torch backend multiplies
        assert error(out, TorchBackend().fp8_linear(x, weight, scale, b)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("vocab_size", [50, 8192, 20000])
def test_sample(vocab_size):
    """The same tokens as the torch backend, greedy and drawn, written to the slots too; ties go to the lowest id."""
    rows = 6
    logits = torch.randn(rows, vocab_size, device=DEVICE)
    logits[0, [3, 40]] = 100.0
    temperature = torch.tensor([0.0, 0.0, 1.0, 0.5, 2.0, 1.0], device=DEVICE)
    seeds = torch.tensor([1, 2, 3, -4, 2**62 + 5, 3], device=DEVICE)
    arguments = (temperature, seeds, int32([0, 5, 0, 7, 900, 1]))
    slots = int32([5, 0, 1, 2, 4, 3])
    ref_last, last = int32([-1] * 7), int32([-1] * 7)
    ref = TorchBackend().sample(logits, *arguments, ref_last, slots)
    assert torch.equal(kernels.sample(logits, *arguments, last, slots), ref)
    logits[2:, ::2] = float("-inf")
    logits[3, 5] = float("inf")
    ref = TorchBackend().sample(logits, *arguments, ref_last, slots)
    assert torch.equal(kernels.sample(logits, *arguments, last, slots), ref) and ref[3] == 5
    assert ref[0] == 3 and torch.equal(last, ref_last) and last[6] == -1


@pytest.mark.parametrize("vocab_size", [157, 4096, 5000])
def test_sample_of_a_row_of_nan(vocab_size):
    """Any token, but of the vocabulary: another one would be the next step's input."""
    logits = torch.full((3, vocab_size), float("nan"), device=DEVICE)
    logits[2, :4096:2] = float("-inf")
    temperature, last = torch.tensor([0.0, 0.7, 1.0], device=DEVICE), int32([-1] * 3)
    tokens = kernels.sample(logits, temperature, int32([1, 2, 3]).long(), int32([0, 5, 9]), last, int32([0, 1, 2]))
    assert ((tokens >= 0) & (tokens < vocab_size)).all() and torch.equal(tokens, last)


@pytest.mark.parametrize("vocab_size", [50, 10000])
def test_truncate(vocab_size):
    """What the torch backend keeps, by each option and by all, with ties, −inf and an untouched row."""
    options = [(1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.3, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.3), (0.5, 30, 0.9, 0.01)]
    options += [(0.0, 1, 1.0, 0.0), (1.0, 0, 1e-9, 0.0), (1.0, 10**9, 0.999, 0.0), (1.0, 3, 0.99999, 0.0)]
    options += [(9.0, 5000, 0.95, 0.0), (9.0, 0, 0.95, 0.0)]  # more than the kernel can narrow down
    columns = [torch.tensor(column, device=DEVICE) for column in zip(*options, strict=True)]
    logits = 3 * torch.randn(len(options), vocab_size, device=DEVICE).bfloat16().float()  # some are equal
    logits[:, 7] = float("-inf")
    expected = logits.clone()
    TorchBackend().truncate(expected, *columns)
    kernels.truncate(logits, *columns)
    share = (logits.double().softmax(-1) - expected.double().softmax(-1)).abs().sum(-1)
    assert share.max() < 1e-4, "top_p's border may fall on the next token by rounding"
    assert torch.equal(logits[[0, 1, 3, 5, 6]], expected[[0, 1, 3, 5, 6]])
    num_kept = logits.isfinite().sum(1).tolist()
    assert num_kept[0] == vocab_size - 1 and num_kept[5] <= 2 and 1 <= num_kept[2] < vocab_size - 1
