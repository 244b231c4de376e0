"""AsyncLLM: the outputs of LLM, many callers at once, and no one left waiting when something ends."""

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minivllm import LLM, RequestOutputKind, SamplingParams
from minivllm.async_llm import AsyncLLM, EngineDeadError
from minivllm.child_process import start_process
from minivllm.engine_process import pack, unpack
from minivllm.output_stream import OutputStream, merge
from minivllm.sampling_params import StructuredOutputsParams

PROMPTS = [[1 + i, 2, 3 + 2 * i, 4] * (1 + i % 3) for i in range(12)]
OPTIONS = dict(device="cpu", skip_tokenizer_init=True, block_size=16, max_num_seqs=6)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny):
    with AsyncLLM(tiny("gqa-tied"), **OPTIONS) as llm:
        yield llm


async def last(outputs):
    async for output in outputs:
        final = output
    return final


async def idle(llm):
    """Wait until the engine has nothing left to do, and check that it lost nothing."""
    for _ in range(200):
        await llm.check_integrity()
        if not llm._streams:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("requests are left over")


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_same_outputs_as_llm(tiny, llm, kind):
    params = [
        SamplingParams(temperature=0, max_tokens=9, logprobs=2, prompt_logprobs=1),
        SamplingParams(seed=3, max_tokens=11, n=2, logprobs=1, flat_logprobs=True),
    ]
    with LLM(tiny("gqa-tied"), **OPTIONS) as offline:
        expected = offline.generate(PROMPTS, params * 6, use_tqdm=False)

    async def one(prompt, params):
        params = SamplingParams(**{name: getattr(params, name) for name in ("temperature", "max_tokens", "logprobs",
                                "prompt_logprobs", "flat_logprobs", "seed", "n")}, output_kind=kind)  # fmt: skip
        outputs = [output async for output in llm.generate(prompt, params)]
        if kind == RequestOutputKind.DELTA:
            assert len(outputs) > 1
            assert params.prompt_logprobs is None or [o.prompt_logprobs is not None for o in outputs].count(True) == 1
            return merge(outputs)
        assert kind == RequestOutputKind.CUMULATIVE or len(outputs) == 1
        return outputs[-1]

    async def run():
        found = await asyncio.gather(*map(one, PROMPTS, params * 6))
        await idle(llm)
        return found

    for found, output in zip(asyncio.run(run()), expected, strict=True):
        assert found.finished and found.prompt_token_ids == output.prompt_token_ids
        if kind == RequestOutputKind.CUMULATIVE and len(output.outputs) > 1:
            continue  # an output carries those of the n that have news
        key = dict(key=lambda completion: completion.index)
        assert sorted(found.outputs, **key) == output.outputs
        assert found.prompt_logprobs == output.prompt_logprobs


def test_packing():
    with_all = merge(
        [unpack(("id", True, 3, [(0, "text", [1], -0.5, None, "stop", 7)], (1.0, 2, 3, 4, 5), (None, [[2]])), "p", [9])]
    )
    again = unpack(pack(with_all), "p", [9])
    assert again == with_all and with_all.metrics.num_preemptions == 5
    assert again.prompt_token_id_logprobs == [[2]]  # which == leaves out, since they are an array
    later = unpack(("id", True, 3, [], (1.0, 2, 3, 4, 5), (None, None)), "p", [9])
    assert merge([again, later]).prompt_token_id_logprobs == [[2]]


def test_a_reader_that_falls_behind_gets_all(llm):
    async def run():
        params = SamplingParams(temperature=0, max_tokens=30, output_kind=RequestOutputKind.DELTA)
        stream = await llm.add_request(PROMPTS[0], params)
        while not stream._pending or not stream._pending[-1][1]:
            await asyncio.sleep(0.01)
        outputs = [output async for output in stream]
        assert len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 30

    asyncio.run(run())


def test_wrong_input_is_refused_and_others_go_on(llm):
    async def run():
        good = asyncio.ensure_future(last(llm.generate(PROMPTS[1], LONG, "good")))
        await asyncio.sleep(0.01)
        for prompt, params, message in (
            ([], None, "the prompt is empty"),
            ([1] * 300, None, "max_model_len is 256"),
            ([10**6], None, "outside the vocabulary"),
            ("text", None, "skip_tokenizer_init"),
            ([1], SamplingParams(logprobs=50), "max_logprobs"),
            ([1], "fast", "must be a SamplingParams"),
        ):
            with pytest.raises(ValueError, match=message):
                await last(llm.generate(prompt, params))
        with pytest.raises(ValueError, match="request_id 'good' is in use"):
            await last(llm.generate([1], LONG, "good"))
        assert len((await good).outputs[0].token_ids) == 200
        await idle(llm)

    asyncio.run(run())


