"""What SamplingParams can ask for, each against Hugging Face or a direct computation on its logits."""

import itertools
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_VOCAB
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from minivllm import LLM, FlatLogprobs, RepetitionDetectionParams, RequestOutputKind, SamplingParams
from minivllm.inputs import InputProcessor
from minivllm.model_config import ModelConfig

PROMPTS = [[1, 2, 3], [(7 * i) % 90 for i in range(40)], [5] * 9 + [8, 5, 8], list(range(60, 85))]
NUM_TOKENS = 20


def make(folder, **arguments):
    return LLM(folder, **dict(skip_tokenizer_init=True, device="cpu", block_size=16) | arguments)


def block_bytes(folder):
    model = ModelConfig.from_hf(json.loads((Path(folder) / "config.json").read_text()))
    return 16 * 4 * model.kv_elements_per_token


def run(llm, prompts, params):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@torch.no_grad()
def logits_after(model, token_ids):
    """[tokens, vocab] float64."""
    return model(torch.tensor([token_ids])).logits[0].double()


def reference(model, prompt, num_tokens, params, bad_words=()):
    """Greedy tokens, options applied one by one to the logits of a whole forward pass."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        logits, output = logits_after(model, token_ids)[-1], token_ids[len(prompt) :]
        if params.allowed_token_ids:
            banned = set(range(len(logits))) - set(params.allowed_token_ids)
            logits[list(banned)] = -math.inf
        for *before, last in bad_words:
            if not before or output[-len(before) :] == before:
                logits[last] = -math.inf
        for token, value in (params.logit_bias or {}).items():
            logits[token] += value
        for function in params.logits_processors or ():
            logits = function(prompt, output, logits) if function is count_down else function(output, logits)
        for token in set(token_ids):
            logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
        for token, count in Counter(output).items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        token_ids.append(int(logits.argmax()))
    return token_ids[len(prompt) :]


def no_token_of_the_last_one_s_parity(output, logits):
    if output:
        logits[output[-1] % 2 :: 2] = -math.inf
    return logits


def count_down(prompt, output, logits):
    """A new tensor: the token to favour hangs on how long prompt and output are."""
    assert all(type(token) is int for token in [*prompt, *output])
    favoured = torch.zeros_like(logits)
    favoured[(len(prompt) - 3 * len(output)) % len(logits)] = 3.0
    return logits + favoured


OPTIONS = [
    dict(logits_processors=[no_token_of_the_last_one_s_parity]),
    dict(logits_processors=[count_down, no_token_of_the_last_one_s_parity], repetition_penalty=1.3),
    dict(repetition_penalty=1.4),
    dict(repetition_penalty=0.8),
    dict(frequency_penalty=0.7),
    dict(presence_penalty=2.0),
    dict(presence_penalty=-1.5, frequency_penalty=0.4, repetition_penalty=1.2),
    dict(logit_bias={3: 4.0, 77: -100.0, 80: 1.5}),
    dict(logit_bias={token: -math.inf for token in range(3, 90)} | {90: 300.0}),
    dict(allowed_token_ids=[90, 91], logit_bias={90: -150.0, 91: -1e39}),
    dict(allowed_token_ids=[2, 3, 5, 7, 11, 13, 17, 90]),
    dict(allowed_token_ids=list(range(40)), logit_bias={7: 2.5}, frequency_penalty=1.0),
]
SETTINGS = {
    "plain": {},
    "async": dict(async_scheduling=True),
    "chunked": dict(max_num_batched_tokens=16, max_num_seqs=4),
    "preempting": dict(num_blocks=7, async_scheduling=True),
    "gpu": dict(device="cuda", dtype="float32"),
    "gpu-preempting": dict(device="cuda", dtype="float32", num_blocks=7),
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.gpu] * ("gpu" in name)) for name in SETTINGS]
)
def engine(request, tiny):
    settings = dict(SETTINGS[request.param])
    if "num_blocks" in settings:
        settings["kv_cache_memory_bytes"] = settings.pop("num_blocks") * block_bytes(tiny("gqa-tied"))
    with make(tiny("gqa-tied"), **settings) as llm:
        yield llm
        assert (llm.engine.scheduler.stats.num_preemptions > 0) == ("preempting" in request.param)
        assert llm.engine.scheduler.num_needing_tokens == 0
        llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: re.sub(" at 0x[0-9a-f]+", "", str(options)))
def test_options_on_logits(engine, tiny, hugging_face, options):
    """In a batch with requests that ask for nothing, and for other things."""
    model, greedy = hugging_face(tiny("gqa-tied")), dict(temperature=0, max_tokens=NUM_TOKENS)
    params = SamplingParams(**greedy, **options)
    others = [SamplingParams(**greedy), SamplingParams(temperature=1, seed=3, max_tokens=9, **OPTIONS[-1])]
    found = run(engine, [*PROMPTS, *PROMPTS[:2]], [params] * len(PROMPTS) + others)
    expected = [reference(model, prompt, NUM_TOKENS, params) for prompt in PROMPTS]
    assert found[: len(PROMPTS)] == expected
    assert found[len(PROMPTS)] == reference(model, PROMPTS[0], NUM_TOKENS, others[0])
    plain = [reference(model, prompt, NUM_TOKENS, others[0]) for prompt in PROMPTS]
    assert expected != plain, "else the option was not seen to do anything"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda output, logits: None, "must return logits .*, returned NoneType"),
        (lambda output, logits: logits[:3], r"returned \[3\]"),
        (lambda output, logits: 1 / 0, "division by zero"),
    ],
)
def test_a_logits_processor_that_fails_ends_its_own_call_only(tiny, function, message):
    with make(tiny("gqa-tied"), async_scheduling=True) as llm:
        expected = run(llm, PROMPTS, SamplingParams(temperature=0))
        other = llm.stream(PROMPTS[0], SamplingParams(temperature=0))
        first = next(other).outputs[0].token_ids
        with pytest.raises(ValueError, match=message):
            run(llm, PROMPTS, SamplingParams(temperature=0, logits_processors=[function]))

        def later(output, logits):
            return logits if len(output) < 2 else function(output, logits)

        failing = llm.stream(PROMPTS[1], SamplingParams(temperature=0, logits_processors=[later]))
        next(failing)
        parts = [next(other) for _ in range(4)]  # the function fails in a step of this call
        with pytest.raises(ValueError, match=message):
            list(failing)
        rest = [token for output in [*parts, *other] for token in output.outputs[0].token_ids]
        assert [*first, *rest] == expected[0]
        assert run(llm, PROMPTS, SamplingParams(temperature=0)) == expected
        llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_a_failing_step_found_out_is_not_lost(tiny, monkeypatch, asynchronous):
    """An error, a second Ctrl-C say, after a request of another call has ended, and before that call was told."""
    with make(tiny("gqa-tied"), async_scheduling=asynchronous) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=3)
        expected = run(llm, PROMPTS[:2], greedy)
        update, scheduler = llm.engine.scheduler.update, llm.engine.scheduler
        other, longer = llm.stream(PROMPTS[0], greedy), llm.stream(PROMPTS[1], greedy)
        found = next(other).outputs[0].token_ids

        def fail_at_the_end(result):
            progressed = update(result)
            if any(request.finished for request in progressed):
                monkeypatch.undo()
                raise KeyboardInterrupt
            return progressed

        monkeypatch.setattr(scheduler, "update", fail_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            list(longer)
        assert llm.engine.has_unfinished_requests()
        found += [token for output in other for token in output.outputs[0].token_ids]
        assert found == expected[0]
        assert run(llm, PROMPTS[:2], greedy) == expected
        scheduler.check_integrity()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_requests_of_a_step_that_failed_midway_go_on(tiny, monkeypatch, asynchronous):
    with make(tiny("gqa-tied"), async_scheduling=asynchronous) as llm:
        expected = run(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=9))
        others = [llm.stream(prompt, SamplingParams(temperature=0, max_tokens=9)) for prompt in PROMPTS[1:]]
        found = [list(next(other).outputs[0].token_ids) for other in others]

        def fail(request, token):  # after the first request of a step has got its token
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.engine.scheduler, "_check_stop", fail)
        with pytest.raises(KeyboardInterrupt):
            run(llm, PROMPTS[:1], SamplingParams(temperature=0, max_tokens=9))
        for tokens, other in zip(found, others, strict=True):
            tokens += [token for output in other for token in output.outputs[0].token_ids]
        assert found == expected[1:]
        llm.engine.scheduler.check_integrity()


def test_a_call_after_one_that_failed(tiny, monkeypatch):
    """What the failed one had to be told of is not told again."""
    with make(tiny("gqa-tied")) as llm:
        greedy = SamplingParams(temperature=0, max_tokens=3)
        expected = run(llm, PROMPTS, greedy)
        update = llm.engine.scheduler.update

        def fail_at_the_end(result):
            if any(request.finished for request in update(result)):
                monkeypatch.undo()
                raise KeyboardInterrupt
            return []

        monkeypatch.setattr(llm.engine.scheduler, "update", fail_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            run(llm, PROMPTS, greedy)
        assert not llm.engine.has_unfinished_requests()
        assert run(llm, PROMPTS, greedy) == expected


def test_aborting_a_request_leaves_others_alone_whatever_they_are_called(tiny):
    params = SamplingParams(n=2, seed=1, max_tokens=20, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY)
    params.stop_token_ids = list(range(0, 100, 2))
    with make(tiny("gqa-tied")) as llm:
        engine = llm.engine
        for seed in range(50):  # until its first output ends before its second
            params.seed = seed
            engine.add_request("x", PROMPTS[0], params)
            while {"0_x", "1_x"} <= engine.scheduler.requests.keys():
                engine.step()
            if "1_x" in engine.scheduler.requests:
                break
            while engine.has_unfinished_requests():
                engine.step()
        assert "0_x" not in engine.scheduler.requests
        engine.add_request("0_x", PROMPTS[1], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
        assert [output.request_id for output in engine.abort_requests(["x"])] == ["x"]
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert outputs[-1].request_id == "0_x" and outputs[-1].outputs[0].finish_reason == "length"


def test_a_request_that_waits_does_not_make_the_others_wait_for_tokens(tiny):
    functions = SamplingParams(max_tokens=4, logits_processors=[lambda output, logits: logits])
    with make(tiny("gqa-tied"), async_scheduling=True, max_num_seqs=1) as llm:
        engine, scheduler = llm.engine, llm.engine.scheduler
        engine.add_request("a", PROMPTS[0], SamplingParams(max_tokens=5, ignore_eos=True))
        engine.add_request("b", PROMPTS[1], functions)
        engine.step()
        while "a" in scheduler.requests:
            assert scheduler.waiting and not scheduler.waits_for_tokens
            engine.step()
        engine.step()
        assert scheduler.running and scheduler.waits_for_tokens
        engine.abort_requests(["b"])
        assert not scheduler.waits_for_tokens


def test_shutdown_tells_a_call_that_is_still_running(tiny):
    llm = make(tiny("gqa-tied"))
    outputs = llm.stream(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True))
    next(outputs)
    llm.shutdown()
    ends = [o.outputs[0].finish_reason for o in outputs if o.finished]
    assert ends == ["abort"] * len(PROMPTS)


@pytest.mark.parametrize("most", [1, 5, 100, -1])
def test_only_the_end_of_a_prompt_is_kept(tiny, most):
    prompt = [(7 * i) % 90 for i in range(40)]
    with make(tiny("gqa-tied"), max_model_len=30) as llm:
        params = SamplingParams(temperature=0, max_tokens=3, truncate_prompt_tokens=most)
        if most == 100:
            with pytest.raises(ValueError, match="the prompt has 40 tokens"):
                llm.generate([prompt], params, use_tqdm=False)
            return
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        assert output.prompt_token_ids == prompt[-27 if most == -1 else -most :]


def test_repetition_penalty_is_hugging_face_s(tiny, hugging_face):
    model = hugging_face(tiny("mha"))
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    with make(tiny("mha")) as llm:
        found = run(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=15, repetition_penalty=1.3))
    for prompt, token_ids in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=15, repetition_penalty=1.3)
        assert token_ids == out[0, len(prompt) :].tolist()


class WordTokenizer:
    """Words w0, w1, … for tokens 0, 1, …; a space before a word makes it the token of its number plus 50."""

    eos_token_id = None

    def __call__(self, texts, add_special_tokens):
        return SimpleNamespace(input_ids=[self.encode(text) for text in texts])

    def encode(self, text):
        words = text.split(" ")
        spaced = bool(words) and words[0] == ""
        ids = [int(word[1:]) for word in words if word]
        return [ids[0] + 50 * spaced, *ids[1:]]

    def decode(self, ids, **_):
        return "".join(f" w{i}" for i in ids)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_bad_words(tiny, hugging_face, asynchronous):
    """Single tokens, words of several tokens, and words that share their last token."""
    model = hugging_face(tiny("gqa-tied"))
    plain = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    free = [reference(model, prompt, NUM_TOKENS, plain) for prompt in PROMPTS]
    ids = [[free[0][0]], free[0][3:5], free[1][5:8], [free[1][0], free[1][7]], [TINY_VOCAB - 60, free[0][4]]]
    with make(tiny("gqa-tied"), async_scheduling=asynchronous) as llm:
        llm.engine.tokenizer = WordTokenizer()
        words = [" ".join(f"w{i}" for i in word) for word in ids]
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, bad_words=words, detokenize=False)
        spaced = [[word[0] + 50, *word[1:]] for word in ids]
        known = [word for pair in zip(ids, spaced, strict=True) for word in pair if max(word) < TINY_VOCAB]
        assert llm.engine._bad_word_ids(params) == known != []
        for none_left in (
            dict(bad_words=["w5", "w6"], allowed_token_ids=[5, 55]),
            dict(bad_words=["w5"], logit_bias={7: -math.inf}, allowed_token_ids=[5, 7]),
        ):
            with pytest.raises(ValueError, match="min_tokens, bad_words and logit_bias leave none of the allowed"):
                llm.generate(PROMPTS[0], SamplingParams(**none_left), use_tqdm=False)
        far = SamplingParams(temperature=0, max_tokens=9, bad_words=[f"w{TINY_VOCAB}", "w9"], detokenize=False)
        assert llm.engine._bad_word_ids(far) == [[9], [59]] and llm.generate(PROMPTS[0], far, use_tqdm=False)
        found = run(llm, [*PROMPTS, PROMPTS[0]], [params] * len(PROMPTS) + [plain])
    expected = [reference(model, prompt, NUM_TOKENS, params, [*ids, *spaced]) for prompt in PROMPTS]
    assert found == [*expected, free[0]] and expected != free


# ---- logprobs


def check_logprobs(entries, logits, token_ids, num_top):
    """`entries` are those of `token_ids` [N] by logits [N, vocab]."""
    assert len(entries) == len(token_ids)
    for entry, row, token in zip(entries, logits.log_softmax(-1), token_ids, strict=True):
        assert next(iter(entry)) == token, "the token itself comes first"
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert entry[token].rank == (row >= row[token]).sum().item()
        top = row.topk(num_top)
        others = {int(i): (value.item(), rank + 1) for rank, (value, i) in enumerate(zip(*top, strict=True))}
        assert entry.keys() == {token, *others}
        for other, (value, rank) in others.items():
            assert entry[other].logprob == pytest.approx(value, abs=1e-4)
            assert entry[other].rank == rank
        assert all(found.decoded_token is None for found in entry.values())


def test_logprobs(engine, tiny, hugging_face):
    """Of outputs and prompts, from raw logits: penalties and temperature do not change them.  Asked for twice, so that
    the second time the prompts are in the prefix cache."""
    model = hugging_face(tiny("gqa-tied"))
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2, repetition_penalty=1.5),
        SamplingParams(temperature=0.7, seed=1, max_tokens=12, logprobs=0, prompt_logprobs=0),
        SamplingParams(temperature=1, seed=2, max_tokens=12, logprobs=5),
        SamplingParams(temperature=1, seed=3, max_tokens=12, prompt_logprobs=4, top_k=10),
    ]
    for _ in range(2):
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
        for prompt, asked, output in zip(PROMPTS, params, outputs, strict=True):
            completion = output.outputs[0]
            logits = logits_after(model, prompt + completion.token_ids)
            if asked.logprobs is None:
                assert completion.logprobs is completion.cumulative_logprob is None
            else:
                check_logprobs(completion.logprobs, logits[len(prompt) - 1 : -1], completion.token_ids, asked.logprobs)
                total = sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True))
                assert completion.cumulative_logprob == pytest.approx(total)
            if asked.prompt_logprobs is None:
                assert output.prompt_logprobs is None
            else:
                assert output.prompt_logprobs[0] is None and output.num_cached_tokens == 0
                check_logprobs(output.prompt_logprobs[1:], logits[: len(prompt) - 1], prompt[1:], asked.prompt_logprobs)


def test_ranks_of_equally_likely_tokens(tiny, tmp_path):
    """Among the most likely ones each has its own, and one has the first."""
    folder = shutil.copytree(tiny("mha"), tmp_path / "ties")
    weights = load_file(folder / "model.safetensors")
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=4)
    with make(str(folder)) as llm:
        (best,) = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0].token_ids
    weights["lm_head.weight"][[3, 50, 90]] = weights["lm_head.weight"][best].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with make(str(folder)) as llm:
        output = llm.generate([*PROMPTS[0], best], params, use_tqdm=False)[0].outputs[0]
        prompt = [*PROMPTS[0], 90]
        (asked,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=4), use_tqdm=False)
    assert sorted(found.rank for found in output.logprobs[0].values()) == [1, 2, 3, 4]
    last = asked.prompt_logprobs[-1]
    assert next(iter(last)) == 90 and {3, 50, 90} < last.keys()
    assert sorted(found.rank for found in last.values()) == [1, 2, 3, 4]


def test_all_logprobs(tiny, hugging_face):
    with make(tiny("mha"), max_logprobs=-1) as llm:
        output = llm.generate(
            PROMPTS[0], SamplingParams(temperature=0, max_tokens=3, logprobs=-1, prompt_logprobs=-1), use_tqdm=False
        )[0]
    logits = logits_after(hugging_face(tiny("mha")), PROMPTS[0] + output.outputs[0].token_ids)
    check_logprobs(output.outputs[0].logprobs, logits[2:-1], output.outputs[0].token_ids, TINY_VOCAB)
    check_logprobs(output.prompt_logprobs[1:], logits[:2], PROMPTS[0][1:], TINY_VOCAB)


def test_flat_logprobs_say_the_same(engine):
    asked = dict(temperature=1, seed=4, max_tokens=9, logprobs=3, prompt_logprobs=2)
    prompt = PROMPTS[1]
    outputs = [
        engine.generate(prompt, SamplingParams(**asked, flat_logprobs=flat), use_tqdm=False)[0]
        for flat in (False, True)
    ]
    dicts, flat = (output.outputs[0].logprobs for output in outputs)
    assert isinstance(flat, FlatLogprobs) and list(flat) == dicts and len(flat) == 9
    assert flat[-1] == dicts[-1] and list(flat[2:7:2]) == dicts[2:7:2] and not flat[3:3]
    with pytest.raises(IndexError):
        flat[9]
    begin, end = flat.start_indices[4], flat.end_indices[4]
    assert dict(zip(flat.token_ids[begin:end], flat.logprobs[begin:end], strict=True)) == {
        token_id: entry.logprob for token_id, entry in dicts[4].items()
    }
    assert flat.ranks[begin:end] == [entry.rank for entry in dicts[4].values()]
    assert flat.end_indices[-1] == len(flat.token_ids) == len(flat.decoded_tokens) == sum(map(len, dicts))
    assert outputs[1].outputs[0].cumulative_logprob == outputs[0].outputs[0].cumulative_logprob
    dicts, flat = (output.prompt_logprobs for output in outputs)
    assert isinstance(flat, FlatLogprobs) and [entries or None for entries in flat] == dicts
    parts = [
        output.outputs[0].logprobs for output in engine.stream(prompt, SamplingParams(**asked, flat_logprobs=True))
    ]
    assert all(isinstance(part, FlatLogprobs) for part in parts)
    assert [entries for part in parts for entries in part] == list(outputs[1].outputs[0].logprobs)


def test_logprobs_of_capped_logits(tiny, hugging_face):
    prompt = PROMPTS[1]
    with make(tiny("gemma2")) as llm:
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=4, prompt_logprobs=2)
        output = llm.generate(prompt, params, use_tqdm=False)[0]
    logits = logits_after(hugging_face(tiny("gemma2")), prompt + output.outputs[0].token_ids)
    check_logprobs(output.outputs[0].logprobs, logits[len(prompt) - 1 : -1], output.outputs[0].token_ids, 4)
    check_logprobs(output.prompt_logprobs[1:], logits[: len(prompt) - 1], prompt[1:], 2)


def test_logprobs_of_named_tokens(engine, tiny, hugging_face):
    """Beside requests that ask for the most likely ones, or for none."""
    model, named = hugging_face(tiny("gqa-tied")), [[5, 150], list(range(3, 40)), [7]]
    params = [
        SamplingParams(temperature=0, max_tokens=6, logprob_token_ids=named[0], prompt_logprobs=1),
        SamplingParams(temperature=1, seed=3, max_tokens=6, logprob_token_ids=named[1], logprobs=37),
        SamplingParams(temperature=0, max_tokens=6, logprob_token_ids=named[2]),
        SamplingParams(temperature=0, max_tokens=6, logprobs=2),
        SamplingParams(temperature=0, max_tokens=6),
    ]
    prompts = [*PROMPTS, PROMPTS[0]]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    for prompt, own, output in zip(prompts, named, outputs, strict=False):
        completion = output.outputs[0]
        logprobs = logits_after(model, prompt + completion.token_ids)[len(prompt) - 1 : -1].log_softmax(-1)
        for row, token, entry in zip(logprobs, completion.token_ids, completion.logprobs, strict=True):
            assert entry.keys() == {token, *own} and entry[token].rank == (row >= row[token]).sum()
            for token_id, found in entry.items():
                assert found.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
                assert token_id == token or found.rank is None
    assert sorted(found.rank for found in outputs[0].prompt_logprobs[1].values())[0] == 1
    assert {*map(len, outputs[3].outputs[0].logprobs)} == {2} and outputs[4].outputs[0].logprobs is None


def test_logprobs_of_tokens_named_for_each_place_of_a_prompt(engine, tiny, hugging_face):
    """Beside prompts whose logprobs are wanted otherwise, or not; in chunks and after preemption too."""
    model = hugging_face(tiny("gqa-tied"))
    rows = [[[(3 * i + j) % TINY_VOCAB for j in range(1 + i % 3)] for i in range(len(p) - 1)] for p in PROMPTS]
    params = [
        SamplingParams(temperature=0, max_tokens=12, prompt_logprob_token_ids=rows[0]),
        SamplingParams(temperature=1, seed=1, n=2, max_tokens=12, prompt_logprob_token_ids=rows[1]),
        SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2),
        SamplingParams(temperature=0, max_tokens=12),
    ]
    start = 3
    prompts = [*PROMPTS[:2], PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    params.append(
        SamplingParams(max_tokens=1, prompt_logprob_token_ids=np.array([[5]] * (len(PROMPTS[1]) - 1 - start)),
                       prompt_logprob_start=start)
    )  # fmt: skip
    outputs = engine.generate(prompts, params, use_tqdm=False)
    assert outputs[2].prompt_logprobs and outputs[2].prompt_token_id_logprobs is outputs[3].prompt_logprobs is None
    for prompt, asked, output in zip(prompts, params, outputs, strict=True):
        if (named := asked.prompt_logprob_token_ids) is None:
            continue
        assert output.prompt_logprobs is None and output.prompt_token_id_logprobs.dtype == np.float32
        expected = logits_after(model, prompt)[asked.prompt_logprob_start or 0 : -1].log_softmax(-1)
        for row, ids, found in zip(expected, named, output.prompt_token_id_logprobs, strict=True):
            assert found == pytest.approx([row[i].item() if i >= 0 else -math.inf for i in ids], abs=1e-4)
    for wrong, message in (
        (dict(prompt_logprob_token_ids=[[1]] * len(PROMPTS[0])), "rows; the prompt has"),
        (dict(prompt_logprob_token_ids=[[TINY_VOCAB]] * (len(PROMPTS[0]) - 1)), "is outside the vocabulary"),
        (dict(prompt_logprob_token_ids=[[1] * 21] * (len(PROMPTS[0]) - 1)), "more than max_logprobs"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(PROMPTS[0], SamplingParams(**wrong), use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logprob_token_ids=[TINY_VOCAB]), f"logprob_token_ids: token id {TINY_VOCAB} is outside"),
        (dict(logprobs=21), r"logprobs asks for 21, more than max_logprobs \(20\)"),
        (dict(prompt_logprobs=-1), r"prompt_logprobs asks for all \(-1\), more than max_logprobs"),
        (dict(allowed_token_ids=[5, TINY_VOCAB]), f"allowed_token_ids: token id {TINY_VOCAB} is outside"),
        (dict(logit_bias={TINY_VOCAB: 1}), f"logit_bias: token id {TINY_VOCAB} is outside"),
        (dict(stop="a"), "stop needs a tokenizer"),
        (dict(bad_words="a"), "bad_words needs a tokenizer"),
    ],
    ids=str,
)
def test_what_this_model_cannot_do_is_refused(tiny, options, message):
    with make(tiny("mha")) as llm, pytest.raises(ValueError, match=message):
        llm.generate([1, 2], SamplingParams(**options), use_tqdm=False)


def test_a_prompt_is_computed_again_if_asked_for(tiny):
    with make(tiny("mha")) as llm:
        prompt = list(range(64))
        for skip, num_cached in ((None, 0), (False, 48), (True, 0), (None, 48)):
            params = SamplingParams(max_tokens=1, temperature=0, skip_reading_prefix_cache=skip)
            assert llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens == num_cached


def test_an_output_that_goes_round_in_circles_ends():
    def ends(tokens, **options):
        return RepetitionDetectionParams(**options).found_in(tokens)

    assert ends([9, 1, 2, 1, 2, 1, 2], max_pattern_size=4, min_count=3)
    assert not ends([9, 1, 2, 1, 2, 1, 2], max_pattern_size=4, min_count=4)
    assert not ends([9, 1, 2, 1, 2, 1, 2], max_pattern_size=1, min_count=2)
    assert not ends([1, 2, 1, 2, 1, 2, 3], max_pattern_size=4, min_count=2)
    assert ends([5, 5], max_pattern_size=1, min_count=2) and not ends([5], max_pattern_size=1, min_count=2)
    assert not ends([5, 5, 5, 5], max_pattern_size=2, min_pattern_size=2, min_count=3)
    assert not ends([5] * 9, min_pattern_size=0) and not ends([], max_pattern_size=3, min_count=2)
    for options in (dict(max_pattern_size=2), dict(max_pattern_size=2, min_count=1), dict(max_pattern_size=-1)):
        with pytest.raises(ValueError, match="repetition_detection: "):
            RepetitionDetectionParams(**options)
    with pytest.raises(ValueError, match=r"min_pattern_size \(3\) must not exceed max_pattern_size \(2\)"):
        RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=3, min_count=2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_repetition_detection(tiny, asynchronous):
    """Two tokens are allowed, so that a greedy output soon repeats itself."""
    circles = RepetitionDetectionParams(max_pattern_size=3, min_count=4)
    params = [
        SamplingParams(temperature=0, max_tokens=60, allowed_token_ids=[5, 9], repetition_detection=circles),
        SamplingParams(
            temperature=0, max_tokens=60, min_tokens=30, allowed_token_ids=[5, 9], repetition_detection=circles
        ),
        SamplingParams(temperature=0, max_tokens=60, allowed_token_ids=[5, 9]),
    ]
    with make(tiny("mha"), async_scheduling=asynchronous) as llm:
        ended, later, whole = [o.outputs[0] for o in llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)]
        llm.engine.scheduler.check_integrity()
    first = next(n for n in range(1, 61) if circles.found_in(whole.token_ids[:n]))
    assert first < 30 and ended.token_ids == whole.token_ids[:first] and later.token_ids == whole.token_ids[:30]
    assert (ended.finish_reason, ended.stop_reason) == ("repetition", "repetition_detected")
    assert (whole.finish_reason, whole.stop_reason) == ("length", None)


def test_the_text_of_an_output_that_goes_round_in_circles(embedded):
    circles = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    with LLM(embedded, device="cpu", kv_cache_memory_bytes=1 << 26) as llm:
        words = [llm.get_tokenizer()(word).input_ids[0] for word in (" red", " blue")]
        params = SamplingParams(temperature=0, max_tokens=40, allowed_token_ids=words, repetition_detection=circles)
        ended = llm.generate("Colors:", params, use_tqdm=False)[0].outputs[0]
        assert ended.finish_reason == "repetition" and ended.text == llm.get_tokenizer().decode(ended.token_ids)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_stream_interval(tiny, kind):
    params = SamplingParams(temperature=0, max_tokens=11, stream_interval=4, output_kind=kind, logprobs=0)
    with make(tiny("mha")) as llm:
        llm.engine.add_request("a", PROMPTS[0], params)
        outputs = []
        while llm.engine.has_unfinished_requests():
            outputs += llm.engine.step()
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == ([1, 4, 4, 2] if kind == RequestOutputKind.DELTA else [1, 5, 9, 11])
    assert [len(output.outputs[0].logprobs) for output in outputs] == lengths and outputs[-1].finished


# ---- n


def test_n_outputs(engine):
    """Each is what its own seed draws alone."""
    params = SamplingParams(temperature=1, max_tokens=14, seed=11, n=3, logprobs=1, prompt_logprobs=1)
    outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert [completion.index for completion in output.outputs] == [0, 1, 2] and output.finished
        for i, completion in enumerate(output.outputs):
            alone = SamplingParams(temperature=1, max_tokens=14, seed=11 + i)
            assert [completion.token_ids] == run(engine, [prompt], alone)
            assert len(completion.logprobs) == 14
        assert len(output.prompt_logprobs) == len(prompt)
        assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1


def test_n_outputs_share_the_prompt(tiny):
    with make(tiny("mha")) as llm:
        llm.generate(list(range(64)), SamplingParams(n=4, max_tokens=2), use_tqdm=False)
        stats = llm.engine.scheduler.stats
        assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (4 * 64, 3 * 48)


def test_streams_of_n_outputs(tiny):
    with make(tiny("mha")) as llm:
        params = SamplingParams(temperature=1, max_tokens=10, seed=5, n=2, stop_token_ids=list(range(0, TINY_VOCAB, 9)))
        final = llm.generate(PROMPTS, params, use_tqdm=False)
        token_ids = [[[], []] for _ in PROMPTS]
        ends = []
        first_id = int(final[-1].request_id) + 1
        for output in llm.stream(PROMPTS, params):
            for completion in output.outputs:
                token_ids[int(output.request_id) - first_id][completion.index] += completion.token_ids
            ends += [output.request_id] * output.finished
        assert token_ids == [[completion.token_ids for completion in output.outputs] for output in final]
        assert sorted(ends) == sorted({str(first_id + i) for i in range(len(PROMPTS))})
        assert {c.finish_reason for output in final for c in output.outputs} == {"stop", "length"}


def test_abort_of_n_outputs(tiny):
    with make(tiny("mha")) as llm:
        engine = llm.engine
        engine.add_request("a", [1, 2, 3], SamplingParams(n=3, max_tokens=30))
        with pytest.raises(ValueError, match="request_id 'a' is in use"):
            engine.add_request("a", [1], SamplingParams())
        engine.add_request("1_b", [1], SamplingParams(max_tokens=1))
        with pytest.raises(ValueError, match="request_id 'b' is in use"):  # and none of its outputs is left queued
            engine.add_request("b", [1], SamplingParams(n=2))
        assert len(engine.scheduler.requests) == 4
        for _ in range(3):
            engine.step()
        (output,) = engine.abort_requests(["a", "a", "b"])
        assert output.finished and [c.finish_reason for c in output.outputs] == ["abort"] * 3
        assert "a" not in engine.request_ids and not engine.abort_requests(["a"])
        while engine.has_unfinished_requests():
            engine.step()
        engine.scheduler.check_integrity()


# ---- stop strings


@pytest.fixture(scope="module")
def story(embedded):
    """(LLM, prompt, the text and tokens of a greedy continuation)"""
    with LLM(embedded, device="cpu") as llm:
        prompt = "Once upon a time, in a small village, there lived a"
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)[0].outputs[0]
        assert len(output.text) > 150
        yield llm, prompt, output


def stops(text):
    """Stop strings that are in the text: inside a token, across tokens, one that is the end of another, and decoys."""
    yield [text[40:43]]
    yield [text[50:75]]
    yield [text[60:90], text[80:95], text[70:72] + "@"]
    yield [text[30:50], text[44:50]]
    yield [text[44:50], text[30:50]]
    yield [text[44:50], text[44:49]]
    yield ["@@", text[100:101]]


def test_stop_strings(story):
    llm, prompt, whole = story
    for stop, include in itertools.product(stops(whole.text), (False, True)):
        params = SamplingParams(temperature=0, max_tokens=60, stop=stop, include_stop_str_in_output=include)
        # The output ends with the first token that completes a stop string; of several, the one that ends first.
        texts = [llm.get_tokenizer().decode(whole.token_ids[: i + 1]) for i in range(60)]
        length, text = next((i + 1, text) for i, text in enumerate(texts) if any(s in text for s in stop))
        end, index = min((text.find(s) + len(s), i) for i, s in enumerate(stop) if s in text)
        reason = stop[index]
        expected = text[: end if include else end - len(reason)]
        output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == (expected, "stop", reason)
        assert output.token_ids == whole.token_ids[:length]
        shown = ""
        for output in llm.stream(prompt, params):
            shown += output.outputs[0].text
            assert expected.startswith(shown), "what was shown cannot be taken back"
        assert shown == expected and output.outputs[0].stop_reason == reason
        llm.engine.scheduler.check_integrity()


def test_stop_strings_wait_for_min_tokens(story):
    llm, prompt, whole = story
    early, texts = whole.text[10:13], [llm.get_tokenizer().decode(whole.token_ids[:i]) for i in range(61)]
    length = next(i for i, text in enumerate(texts) if early in text)
    for min_tokens in (length - 1, length):
        params = SamplingParams(temperature=0, max_tokens=60, stop=early, min_tokens=min_tokens)
        output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert (len(output.token_ids) == length) == (min_tokens < length)


def test_a_stop_string_in_the_last_token(story):
    """It counts although max_tokens ends the request too."""
    llm, prompt, whole = story
    texts = [llm.get_tokenizer().decode(whole.token_ids[:i]) for i in range(61)]
    length = next(i for i in range(12, 60) if texts[i][-3:] not in texts[i][:-1])
    stop = texts[length][-3:]
    params = SamplingParams(temperature=0, max_tokens=length, stop=stop)
    output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", stop, texts[length][:-3])
    cumulative = SamplingParams(temperature=0, max_tokens=8, stop="@" * 9, output_kind=RequestOutputKind.CUMULATIVE)
    llm.engine.add_request("x", llm.get_tokenizer()(prompt).input_ids, cumulative)
    seen = []
    while llm.engine.has_unfinished_requests():
        seen += [output.outputs[0].text for output in llm.engine.step()]
    assert seen[-1] == llm.get_tokenizer().decode(whole.token_ids[:8])
    assert [text for text in seen[:-1] if text] == [seen[-1][: len(text)] for text in seen[:-1] if text]


def test_a_stop_token_is_no_part_of_the_text(story):
    llm, prompt, whole = story
    place = next(i for i in range(9, 60) if whole.token_ids[i] not in whole.token_ids[:i])
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=60, stop_token_ids=[whole.token_ids[place]], include_stop_str_in_output=include
        )
        output = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
        assert output.token_ids == whole.token_ids[: place + 1] and output.stop_reason == whole.token_ids[place]
        assert output.text == llm.get_tokenizer().decode(whole.token_ids[: place + include])


def test_decoded_tokens(story):
    llm, prompt, whole = story
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=5, logprobs=2), use_tqdm=False)[0]
    for entry, token in zip(output.outputs[0].logprobs, whole.token_ids[:5], strict=True):
        assert entry[token].rank == 1 and len(entry) == 2
        for other, found in entry.items():
            assert found.decoded_token == llm.get_tokenizer().decode([other])
    without = SamplingParams(max_tokens=2, logprobs=2, prompt_logprobs=1, detokenize=False)
    output = llm.generate(prompt, without, use_tqdm=False)[0]
    for entry in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]:
        assert all(found.decoded_token is None for found in entry.values())


@pytest.mark.parametrize("text", ["I like 😀日本 a lot, é", "日本語の😀😃"])
def test_decoded_tokens_of_characters_in_several(embedded, text):
    """The last token has the character; the texts together are the text."""

    def say(output, logits):
        return torch.zeros_like(logits).index_fill_(0, torch.tensor([token_ids[len(output)]]), 50.0)

    with LLM(embedded, device="cpu", max_model_len=64, kv_cache_memory_bytes=1 << 24) as llm:
        token_ids = llm.get_tokenizer()(text).input_ids
        own = [llm.get_tokenizer().decode([token_id]) for token_id in token_ids]
        assert any("\ufffd" in one for one in own), "characters that one token does not end"
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
        entries = llm.generate(text, asked, use_tqdm=False)[0].prompt_logprobs[1:]
        said = [own[0], *(entry[token].decoded_token for entry, token in zip(entries, token_ids[1:], strict=True))]
        if "\ufffd" not in own[0]:
            assert "".join(said) == text and "" in said
        asked = SamplingParams(temperature=0, max_tokens=len(token_ids), logprobs=2, logits_processors=[say])
        output = llm.generate("a", asked, use_tqdm=False)[0].outputs[0]
        said = [entry[token].decoded_token for entry, token in zip(output.logprobs, token_ids, strict=True)]
        assert output.text == "".join(said) == text and "" in said
        others = {found.decoded_token for entry in output.logprobs for found in entry.values()}
        assert not any(other.endswith("\ufffd") for other in others)


@pytest.mark.parametrize(
    ("most", "kept"), [(None, [0, 2, 3, 4]), (3, [0, 3, 4]), (1, [0]), (9, [0, 2, 3, 4]), (-1, [0, 4])]
)
def test_what_the_tokenizer_puts_before_a_text_is_not_cut_off(most, kept):
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<s>", "<unk>", "a", "b", "c"])}, "<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    inputs = InputProcessor(PreTrainedTokenizerFast(tokenizer_object=words), None, {}, 3)
    params = SamplingParams(truncate_prompt_tokens=most, max_tokens=1)
    assert inputs.check("a b c", params, RequestOutputKind.FINAL_ONLY)[0] == kept
    assert inputs.check([0, 2, 3, 4], params, RequestOutputKind.FINAL_ONLY)[0] == ([0, 2, 3, 4][-len(kept) :])
    assert inputs.check("a b c", SamplingParams(), RequestOutputKind.FINAL_ONLY)[0] == [0, 2, 3, 4]


def test_more_special_tokens_than_may_stay():
    words = Tokenizer(WordLevel({"<s>": 0, "a": 1}, "a"))
    words.post_processor = TemplateProcessing("<s> $A <s>", special_tokens=[("<s>", 0)])
    inputs = InputProcessor(PreTrainedTokenizerFast(tokenizer_object=words), None, {}, 3)
    with pytest.raises(ValueError, match=r"truncate_prompt_tokens \(1\) has no room for 2 special tokens"):
        inputs.check("a", SamplingParams(truncate_prompt_tokens=1), RequestOutputKind.FINAL_ONLY)
