"""The whole engine through the Triton backend, in the interpreter: the same tokens as through torch."""

import pytest
import torch

from minivllm import LLM, SamplingParams

PROMPTS = [[(7 * i + j) % 150 for j in range(n)] for i, n in enumerate([3, 16, 33, 1])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py does this for real")
@pytest.mark.parametrize("name", ["gqa-tied", "odd-head-dim", "mistral-window", "qwen2-windows", "qwen3"])
def test_same_tokens_as_torch(tiny, name):
    params = [SamplingParams(temperature=t, max_tokens=6, seed=i) for i, t in enumerate([0.0, 0.0, 1.0, 0.0])]
    tokens = {}
    for backend in ("torch", "triton"):
        with LLM(
            tiny(name), backend=backend, skip_tokenizer_init=True, block_size=16, max_num_batched_tokens=24,
            kv_cache_memory_bytes=1 << 20,
        ) as llm:  # fmt: skip
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            tokens[backend] = [output.outputs[0].token_ids for output in outputs]
    assert tokens["triton"] == tokens["torch"]