def test_a_refused_request_leaves_another_of_its_name_alone(llm, monkeypatch):
    """One that takes the name between the refusal and the moment in which the refused caller wakes."""
    accept, params, others = llm._accept, SamplingParams(max_tokens=2), []

    def refuse(name, wrong):
        accept(name, wrong)
        if not others:
            others.append(OutputStream(llm, name, None, [1, 2], params))
            llm._streams[name] = others[0]
            llm._send("add", name, [1, 2], pickle.dumps(params), None)

    async def run():
        monkeypatch.setattr(llm, "_accept", refuse)
        with pytest.raises(ValueError, match="max_model_len is 256"):
            await llm.add_request([1] * 300, LONG, "again")
        await asyncio.wait_for(others[0].accepted, 20)
        assert (await asyncio.wait_for(last(others[0]), 20)).finished
        await idle(llm)

    asyncio.run(run())


def test_abort_and_leaving_early(llm):
    async def run():
        aborted = asyncio.ensure_future(last(llm.generate(PROMPTS[2], LONG, "a")))
        cancelled = asyncio.ensure_future(last(llm.generate(PROMPTS[3], LONG, "b")))
        await asyncio.sleep(0.05)
        await llm.abort("a")
        await llm.abort("unknown")
        output = await aborted
        assert output.finished and output.outputs[0].finish_reason == "abort"
        cancelled.cancel()
        async for output in llm.generate(PROMPTS[4], LONG):
            if len(output.outputs[0].token_ids) > 2:
                break
        await idle(llm)
        assert not llm._streams

    asyncio.run(run())


def test_calls_and_metrics(llm):
    async def run():
        await last(llm.generate([5] * 40, SamplingParams(max_tokens=2)))
        assert (await last(llm.generate([5] * 40, SamplingParams(max_tokens=2)))).num_cached_tokens == 32
        assert await llm.reset_prefix_cache() is True
        assert (await last(llm.generate([5] * 40, SamplingParams(max_tokens=2)))).num_cached_tokens == 0

    asyncio.run(run())
    values = {metric.name: metric.value for metric in llm.get_metrics()}
    assert values["vllm:generation_tokens"] >= 6 and values["vllm:num_requests_running"] == 0


def test_a_dead_engine_is_an_error_for_everybody(tiny):
    with AsyncLLM(tiny("mha"), **OPTIONS) as llm:

        async def run():
            waiting = [asyncio.ensure_future(last(llm.generate(prompt, LONG))) for prompt in PROMPTS]
            await asyncio.sleep(0.1)
            llm._process.send_signal(signal.SIGKILL)
            start = time.monotonic()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert time.monotonic() - start < 5
            assert any(isinstance(result, EngineDeadError) for result in results)
            assert llm.errored
            with pytest.raises(EngineDeadError, match="its process is gone"):
                await last(llm.generate([1], LONG))
            with pytest.raises(EngineDeadError):
                await llm.check_integrity()

        asyncio.run(run())


def test_an_answer_that_cannot_be_taken_is_an_error_for_everybody(tiny):
    with AsyncLLM(tiny("mha"), **OPTIONS) as llm:

        async def run():
            waiting = asyncio.ensure_future(last(llm.generate([1], LONG)))
            await asyncio.sleep(0.1)
            llm._send("call", 999, "check_integrity")  # nobody's
            with pytest.raises(EngineDeadError, match="cannot be read: KeyError"):
                await asyncio.wait_for(waiting, 10)
            assert llm.errored
            with pytest.raises(EngineDeadError, match="cannot be read: KeyError"):
                await llm.check_health()

        asyncio.run(run())


