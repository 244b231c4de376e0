"""Decode attention on a GPU: how long a call takes, and how near its reads come to the memory's bandwidth.

Calls are timed inside a CUDA graph, over several caches in turn, so that none finds its keys and values in the L2.
The kernel beside it reads token by token, as a first try at paged attention does.
"""
# mypy: disallow-untyped-defs=false, check-untyped-defs=false

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from minivllm.kernels import paged_attention_decode, plan_paged_decode

DTYPE = torch.bfloat16


@triton.jit
def _token_by_token_kernel(
    q, k_cache, v_cache, out, block_tables, seq_lens, scale,
    stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh, stride_bt,
    stride_ot, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < HEAD_DIM
    query = tl.load(q + row * stride_qt + head * stride_qh + offs, mask, 0.0).to(tl.float32) * scale
    keys = k_cache + (head // GROUP) * stride_kh + offs
    values = v_cache + (head // GROUP) * stride_vh + offs
    m = tl.full((), float("-inf"), tl.float32)
    l = tl.full((), 0.0, tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_D], tl.float32)
    for token in range(tl.load(seq_lens + row)):
        block = tl.load(block_tables + row * stride_bt + token // BLOCK_SIZE).to(tl.int64)
        within = token % BLOCK_SIZE
        k = tl.load(keys + block * stride_kb + within * stride_kt, mask, 0.0).to(tl.float32)
        v = tl.load(values + block * stride_vb + within * stride_vt, mask, 0.0).to(tl.float32)
        score = tl.sum(query * k, 0)
        m_new = tl.maximum(m, score)
        alpha = tl.exp(m - m_new)
        p = tl.exp(score - m_new)
        l = l * alpha + p  # noqa: E741
        acc = acc * alpha + p * v
        m = m_new
    tl.store(out + row * stride_ot + head * stride_oh + offs, (acc / l).to(out.dtype.element_ty), mask)


def token_by_token_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Decode attention with one program a (row, query head), one token a turn.  Arguments as for
    `minivllm.kernels.paged_attention_decode`; every row needs at least one token."""
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty_like(q)
    _token_by_token_kernel[(num_rows, num_heads)](
        q, k_cache, v_cache, out, block_tables, seq_lens, scale,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], block_tables.stride(0),
        out.stride(0), out.stride(1),
        GROUP=num_heads // k_cache.shape[2], HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=k_cache.shape[1], num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _read_kernel(x, out, num_elements, BLOCK: tl.constexpr):
    """Read x once, all programs together, and write a number a program.  num_elements: a multiple of BLOCK."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.program_id(0) * BLOCK, num_elements, tl.num_programs(0) * BLOCK):
        total += tl.load(x + start + offs)
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@dataclass(frozen=True)
class Case:
    """One decode step: the length of each row, and the heads."""

    name: str
    seq_lens: tuple[int, ...]
    num_heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that any kernel must read."""
        return 2 * sum(self.seq_lens) * self.kv_heads * self.head_dim * DTYPE.itemsize


def _even(batch: int, length: int, num_heads: int, kv_heads: int) -> Case:
    return Case(f"{batch} x {length}", (length,) * batch, num_heads, kv_heads)


CASES = [
    _even(1, 1024, 32, 32),  # LLaMA-7B's heads
    _even(16, 1024, 32, 32),
    _even(64, 1024, 32, 32),
    _even(1, 1024, 32, 8),
    _even(1, 8192, 32, 8),
    _even(64, 1024, 32, 8),
    _even(256, 1024, 32, 8),
    Case("1 x 16384 + 63 x 512", (16384,) + (512,) * 63, 32, 8),
]


@dataclass(frozen=True)
class Timing:
    """One kernel on one case.  `error` is ‖out − ref‖ / ‖ref‖ against float32 attention."""

    microseconds: float
    gigabytes_per_s: float  # of K and V
    bandwidth_percent: float  # of the measured read bandwidth
    error: float

    def __str__(self) -> str:
        speed = f"{self.microseconds:>9,.1f}{self.gigabytes_per_s:>7,.0f}{self.bandwidth_percent:>7.0f}%"
        return f"{speed}{self.error:>9.5f}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; the caches are its own, so that inputs in turn miss the L2."""

    q: torch.Tensor  # [rows, heads, head_dim]
    k_cache: torch.Tensor  # [blocks, block_size, kv_heads, head_dim]
    v_cache: torch.Tensor
    block_tables: torch.Tensor  # [rows, columns] int32
    seq_lens: torch.Tensor  # [rows] int32
    scale: float


def run(block_size: int, cases: list[Case] | None = None) -> dict[str, object]:
    """Time the cases, printing a table row after each; returns all figures."""
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"measured read bandwidth: {bandwidth / 1e12:.2f} TB/s (100%)\n")
    columns = f"{'µs':>9}{'GB/s':>7}{'%':>8}{'error':>9}"
    print(f"{'':36} | {'minivllm':^33} | {'token by token':^33} |")
    print(f"{'rows x tokens':<21}{'heads/kv':>9}{'MB':>6} | {columns} | {columns} | speed-up", flush=True)
    results = []
    for case in CASES if cases is None else cases:
        ours, naive = time_case(case, block_size, bandwidth)
        heads_per_kv = f"{case.num_heads}/{case.kv_heads}"
        print(
            f"{case.name:<21}{heads_per_kv:>9}{case.kv_bytes / 1e6:>6.0f} | {ours} | {naive} "
            f"| {naive.microseconds / ours.microseconds:>7.1f}x",
            flush=True,
        )
        heads = dict(num_heads=case.num_heads, kv_heads=case.kv_heads, head_dim=case.head_dim)
        results.append(
            dict(case=case.name, **heads, kv_bytes=case.kv_bytes, minivllm=asdict(ours), token_by_token=asdict(naive))
        )
    return dict(device=torch.cuda.get_device_name(), block_size=block_size, read_bytes_per_s=bandwidth, cases=results)


def read_bandwidth() -> float:
    """Bytes a second that a kernel gets which reads 1 GiB and does nothing else; the best of three grids."""
    x = torch.ones(1 << 28, device="cuda")
    best = math.inf
    for programs_per_multiprocessor in (4, 8, 16):
        num_programs = programs_per_multiprocessor * torch.cuda.get_device_properties(0).multi_processor_count
        out = torch.empty(num_programs, device="cuda")

        def read(_: int, out: torch.Tensor = out) -> None:
            _read_kernel[(len(out),)](x, out, len(x), BLOCK=4096, num_warps=8)

        best = min(best, median_microseconds(read, 1))
        assert out.double().sum().item() == len(x)
    return x.nbytes / best * 1e6


def time_case(case: Case, block_size: int, bandwidth: float) -> tuple[Timing, Timing]:
    """(this engine's kernel, the token-by-token one)."""
    # The caches together are four times the L2, so that by its next turn a cache has been evicted.
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [make_inputs(case, block_size) for _ in range(max(2, math.ceil(4 * l2_bytes / case.kv_bytes)))]
    first = sets[0]
    ref = reference(first)
    # One plan serves every set, since it hangs on the lengths alone; the engine makes one a step for all layers.
    plan = plan_paged_decode(first.q, first.k_cache, first.block_tables, first.seq_lens)

    def ours(i: int) -> torch.Tensor:
        s = sets[i]
        return paged_attention_decode(s.q, s.k_cache, s.v_cache, s.block_tables, s.seq_lens, s.scale, plan=plan)

    def naive(i: int) -> torch.Tensor:
        s = sets[i]
        return token_by_token_decode(s.q, s.k_cache, s.v_cache, s.block_tables, s.seq_lens, s.scale)

    timings = []
    for call in (ours, naive):
        error = ((call(0).float() - ref).norm() / ref.norm()).item()
        microseconds = median_microseconds(call, len(sets))
        rate = case.kv_bytes / microseconds * 1e6
        timings.append(Timing(microseconds, rate / 1e9, 100 * rate / bandwidth, error))
    return timings[0], timings[1]


def make_inputs(case: Case, block_size: int, dtype: torch.dtype = DTYPE, device: str = "cuda") -> Inputs:
    """Random q, K and V; the blocks of a row lie anywhere in the cache, as after a while of serving."""
    columns = [-(-length // block_size) for length in case.seq_lens]
    num_blocks = sum(columns)
    blocks = torch.randperm(num_blocks, device=device).to(torch.int32)
    tables = torch.zeros(len(columns), max(columns), dtype=torch.int32, device=device)
    for row, own in enumerate(blocks.split(columns)):
        tables[row, : len(own)] = own
    shape = (num_blocks, block_size, case.kv_heads, case.head_dim)
    return Inputs(
        q=torch.randn(len(columns), case.num_heads, case.head_dim, dtype=dtype, device=device),
        k_cache=torch.randn(shape, dtype=dtype, device=device),
        v_cache=torch.randn(shape, dtype=dtype, device=device),
        block_tables=tables,
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        scale=case.head_dim**-0.5,
    )


def reference(inputs: Inputs) -> torch.Tensor:
    """Attention in float32, row by row: [rows, heads, head_dim]."""
    kv_heads, head_dim = inputs.k_cache.shape[2:]
    group = inputs.q.shape[1] // kv_heads
    outs = []
    for row, length in enumerate(inputs.seq_lens.tolist()):
        blocks = inputs.block_tables[row, : -(-length // inputs.k_cache.shape[1])].long()
        k, v = (
            cache[blocks].reshape(-1, kv_heads, head_dim)[:length].float().repeat_interleave(group, 1)
            for cache in (inputs.k_cache, inputs.v_cache)
        )  # [tokens, heads, head_dim]
        scores = (inputs.q[row].float() * k).sum(-1) * inputs.scale  # [tokens, heads]; no TF32, unlike a product
        outs.append((scores.softmax(0).unsqueeze(-1) * v).sum(0))
    return torch.stack(outs)


def median_microseconds(call: Callable[[int], object], num_sets: int) -> float:
    """Median time of `call(i)`, i = 0 … num_sets − 1 in turn, inside a CUDA graph that is replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, which a capture must not
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, 16 // num_sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for i in range(num_sets):
                call(i)
    graph.replay()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * num_sets))
    return sorted(times)[len(times) // 2]
