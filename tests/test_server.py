"""The server: endpoints, fields and errors, clients that misbehave, load, its beginning and its end."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import aiohttp
import pytest
from conftest import RunningServer

from minivllm import LLM, SamplingParams
from minivllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from minivllm.server import app
from minivllm.server.chat_protocol import ChatBody, TokenizeBody
from minivllm.server.protocol import ApiError, CompletionBody
from minivllm.server.service import ServerOptions, Service

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def request(server, path, body=None, method=None, headers=None, data=None):
    """(status, JSON or text, headers)"""

    async def run():
        async with aiohttp.ClientSession() as session:
            kind = method or ("GET" if body is None and data is None else "POST")
            async with session.request(kind, server.url + path, json=body, data=data, headers=headers) as answer:
                text = await answer.text()
                is_json = answer.content_type == "application/json"
                return answer.status, json.loads(text) if is_json else text, answer.headers

    return asyncio.run(run())


async def events(session, url, body):
    """The events of a streamed answer, [DONE] excluded."""
    async with session.post(url, json=body | {"stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        found = []
        async for line in answer.content:
            if line.startswith(b"data: "):
                found.append(line[6:].strip())
        assert found[-1] == b"[DONE]"
        return [json.loads(event) for event in found[:-1]]


def stream(server, path, body):
    async def run():
        async with aiohttp.ClientSession() as session:
            return await events(session, server.url + path, body)

    return asyncio.run(run())


def complete(server, **body):
    status, answer, _ = request(server, "/v1/completions", {"temperature": 0} | body)
    assert status == 200, answer
    return answer


def chat(server, **body):
    status, answer, _ = request(server, "/v1/chat/completions", {"messages": CHAT, "temperature": 0} | body)
    assert status == 200, answer
    return answer


@pytest.fixture(scope="module")
def offline(embedded):
    with LLM(embedded, device="cpu", max_model_len=2048, block_size=16, kv_cache_memory_bytes=1 << 28) as llm:
        yield llm


def test_completions(server, offline):
    prompts = ["The capital of France is", "1, 2, 3,"]
    expected = offline.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    answer = complete(server, model="smol", prompt=prompts, max_tokens=8)
    assert answer["object"] == "text_completion" and answer["model"] == "smol" and answer["id"].startswith("cmpl-")
    assert [(c["index"], c["text"], c["finish_reason"]) for c in answer["choices"]] == [
        (i, output.outputs[0].text, "length") for i, output in enumerate(expected)
    ]
    num_prompt = sum(len(output.prompt_token_ids) for output in expected)
    assert {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"} == dict(
        prompt_tokens=num_prompt, completion_tokens=16, total_tokens=num_prompt + 16
    )
    ids = [output.prompt_token_ids for output in expected]
    assert [c["text"] for c in complete(server, prompt=ids, max_tokens=8)["choices"]] == [
        output.outputs[0].text for output in expected
    ]
    assert complete(server, prompt=ids[1], max_tokens=8)["choices"][0]["text"] == expected[1].outputs[0].text
    assert complete(server, prompt="x")["usage"]["completion_tokens"] <= 16


def test_biases_beyond_100_count_as_100():
    body = CompletionBody(prompt="a", logit_bias={"1": 1000.0, "2": -1e9, "3": 0.5})
    assert body.sampling_params({}).logit_bias == {1: 100.0, 2: -100.0, 3: 0.5}
    with pytest.raises(ApiError, match="logit_bias must be"):
        CompletionBody(prompt="a", logit_bias={"1": float("nan")}).sampling_params({})


def test_completions_streamed(server):
    body = dict(prompt=["The capital of France is", "1, 2, 3,"], n=2, seed=5, max_tokens=9, temperature=1.0)
    whole = complete(server, **body)
    parts = stream(server, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    texts = dict.fromkeys(range(4), "")
    for part in parts[:-1]:
        assert part["usage"] is None and part["id"] == parts[0]["id"]
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == [choice["text"] for choice in whole["choices"]] and len(set(texts.values())) == 4
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 36
    body["stream_options"] = dict(include_usage=True, continuous_usage_stats=True)
    assert stream(server, "/v1/completions", body)[0]["usage"]["completion_tokens"] >= 1


def test_echo_and_logprobs(server, offline):
    prompt = "The capital of France is"
    expected = offline.generate(
        prompt, SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=2), use_tqdm=False
    )[0]
    text = prompt + expected.outputs[0].text
    choice = complete(server, prompt=prompt, max_tokens=3, echo=True, logprobs=2)["choices"][0]
    assert choice["text"] == text
    found = choice["logprobs"]
    ids = expected.prompt_token_ids + expected.outputs[0].token_ids
    entries = expected.prompt_logprobs + expected.outputs[0].logprobs
    assert "".join(found["tokens"]) == text and len(found["tokens"]) == len(ids)
    assert [
        text[offset:].startswith(token) for token, offset in zip(found["tokens"], found["text_offset"], strict=True)
    ]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    for i, (token, entry) in enumerate(zip(ids, entries, strict=True)):
        if i:
            assert found["token_logprobs"][i] == pytest.approx(entry[token].logprob, abs=1e-4)
            assert len(found["top_logprobs"][i]) in (2, 3)
    only_prompt = complete(server, prompt=prompt, max_tokens=0, echo=True, logprobs=2)
    assert only_prompt["choices"][0]["text"] == prompt and only_prompt["usage"]["completion_tokens"] == 0
    assert only_prompt["choices"][0]["logprobs"]["tokens"] == found["tokens"][: len(expected.prompt_token_ids)]
    parts = stream(server, "/v1/completions", dict(prompt=prompt, max_tokens=3, temperature=0, echo=True, logprobs=2))
    assert "".join(part["choices"][0]["text"] for part in parts) == text
    assert sum((part["choices"][0]["logprobs"]["tokens"] for part in parts), []) == found["tokens"]
    assert sum((part["choices"][0]["logprobs"]["text_offset"] for part in parts), []) == found["text_offset"]
    listed = complete(server, prompt=prompt, max_tokens=1, prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert listed[0] is None and listed[1][str(ids[1])]["logprob"] == pytest.approx(
        entries[1][ids[1]].logprob, abs=1e-4
    )


def test_chat(server, offline):
    expected = offline.chat(CHAT, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0]
    answer = chat(server, max_completion_tokens=20, logprobs=True, top_logprobs=2)
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == expected.outputs[0].text and choice["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.outputs[0].token_ids)
    assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
    assert b"".join(bytes(e["bytes"]) for e in choice["logprobs"]["content"]).decode().startswith("The capital")
    parts = stream(server, "/v1/chat/completions", dict(messages=CHAT, temperature=0, logprobs=True))
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == expected.outputs[0].text
    assert [p["choices"][0]["finish_reason"] for p in parts if p["choices"][0]["finish_reason"]] == ["stop"]
    entries = [e for p in parts if p["choices"][0]["logprobs"] for e in p["choices"][0]["logprobs"]["content"]]
    assert len(entries) == len(expected.outputs[0].token_ids)
    count = [{"role": "user", "content": "Count from 1 to 30."}]
    assert chat(server, messages=count)["usage"]["completion_tokens"] > 16, "no limit but the model's"
    again = chat(server)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(expected.prompt_token_ids) - 1) // 16 * 16
    going_on = [*CHAT, {"role": "assistant", "content": "The capital of France is"}]
    text = chat(server, messages=going_on, continue_final_message=True, max_tokens=3)["choices"][0]["message"][
        "content"
    ]
    assert "Paris" in text
    parts = [{"type": "text", "text": CHAT[0]["content"]}]
    assert chat(server, messages=[{"role": "user", "content": parts}])["choices"][0]["message"] == {
        "role": "assistant",
        "content": expected.outputs[0].text,
    }


def test_options_have_their_effect(server):
    assert complete(server, prompt="1, 2, 3,", max_tokens=30, stop=[" 6"])["choices"][0] | {"logprobs": None} == {
        "index": 0, "text": " 4, 5,", "logprobs": None, "finish_reason": "stop", "stop_reason": " 6",
    }  # fmt: skip
    kept = complete(server, prompt="1, 2, 3,", max_tokens=30, stop=" 6", include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == " 4, 5, 6"
    seeded = [complete(server, prompt="Once", seed=s, temperature=1.5, max_tokens=12) for s in (1, 1, 2)]
    texts = [answer["choices"][0]["text"] for answer in seeded]
    assert texts[0] == texts[1] != texts[2]
    plain = complete(server, prompt="1, 2, 3,", max_tokens=1)["choices"][0]["text"]
    space = request(server, "/tokenize", {"prompt": plain})[1]["tokens"][0]
    banned = complete(server, prompt="1, 2, 3,", max_tokens=1, logit_bias={str(space): -100})["choices"][0]["text"]
    assert banned != plain
    five = complete(server, prompt="1, 2, 3,", max_tokens=5, ignore_eos=True, min_tokens=5, top_k=1, min_p=0.1)
    assert five["usage"]["completion_tokens"] == 5
    assert complete(server, prompt="a b c d e f g", truncate_prompt_tokens=3)["usage"]["prompt_tokens"] == 3
    circles = dict(max_tokens=60, allowed_token_ids=[space], repetition_detection=dict(max_pattern_size=1, min_count=4))
    ended = complete(server, prompt="1, 2, 3,", **circles)
    assert ended["choices"][0]["finish_reason"] == "repetition" and ended["usage"]["completion_tokens"] == 4
    body = dict(prompt="1, 2, 3,", temperature=0, max_tokens=21, ignore_eos=True, stream=True)
    every, tenth = (len(stream(server, "/v1/completions", body | more)) for more in ({}, {"stream_interval": 10}))
    assert tenth <= 5 < 10 < every
    # The same, but for the options that are off: null counts as left out.
    nulls = dict.fromkeys(["n", "seed", "stop", "logit_bias", "top_k", "user", "response_format", "suffix", "tools"])
    assert complete(server, prompt="1, 2, 3,", max_tokens=1, **nulls)["choices"][0]["text"] == plain


HARMLESS = dict(
    priority=0, use_beam_search=False, length_penalty=1.0, best_of=1, echo=False, add_special_tokens=False,
    include_reasoning=True, return_token_ids=False, return_tokens_as_token_ids=False, store=False, metadata={"a": "b"},
    service_tier="auto", modalities=["text"], functions=[], function_call="none", top_logprobs=0,
    parallel_tool_calls=True, prompt_cache_key="k", safety_identifier="s", user="u",
)  # fmt: skip


def test_fields_that_ask_for_nothing_change_nothing(server):
    assert chat(server, max_tokens=3, **HARMLESS)["choices"] == chat(server, max_tokens=3)["choices"]
    body = dict(prompt="1, 2, 3,", max_tokens=3, logprobs=1)
    assert complete(server, **body, **HARMLESS)["choices"] == complete(server, **body)["choices"]


def test_tools_reach_the_template_as_given():
    tool = {
        "function": {"name": "f", "parameters": {"default": None}, "return": {"type": "string"}, "strict": False},
        "cache_control": {"type": "ephemeral"},
    }
    [found] = ChatBody(messages=CHAT, tools=[tool]).tools
    assert found.given() == tool | {"type": "function"}


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "save_person", "parameters": PERSON}},
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]


WRITES_TOOLS = (
    "{{ mood }}{% for tool in tools or () %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def test_tools_stay_in_the_prompt_where_none_may_be_called(server, monkeypatch):
    monkeypatch.setattr(server.llm.inputs, "chat_template", WRITES_TOOLS)
    answer = chat(server, tools=TOOLS, tool_choice="none", max_tokens=1)
    without = chat(server, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"] + 50
    assert "tool_calls" not in answer["choices"][0]["message"]


@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(tools=TOOLS, tool_choice="none"),
        dict(chat_template_kwargs={"mood": "merry " * 9}),
        dict(messages=[*CHAT, {"role": "assistant", "content": "The capital"}], continue_final_message=True),
    ],
)
def test_prompts_of_chats_can_be_counted(server, monkeypatch, more):
    monkeypatch.setattr(server.llm.inputs, "chat_template", WRITES_TOOLS)
    body = dict(messages=CHAT) | more
    expected = chat(server, max_tokens=1, **body)["usage"]["prompt_tokens"]
    body.pop("tool_choice", None)
    assert request(server, "/tokenize", body)[1]["count"] == expected


def test_templates_of_clients_need_trust(server):
    body = TokenizeBody(messages=CHAT, chat_template="{{ messages[0].content }}!")
    service = Service(server.llm, ServerOptions(["m"], trust_request_chat_template=True), None)
    assert server.call(service.render(CHAT, body))["prompt"] == CHAT[0]["content"] + "!"
    service.options = replace(service.options, chat_template_content_format="openai")
    assert server.call(service.render(CHAT, body))["prompt"].startswith("[{'type': 'text'")
    path = body.model_copy(update={"chat_template": "/etc/hostname"})
    with pytest.raises(ApiError, match="must be the text"):
        server.call(service.render(CHAT, path))
    for endpoint in ("/tokenize", "/v1/chat/completions"):
        status, answer, _ = request(server, endpoint, body.model_dump(include={"messages", "chat_template"}))
        assert status == 400 and answer["error"]["param"] == "chat_template"


def test_response_format_and_forced_calls(server):
    pytest.importorskip("llguidance")
    messages = [{"role": "user", "content": "Ann is 31 years old. Save her."}]
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    answer = chat(server, messages=messages, response_format=form, max_tokens=80)
    person = json.loads(answer["choices"][0]["message"]["content"])
    assert person.keys() == {"name", "age"}
    assert complete(server, prompt="Answer:", structured_outputs={"choice": ["yes", "no"]})["choices"][0]["text"] in (
        "yes", "no",
    )  # fmt: skip
    structures = [{"begin": "The capital of ", "schema": {"enum": ["Spain"]}, "end": "!"}]
    tag = {"structures": structures, "triggers": ["The capital"]}
    for asked in (
        dict(structured_outputs={"structural_tag": json.dumps(tag)}),
        dict(response_format={"type": "structural_tag"} | tag),
    ):
        text = chat(server, max_tokens=12, **asked)["choices"][0]["message"]["content"]
        assert text.startswith('The capital of "Spain"!'), text
    named = {"type": "function", "function": {"name": "save_person"}}
    for choice, reason in ((named, "stop"), ("required", "tool_calls")):
        body = dict(messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=120)
        whole = chat(server, **body)["choices"][0]
        assert whole["finish_reason"] == reason and whole["message"]["content"] is None
        call = whole["message"]["tool_calls"][0]
        assert call["type"] == "function" and call["id"] and json.loads(call["function"]["arguments"]) is not None
        parts = stream(server, "/v1/chat/completions", body | {"temperature": 0})
        calls = [c for p in parts for c in p["choices"][0]["delta"].get("tool_calls", ())]
        if choice == named:  # its arguments come in pieces
            first, *pieces = calls
            assert first["id"] and first["type"] == "function" and first["function"]["name"] == "save_person"
            assert len(pieces) > 3 and all(piece.keys() == {"index", "function"} for piece in pieces)
            assert all(piece["index"] == 0 and piece["function"].keys() == {"arguments"} for piece in pieces)
            for piece in pieces:
                first["function"]["arguments"] += piece["function"]["arguments"]
            calls = [first]
        assert [c["function"] for c in calls] == [c["function"] for c in whole["message"]["tool_calls"]]
        assert [c["index"] for c in calls] == list(range(len(calls)))
        assert parts[-1]["choices"][0]["finish_reason"] == reason
    # The calls and their results go back to the model.
    turn = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turn.append({"role": "tool", "tool_call_id": call["id"], "content": "saved"})
    assert chat(server, messages=turn, max_tokens=3)["usage"]["completion_tokens"] <= 3


WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
WRONG_TOOLS = [{"function": {"name": "f", "parameters": {"type": "nonsense"}}}]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("completions", dict(), 400, "prompt", "prompt is missing"),
        ("completions", dict(prompt="x", suffix="y"), 400, "suffix", "suffix is not supported"),
        ("completions", dict(prompt="x", best_of=3), 400, "best_of", "best_of is not supported"),
        ("completions", dict(prompt="x", use_beam_search=True), 400, "use_beam_search", "use_beam_search is not"),
        ("completions", dict(prompt="x", metadata="m"), 400, "metadata", "metadata"),
        ("completions", dict(prompt=""), 400, "prompt", "the prompt is empty"),
        ("completions", dict(prompt=[]), 400, None, "prompt"),
        ("completions", dict(prompt=[[1], []]), 400, "prompt", "the prompt is empty"),
        ("completions", dict(prompt=["x", [1]]), 400, "prompt", "none of the forms"),
        ("completions", dict(prompt=[10**9]), 400, "prompt", "outside the vocabulary"),
        ("completions", dict(prompt=["a"] * 200), 400, None, "more than 128"),
        ("completions", dict(prompt="x", max_tokens=0), 400, "max_tokens", "max_tokens must be at least 1"),
        ("completions", dict(prompt="x", max_tokens="many"), 400, "max_tokens", "max_tokens"),
        ("completions", dict(prompt="x", temperature=-1), 400, "temperature", "temperature must be"),
        ("completions", dict(prompt="x", repetition_detection=dict(max_pattern_size=2)), 400, "repetition_detection",
         "min_count must be at least 2"),
        ("completions", dict(prompt="x", stream_interval=0), 400, "stream_interval", "stream_interval must be"),
        ("completions", dict(prompt="x", logprobs=99), 400, "logprobs", "logprobs asks for 99, more than max_logprobs"),
        ("completions", dict(prompt="x", prompt_logprobs=99), 400, "prompt_logprobs", "prompt_logprobs asks for 99"),
        ("completions", dict(prompt="x", stop_token_ids=[10**9]), 400, "stop_token_ids", "outside the vocabulary"),
        ("completions", dict(prompt="x", n=1000), 400, "n", "n"),
        ("completions", dict(prompt="x", logit_bias={"a": 1}), 400, "logit_bias", "logit_bias"),
        ("completions", dict(prompt="x", stream_options={}), 400, "stream_options", "stream: true"),
        ("completions", dict(prompt="x", model="gpt-9"), 404, "model", "does not exist"),
        ("completions", dict(prompt=[5] * 3000), 400, "prompt", "maximum context length is 2048 tokens"),
        ("chat/completions", dict(messages=[]), 400, "messages", "messages"),
        ("chat/completions", dict(messages=[{"content": "x"}]), 400, "messages", "role"),
        ("chat/completions", dict(messages="Hi"), 400, "messages", "messages"),
        ("chat/completions", dict(messages=CHAT, functions=[{}]), 400, "functions", "functions is not supported"),
        ("chat/completions", dict(messages=CHAT, add_special_tokens=True), 400, "add_special_tokens", "not supported"),
        ("chat/completions", dict(messages=CHAT, store=True), 400, "store", "store is not supported"),
        ("chat/completions", dict(messages=CHAT, tools=[dict(type="web")]), 400, "tools", "tools"),
        ("chat/completions", dict(messages=CHAT, top_logprobs=2), 400, None, "top_logprobs needs logprobs"),
        ("chat/completions", dict(messages=CHAT, tool_choice="auto"), 400, None, "tool_choice needs tools"),
        ("chat/completions", dict(messages=CHAT, chat_template="{{ 1/0 }}"), 400, "chat_template", "--trust-request"),
        ("chat/completions", dict(messages=CHAT, chat_template_kwargs={"tokenize": True}), 400, "messages", "template"),
        ("chat/completions", dict(messages=[{"role": "user", "content": "\ud83d"}]), 400, None, "not JSON"),
        ("chat/completions", dict(messages=CHAT, max_completion_tokens=0), 400, "max_completion_tokens", "max_"),
        ("chat/completions", dict(messages=[{"role": "user", "tool_calls": 5}]), 400, "messages", "tool_calls"),
        ("chat/completions", dict(messages=[{"role": "user", "tool_calls": ["a"]}]), 400, "messages", "tool_calls"),
        ("chat/completions", dict(messages=[3] * 100_000), 400, "messages.0", "messages.0"),
        ("completions", dict(prompt="x", structured_outputs={"grammar": 'root ::= "'}), 400, "structured_outputs",
         "structured_outputs: "),
        ("completions", dict(prompt="x", structured_outputs={"json": "[" * 100_000}), 400, "structured_outputs", ""),
        ("completions", dict(prompt="x", bad_words=[" "]), 400, None, "bad_words"),
        ("completions", dict(prompt="x", n=128, stream=True, prompt_logprobs=1), 400, "prompt_logprobs", "stream"),
        ("chat/completions", dict(messages=CHAT, logprobs=True, top_logprobs=25), 400, "top_logprobs",
         "top_logprobs asks for 25"),
        ("chat/completions", dict(messages=CHAT, min_tokens=9, max_completion_tokens=5), 400, "min_tokens", "exceed"),
        ("chat/completions", dict(messages=CHAT, response_format=WRONG_SCHEMA), 400, "response_format",
         "response_format: "),
        ("chat/completions", dict(messages=CHAT, tools=WRONG_TOOLS, tool_choice="required"), 400, "tools", "tools: "),
        ("chat/completions", dict(messages=CHAT, response_format={"type": "structural_tag"}), 400, "response_format",
         "triggers"),
        ("chat/completions", dict(messages=CHAT, response_format={"type": "json_object"}, structured_outputs=dict(
            regex="a")), 400, "structured_outputs", "different texts"),
        ("chat/completions", dict(messages=CHAT, response_format={"type": "yaml"}), 400, "response_format.type", ""),
        (
            "chat/completions",
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            400, "messages", "only content of text",
        ),
    ],
)  # fmt: skip
def test_mistakes(server, path, body, status, param, message):
    found, answer, _ = request(server, "/v1/" + path, body)
    assert found == status and message in answer["error"]["message"], answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert param is None or answer["error"]["param"] == param
    server.wait_until_idle()


def test_more_tokens_than_there_is_room_for(server):
    """What is asked for is given or refused; who does not say gets what fits."""
    ids = [5] * 2040
    room = dict(prompt=ids, ignore_eos=True)
    assert complete(server, **room)["usage"]["completion_tokens"] == 8
    text = "a " * 1500
    length = request(server, "/tokenize", {"prompt": text})[1]["count"]
    chat_length = request(server, "/tokenize", {"messages": CHAT})[1]["count"]
    for path, body, wanted, given in (
        ("completions", dict(prompt=ids, max_tokens=9), 9, 2040),
        ("completions", dict(prompt=[[1], ids], max_tokens=9, stream=True), 9, 2040),
        ("completions", dict(prompt=text, max_tokens=1000), 1000, length),
        ("completions", dict(prompt=ids + ids, max_tokens=9, truncate_prompt_tokens=2041), 9, 2041),
        ("completions", dict(prompt=ids + ids, max_tokens=0, echo=True), "at least 1", 4080),
        ("chat/completions", dict(messages=CHAT, max_tokens=2040), 2040, chat_length),
        ("chat/completions", dict(messages=CHAT, max_completion_tokens=2041, max_tokens=1), 2041, chat_length),
    ):
        status, answer, _ = request(server, "/v1/" + path, body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded", answer
        assert answer["error"]["message"].startswith(
            f"This model's maximum context length is 2048 tokens. However, you requested {wanted} output tokens and "
            f"your prompt contains {given} tokens"
        )
    for path, body in (
        ("completions", dict(prompt="a" * 1_000_000)),
        ("chat/completions", dict(messages=[dict(role="user", content="a" * 1_000_000)])),
    ):
        status, answer, _ = request(server, "/v1/" + path, body)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert " characters, and max_model_len (2048) tokens " in answer["error"]["message"]
    usage = complete(server, **room, max_tokens=20, truncate_prompt_tokens=-1)["usage"]
    assert usage["prompt_tokens"] == 2028 and usage["completion_tokens"] == 20
    server.wait_until_idle()


def test_no_request_ends_the_engine(server, monkeypatch):
    """Whatever comes of it there: here the tokenizer fails in the engine's process, with a TypeError."""
    check = server.llm.inputs.check

    def unchecked(*arguments):
        token_ids, params, text = check(*arguments)
        params.bad_words = ["\ud800"]
        return token_ids, params, text

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="TypeError"):
        patch.setattr(server.llm.inputs, "check", unchecked)
        server.call(server.llm.add_request("x", SamplingParams()))
    assert not server.llm.errored and complete(server, prompt="1, 2, 3,", max_tokens=1)
    server.wait_until_idle()