def test_outputs_that_cannot_be_sent_are_an_error_for_everybody(tiny, tmp_path, monkeypatch):
    (tmp_path / "mute_engine.py").write_text(
        "import minivllm.engine_process as e\nmain, e.collect = e.main, lambda scheduler: lambda: None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("minivllm.async_llm.start_process", lambda module, *rest: start_process("mute_engine", *rest))
    with AsyncLLM(tiny("mha"), **OPTIONS) as llm, pytest.raises(EngineDeadError, match="its process is gone"):
        asyncio.run(asyncio.wait_for(last(llm.generate([1], LONG)), 20))


def test_the_model_is_loaded_while_the_tokenizer_is(tiny, monkeypatch):
    started = []

    def start(*arguments):
        started.append(start_process(*arguments))
        return started[-1]

    def load_tokenizer(files):
        assert started[0][1].poll(60)  # the engine says that it is ready

    monkeypatch.setattr("minivllm.async_llm.start_process", start)
    monkeypatch.setattr("minivllm.loading.resolve.ModelFiles.load_tokenizer", load_tokenizer)
    with AsyncLLM(tiny("mha"), **OPTIONS) as llm:
        assert len(asyncio.run(last(llm.generate([1, 2], SamplingParams(max_tokens=3)))).outputs[0].token_ids) == 3


def test_an_engine_that_ends_at_once_is_an_error(tiny, tmp_path, monkeypatch):
    (tmp_path / "no_engine.py").write_text("raise SystemExit(7)")
    monkeypatch.syspath_prepend(tmp_path)

    def start(module, *rest):
        process, connection = start_process("no_engine", *rest)
        process.wait(60)  # so that nothing can be sent to it
        return process, connection

    monkeypatch.setattr("minivllm.async_llm.start_process", start)
    with pytest.raises(EngineDeadError, match="ended with status 7"):
        AsyncLLM(tiny("mha"), **OPTIONS)


def test_an_engine_that_nobody_has_any_more_ends(tiny):
    llm = AsyncLLM(tiny("mha"), **OPTIONS)
    asyncio.run(last(llm.generate([1, 2], SamplingParams(max_tokens=3))))
    process = llm._process
    del llm
    gc.collect()
    assert process.wait(10) == 0


def test_no_step_waits_for_a_grammar_to_be_compiled(embedded, tmp_path, monkeypatch):
    (tmp_path / "slow_engine.py").write_text(
        "import time, minivllm.engine_process as e, minivllm.engine.grammar as g\n"
        "main, compile = e.main, g.GrammarCompiler._compile\n"
        "g.GrammarCompiler._compile = lambda *arguments: time.sleep(2) or compile(*arguments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("minivllm.async_llm.start_process", lambda module, *rest: start_process("slow_engine", *rest))
    asked = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(regex="["))
    endless = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"), max_tokens=1000)

    async def run():
        with AsyncLLM(embedded, device="cpu", kv_cache_memory_bytes=1 << 26) as llm:
            steady = await llm.add_request([1, 2, 3], LONG)
            answer = asyncio.ensure_future(last(llm.generate([1], asked)))
            refused = asyncio.ensure_future(last(llm.generate([1], wrong)))
            given_up = asyncio.ensure_future(last(llm.generate([1], endless)))
            ended = asyncio.ensure_future(last(llm.generate([1], endless, request_id="ended")))
            await asyncio.sleep(0.3)
            given_up.cancel()
            await llm.abort(["ended"])
            assert (await last(llm.generate([1], SamplingParams(max_tokens=2)))).finished
            assert not (answer.done() or refused.done() or ended.done()), "other requests go by"
            async for output in steady:
                num_tokens = len(output.outputs[0].token_ids)
                if answer.done():
                    break
            await steady.aclose()
            assert (await answer).outputs[0].text in ("yes", "no") and num_tokens > 10
            with pytest.raises(ValueError, match="structured_outputs"):
                await refused
            assert (await ended).outputs[0].finish_reason == "abort"
            await idle(llm)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_functions_that_the_engine_cannot_import_harm_nobody_else(tiny, tmp_path, monkeypatch):
    """Here of a module that is found in this process alone."""
    (tmp_path / "only_here.py").write_text("def keep(token_ids, logits):\n    return logits\n")
    with AsyncLLM(tiny("mha"), **OPTIONS) as llm:
        monkeypatch.syspath_prepend(str(tmp_path))
        import only_here

        async def run():
            with pytest.raises(ValueError, match="No module named 'only_here'"):
                await llm.add_request([1, 2], SamplingParams(logits_processors=[only_here.keep]))
            params = SamplingParams(max_tokens=3)
            assert (await last(llm.generate([1, 2], params, lora_request=None, priority=0))).finished
            with pytest.raises(ValueError, match="generate: priority=1 is not supported"):
                await last(llm.generate([1, 2], params, priority=1))
            await llm.check_health()

        asyncio.run(run())


def test_closing_an_old_stream_leaves_a_newer_one_of_its_name_alone(llm):
    async def run():
        old = await llm.add_request([1, 2], SamplingParams(max_tokens=1), "a")
        await idle(llm)
        new = await llm.add_request([1, 2], SamplingParams(max_tokens=60, ignore_eos=True), "a")
        await old.aclose()
        output = await last(new)
        assert output.outputs[0].finish_reason == "length"
        await idle(llm)

    asyncio.run(run())


def test_requests_of_a_closed_event_loop_are_forgotten(llm):
    asyncio.run(llm.add_request([1, 2], SamplingParams(max_tokens=200, ignore_eos=True), "left"))

    async def run():
        for _ in range(100):
            if not llm._streams:
                break
            await asyncio.sleep(0.05)
        await idle(llm)
        assert (await last(llm.generate([1, 2], SamplingParams(max_tokens=2), "left"))).finished

    asyncio.run(run())


def test_a_failing_step_reaches_the_caller_with_its_traceback(tiny):
    with AsyncLLM(tiny("mha"), **OPTIONS) as llm:
        params = SamplingParams(max_tokens=5, logits_processors=[end_the_engine])
        with pytest.raises(EngineDeadError, match="SystemExit: a mishap"):
            asyncio.run(last(llm.generate([1, 2], params)))
        assert llm._process.wait(5) == 1


def end_the_engine(token_ids, logits):
    raise SystemExit("a mishap")  # not an Exception, as which it would be the request's own


def test_a_function_that_fails_is_an_error_of_its_own_request(llm):
    async def run():
        others = [asyncio.ensure_future(last(llm.generate([i], SamplingParams(max_tokens=30)))) for i in range(3)]
        params = SamplingParams(max_tokens=5, logits_processors=[fail], n=2, seed=1)
        with pytest.raises(ValueError, match=r"(?s)logits_processors: .*fail.*a function that fails"):
            await last(llm.generate([1, 2], params))
        assert [(await other).outputs[0].finish_reason for other in others] == ["length"] * 3
        await idle(llm)

    asyncio.run(run())


def fail(token_ids, logits):
    if len(token_ids) == 2:
        raise RuntimeError("a function that fails")
    return logits


def test_an_engine_that_cannot_start_says_why(tiny):
    with pytest.raises(ValueError, match="max_model_len"):
        AsyncLLM(tiny("mha"), max_model_len=10**6, device="cpu", skip_tokenizer_init=True)
    with pytest.raises(ValueError, match="model must be a folder"):
        AsyncLLM(3)
    with pytest.raises(ValueError, match="unexpected|unknown|no argument"):
        AsyncLLM(tiny("mha"), max_num_sequences=3, skip_tokenizer_init=True)
    for wrong in (dict(block_size=17.5), dict(load_format="gguf"), dict(trust_remote_code=True, x=1)):
        with pytest.raises(ValueError, match="block_size|gguf|argument 'x'"):  # before it is looked for
            AsyncLLM("no-one/has-this", **wrong)


def test_the_engine_ends_with_its_parent(tiny):
    code = f"""
import os, time
from minivllm.async_llm import AsyncLLM
llm = AsyncLLM({tiny("mha")!r}, device="cpu", skip_tokenizer_init=True)
print(llm._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if (state := Path(f"/proc/{child}/stat").read_text().rsplit(")")[1].split()[0]) == "Z":
            return  # ended; nobody has asked for its status
        time.sleep(0.05)
    raise AssertionError(f"the engine's process is still there ({state})")


def test_an_engine_that_is_about_to_start_ends_with_its_parent(tmp_path, monkeypatch):
    (tmp_path / "slow_engine.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        "import minivllm.llm\n"
        "from minivllm.engine_process import main\n"
        "minivllm.llm.LLM.__init__ = lambda self, model: (Path(model).touch(), time.sleep(60))[1]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    process, connection = start_process("slow_engine")
    connection.send((str(tmp_path / "begun"), {}))
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    connection.close()
    assert process.wait(5) == 0


def test_its_process_takes_no_modules_from_the_folder_it_is_in(tmp_path):
    for folder in ("here", "script"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "minivllm.py").write_text("raise SystemExit(7)")
    (tmp_path / "script" / "run.py").write_text(
        "from minivllm.child_process import start_process\n"
        "process, connection = start_process('minivllm.engine_process')\n"
        "connection.close()\n"
        "print(process.wait(60))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, tmp_path / "script" / "run.py"],
        cwd=tmp_path / "here", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr
