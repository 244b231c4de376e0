"""Greedy tokens in float32 are Hugging Face's, whatever the chunks, the prefix cache, the memory and the schedule."""

import itertools
import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_VOCAB
from safetensors.torch import load_file, save_file

from minivllm import LLM, SamplingParams
from minivllm.model_config import ModelConfig

BLOCK_SIZE = 16
WHOLE = 4096  # a token budget that every prompt fits
GRID = list(
    itertools.product(
        ["cache", "nocache"],  # prefix cache
        [16, 64, WHOLE],  # max_num_batched_tokens
        ["ample", "scarce"],  # KV cache
        ["alone", "together"],  # prompts one by one, or all at once
        ["sync", "async"],
    )
)
CORNERS = [
    ("cache", 16, "scarce", "together", "async"),
    ("cache", 64, "scarce", "alone", "sync"),
    ("nocache", 64, "scarce", "together", "sync"),
    ("nocache", WHOLE, "ample", "together", "async"),
    ("cache", WHOLE, "ample", "together", "sync"),
]
FULL_GRID_BY_DEFAULT = ("gqa-tied", "llama3-rope-sharded")


def shared_prefix_prompts(lengths, vocab_size):
    """Random prompts whose starts agree, pairwise and as far as possible, up to block borders and just beside them."""
    draw = random.Random(0)
    start = [draw.randrange(vocab_size) for _ in range(max(lengths))]
    shared = [0, 15, 16, 17, 31, 32, 33, 48]
    return [
        start[:k] + [draw.randrange(vocab_size) for _ in range(length - k)]
        for length, k in zip(lengths, (min(k, n) for k, n in zip(shared, lengths, strict=True)), strict=True)
    ]


PROMPTS = shared_prefix_prompts([1, 15, 16, 17, 32, 33, 48, 65], TINY_VOCAB)
NUM_TOKENS = 24


def run(folder, prompts, num_tokens, cache, budget, memory, order, schedule):
    """The greedy tokens of minivllm with these settings."""
    model = ModelConfig.from_hf(json.loads((Path(folder) / "config.json").read_text()))
    longest = max(map(len, prompts)) + num_tokens
    num_blocks = -(-longest // BLOCK_SIZE) * (2 * len(prompts) if memory == "ample" else 1) + 1
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    with LLM(
        folder,
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=num_blocks * BLOCK_SIZE * model.kv_elements_per_token * 4,
        max_num_batched_tokens=budget,
        enable_prefix_caching=cache == "cache",
        async_scheduling=schedule == "async",
    ) as llm:
        batches = [prompts] if order == "together" else [[prompt] for prompt in prompts]
        outputs = [output for batch in batches for output in llm.generate(batch, params, use_tqdm=False)]
        scheduler = llm.engine.scheduler
        scheduler.check_integrity()
        if scheduler.window is None:  # with one, blocks become free before a request ends
            assert (scheduler.stats.num_preemptions > 0) == (memory == "scarce" and order == "together")
        assert (scheduler.stats.num_cached_tokens > 0) == (cache == "cache")
    return [output.outputs[0].token_ids for output in outputs]


def check(model, prompts, tokens, expected):
    """All tokens are the expected ones, up to a tie of the two best logits, which must be proven."""
    for prompt, got, want in zip(prompts, tokens, expected, strict=True):
        assert len(got) == len(want)
        differ = next((i for i in range(len(want)) if got[i] != want[i]), None)
        if differ is not None:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + want[:differ]])).logits[0, -1]
            gap = (logits[want[differ]] - logits[got[differ]]).item()
            assert abs(gap) < 1e-4, f"prompt of {len(prompt)} tokens, output token {differ}: {got} is not {want}"


def grid_id(values):
    return "-".join("whole" if value == WHOLE else str(value) for value in values)


def cases():
    for name, settings in itertools.product(TINY, GRID):
        default = name in FULL_GRID_BY_DEFAULT or settings in CORNERS
        yield pytest.param(name, settings, id=f"{name}-{grid_id(settings)}", marks=() if default else pytest.mark.slow)


@pytest.mark.parametrize(("name", "settings"), cases())
def test_tiny_checkpoints(tiny, greedy, hugging_face, name, settings):
    folder = tiny(name)
    expected = greedy(folder, PROMPTS, NUM_TOKENS)
    assert min(len(set(tokens)) for tokens in expected) > NUM_TOKENS // 2, "the checkpoint repeats itself"
    check(hugging_face(folder), PROMPTS, run(folder, PROMPTS, NUM_TOKENS, *settings), expected)


TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    ",
    "Q: What is the boiling point of water at sea level?\nA:",
    "The three laws of motion were formulated by",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "import numpy as np\n\n# The mean of each row\nx = np.arange(12).reshape(3, 4)\n",
    "To make a good cup of coffee, first",
    "Photosynthesis is the process by which",
    "1, 1, 2, 3, 5, 8, 13,",
    "She opened the letter with trembling hands and read the first line:",
    "The difference between a virus and a bacterium is that",
    "SELECT name, price FROM products WHERE",
    "Water freezes at 0 degrees, and it",
    "In 1969, for the first time in history, human beings",
    "A haiku about autumn:\n",
    "The French word for 'apple' is 'pomme'; the German word is",
    "My favourite book is about a lighthouse keeper. It begins like this:",
    "List of the planets, from the Sun outward: Mercury, Venus,",
    "Hello",
]


@pytest.fixture(scope="module")
def tokenizer(embedded):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded)


def save(folder, config, **tensors):
    """Change a checkpoint's config.json, and add tensors."""
    path = Path(folder)
    config = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(config))
    save_file(load_file(path / "model.safetensors") | tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def greedy_tokens(folder, **options):
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with LLM(folder, skip_tokenizer_init=True, device="cpu", kv_cache_memory_bytes=1 << 22, **options) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_a_head_beside_tied_embeddings(tiny, greedy, tmp_path):
    """It is used if it is another, as in transformers 5, and says so."""
    embedding = load_file(Path(tiny("gqa-tied")) / "model.safetensors")["model.embed_tokens.weight"]
    same, own, untied = (shutil.copytree(tiny("gqa-tied"), tmp_path / name) for name in ("same", "own", "untied"))
    save(same, {}, **{"lm_head.weight": embedding.clone()})
    for folder in (own, untied):
        save(folder, dict(tie_word_embeddings=folder == own), **{"lm_head.weight": embedding.flip(0).contiguous()})
    tied, other = greedy(tiny("gqa-tied"), PROMPTS, NUM_TOKENS), greedy(str(untied), PROMPTS, NUM_TOKENS)
    assert tied != other
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greedy_tokens(str(same)) == tied
        assert greedy_tokens(str(own), hf_overrides={"tie_word_embeddings": True}) == tied
        assert greedy_tokens(str(untied)) == other
    with pytest.warns(UserWarning, match="lm_head.weight is used, as it differs from the embeddings"):
        assert greedy_tokens(str(own)) == other


def test_dynamic_rope_within_the_context_of_the_training(tiny, greedy, tmp_path):
    """Which is all that there is, unless max_model_len says more."""
    folder = save(
        shutil.copytree(tiny("mha"), tmp_path / "dynamic"), dict(rope_parameters=dict(rope_type="dynamic", factor=4.0))
    )
    expected = greedy(folder, PROMPTS, NUM_TOKENS)
    assert greedy_tokens(folder) == greedy_tokens(folder, max_model_len=256) == expected
    assert greedy_tokens(folder, max_model_len=1024) != expected


def test_embedded_model(embedded, tokenizer, greedy, hugging_face):
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    with LLM(embedded, skip_tokenizer_init=True, device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    check(hugging_face(embedded), prompts, tokens, greedy(embedded, prompts, 64))


def test_embedded_model_past_2048_tokens(embedded, tokenizer, greedy, hugging_face):
    """One prompt starts past 2,048 tokens, the other crosses them while it decodes."""
    prompts = []
    for seed, length in enumerate([2100, 2040]):
        texts = random.Random(seed).choices(TEXTS, k=400)
        prompts.append(tokenizer("\n\n".join(texts)).input_ids[:length])
        assert len(prompts[-1]) == length
    with LLM(embedded, skip_tokenizer_init=True, device="cpu", max_num_batched_tokens=1024) as llm:
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]
    check(hugging_face(embedded), prompts, tokens, greedy(embedded, prompts, 16))


@pytest.mark.slow
@pytest.mark.parametrize("settings", GRID, ids=grid_id)
def test_embedded_model_over_the_grid(embedded, tokenizer, greedy, hugging_face, settings):
    text = tokenizer("\n\n".join(TEXTS)).input_ids
    lengths = [1, 15, 16, 17, 32, 33, 48, 64]
    prompts = [text[:n] + tokenizer(end).input_ids for n, end in zip(lengths, TEXTS[:8], strict=True)]
    check(hugging_face(embedded), prompts, run(embedded, prompts, 32, *settings), greedy(embedded, prompts, 32))