def test_texts_are_tokenized_off_the_event_loop(server, monkeypatch):
    threads = []
    with_tokenizer = server.llm.with_tokenizer

    async def watched(function, *arguments):
        def run(*given):
            threads.append(threading.current_thread().name)
            return function(*given)

        return await with_tokenizer(run, *arguments)

    monkeypatch.setattr(server.llm, "with_tokenizer", watched)
    bodies = [
        ("/tokenize", dict(prompt="a")),
        ("/tokenize", dict(messages=CHAT)),
        ("/detokenize", dict(tokens=[1])),
        ("/v1/completions", dict(prompt="a", max_tokens=1, add_special_tokens=False)),
        ("/v1/completions", dict(prompt="a", max_tokens=1)),
        ("/v1/chat/completions", dict(messages=CHAT, max_tokens=1)),
    ]
    for number, (path, body) in enumerate(bodies, 1):
        assert request(server, path, body)[0] == 200
        assert len(threads) >= number and all(name.startswith("tokenizer") for name in threads)
    before = len(threads)
    assert request(server, "/v1/completions", dict(prompt=[1, 2], max_tokens=1))[0] == 200
    assert len(threads) == before, "ids wait for no text"


def test_other_mistakes(server):
    assert request(server, "/v1/nothing")[0] == 404 and request(server, "/v1/completions")[0] == 405
    assert request(server, "/v1/completions", data="{}", headers={"Content-Type": "text/plain"})[0] == 415
    wide = '{"prompt": "\ud800", "max_tokens": 1}'.encode("utf-16", "surrogatepass")
    for data in ("{", "[]", "3", "[" * 100_000, b"\xff\xfe", wide):
        status, answer, _ = request(server, "/v1/completions", data=data, headers={"Content-Type": "application/json"})
        assert status == 400 and "error" in answer, answer


