"""Drafts from the request's own text: the same output in fewer steps, and nothing where they do not pay."""

import random
from types import SimpleNamespace

import pytest

from minivllm import LLM, SamplingParams
from minivllm.config import EngineConfig
from minivllm.engine.batch import StepResult
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.ngram import ON_CPU, ON_GPU, DraftLimits, NgramConfig, NgramDrafter, accepted
from minivllm.engine.request import Request
from minivllm.engine.scheduler import Scheduler

NGRAM = dict(method="ngram", num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=3)
FEW = dict(allowed_token_ids=[3, 5, 62])  # so that a random model's output repeats itself, now and then
PATTERN = [5, 9, 13, 2, 7, 11]
PROMPTS = [PATTERN * 5, [3] * 20, list(range(40)), [60, 61, 62] * 4 + [1]]


@pytest.fixture
def make(tiny):
    def make(name="gqa-tied", **options):
        return LLM(tiny(name), **dict(skip_tokenizer_init=True, device="cpu", block_size=16) | options)

    return make


def run(llm, params, prompts=PROMPTS):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


SETTINGS = {
    "plain": {},
    "async": dict(async_scheduling=True),
    "chunked": dict(max_num_batched_tokens=16, max_num_seqs=4),
    "few-rows": dict(max_num_seqs=1),
    "triton": dict(backend="triton"),
    "gpu": dict(device="cuda", dtype="float32"),
    "gpu-eager": dict(device="cuda", dtype="float32", enforce_eager=True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.gpu] * ("gpu" in n)) for n in SETTINGS])
@pytest.mark.parametrize(
    "options",
    [dict(temperature=0), dict(temperature=0.4, seed=3), dict(temperature=1.5, top_k=5, top_p=0.9, seed=4)],
    ids=str,
)
def test_the_output_is_that_without_speculation(make, name, options):
    if name == "triton" and options["temperature"] != 0:
        pytest.skip("the interpreter is slow, and the torch backend has drawn the same")
    params, prompts = SamplingParams(max_tokens=60, ignore_eos=True, **options, **FEW), PROMPTS
    if name == "triton":
        params.max_tokens, params.allowed_token_ids, prompts = 11, [3], [[3] * 20, [4] + [3] * 30]
    with make(**SETTINGS["plain" if name == "triton" else name]) as llm:  # backends agree: test_triton_engine.py
        expected = run(llm, params, prompts)
    with make(**SETTINGS[name], speculative_config=NGRAM) as llm:
        assert run(llm, params, prompts) == expected
        stats = llm.engine.scheduler.stats
        assert 0 < stats.num_drafts <= stats.num_draft_tokens and stats.num_accepted_tokens <= stats.num_draft_tokens
        assert stats.num_accepted_tokens > (0 if name == "triton" else 10)
        assert sum(map(len, expected)) == stats.num_generated_tokens
        llm.engine.scheduler.check_integrity()
        values = {metric.name: metric.value for metric in llm.get_metrics()}
        assert values["vllm:spec_decode_num_accepted_tokens"] == stats.num_accepted_tokens
        assert values["vllm:spec_decode_num_draft_tokens"] == stats.num_draft_tokens
        assert values["vllm:spec_decode_num_drafts"] == stats.num_drafts


def test_fewer_steps(make):
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, allowed_token_ids=[3])
    steps = []
    for options in ({}, dict(speculative_config=NGRAM)):
        with make(**options) as llm:
            run(llm, params, PROMPTS[1:2])
            steps.append(llm.engine.scheduler.stats.num_steps)
    assert steps[1] < 0.7 * steps[0]


def test_every_end_comes_where_it_should(make):
    """Lengths, stop tokens and the end of the context, also in the middle of a draft that was right."""
    with make(max_model_len=70) as llm, make(max_model_len=70, speculative_config=NGRAM) as other:
        for options in (
            *(dict(max_tokens=n, ignore_eos=True) for n in range(1, 9)),
            dict(max_tokens=None, ignore_eos=True),
            *(dict(max_tokens=40, stop_token_ids=[token]) for token in FEW["allowed_token_ids"]),
        ):
            params = SamplingParams(temperature=0, **options, **FEW)
            found = [
                [(o.outputs[0].token_ids, o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in outputs]
                for outputs in (model.generate(PROMPTS, params, use_tqdm=False) for model in (llm, other))
            ]
            assert found[0] == found[1]
        assert other.engine.scheduler.stats.num_accepted_tokens > 0


def test_preemption(make, tiny):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, **FEW)
    with make() as llm:
        expected = run(llm, params)
        block_bytes = llm._executor.runner.kv_caches[0][0][0].nbytes * 2 * llm.model_config.num_hidden_layers
    with make(speculative_config=NGRAM, kv_cache_memory_bytes=8 * block_bytes) as llm:
        assert run(llm, params) == expected
        stats = llm.engine.scheduler.stats
        assert stats.num_preemptions > 0 and stats.num_accepted_tokens > 0
        llm.engine.scheduler.check_integrity()


def test_requests_that_want_more_are_left_alone(make):
    """Penalties, logprobs and the like hang on each token; beside them others are drafted for."""
    wants = [
        dict(repetition_penalty=1.2),
        dict(logprobs=2),
        dict(min_tokens=5),
        dict(logits_processors=[lambda o, x: x]),
    ]
    params = [SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, **options, **FEW) for options in wants]
    params.append(SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, allowed_token_ids=[3]))
    prompts = [PROMPTS[1]] * len(params)
    with make() as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    with make(speculative_config=NGRAM) as llm:
        found = llm.generate(prompts, params, use_tqdm=False)
        assert llm.engine.scheduler.stats.num_accepted_tokens > 0
    for a, b in zip(found, expected, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids and a.outputs[0].logprobs == b.outputs[0].logprobs
    with make(speculative_config=NGRAM) as llm:
        llm.generate(prompts[:-1], params[:-1], use_tqdm=False)
        assert llm.engine.scheduler.stats.num_drafts == 0


def test_many_requests_are_not_drafted_for(make):
    with make(speculative_config=NGRAM) as llm:
        run(llm, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), [PATTERN * 4] * (ON_GPU.max_rows + 1))
        assert llm.engine.scheduler.stats.num_drafts == 0


# ---- drafter


def draft(token_ids, most=10, **options):
    return NgramDrafter(NgramConfig.from_dict(NGRAM | options)).propose(token_ids, most)


def test_the_latest_of_the_longest_ngrams_proposes():
    assert draft([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]) == [4, 9, 2, 3]  # 1 2 3 before 2 3
    assert draft([2, 3, 4, 9, 2, 3, 5, 7, 2, 3]) == [5, 7, 2, 3]  # the later 2 3
    assert draft([2, 3, 4, 9, 2, 3, 5, 7, 2, 3], most=1) == [5]
    assert draft([1, 2, 3, 4]) == [] and draft([5]) == []
    assert draft([7, 7]) == [7, 7, 7, 7] and draft([4, 5, 6, 4, 5]) == [6, 4, 5, 6], "in a circle"
    assert draft([1, 2, 5, 2], prompt_lookup_min=2) == []


def test_an_index_that_grows_is_that_of_the_whole():
    r = random.Random(0)
    config = NgramConfig.from_dict(NGRAM)
    for _ in range(50):
        tokens = [r.randint(0, 3) for _ in range(60)]
        growing = NgramDrafter(config)
        for end in range(1, 60, r.randint(1, 4)):
            assert growing.propose(tokens[:end], 4) == NgramDrafter(config).propose(tokens[:end], 4)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.9, 1.0])
def test_it_knows_what_drafts_would_bring_without_any(share):
    """Told of each token, the mean over the steps that drafts would have made."""
    r = random.Random(5)
    tokens = list(range(20)) * 2
    while len(tokens) < 400:  # a cycle that jumps now and then
        tokens.append((tokens[-1] + (1 if r.random() < share else r.randint(2, 18))) % 20)
    config = NgramConfig.from_dict(NGRAM)
    watching, means = NgramDrafter(config), {}
    for end in range(40, 401):
        watching.watch(tokens[:end])
        means[end] = watching.expected
    computing, mean, end = NgramDrafter(config), 0.0, 40
    while True:
        drafted = computing.propose(tokens[:end], config.num_speculative_tokens)
        if end + len(drafted) + 1 > 400:
            break
        right = len(accepted(drafted, tokens[end : end + len(drafted) + 1])) - 1
        mean, end = 0.85 * mean + 0.15 * right, end + right + 1
        assert means[end] == pytest.approx(mean)
    mean_of_8 = 8 * sum(means.values()) / len(means)
    assert [limits.pay(mean_of_8, 8) for limits in (ON_GPU, ON_CPU)] == [share > 0.5, share > 0.8]


