"""Sampling against direct computation: distributions, noise, truncation; and a seed always draws the same."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minivllm import LLM, SamplingParams
from minivllm.backends import make_backend
from minivllm.backends.torch_backend import gumbel_noise
from minivllm.engine.batch import AdmittedRequest, ScheduledBatch
from minivllm.model_config import ModelConfig
from minivllm.runner.logits import needs_processing, process_logits
from minivllm.runner.sampler import SamplingInputs, sample
from minivllm.runner.slots import Slots

BACKEND = make_backend("torch")


def draw(logits, params, num_draws, seed=1234, num_prompt_tokens=7):
    """Draw the first `num_draws` output tokens of a request that has the same logits [vocab] at every position.
    [num_draws] int64."""
    slots = Slots(max_num_seqs=1, max_model_len=64, block_size=16, vocab_size=len(logits))
    slots.apply(
        ScheduledBatch(admitted=[AdmittedRequest(0, [0] * num_prompt_tokens, num_prompt_tokens, params, seed, [])])
    )
    rows = np.zeros(num_draws, np.int32)
    seq_lens = num_prompt_tokens + np.arange(num_draws, dtype=np.int32)
    inputs = SamplingInputs(
        slots=torch.from_numpy(rows),
        temperature=torch.from_numpy(slots.temperature[rows]),
        seeds=torch.from_numpy(slots.seed[rows]),
        positions=torch.from_numpy(seq_lens - num_prompt_tokens),
    )
    logits = logits.expand(num_draws, -1)
    if needs_processing(slots, rows, seq_lens):
        logits, _ = process_logits(BACKEND, logits, slots, rows, seq_lens, inputs.temperature)
    return sample(BACKEND, logits, inputs, torch.zeros(2, dtype=torch.int32)).long()


def expected_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that the options ask for, computed the slow way in float64: min_p, then top_k, then top_p."""
    p = (logits.double() / temperature).softmax(-1)
    p = torch.where(p >= min_p * p.max(), p, 0)
    p = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0) if top_k > 0 else p
    p = p / p.sum()
    order = p.argsort(descending=True)
    mass = 0.0
    for token in order.tolist():
        if mass >= top_p:
            p[token] = 0
        mass += p[token].item()
    return p / p.sum()


LOGITS = torch.tensor([1.0, -0.5, 2.2, 0.1, -3.0, 1.7, 0.4, -1.2])
NUM_DRAWS = 40_000


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 + 7])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(temperature=0.3),
        dict(temperature=1.9),
        dict(top_k=3),
        dict(top_p=0.7),
        dict(top_p=0.95, temperature=0.6),
        dict(min_p=0.2),
        dict(min_p=0.1, temperature=2.0),
        dict(top_k=5, top_p=0.8, min_p=0.05, temperature=1.5),
    ],
    ids=str,
)
def test_goodness_of_fit(options, seed):
    """Pearson's chi-square: its mean is the degrees of freedom, its variance twice that; 5 sigma are allowed."""
    p = expected_probabilities(LOGITS, **options)
    counts = torch.bincount(draw(LOGITS, SamplingParams(**options), NUM_DRAWS, seed), minlength=len(LOGITS))
    assert counts[p == 0].sum() == 0, "a token that is ruled out was drawn"
    rare = p * NUM_DRAWS < 5  # taken together: the test is for counts that are about normal
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([p[~rare], p[rare].sum()[None]]) * NUM_DRAWS
    freedom = len(expected) - 1
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1)).sum().item()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), f"{counts.tolist()} for {(p * NUM_DRAWS).tolist()}"


def test_the_expectation_tells_options_apart():
    """The fit above is worth something only if the wrong option would not pass."""
    right, wrong = (expected_probabilities(LOGITS, temperature=t) for t in (1.0, 1.05))
    assert ((right - wrong) ** 2 / wrong).sum() * NUM_DRAWS > 7 + 5 * math.sqrt(14)


