"""The clients that people have, against the server: the openai package, lm-eval, llm."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from minivllm import LLM, SamplingParams

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(openai, server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        yield client


def test_openai_chat_and_completions(client):
    assert [model.id for model in client.models.list()] == ["smol"] == [client.models.retrieve("smol").id]
    answer = client.chat.completions.create(model="smol", messages=CHAT, temperature=0, n=1, logprobs=True)
    assert "Paris" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    text = ""
    with client.chat.completions.create(
        model="smol", messages=CHAT, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        for chunk in chunks:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    assert text == answer.choices[0].message.content and chunk.usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunk.usage.prompt_tokens_details}
    )
    done = client.completions.create(
        model="smol", prompt=["1, 2, 3,", "Once"], max_tokens=4, temperature=0, logprobs=1, echo=True,
        extra_body={"top_k": 1, "ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in done.choices] == [0, 1] and done.choices[0].text.startswith("1, 2, 3, 4")
    assert len(done.choices[0].logprobs.tokens) == len(done.choices[0].logprobs.token_logprobs)


def test_openai_errors(client, openai):
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.chat.completions.create(model="gpt-9", messages=CHAT)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="smol", prompt="x", temperature=-1)
    assert caught.value.type == "invalid_request_error" and caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="beams is not supported"):
        client.completions.create(model="smol", prompt="x", extra_body={"beams": 3})


def test_openai_async(openai, server):
    async def run():
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="any") as client:

            async def one(i):
                chunks = await client.chat.completions.create(
                    model="smol", messages=CHAT, stream=True, max_completion_tokens=20, seed=i
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            texts = await asyncio.gather(*map(one, [1, 2, 1, 3]))
            assert texts[0] == texts[2] and all(texts)
            stream = await client.completions.create(
                model="smol", prompt="Once", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(run())
    server.wait_until_idle()


def test_openai_tools_and_parsed_answers(client):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=10)
        age: int = Field(le=99)

    messages = [{"role": "user", "content": "Ann is 31 years old."}]
    parsed = client.chat.completions.parse(
        model="smol", messages=messages, response_format=Person, temperature=0, max_completion_tokens=60
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    tool = {"type": "function", "function": {"name": "save", "parameters": Person.model_json_schema()}}
    answer = client.chat.completions.create(
        model="smol", messages=messages, tools=[tool], tool_choice="required", temperature=0, max_tokens=80,
        parallel_tool_calls=False,
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "save" and Person.model_validate_json(call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "saved"}
    client.chat.completions.create(
        model="smol", messages=[*messages, answer.choices[0].message, result], tools=[tool], max_tokens=3,
        tool_choice="none",
    )  # fmt: skip


def test_lm_eval(server, embedded, tmp_path):
    """Log likelihoods of a local task through `local-completions`: those that the engine itself finds."""
    pytest.importorskip("lm_eval")
    questions = [("The capital of France is", [" Paris", " banana"]), ("1, 2, 3, 4,", [" 5", " seven houses"])]
    lines = [json.dumps(dict(question=q, choices=c, answer=0)) for q, c in questions]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(f"""
task: tiny_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    model_args = f"model=smol,base_url={server.url}/v1/completions,tokenizer={embedded},num_concurrent=2,max_retries=1"
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model_args,
         "--tasks", "tiny_task", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"),
         "--log_samples"],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("samples_tiny_task*.jsonl")
    found = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with LLM(embedded, device="cpu", max_model_len=512) as llm:
        tokenizer = llm.get_tokenizer()
        for sample, (question, choices) in zip(found, questions, strict=True):
            assert sample["acc"] == 1.0
            for response, choice in zip(sample["resps"], choices, strict=True):
                ids, num_context = tokenizer(question + choice).input_ids, len(tokenizer(question).input_ids)
                entries = llm.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
                expected = sum(entries[i][ids[i]].logprob for i in range(num_context, len(ids)))
                assert float(response[0][0]) == pytest.approx(expected, abs=1e-2)


def test_llm_command(server, tmp_path):
    """The command `llm`, which reads servers out of a YAML file."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f'- model_id: smol\n  model_name: smol\n  api_base: "{server.url}/v1"\n  api_key_name: none\n'
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
    for options in ([], ["--no-stream"]):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "smol", "-o", "temperature", "0", *options, CHAT[0]["content"]],
            capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        assert done.returncode == 0 and "Paris" in done.stdout, done.stderr