def test_the_device_decides_how_much_is_drafted():
    for device, limits in (("cpu", ON_CPU), ("cuda:1", ON_GPU)):
        assert EngineConfig(speculative_config=NGRAM, device=device).draft_limits is limits
        assert EngineConfig(device=device).draft_limits.max_rows == 0


def test_it_may_miss_tokens():
    drafter = NgramDrafter(NgramConfig.from_dict(NGRAM))
    tokens = [1, 2, 3, 4] * 20
    for end in (20, 22, 60, 61, 62, 63, 64, 65, 80):
        drafter.watch(tokens[:end])
    assert drafter.expected > 0.5 and drafter.propose(tokens, 3) == [1, 2, 3]


def test_all_wait_for_the_drafts_of_a_few_only_where_that_pays_all():
    drafting = SimpleNamespace(drafter=SimpleNamespace(expected=4.0), token_ids=[1])
    plain = SimpleNamespace(drafter=None, token_ids=[1])
    scheduler = Scheduler(BlockManager(4, 16, False), 64, 64, [], draft_limits=DraftLimits(32, 0.16))
    for num_others, waits in ((0, True), (8, True), (9, False), (30, False)):
        scheduler.running = [drafting] + [plain] * num_others
        assert scheduler.waits_for_tokens == waits
    for num_drafting, waits in ((20, True), (21, False), (32, False)):  # room for 12 drafts, for 11, for none
        scheduler.running = [drafting] * num_drafting
        assert scheduler.waits_for_tokens == waits


class Eager:
    """A drafter that is always sure, and finds `found` tokens."""

    def __init__(self, found):
        self.found = found

    expected = 5.0

    def propose(self, token_ids, most):
        return [7] * min(most, self.found)

    def watch(self, token_ids):
        pass


def drafts_of_a_step(num_requests, room, found=9, num_before=0):
    """{row: tokens drafted} in a step of decodes."""
    scheduler = Scheduler(BlockManager(64, 16, False), 16, 64, [], draft_limits=DraftLimits(num_requests + room, 0.16))
    for i in range(num_requests):
        params = SamplingParams(max_tokens=40)
        scheduler.add(Request(str(i), [1, 2], params, max_num_tokens=42, seed=0, arrival_time=0, drafter=Eager(found)))
    for _ in range(1 + num_before):
        batch = scheduler.schedule()
        after = [[0] * len(tokens) for _, tokens in batch.drafts]
        scheduler.update(StepResult([0] * num_requests, draft_tokens=after))
    return {row: len(tokens) for row, tokens in scheduler.schedule().drafts}


def test_requests_share_the_room_for_drafts():
    assert sorted(drafts_of_a_step(3, 12).items()) == [(0, 4), (1, 4), (2, 4)]
    assert sorted(drafts_of_a_step(3, 8).values()) == [2, 3, 3]
    assert sorted(drafts_of_a_step(4, 40, found=2).values()) == [2, 2, 2, 2]
    rows = [row for turn in range(4) for row in drafts_of_a_step(4, 2, num_before=turn)]
    assert sorted(rows) == [0, 0, 1, 1, 2, 2, 3, 3], "each has its turn where there is no room for all"
    assert not drafts_of_a_step(8, 1), "not worth it"


def test_accepted():
    assert accepted([], [4]) == [4]
    assert accepted([4, 5, 6], [4, 5, 6, 7]) == [4, 5, 6, 7]
    assert accepted([4, 5, 6], [4, 9, 6, 7]) == [4, 9]
    assert accepted([4, 5], [3, 5, 6]) == [3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ngram", 'must be a dict with method "ngram"'),
        (dict(method="eagle", num_speculative_tokens=3), 'method "ngram", the only one'),
        (dict(method="ngram"), "lacks num_speculative_tokens"),
        (dict(method="ngram", num_speculative_tokens=0), "num_speculative_tokens must be an integer of at least 1"),
        (dict(method="ngram", num_speculative_tokens=3, model="x"), "speculative_config has no argument 'model'"),
        (NGRAM | dict(prompt_lookup_min=4), r"prompt_lookup_min \(4\) is over prompt_lookup_max \(3\)"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_arguments(dict(speculative_config=given))


def test_defaults_are_those_of_vllm():
    assert NgramConfig.from_dict(dict(method="ngram", num_speculative_tokens=3)) == NgramConfig(3, 5, 5)
    assert (
        NgramConfig.from_dict(dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=4)).prompt_lookup_min
        == 4
    )
