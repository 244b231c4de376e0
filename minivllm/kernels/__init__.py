"""Triton kernels, each with the Python function that launches it.  Nothing else lives here.

They run on a GPU, or on CPU tensors in Triton's interpreter (TRITON_INTERPRET=1 set before the first import).
"""

from minivllm.kernels.activation import activate_and_mul
from minivllm.kernels.inbox import Inbox, await_flags
from minivllm.kernels.linear import has_kernel, small_linear
from minivllm.kernels.norm import add_rms_norm, rms_norm, sum_rms_norm
from minivllm.kernels.paged_decode import paged_attention_decode, plan_paged_decode
from minivllm.kernels.prefill import paged_attention_prefill
from minivllm.kernels.quantize import quantize_rows
from minivllm.kernels.rope_kv import rope_and_store_kv
from minivllm.kernels.sample import VocabShare, sample
from minivllm.kernels.truncate import truncate

__all__ = [
    "Inbox",
    "VocabShare",
    "activate_and_mul",
    "add_rms_norm",
    "await_flags",
    "has_kernel",
    "paged_attention_decode",
    "paged_attention_prefill",
    "plan_paged_decode",
    "quantize_rows",
    "rms_norm",
    "rope_and_store_kv",
    "sample",
    "small_linear",
    "sum_rms_norm",
    "truncate",
]
