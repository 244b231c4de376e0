"""Structured outputs: what comes out follows the grammar, whatever runs beside it."""

import json
import os
import pickle
import re
import tempfile
from functools import partial
from types import SimpleNamespace

import llguidance
import numpy as np
import pytest
import torch

from minivllm import LLM, SamplingParams, StructuredOutputsParams
from minivllm.engine import grammar
from minivllm.engine.batch import ScheduledBatch
from minivllm.engine.grammar import TokenMasks
from minivllm.runner.shared_masks import SharedMasks

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SUM = 'root ::= term ("+" term){1,3}\nterm ::= [0-9] | "(" root ")"'
PROMPTS = ["Tell me about a person:", "Answer:", "I think that"]


def is_person(text):
    person = json.loads(text)
    assert person.keys() == {"name", "age", "tags"} and len(person["name"]) <= 12 and 0 <= person["age"] <= 150
    assert 2 <= len(person["tags"]) <= 3 and set(person["tags"]) <= {"red", "green", "blue"}


def is_sum(text):
    assert re.fullmatch(r"[0-9+()]+", text) and isinstance(eval(text), int)


def is_compact_person(text):
    is_person(text)
    assert json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text


NUMBER = r"(\d{3}-){2}\d{4} (yes|no)"
CITIES = ["Paris", 'a "quoted" one', "naïve", "no"]
CASES = {
    "json": (dict(json=SCHEMA), is_person),
    "json as text": (dict(json=json.dumps(SCHEMA)), is_person),
    "compact json": (dict(json=SCHEMA, disable_any_whitespace=True), is_compact_person),
    "regex": (dict(regex=NUMBER), lambda text: re.fullmatch(NUMBER, text)[0]),
    "choice": (dict(choice=CITIES), CITIES.index),
    "gbnf": (dict(grammar=SUM), is_sum),
    "lark": (
        dict(grammar='start: "<" W ">"\nW: /[a-z]{2,5}/'),
        lambda text: re.fullmatch("<[a-z]{2,5}>", text).group(),
    ),
}


@pytest.fixture(scope="module", params=["sync", "async", "preempting", pytest.param("cuda", marks=pytest.mark.gpu)])
def llm(request, embedded):
    settings = dict(device="cuda" if request.param == "cuda" else "cpu", dtype="float32", kv_cache_memory_bytes=1 << 28)
    if request.param == "preempting":  # 7 blocks of 16 tokens
        settings |= dict(block_size=16, kv_cache_memory_bytes=7 * 16 * 4 * 2 * 30 * 3 * 64, max_model_len=140)
    with LLM(embedded, async_scheduling=request.param != "sync", **settings) as llm:
        yield llm
        assert (llm.engine.scheduler.stats.num_preemptions > 0) == (request.param == "preempting")
        llm.engine.scheduler.check_integrity()


FREE = SamplingParams(temperature=0, max_tokens=25)


