"""How much memory the KV cache gets, and its allocation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import numpy as np
import torch

from minivllm.backends.base import KVCache
from minivllm.config import EngineConfig
from minivllm.model_config import ModelConfig

GIB = 1 << 30
CPU_KV_CACHE_BYTES = 4 * GIB  # at most, and no more than a quarter of the memory
SLACK_BYTES = 128 << 20  # GPU memory left for fragmentation and what libraries allocate late


def check_weights_fit(model: torch.nn.Module) -> None:
    """Raise ValueError if a model that is still empty is more than a CPU's memory holds: the system would grant it, and
    end the process once it is filled."""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if num_bytes > _host_bytes():
        raise ValueError(
            f"the weights need {num_bytes / GIB:.2f} GiB of memory, and there are {_host_bytes() / GIB:.2f}; take a "
            "smaller model, or dtype='bfloat16'"
        )


def kv_cache_blocks(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, profile: Callable[[], None]) -> int:
    """Blocks of KV cache that fit.  `profile` runs the largest steps; on a GPU their memory is measured and set aside.

    Raises ValueError if not even one block fits, or if what was asked for does not.
    """
    assert config.max_num_seqs and config.max_model_len
    block_bytes = model.kv_elements_per_token * config.block_size * dtype.itemsize
    # More than every slot at its longest is never used, but for prefixes worth keeping.
    useful = 2 * config.max_num_seqs * -(-config.max_model_len // config.block_size) * block_bytes
    wanted, name = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    if config.num_gpu_blocks_override is not None:
        wanted, name = config.num_gpu_blocks_override * block_bytes, "num_gpu_blocks_override"
    if config.device.startswith("cuda"):
        available = _gpu_bytes_left(config, profile)
        if wanted is not None and wanted > available:
            raise ValueError(
                f"{name} ({wanted / GIB:.2f} GiB) is more than the {max(0, available) / GIB:.2f} GiB that weights and "
                f"activations leave of gpu_memory_utilization {config.gpu_memory_utilization}; lower it"
            )
    else:
        memory = _host_bytes()
        if wanted is not None and wanted > memory:
            raise ValueError(
                f"{name} ({wanted / GIB:.2f} GiB) is more than there is ({memory / GIB:.2f} GiB); lower it"
            )
        available = min(CPU_KV_CACHE_BYTES, memory // 4, useful)
    num_blocks = (wanted or available) // block_bytes
    if num_blocks < 1:
        raise ValueError(
            f"no memory is left for the KV cache: one block needs {block_bytes} bytes, there are "
            f"{max(0, wanted or available)}; raise gpu_memory_utilization or "
            "kv_cache_memory_bytes, or lower max_num_batched_tokens, max_num_seqs or max_model_len"
        )
    return num_blocks


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gpu_bytes_left(config: EngineConfig, profile: Callable[[], None]) -> int:
    """Bytes of gpu_memory_utilization that are left beside the weights, the largest step and the CUDA graphs."""
    device = torch.device(config.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    profile()
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # what stays reserved now, the graphs' pool, counts as used
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - activations - SLACK_BYTES


def allocate_kv_cache(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[KVCache]:
    """K and V of every layer, each [blocks, block_size, kv_heads, head_dim], in one allocation of zeros."""
    shape = (model.num_hidden_layers, 2, num_blocks, block_size, model.num_key_value_heads, model.head_dim)
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type == "cpu":
        # numpy's zeros are pages that the system hands out on first use; torch's are written.
        cache = torch.from_numpy(np.zeros(num_bytes, np.uint8))
    else:
        cache = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return [(layer[0], layer[1]) for layer in cache.view(dtype).view(shape)]