def test_small_endpoints(server, offline):
    assert request(server, "/health")[0] == 200 and request(server, "/version")[1].keys() == {"version"}
    assert request(server, "/ping")[0] == request(server, "/ping", {})[0] == 200
    models = request(server, "/v1/models")[1]
    assert models["object"] == "list" and models["data"][0]["id"] == "smol"
    assert models["data"][0]["max_model_len"] == 2048
    assert request(server, "/v1/models/smol")[1] == models["data"][0] and request(server, "/v1/models/x")[0] == 404
    ids = offline.get_tokenizer()("Hello, world").input_ids
    found = request(server, "/tokenize", {"prompt": "Hello, world", "return_token_strs": True})[1]
    assert found["tokens"] == ids and found["count"] == len(ids) == len(found["token_strs"])
    assert request(server, "/tokenize", {"messages": CHAT})[1]["count"] > 10
    assert request(server, "/tokenize", {})[0] == 400
    assert request(server, "/detokenize", {"tokens": ids})[1] == {"prompt": "Hello, world"}
    assert request(server, "/detokenize", {"tokens": [-5]})[0] in (200, 400)
    text = request(server, "/metrics")[1]
    for name in ("num_requests_running", "kv_cache_usage_perc", "prefix_cache_hits_total", "num_preemptions_total",
                 "generation_tokens_total", "time_to_first_token_seconds_bucket", "e2e_request_latency_seconds_count",
                 "inter_token_latency_seconds_sum", "request_success_total"):  # fmt: skip
        assert f"vllm:{name}{{" in text, name
    page = request(server, "/")
    assert page[0] == 200 and "<html" in page[1].lower()


