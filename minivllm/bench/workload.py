"""What a throughput run is fed: random prompts, and the shapes of public models for random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

Range = tuple[int, int]  # smallest and largest, both included

NANO: Range = (100, 1024)  # tokens in and tokens out of nano-vLLM's benchmark, with 256 requests at temperature 0.6

_LLAMA3 = dict(vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0, num_key_value_heads=8)
_LLAMA32 = _LLAMA3 | dict(
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    rope_scaling=dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)


def _llama(hidden_size: int, intermediate_size: int, layers: int, heads: int, **others: object) -> dict[str, object]:
    sizes = dict(hidden_size=hidden_size, intermediate_size=intermediate_size)
    return sizes | dict(num_hidden_layers=layers, num_attention_heads=heads, head_dim=hidden_size // heads) | others


SHAPES = {
    "llama2-7b": _llama(4096, 11008, 32, 32, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096),
    "llama2-13b": _llama(5120, 13824, 40, 40, num_key_value_heads=40, vocab_size=32000, max_position_embeddings=4096),
    "llama3-8b": _llama(4096, 14336, 32, 32, **_LLAMA3),
    "llama3-70b": _llama(8192, 28672, 80, 64, **_LLAMA3),
    "llama3.2-1b": _llama(2048, 8192, 16, 32, **_LLAMA32),
    "llama3.2-3b": _llama(3072, 8192, 28, 24, **_LLAMA32),
}


def write_config(shape: str, folder: str) -> None:
    """Write the config.json of `shape` into `folder`, which is then a model for load_format="dummy"."""
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    (Path(folder) / "config.json").write_text(json.dumps(config | SHAPES[shape]))


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once and end only at their length."""

    num_prompts: int
    input_len: Range
    output_len: Range
    temperature: float
    seed: int = 0

    def draw(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """(prompts as token ids, tokens to generate for each), the same for the same seed.

        Ids are at most 10,000.  With the ranges of `NANO` these are the very draws of nano-vLLM's bench.py.
        """
        random = Random(self.seed)
        largest = min(10000, vocab_size - 1)

        def length(bounds: Range) -> int:  # a fixed one takes no random number
            return bounds[0] if bounds[0] == bounds[1] else random.randint(*bounds)

        prompts = [[random.randint(0, largest) for _ in range(length(self.input_len))] for _ in range(self.num_prompts)]
        return prompts, [length(self.output_len) for _ in range(self.num_prompts)]

    def __str__(self) -> str:
        requests = "1 request" if self.num_prompts == 1 else f"{self.num_prompts} requests at once"
        sampling = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return (
            f"{requests}, {_text(self.input_len)} tokens in, {_text(self.output_len)} out, {sampling}, seed {self.seed}"
        )


def _text(bounds: Range) -> str:
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]}-{bounds[1]}"
