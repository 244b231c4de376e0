"""Compile every kernel, as its launcher calls it, for GPUs that are not here; print what each needs.  Run without the
interpreter: python cross_compile.py CAPABILITY SHARED_MEMORY_BYTES."""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import minivllm.kernels.device as device
import minivllm.kernels.norm as norm
import minivllm.kernels.prefill as prefill
from minivllm import kernels

capability, limit = int(sys.argv[1]), int(sys.argv[2])
device.shared_memory = lambda _: limit
prefill.has_tensor_copies = lambda _: capability >= 90
for name, module in list(sys.modules.items()):
    if name.startswith("minivllm.kernels.") and hasattr(module, "launch_options"):
        module.launch_options = lambda _: {"PDL": True, "launch_pdl": True} if capability >= 90 else {"PDL": False}
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LAUNCH_OPTIONS = ("num_warps", "num_stages", "launch_pdl")
compiled = {}


def descriptor_type(value):
    return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"


def compile_instead(kernel, *args, grid, warmup, **kwargs):
    """Stand in for a launch: compile for the target with the types and constants of this call."""
    options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {
        name: value for name, value in values.items() if kernel.params[kernel.arg_names.index(name)].is_constexpr
    }
    signature = {
        name: "constexpr" if name in constants
        else TYPES[value.dtype] if isinstance(value, torch.Tensor)
        else descriptor_type(value) if isinstance(value, TensorDescriptor)
        else "fp32" if isinstance(value, float) else "i32"
        for name, value in values.items()
    }  # fmt: skip
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, value in values.items()
        if name not in constants and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0))
    }
    key = (kernel.__name__, tuple(signature.values()), tuple(constants.values()))
    if key not in compiled:
        source = ASTSource(kernel, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert binary.asm["cubin"]
        compiled[key] = dict(
            kernel=kernel.__name__, types=key[1][0], shared=binary.metadata.shared, constants=str(constants)
        )
        print(json.dumps(compiled[key]), flush=True)


JITFunction.run = compile_instead

for dtype in (torch.bfloat16, torch.float32):
    for heads, kv_heads, head_dim, block_size in [(32, 8, 128, 64), (9, 3, 64, 16), (8, 1, 256, 64)]:
        q = torch.zeros(2, heads, head_dim, dtype=dtype)
        k = torch.zeros(2, block_size, kv_heads, head_dim, dtype=dtype)
        table = lens = starts = torch.ones(2, 2, dtype=torch.int32)
        caches = [k, k.to(torch.float8_e4m3fn)] if capability >= 89 else [k]
        for cache in caches:
            kernels.paged_attention_decode(q, cache, cache, table, lens, 0.1)
            kernels.paged_attention_prefill(q, cache, cache, table, lens, starts, table, 0.1)
        qkv = torch.zeros(2, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        kernels.paged_attention_prefill(q, k, k, table, lens, starts, table, 0.1, window=100)
        if head_dim == 256 and dtype == torch.bfloat16:  # Gemma 2's
            kernels.paged_attention_prefill(q, k, k, table, lens, starts, table, 0.1, window=100, cap=50.0)
            kernels.paged_attention_decode(q, k, k, table, lens, 0.1, cap=50.0)
        for cache in caches:
            rope = (qkv, lens, torch.zeros(2, head_dim), cache, cache, torch.zeros(2, dtype=torch.int64), heads)
            kernels.rope_and_store_kv(*rope)
            kernels.rope_and_store_kv(*rope, (q[0, 0], q[0, 0], 1e-5))
    x = torch.zeros(2, 4096, dtype=dtype)
    kernels.rms_norm(x, x[0], 1e-5)
    kernels.add_rms_norm(x, x.clone(), x[0], 1e-5)
    kernels.activate_and_mul(x)
    kernels.activate_and_mul(x, "gelu_pytorch_tanh")
    if dtype == torch.bfloat16 and capability == 90:  # elsewhere cuBLAS does it
        for rows in (1, 16, 64):
            for out_size in (64, 192):  # tiles of 32 rows for few rows of x, and of 64
                weight = torch.zeros(out_size, 4096, dtype=dtype)
                kernels.small_linear(torch.zeros(rows, 4096, dtype=dtype), weight, None)
            kernels.small_linear(
                torch.zeros(rows, 4096, dtype=dtype), weight.to(torch.float8_e4m3fn), None, lens[0].float()
            )
        kernels.quantize_rows(x)
    for ranks, norm.OWNED_BYTES in ((2, 0), (3, 0), (3, 1 << 30)):
        integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
        places, addresses = torch.zeros(2, 2, ranks - 1, 4096, dtype=integer), torch.zeros(ranks, dtype=torch.int64)
        inbox = kernels.Inbox(places, addresses, lens[0], 0)
        kernels.sum_rms_norm(x, None, x[0], 1e-5, inbox)
        kernels.sum_rms_norm(x, x.clone(), x[0], 1e-5, inbox)
        kernels.sum_rms_norm(x, x.clone(), x[0], 1e-5, torch.zeros(ranks - 1, 2, 4096, dtype=dtype))
        kernels.await_flags(torch.zeros(ranks - 1, dtype=torch.int32), 0)
        inbox = kernels.Inbox(torch.zeros(2, 2, ranks, 4, dtype=torch.int32), addresses, lens[0], 0)
        kernels.sample(
            x,
            torch.ones(2),
            torch.ones(2, dtype=torch.int64),
            lens[0],
            lens[0],
            lens[0],
            kernels.VocabShare(4096, inbox),
        )
    kernels.sample(x, torch.ones(2), torch.ones(2, dtype=torch.int64), lens[0], lens[0], lens[0])
    kernels.truncate(x.float(), torch.ones(2), lens[0], torch.ones(2), torch.ones(2))