@pytest.fixture(scope="module")
def alone(llm):
    """What a request without a grammar gives with nothing beside it."""
    return llm.generate(PROMPTS[1], FREE, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("name", CASES)
def test_outputs_follow_the_grammar(llm, alone, name):
    """Greedy and drawn, two from one prompt, beside requests without a grammar, which give what they give alone."""
    options, check = CASES[name]
    guided = dict(structured_outputs=StructuredOutputsParams(**options), max_tokens=90)
    params = [SamplingParams(temperature=0, **guided), FREE, SamplingParams(temperature=1, seed=5, n=2, **guided)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert outputs[1].outputs[0].token_ids == alone
    finished = [c for output in (outputs[0], outputs[2]) for c in output.outputs if c.finish_reason == "stop"]
    assert len(finished) >= 2, "too few came to their end to say much"
    for completion in finished:
        check(completion.text)


PERSON = SamplingParams(temperature=0, max_tokens=90, structured_outputs=StructuredOutputsParams(json=SCHEMA))


@pytest.fixture(scope="module")
def person(embedded):
    """What PERSON gives for the first prompt."""
    with LLM(embedded, device="cpu", dtype="float32", async_scheduling=False, kv_cache_memory_bytes=1 << 24) as llm:
        output = llm.generate(PROMPTS[0], PERSON, use_tqdm=False)[0].outputs[0]
    is_person(output.text)
    return output


THREE = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")


@pytest.mark.parametrize(
    ("is_async", "size", "device"),
    [
        (False, 1, "cpu"),
        (True, 1, "cpu"),
        (True, 3, "cpu"),
        pytest.param(True, 1, "cuda", marks=pytest.mark.gpu),
        pytest.param(True, 3, "cuda", marks=[pytest.mark.gpu, THREE]),
    ],
)
def test_a_step_is_launched_before_the_token_before_it_is_known(embedded, person, monkeypatch, is_async, size, device):
    """Not without async scheduling.  If something fails while that token is waited for, nothing is lost."""
    settings = dict(async_scheduling=is_async, tensor_parallel_size=size, kv_cache_memory_bytes=1 << 24)
    with LLM(embedded, device=device, dtype="float32", **settings) as llm:
        engine = llm.engine
        execute, update, known, failures = engine.executor.execute, engine.scheduler.update, [], []

        def counting(batch):
            known.append(engine.scheduler.requests["a"].num_output_tokens)
            return execute(batch)

        def failing(result):
            if len(known) == 6 and not failures:
                failures.append(result)
                raise RuntimeError("on purpose")
            return update(result)

        def run():
            outputs = []
            while engine.request_ids:
                outputs = engine.step() or outputs
            return outputs[-1].outputs[0].token_ids

        monkeypatch.setattr(engine.executor, "execute", counting)
        prompt_token_ids = llm.get_tokenizer()(PROMPTS[0]).input_ids
        engine.add_request("a", prompt_token_ids, PERSON)
        assert run() == person.token_ids
        assert known[:6] == [max(0, i - is_async) for i in range(6)]
        known.clear()
        monkeypatch.setattr(engine.scheduler, "update", failing)
        engine.add_request("a", prompt_token_ids, PERSON)
        with pytest.raises(RuntimeError, match="on purpose"):
            run()
        assert failures and run() == person.token_ids


OPEN = {"type": "object", "properties": {"a": {"type": "object", "properties": {"properties": {"enum": [1]}}}}}
NAMES = {"type": "object", "properties": {"default": OPEN, "enum": {"enum": [OPEN]}}}
TAGS = json.dumps(
    {"structures": [{"begin": "<call>", "schema": {"enum": [12]}, "end": "</call>"}], "triggers": ["<call"]}
)


@pytest.mark.parametrize(
    ("options", "allowed", "refused"),
    [
        (dict(json=OPEN), '{"a": {"properties": 1, "b": 2}, "c": 3}', '{"a": {"properties": 2'),
        (dict(json=OPEN, disable_additional_properties=True), '{"a": {"properties": 1}}', '{"a": {"b'),
        (dict(json=OPEN, disable_additional_properties=True), "{}", '{"c'),
        (dict(json={"anyOf": [OPEN, {"const": {"properties": 1}}]}, disable_additional_properties=True),
         '{"properties": 1}', '{"c'),
        (dict(json=NAMES, disable_additional_properties=True), '{"default": {"a": {}}}', '{"default": {"b'),
        (dict(json=SCHEMA, whitespace_pattern="[ ]{2}"), '{"name":  "A",  "age":  1,  "tags":  ["red",  "red"]}',
         '{"name": "A"'),
        (dict(structural_tag=TAGS), "Well: <call>12</call>, and <call>12</call>.", "Well: <call>13"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_grammar_lets_through(embedded, options, allowed, refused):
    with LLM(embedded, device="cpu", kv_cache_memory_bytes=1 << 24) as llm:
        tokenizer, params = llm.get_tokenizer(), SamplingParams(structured_outputs=StructuredOutputsParams(**options))

        def accepts(text):
            grammar = llm.engine.start_grammar(params.structured_outputs)
            return all(grammar.accept(token) for token in tokenizer(text).input_ids)

        assert accepts(allowed) and not accepts(refused)


def test_any_object(llm):
    params = SamplingParams(
        temperature=1, seed=3, max_tokens=100, structured_outputs=StructuredOutputsParams(json_object=True), n=4
    )
    completions = llm.generate("An object: ", params, use_tqdm=False)[0].outputs
    ended = [json.loads(c.text) for c in completions if c.finish_reason == "stop"]
    assert ended and all(isinstance(value, dict) for value in ended)


@pytest.mark.parametrize("num_alone", [0, 1, 2])
def test_masks(llm, monkeypatch, num_alone):
    """Worked out alone while there is time, then on threads.  A grammar stays where its engine is; another process is
    told the places alone."""
    tokenizer = llm.get_tokenizer()
    masks = TokenMasks()
    for place, choice in ((2, ["no", "none"]), (5, ["yes"])):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(choice=choice))
        masks.add(place, llm.engine.start_grammar(params.structured_outputs))
    sent = pickle.loads(pickle.dumps(ScheduledBatch(token_masks=masks))).token_masks
    times = iter([0.0] * (1 + num_alone) + [grammar.SECONDS_ALONE + 1] * 2)
    monkeypatch.setattr(grammar, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    out = np.full((3, -(-llm.model_config.vocab_size // 32)), 0x12345678, np.int32)
    sent.receive = partial(masks.words, out)
    assert len(sent) == 2 and sent.places == [2, 5]
    words = sent.words()
    assert words.base is out and (out[:2] == words).all() and (out[2] == 0x12345678).all()
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    for row, word in zip(bits, ("none", "yes"), strict=True):
        allowed = {tokenizer.decode([token]) for token in np.flatnonzero(row)}
        assert allowed and all(text and word.startswith(text) for text in allowed)


@pytest.mark.parametrize("in_memory", [True, False])
def test_shared_masks(monkeypatch, tmp_path, in_memory):
    """What one writes, another reads, and nothing is left behind."""
    if not in_memory:
        monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    made = SharedMasks(max_num_seqs=3, vocab_size=70)
    with made.file as file:
        inherited = SharedMasks(3, 70, os.dup(file.fileno()))
    inherited.file.close()
    assert made.array.shape == (2, 3, 3)
    made.array[1, 2] = [1, -1, 7]
    assert inherited.array[1, 2].tolist() == [1, -1, 7] and not inherited.array[0].any()
    del made, inherited
    assert os.listdir("/proc/self/fd") == before and not os.listdir(tmp_path)


def test_options_that_leave_nothing_end_the_request(llm):
    """It is aborted; the others go on.  min_tokens gives way to the grammar."""
    choice = StructuredOutputsParams(choice=["no"])
    params = [
        SamplingParams(max_tokens=20, structured_outputs=choice, allowed_token_ids=[50]),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice, min_tokens=10, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=choice, min_tokens=10),
    ]
    outputs = [output.outputs[0] for output in llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)]
    assert outputs[0].finish_reason == "abort" and "other options leave none" in outputs[0].stop_reason
    for output in outputs[1:]:
        assert (output.text, output.finish_reason) == ("no", "stop")


def chain(length):
    """A schema of definitions, each of which names the next."""
    names = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": names | {f"a{length}": {"enum": [12]}}}


LARGE = {
    "choice": (dict(choice=[f"city {i}" for i in range(5000)]), lambda text: re.fullmatch(r"city \d{1,4}", text)[0]),
    "properties": (
        dict(json={"type": "object", "properties": {f"city {i}": {"enum": [7]} for i in range(500)},
                   "required": ["city 499"], "additionalProperties": False}, disable_any_whitespace=True),
        lambda text: re.match(r'\{"city \d+":7[,}]', text)[0],  # of which it may have many
    ),
    "definitions": (dict(json=chain(5000)), int),  # by recursion, which needs a large stack
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_grammars(embedded, name):
    options, check = LARGE[name]
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=StructuredOutputsParams(**options))
    with LLM(embedded, device="cpu", kv_cache_memory_bytes=1 << 24) as llm:
        completion = llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0]
        assert completion.finish_reason in ("stop", "length") and completion.stop_reason is None
        check(completion.text)


def test_a_grammar_that_cannot_go_on_is_no_end_of_a_text(embedded, monkeypatch):
    """llguidance then allows the end, which must not pass for one."""
    patterns = [{"pattern": pattern} for pattern in ("a.{12}b", "b.{13}a", "c.{14}d")]
    schema = {"type": "object", "properties": {"p": {"type": "string", "allOf": patterns}}, "required": ["p"]}
    limits = partial(llguidance.LLParserLimits, initial_lexer_fuel=10_000_000, step_lexer_fuel=5_000)
    monkeypatch.setattr(llguidance, "LLParserLimits", lambda **_: limits())
    params = SamplingParams(
        temperature=0,
        max_tokens=60,
        structured_outputs=StructuredOutputsParams(json=schema),
        include_stop_str_in_output=True,
    )
    with LLM(embedded, device="cpu", kv_cache_memory_bytes=1 << 24) as llm:
        completion = llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0]
        assert completion.finish_reason == "abort" and completion.stop_reason.startswith("structured_outputs: ")


def test_a_grammar_is_compiled_once(embedded, monkeypatch):
    with LLM(embedded, device="cpu", kv_cache_memory_bytes=1 << 24) as llm:
        choice = StructuredOutputsParams(choice=["no", "yes"])
        llm.generate(PROMPTS[1], SamplingParams(max_tokens=2, structured_outputs=choice), use_tqdm=False)
        monkeypatch.setattr(llm.engine._grammars, "_compile", None)
        again = SamplingParams(max_tokens=2, n=3, structured_outputs=StructuredOutputsParams(choice=["no", "yes"]))
        texts = [c.text for c in llm.generate(PROMPTS[1], again, use_tqdm=False)[0].outputs]
        assert set(texts) <= {"no", "yes"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "must have one of json, regex, choice, grammar, json_object, structural_tag; got none"),
        (dict(json={}, regex="a"), "got json, regex"),
        (dict(json=3), "json must be a JSON schema"),
        (dict(choice=[]), "choice must be a list of texts"),
        (dict(regex=1), "regex must be a string"),
        (dict(json_object="x"), "json_object must be True or False, got 'x'"),
        (dict(regex="a", disable_any_whitespace=1), "disable_any_whitespace must be True or False, got 1"),
        (dict(jsn={}), "StructuredOutputsParams has no argument 'jsn'; did you mean 'json'"),
    ],
    ids=str,
)
def test_wrong_params(options, message):
    with pytest.raises(ValueError, match=message):
        StructuredOutputsParams(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(regex="(["), "regex parse error"),
        (dict(json="{"), "structured_outputs: Expecting property name"),
        (dict(json={"type": "nothing"}), "structured_outputs: "),
        (dict(grammar="start: /a"), "structured_outputs: "),
        (dict(regex=r"[^\s\S]"), r"structured_outputs: the grammar allows no text \(\w+\)$"),
        (dict(json={"$ref": "#"}), r"structured_outputs: the grammar allows no text \(\w+\)$"),
        (dict(grammar="x" * 70_000), "grammar has 70000 characters; 65536 are the most"),
        (dict(regex="a" * (1 << 20)), "characters are too many for a grammar"),
        (dict(structural_tag="{}"), "structural_tag must have triggers, and structures with begin, schema and end"),
        (dict(structural_tag="[]"), "structural_tag must have triggers, and structures with"),
        (dict(structural_tag="{"), "structured_outputs: Expecting property name"),
        (dict(structural_tag=TAGS.replace("<call", "<cull", 1)), "no trigger is the beginning of '<cull>'"),
    ],
    ids=str,
)
def test_grammars_that_are_not_well_formed(llm, options, message):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**options))
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPTS[0], params, use_tqdm=False)
    assert not llm.engine.request_ids


def test_without_a_tokenizer(tiny):
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    with (
        LLM(tiny("mha"), skip_tokenizer_init=True, device="cpu") as llm,
        pytest.raises(ValueError, match="structured_outputs needs a tokenizer"),
    ):
        llm.generate([1], params, use_tqdm=False)