def hang_up_after(server, body, num_bytes):
    """Send a request, read a little of the answer, and hang up."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        content = json.dumps(body).encode()
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
        received = b""
        while len(received) < num_bytes:
            received += connection.recv(4096)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_hangs_up_is_aborted(server, streamed):
    before = server.metric("generation_tokens")
    body = dict(prompt=["Once upon a time"] * 3, max_tokens=1500, ignore_eos=True, stream=streamed)
    hang_up_after(server, body, 2000 if streamed else 0)
    if not streamed:
        time.sleep(0.5)
    server.wait_until_idle()
    assert server.metric("generation_tokens") - before < 1000


def test_keys_queue_and_body_limits(tiny):
    options = dict(api_keys=["secret", "other"], max_queued_requests=2, max_body_bytes=2000, model_names=["a", "b"])
    server = RunningServer(tiny("mha"), skip_tokenizer_init=True, max_num_seqs=2, block_size=16, **options)
    try:
        key = {"Authorization": "Bearer other"}
        for headers in (None, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            status, answer, _ = request(server, "/v1/models", headers=headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert request(server, "/health")[0] == request(server, "/ping")[0] == request(server, "/")[0] == 200
        assert [model["id"] for model in request(server, "/v1/models", headers=key)[1]["data"]] == ["a", "b"]
        one = dict(prompt=[1, 2, 3], max_tokens=240, ignore_eos=True)
        assert request(server, "/v1/completions", dict(one, model="b"), headers=key)[1]["model"] == "b"
        status, answer, _ = request(server, "/v1/completions", dict(one, prompt=[1] * 2000), headers=key)
        assert status == 413 and "2000 bytes" in answer["error"]["message"]
        chunked = request(server, "/v1/completions", data=iter_bytes(2100), headers=key | JSON)
        assert chunked[0] == 413
        status, answer, _ = request(server, "/v1/completions", dict(one, n=5), headers=key)
        assert status == 400 and "than the server ever takes" in answer["error"]["message"]

        async def crowd():
            async with aiohttp.ClientSession(headers=key) as session:

                async def ask():
                    async with session.post(server.url + "/v1/completions", json=one) as answer:
                        assert answer.status == 200 or int(answer.headers["Retry-After"]) >= 1
                        return answer.status

                return await asyncio.gather(*(ask() for _ in range(12)))

        statuses = asyncio.run(crowd())
        assert set(statuses) == {200, 429} and statuses.count(200) >= 4
        server.wait_until_idle()
        server.llm._process.kill()
        server.llm._process.wait()
        time.sleep(0.2)
        assert request(server, "/health")[0] == 503
        status, answer, _ = request(server, "/v1/completions", one, headers=key)
        assert status == 500 and "engine has failed" in answer["error"]["message"]
    finally:
        server.close()


JSON = {"Content-Type": "application/json"}


async def iter_bytes(count):
    for _ in range(count // 100):
        yield b" " * 100


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_of_a_character_that_several_tokens_make_up(server, max_tokens):
    choice = complete(server, prompt="\U0001f600 a", max_tokens=max_tokens, echo=True, logprobs=0)["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] and found["tokens"][0] == "" and choice["text"][0] == "\U0001f600"
    assert found["text_offset"] == [sum(map(len, found["tokens"][:i])) for i in range(len(found["tokens"]))]


def test_most_likely_tokens_with_the_same_text():
    """The sampled one's logprob is its own, of others it is the most likely one's."""
    from minivllm.server.completions import Completion

    body = CompletionBody(prompt=[1], logprobs=5)
    work = Completion(SimpleNamespace(llm=FakeLLM(), check_model=lambda name: "m"), body)
    entry = {7: Logprob(-3.0, 9, ""), 1: Logprob(-0.5, 1, "b"), 2: Logprob(-1.0, 2, ""), 3: Logprob(-2.0, 3, "b")}
    found = work._logprobs([(7, entry)], 0, "")
    assert found["token_logprobs"] == [-3.0] and found["top_logprobs"] == [{"": -3.0, "b": -0.5}]


class FakeLLM:
    inputs = SimpleNamespace(default_options=dict)


def test_token_ids(server, offline):
    text, params = "The capital of France is", SamplingParams(temperature=0, max_tokens=6)
    output = offline.generate(text, params, use_tqdm=False)[0]
    ids, wanted = output.prompt_token_ids, output.outputs[0].token_ids
    body = dict(prompt=text, max_tokens=6, temperature=0, return_token_ids=True)
    choice = complete(server, **body)["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, wanted)
    assert complete(server, **body | dict(max_tokens=0, echo=True))["choices"][0]["token_ids"] == []
    assert "token_ids" not in complete(server, **body | dict(return_token_ids=False))["choices"][0]
    parts = [part["choices"][0] for part in stream(server, "/v1/completions", body)]
    assert parts[0]["prompt_token_ids"] == ids and all(part["prompt_token_ids"] is None for part in parts[1:])
    assert sum((part["token_ids"] for part in parts), []) == wanted

    expected = offline.chat(CHAT, params, use_tqdm=False)[0]
    body = dict(max_tokens=6, temperature=0, return_token_ids=True, messages=CHAT)
    answer = chat(server, **body, n=1)
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["choices"][0]["token_ids"] == expected.outputs[0].token_ids
    parts = stream(server, "/v1/chat/completions", body)
    assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == [expected.prompt_token_ids]
    found = [part["choices"][0].get("token_ids", []) for part in parts]
    assert sum(found, []) == expected.outputs[0].token_ids


def test_echo_of_token_ids_that_are_cut(server, offline):
    ids = offline.get_tokenizer()("The capital of France is").input_ids
    body = dict(prompt=ids, max_tokens=1, echo=True, truncate_prompt_tokens=2, logprobs=0, temperature=0)
    whole = complete(server, **body)["choices"][0]
    assert whole["text"].startswith(" France is") and "".join(whole["logprobs"]["tokens"]) == whole["text"]
    parts = stream(server, "/v1/completions", body)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole["text"]


def test_what_needs_a_tokenizer_is_refused_without_one(tiny):
    server = RunningServer(tiny("mha"), skip_tokenizer_init=True, max_num_seqs=2, block_size=16)
    tool = dict(function=dict(name="f"))
    try:
        for path, body in (
            ("/v1/completions", dict(prompt="x")),
            ("/v1/completions", dict(prompt="x", add_special_tokens=False)),
            ("/v1/completions", dict(prompt=[1, 2], echo=True)),
            ("/v1/completions", dict(prompt=[1, 2], echo=True, stream=True)),
            ("/v1/completions", dict(prompt=[1, 2], echo=True, logprobs=1)),
            ("/v1/chat/completions", dict(messages=[dict(role="user", content="x")])),
            ("/v1/chat/completions", dict(messages=[dict(role="user", content="x")], tools=[tool])),
            ("/tokenize", dict(prompt="x")),
            ("/detokenize", dict(tokens=[1])),
        ):
            status, answer, _ = request(server, path, body)
            assert status == 400 and "no tokenizer" in answer["error"]["message"], (path, body, answer)
    finally:
        server.close()


def test_calls_that_are_cut_or_too_deep_are_text(server):
    from minivllm.server.chat import ChatCompletion

    tool = dict(function=dict(name="f"))
    body = ChatBody(messages=CHAT, tools=[tool], tool_choice="required")
    work = ChatCompletion(SimpleNamespace(llm=server.llm, options=None, check_model=lambda name: "m"), body)
    [call] = work._required_calls('[{"name": "f", "parameters": {"a": 1}}]')
    assert (call.name, call.arguments) == ("f", '{"a": 1}')
    for text in ('[{"name": "f", "par', '[{"name": "f", "parameters": ' + "[" * 5000):
        assert work._required_calls(text) == []


def test_time_per_token_of_several_outputs_is_that_of_one():
    from minivllm.server.metrics import RequestWatch, ServerMetrics

    metrics = ServerMetrics(SimpleNamespace(get_metrics=list), "m")
    watch = RequestWatch(metrics, 10.0)
    moments = RequestMetrics(10.0, 10.5, 11.0, 15.0)
    outputs = [CompletionOutput(i, "", [1] * 5, finish_reason="length") for i in range(4)]
    watch.see(RequestOutput("r", None, [1], outputs, True, moments))
    text = metrics.text().decode()
    assert 'vllm:request_time_per_output_token_seconds_sum{model_name="m"} 1.0' in text
    assert 'vllm:time_to_first_token_seconds_sum{model_name="m"} 1.0' in text
    assert 'vllm:request_generation_tokens_sum{model_name="m"} 20.0' in text


def test_an_engine_that_dies_ends_streams(tiny, capfd):
    server = RunningServer(tiny("mha"), skip_tokenizer_init=True, max_num_seqs=2, block_size=16)
    try:

        async def run():
            body = dict(prompt=[1, 2], max_tokens=250, ignore_eos=True, stream=True)
            async with (
                aiohttp.ClientSession() as session,
                session.post(server.url + "/v1/completions", json=body) as answer,
            ):
                await answer.content.readline()
                server.llm._process.kill()
                return (await answer.content.read()).decode()

        text = asyncio.run(run())
        assert "engine has failed" in text.split("data: ")[-2] and text.endswith("data: [DONE]\n\n")
        assert "minivllm: the engine has failed: its process is gone (status -9)" in capfd.readouterr().err
        figures = request(server, "/metrics")[1]
        assert 'vllm:num_requests_running{model_name="smol"} 0.0' in figures, figures
        assert 'vllm:prompt_tokens_total{model_name="smol"} 2.0' in figures
    finally:
        server.close()


@pytest.mark.parametrize("num_clients", [200])
def test_load(server, num_clients):
    """Many streams at once; a third of the clients hang up midway or send rubbish.  The others get all of theirs."""

    async def good(session, i):
        body = dict(prompt=f"Number {i % 7}:", max_tokens=12, ignore_eos=True, temperature=0)
        parts = await events(
            session, server.url + "/v1/completions", body | {"stream_options": {"include_usage": True}}
        )
        assert parts[-1]["usage"]["completion_tokens"] == 12
        assert parts[-2]["choices"][0]["finish_reason"] == "length"
        return i % 7, "".join(part["choices"][0]["text"] for part in parts[:-1])

    async def bad(session, i):
        if i % 2:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: nonsense\r\n\r\n{{{" * (i % 5))
            await writer.drain()
            writer.close()
            return None
        body = dict(prompt="Once", max_tokens=1500, ignore_eos=True, stream=True)
        async with session.post(server.url + "/v1/completions", json=body) as answer:
            await answer.content.readline()
        return None

    async def run():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
            return await asyncio.gather(*((bad if i % 3 == 2 else good)(session, i) for i in range(num_clients)))

    results = [result for result in asyncio.run(run()) if result is not None]
    assert len(results) == num_clients - num_clients // 3
    assert len(set(results)) == 7, "equal prompts have equal answers"
    server.wait_until_idle()


def start(model, *arguments):
    """The command `minivllm serve`, once it serves: (process, url)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minivllm", "serve", model, "--port", "0", "--device", "cpu", "--skip-tokenizer-init",
         "--max-model-len", "256", "--block-size", "16", *arguments],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("minivllm: serving"):
            return process, line.split(" on ")[1].split()[0]
    raise AssertionError(f"the server ended with status {process.wait()}")


