"""Compile the backend's kernels side by side, while the weights are loaded.

Compiling a Triton kernel takes a second or so, most of it in other processes.  The first steps would do it one kernel
after the other; here every operator runs once on a few rows, in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from minivllm.backends import Backend
from minivllm.backends.base import KVCache
from minivllm.model_config import ModelConfig
from minivllm.runner.forward_batch import ForwardBatch

ROWS = (1, 2, 32, 64, 300)  # one in each range that a backend may have a kernel of its own for


@contextmanager
def kernels_compiled_meanwhile(
    backend: Backend, config: ModelConfig, dtype: torch.dtype, caches: KVCache, num_columns: int
) -> Iterator[None]:
    """`compile_kernels`, beside what the block does; at its end all are."""
    with ThreadPoolExecutor(1) as thread:
        compiled = thread.submit(compile_kernels, backend, config, dtype, caches, num_columns)
        yield
        compiled.result()


def compile_kernels(
    backend: Backend, config: ModelConfig, dtype: torch.dtype, caches: KVCache, num_columns: int
) -> None:
    """Run each of `backend`'s operators on the shapes of the model and of its KV cache, of which `caches` are a layer
    with a single block, and whose block table has `num_columns`.  The results mean nothing."""
    device = caches[0].device
    hidden, num_heads, kv_heads, head_dim = (
        config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
    )  # fmt: skip

    norm_dtype = torch.float32 if config.zero_centered_norms else dtype

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def rotate(rows: int) -> None:
        batch = ForwardBatch(ints(), zeros(rows, dtype=torch.int32), zeros(rows, dtype=torch.int64), ints(), ints(), 0)
        qkv = zeros(rows, (num_heads + 2 * kv_heads) * head_dim)
        own_weight = zeros(head_dim, dtype=norm_dtype)
        qk_norm = (own_weight, own_weight, config.rms_norm_eps) if config.qk_norm else None
        backend.rotate_and_store(qkv, zeros(1, head_dim, dtype=torch.float32), num_heads, caches, batch, qk_norm)

    def attend(batch: ForwardBatch, window: int | None) -> None:
        qkv = zeros(batch.token_ids.shape[0], num_heads + 2 * kv_heads, head_dim)
        backend.attention(qkv[:, :num_heads], caches, replace(batch), 1.0, window, config.attention_cap)

    def sample() -> None:
        logits, longs = zeros(2, config.vocab_size), zeros(2, dtype=torch.int64)
        backend.sample(logits, zeros(2, dtype=torch.float32), longs, ints(0, 0), ints(0, 0), ints(0, 1))

    def truncate() -> None:
        ones = torch.ones(1, device=device)
        backend.truncate(zeros(1, config.vocab_size, dtype=torch.float32), ones, ones.int(), ones, ones)

    x, norm_weight = zeros(ROWS[-1], hidden), zeros(hidden, dtype=norm_dtype)
    weight, wider = zeros(max(4096, hidden), hidden), zeros(max(6144, hidden), hidden)  # two ways to be cut
    tables = zeros(2, num_columns, dtype=torch.int32)
    decode = ForwardBatch(ints(0, 0), ints(0, 0), ints(0, 0), tables, ints(1, 1), 2)
    prefill = ForwardBatch(
        ints(0, 0), ints(0, 1), ints(0, 0), tables, ints(2, 0), 0, ints(0, 2, 2), ints(0, 0, 1, 0).view(2, 2)
    )
    windows = list(dict.fromkeys(config.window(layer) for layer in range(config.num_hidden_layers)))
    jobs: list[Callable[[], object]] = [
        *(lambda window=window: attend(prefill, window) for window in windows),  # type: ignore[misc]
        lambda: attend(decode, windows[0]),
        sample,
        truncate,
        lambda: backend.rms_norm(x, norm_weight, config.rms_norm_eps),
        lambda: backend.add_rms_norm(x, x.clone(), norm_weight, config.rms_norm_eps),
        lambda: backend.activate_and_mul(zeros(2, 2 * config.intermediate_size), config.activation),
        lambda: backend.activate_and_mul(zeros(ROWS[-1], 2 * config.intermediate_size), config.activation),
        lambda: rotate(1),
        lambda: rotate(ROWS[-1]),
        *(lambda rows=rows: backend.linear(x[:rows], weight, None) for rows in ROWS),  # type: ignore[misc]
        lambda: backend.linear(x[:2], wider, None),
    ]

    def run(job: Callable[[], object]) -> None:
        if device.type == "cuda":  # this and the mode are a thread's own
            torch.cuda.set_device(device)
        with torch.inference_mode():
            job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(run, jobs))