def test_goodness_of_fit_across_splits_of_the_vocabulary():
    """A vocabulary of several splits, the last one short; tokens counted by their remainder modulo 64."""
    logits = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    logits[4096:8192] -= 2.0
    p = torch.bincount(torch.arange(9000) % 64, logits.double().softmax(-1))
    by_split = torch.bincount(torch.arange(9000) // 4096, logits.double().softmax(-1))
    tokens = torch.cat([draw(logits, SamplingParams(), 4000, seed) for seed in range(4)])
    for places, expected in ((tokens % 64, p), (tokens // 4096, by_split)):
        expected = expected * len(tokens)
        chi_square = ((torch.bincount(places, minlength=len(expected)) - expected) ** 2 / expected).sum().item()
        freedom = len(expected) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_only_what_is_possible_is_drawn(vocab_size):
    """Infinite logits: +inf is certain, −inf is never drawn, whatever else there is."""
    logits = torch.full((3, vocab_size), float("-inf"))
    logits[0, 17] = logits[1, vocab_size - 1] = 0.0
    logits[2] = 1.0
    logits[2, 30] = float("inf")
    for row, token in zip(logits, (17, vocab_size - 1, 30), strict=True):
        assert set(draw(row, SamplingParams(), 200).tolist()) == {token}


# ---- noise


def noise_grid(num_seeds, num_positions, vocab_size, first_seed=0):
    """[seeds, positions, vocab]"""
    seeds = torch.arange(first_seed, first_seed + num_seeds).repeat_interleave(num_positions)
    positions = torch.arange(num_positions, dtype=torch.int32).repeat(num_seeds)
    ids = torch.arange(vocab_size, dtype=torch.int32)
    return gumbel_noise(seeds, positions, ids).view(num_seeds, num_positions, vocab_size)


def test_noise_is_gumbel():
    noise = torch.stack([noise_grid(8, 64, 8192, seed) for seed in (0, 1_000_003, 2**40, -9)]).double().flatten()
    n = len(noise)
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.pi / math.sqrt(6 * n)
    assert abs(noise.var() - math.pi**2 / 6) < 5 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / n)
    for x in (-2.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0, 11.0, 13.0):  # the winners are in the upper tail
        p = -math.expm1(-math.exp(-x))  # P(noise > x)
        assert abs((noise > x).sum() - n * p) < 5 * math.sqrt(n * p * (1 - p)), f"P(noise > {x})"


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_neighbouring_draws_are_independent(along):
    """Pairs of tokens drawn one after the other, from 16 that are equally likely: chi-square over the 256 pairs."""
    tokens = noise_grid(300, 300, 16, first_seed=5).argmax(-1)
    tokens = tokens if along == "positions" else tokens.T
    pairs = torch.bincount((tokens[:, :-1] * 16 + tokens[:, 1:]).flatten(), minlength=256)
    expected = pairs.sum() / 256
    assert ((pairs - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("shift", [1, 2, 3, 64])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["seeds", "positions", "ids"])
def test_neighbouring_noise_is_independent(dim, shift):
    """Uncorrelated, in value and in its upper tail; as ranks, (0, 1) uniform, so that every draw weighs alike."""
    sizes = [8, 8, 256]
    sizes[dim] = max(sizes[dim], 128)
    noise = noise_grid(*sizes)
    uniform = torch.exp(-torch.exp(-noise.double()))
    a, b = (uniform.narrow(dim, start, sizes[dim] - shift).flatten() for start in (0, shift))
    for f in (lambda u: u, lambda u: (u - 0.5) ** 2, lambda u: (u > 0.95).double()):
        correlation = torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(len(a))


def test_noise_of_a_seed_and_position_is_always_the_same():
    """Seeds must mean the same tomorrow."""
    rows = [(3, 0), (3, 1), (2**40 + 3, 0), (-5, 9)]
    together = gumbel_noise(*(torch.tensor(column) for column in zip(*rows, strict=True)), torch.arange(100).int())
    assert len({tuple(row) for row in together.tolist()}) == len(rows)
    torch.testing.assert_close(together[:, :2], torch.tensor(GOLDEN_NOISE), rtol=0, atol=1e-5)
    for (seed, position), row in zip(rows, together, strict=True):
        ids = torch.arange(50, 60).int()
        alone = gumbel_noise(torch.tensor([seed]), torch.tensor([position], dtype=torch.int32), ids)
        assert torch.equal(alone[0], row[50:60])


GOLDEN_NOISE = [[2.389395, -0.467971], [2.766055, -0.169226], [-0.061127, 0.891624], [0.495032, 0.607503]]


# ---- greedy


def test_greedy_rows_among_drawn_ones_are_exact_and_ties_go_to_the_lowest_id():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator)
    logits[:, 700] = logits[:, 300] = logits.amax(-1)  # three equal maxima
    temperature = torch.tensor([0.0, 1.0]).repeat(32)
    last_token = torch.full((100,), -1, dtype=torch.int32)
    slots = torch.randperm(100, generator=generator)[:64].int()
    before = logits.clone()
    tokens = BACKEND.sample(
        logits, temperature, torch.arange(64), torch.arange(64, dtype=torch.int32), last_token, slots
    )
    lowest = [row.index(max(row)) for row in logits.tolist()]
    assert tokens[0::2].tolist() == lowest[0::2]
    assert sum(a == b for a, b in zip(tokens[1::2].tolist(), lowest[1::2], strict=True)) < 4
    assert torch.equal(last_token[slots.long()], tokens) and (last_token == -1).sum() == 36
    assert torch.equal(logits, before), "the logits are not the sampler's to change"


def test_greedy_is_exact_among_truncated_rows():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    slots = Slots(3, 64, 16, 9)
    every = [SamplingParams(temperature=0, top_k=1), SamplingParams(top_k=1, seed=1), SamplingParams(temperature=0)]
    slots.apply(ScheduledBatch(admitted=[AdmittedRequest(i, [0], 1, params, i, []) for i, params in enumerate(every)]))
    rows, seq_lens = np.arange(3, dtype=np.int32), np.ones(3, np.int32)
    masked, _ = process_logits(BACKEND, logits, slots, rows, seq_lens, torch.from_numpy(slots.temperature[rows]))
    assert masked.argmax(-1).tolist() == logits.argmax(-1).tolist()
    assert torch.equal(masked[2], logits[2])


# ---- truncation


def truncated(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Which tokens `truncate` keeps: [rows, vocab] bool."""
    column = logits.new_ones(len(logits))
    kept = logits.clone()
    BACKEND.truncate(kept, column * temperature, (column * top_k).int(), column * top_p, column * min_p)
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()]), "what is kept is not changed"
    return kept.isfinite()


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        (dict(top_k=1), ["TopK"]),
        (dict(top_k=50), ["TopK"]),
        (dict(top_k=5000), ["TopK"]),
        (dict(top_p=0.01), ["TopP"]),
        (dict(top_p=0.5), ["TopP"]),
        (dict(top_p=0.999), ["TopP"]),
        (dict(min_p=0.02), ["MinP"]),
        (dict(min_p=1.0), ["MinP"]),
        (dict(min_p=0.01, top_k=40, top_p=0.8), ["MinP", "TopK", "TopP"]),
    ],
    ids=str,
)
def test_truncation_is_that_of_transformers(options, warpers, temperature):
    import transformers

    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    arguments = dict(TopK="top_k", TopP="top_p", MinP="min_p")
    expected = logits / temperature
    for name in warpers:
        expected = getattr(transformers, f"{name}LogitsWarper")(options[arguments[name]])(None, expected)
    assert torch.equal(truncated(logits, temperature, **options), expected.isfinite())


def test_equal_logits_are_kept_or_dropped_together():
    logits = torch.tensor([[2.0, 1.0, 3.0, 1.0, 1.0, 0.0]])
    assert truncated(logits, top_k=3).tolist() == [[True, True, True, True, True, False]]
    assert truncated(logits, top_p=0.75).tolist() == [[True, False, True, False, False, False]]
    assert truncated(logits, top_p=0.8).tolist() == [[True, True, True, True, True, False]]


def test_each_row_is_truncated_by_its_own_options():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    options = [dict(), dict(top_k=3), dict(top_p=0.3), dict(min_p=0.5)]
    names = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    columns = [torch.tensor([{**names, **row}[name] for row in options]) for name in names]
    together = logits.clone()
    BACKEND.truncate(together, *columns)
    for i, row in enumerate(options):
        assert torch.equal(together[i].isfinite(), truncated(logits[i : i + 1], **row)[0])
    assert together[0].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [dict(top_p=1e-6), dict(top_p=1e-50), dict(top_k=1), dict(min_p=1.0)],
    ids=str,
)
def test_the_most_likely_token_is_always_kept(options):
    assert set(draw(LOGITS, SamplingParams(**options), 100).tolist()) == {2}


def test_ended_tokens_are_banned_before_min_tokens():
    slots = Slots(2, 64, 16, 9)
    every = [SamplingParams(min_tokens=3), SamplingParams(min_tokens=0)]
    slots.apply(ScheduledBatch(admitted=[AdmittedRequest(i, [0] * 5, 5, p, i, [1, 4]) for i, p in enumerate(every)]))
    rows = np.array([0, 0, 0, 0, 1], np.int32)
    seq_lens = np.array([5, 6, 7, 8, 5], np.int32)  # the row's token is output token 0, 1, 2, 3 and 0
    logits = torch.zeros(5, 6)
    masked, _ = process_logits(BACKEND, logits, slots, rows, seq_lens, torch.ones(5))
    banned = torch.zeros(5, 6, dtype=torch.bool)
    banned[:3, [1, 4]] = True
    assert torch.equal(masked == float("-inf"), banned) and torch.equal(logits, torch.zeros(5, 6))
    assert needs_processing(slots, rows[2:3], seq_lens[2:3]) and not needs_processing(slots, rows[3:], seq_lens[3:])


# ---- seeds, through the engine


@pytest.fixture(scope="module")
def generate(tiny):
    """generate(prompts, params, scarce): output tokens, and the number of preemptions."""
    folder = tiny("gqa-tied")
    model = ModelConfig.from_hf(json.loads((Path(folder) / "config.json").read_text()))

    def run(prompts, params, scarce=False, **arguments):
        block_bytes = 16 * 4 * model.kv_elements_per_token
        memory = (4 if scarce else 64) * block_bytes
        with LLM(
            folder, skip_tokenizer_init=True, device="cpu", block_size=16, kv_cache_memory_bytes=memory, **arguments
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [output.outputs[0].token_ids for output in outputs], llm.engine.scheduler.stats.num_preemptions

    return run


PROMPTS = [[5, 6, 7], [5, 6, 8, 9], list(range(17)), [5, 6, 7]]


@pytest.mark.parametrize("options", [dict(), dict(top_k=20, top_p=0.9, min_p=0.01), dict(temperature=1.7)], ids=str)
def test_a_seed_draws_the_same_alone_in_a_batch_and_after_preemption(generate, options):
    params = [SamplingParams(seed=100 * i - 3, max_tokens=32, **options) for i in range(len(PROMPTS))]
    together, _ = generate(PROMPTS, params, max_num_batched_tokens=64)
    assert len({tuple(tokens) for tokens in together}) == len(PROMPTS), "equal prompts differ by their seeds"
    for prompt, own, tokens in zip(PROMPTS, params, together, strict=True):
        assert generate([prompt], own)[0] == [tokens]
    preempted, num_preemptions = generate(PROMPTS, params, scarce=True, max_num_batched_tokens=16)
    assert num_preemptions > 0 and preempted == together
    assert generate(PROMPTS[::-1], params[::-1], async_scheduling=True)[0] == together[::-1]


def test_without_a_seed_requests_differ_and_the_engine_s_seed_decides(generate):
    params = SamplingParams(max_tokens=16)
    first, again, other = (generate([[1, 2, 3]] * 3, params, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again and first != other
    assert len({tuple(tokens) for tokens in first}) == 3


def test_greedy_rows_do_not_depend_on_drawn_ones(generate):
    greedy = SamplingParams(temperature=0, max_tokens=16)
    drawn = SamplingParams(temperature=2.0, top_k=50, max_tokens=16)
    mixed, _ = generate(PROMPTS, [greedy, drawn, greedy, drawn])
    pure, _ = generate(PROMPTS, greedy)
    assert mixed[0] == pure[0] and mixed[2] == pure[2] and mixed[1] != pure[1] and mixed[3] != pure[3]