def test_sigterm_loses_no_request(tiny):
    process, url = start(tiny("mha"), "--no-enable-prefix-caching", "--served-model-name", "tiny")

    async def run():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            body = dict(prompt=[1, 2, 3], max_tokens=250, ignore_eos=True)
            running = [asyncio.ensure_future(events(session, url + "/v1/completions", body)) for _ in range(40)]
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*running)

    for parts in asyncio.run(run()):
        assert parts[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait(10) == 0 and "requests that run have 30 s to end (Ctrl-C: at once)" in process.stderr.read()
    process.stderr.close()


def test_requests_that_outlast_the_grace_period_hear_of_it(tiny):
    process, url = start(
        tiny("mha"),
        "--grace-period",
        "1",
        "--max-model-len",
        "8000",
        "--hf-overrides",
        '{"max_position_embeddings": 8000}',
    )

    async def run():
        async with aiohttp.ClientSession() as session:
            body = dict(prompt=[1, 2, 3], max_tokens=7900, ignore_eos=True)
            stream = asyncio.ensure_future(session.post(url + "/v1/completions", json=body | dict(stream=True)))
            answer = asyncio.ensure_future(session.post(url + "/v1/completions", json=body))
            halves = []
            for path in ("/v1/completions", "/tokenize"):
                reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
                head = (
                    f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
                )
                writer.write(head.encode() + b"{")
                halves.append((reader, writer))
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            async with await answer as response, await stream as streamed:
                found = response.status, await response.json(), (await streamed.read()).decode()
            return *found, [(await reader.read()).decode() for reader, _ in halves]

    status, answer, streamed, halves = asyncio.run(run())
    assert status == 503 and "shutting down" in answer["error"]["message"]
    for half in halves:
        assert half.startswith("HTTP/1.1 503") and "the server is shutting down" in half
    assert "shutting down" in streamed.split("data: ")[-2] and streamed.endswith("data: [DONE]\n\n")
    assert process.wait(10) == 0 and "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_the_second_of_two_servers_that_load_says_so(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with app.bind("127.0.0.1", 0) as first:
        second = app.bind("127.0.0.1", first.getsockname()[1])
        first.listen()
        with pytest.raises(OSError, match="use another --port"):
            app.serve(second, nullcontext, None, 1)


def test_starting_mistakes_are_one_line(tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, message in (
            (["--port", port], "use another --port"),
            (["--host", "192.0.2.1"], "use another --host"),
            (["--tool-call-parser", "x", "--port", "0"], "--tool-call-parser must be one of"),
            (["--port", "0", "--max-model-len", "99999999"], "max_model_len"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "minivllm", "serve", tiny("mha"), "--device", "cpu", "--skip-tokenizer-init",
                 *arguments],
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            lines = done.stderr.strip().splitlines()
            assert done.returncode == 1 and message in lines[-1] and lines[-1].startswith("minivllm: error:")
