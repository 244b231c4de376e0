"""The command line, as a user meets it."""

import contextlib
import http.server
import os
import re
import subprocess
import sys
import threading
from dataclasses import fields
from types import SimpleNamespace

import pytest

from minivllm import __version__
from minivllm.chat import Chat, RemoteModel
from minivllm.cli import main
from minivllm.config import NO_MEANING_HERE, NOT_SUPPORTED, EngineConfig
from minivllm.vllm_flags import SERVER_FLAGS


def run(*arguments, text="", timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-m", "minivllm", *arguments], input=text, capture_output=True, text=True, timeout=timeout,
        env=os.environ | environment,
    )  # fmt: skip


def test_help_names_everything(capsys):
    for arguments, words in (
        (["--help"], ["serve", "chat", "generate", "bench"]),
        (
            ["serve", "--help"],
            ["--port", "--api-key", *("--" + f.name.replace("_", "-") for f in fields(EngineConfig))],
        ),
        (["chat", "--help"], ["--url", "--system"]),
        (["generate", "--help"], ["--prompt", "--max-tokens"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        text = capsys.readouterr().out
        assert all(word in text for word in words), text
    assert main(["bench", "--help"]) == 0 and main(["bench"]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in ("throughput", "latency", "serve", "kernels"))
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "message"),
    [("nonsense", "there is no benchmark 'nonsense'"), ("--shape", "name a benchmark before --shape")],
)
def test_benchmarks_are_named(first, message, capsys):
    assert main(["bench", first, "llama2-7b"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error == f"minivllm bench: error: {message}; there are throughput, latency, serve, kernels\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--temperature", "-1", "--prompt", "x"], "temperature must be"),
        (["generate", "no/such/folder/at/all", "--prompt", "x"], "no/such/folder"),
        (["chat", "--url", "http://127.0.0.1:9"], "does not answer"),
        (["chat", "--top-p", "3"], "top_p must be"),
        (["chat", "--url", "http://127.0.0.1:9", "--block-size", "16"], "--block-size is the server's to choose"),
        (["chat", "--skip-tokenizer-init"], "--skip-tokenizer-init: a chat needs a tokenizer"),
        (["serve", "--port", "0", "--enable-lora"], "enable_lora=True is not supported: merge the adapter"),
        (["generate", "-pp", "2", "--prompt", "x"], "pipeline_parallel_size=2 is not supported: take tensor_parallel"),
        (["serve", "--ssl-keyfile", "x"], "serve: ssl_keyfile='x' is not supported: let a proxy"),
        (["serve", "--reasoning_parser", "deepseek_r1"], "serve: reasoning_parser='deepseek_r1' is not supported"),
        (["serve", "a", "--model", "b"], "which model is it, a or --model b"),
        (["serve", "--host", "300.1.1.1"], "cannot serve on|Name or service|not known"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("minivllm: error: ")
    assert re.search(message, error), error


def test_a_lost_worker_is_one_line(monkeypatch, capsys):
    from minivllm import LLM
    from minivllm.child_process import WorkerError

    def lost(*_, **__):
        raise WorkerError("worker 0 has ended")

    monkeypatch.setattr(LLM, "__init__", lost)
    for arguments in (["generate", "--prompt", "x"], ["bench", "throughput"]):
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].endswith("error: worker 0 has ended") and "Traceback" not in error[0]


def test_wrong_options_are_named(capsys):
    for arguments in (["serve", "--speculative-config", "ngram"], ["serve", "--max-num-seqs", "many"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert arguments[1] in capsys.readouterr().err


def served(monkeypatch, *arguments, **environment):
    """(what AsyncLLM is given, ServerOptions) when `minivllm serve` has these arguments."""
    from minivllm import async_llm
    from minivllm.server import app

    found = []
    for name in ("MINIVLLM_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(async_llm, "AsyncLLM", lambda model, **given: SimpleNamespace(model=model, given=given))

    def serve(listener, load, make_options, *_):
        with listener:
            llm = load()
            found.extend([llm, make_options(llm)])

    monkeypatch.setattr(app, "serve", serve)
    assert main(["serve", "--port", "0", *arguments]) == 0
    return found


def test_keys_of_the_environment(monkeypatch):
    assert served(monkeypatch)[1].api_keys == []
    assert served(monkeypatch, VLLM_API_KEY="a")[1].api_keys == ["a"]
    assert served(monkeypatch, VLLM_API_KEY="a", MINIVLLM_API_KEY="b")[1].api_keys == ["b"]
    assert served(monkeypatch, "--api-key", "c", VLLM_API_KEY="a")[1].api_keys == ["c"]


def test_command_lines_for_vllm(monkeypatch):
    with pytest.warns(UserWarning, match="has no effect") as told:
        llm, options = served(
            monkeypatch, "--model", "m", "-tp", "2", "--gpu_memory_utilization", "0.5", "--max_model_len=100",
            "--enable-chunked-prefill", "--no-enable-prefix-caching", "--swap-space", "4", "--hf_overrides",
            '{"a_b": 1}', "--pipeline-parallel-size", "1", "--task", "generate", "--download-dir", "None",
            "--trust-remote-code", "--cudagraph-capture-sizes", "1", "2", "--enable-auto-tool-choice",
            "--disable-log-requests", "--no-enable-log-requests", "--uvicorn-log-level", "info",
            "--chat-template-content-format", "string", "--reasoning-parser", "",
        )  # fmt: skip
    assert llm.model == "m" and llm.given == dict(
        tensor_parallel_size=2, gpu_memory_utilization=0.5, max_model_len=100, enable_chunked_prefill=True,
        enable_prefix_caching=False, swap_space=4, hf_overrides={"a_b": 1}, pipeline_parallel_size=1, task="generate",
        trust_remote_code=True, cudagraph_capture_sizes=[1, 2],
    )  # fmt: skip
    assert options.chat_template_content_format == "string"
    names = ("enable_auto_tool_choice", "disable_log_requests", "enable_log_requests", "uvicorn_log_level")
    assert sorted(str(warning.message).split()[0] for warning in told) == sorted(names)
    assert served(monkeypatch, "m", "--model", "m", "--enable-chunked-prefill")[0].model == "m"
    assert served(monkeypatch, "--enable-chunked-prefill", "m")[0].model == "m", "switches take no value"


def test_all_that_llm_answers_is_an_option(monkeypatch, capsys):
    for name in (*NO_MEANING_HERE, *NOT_SUPPORTED, *SERVER_FLAGS):
        flag = "--" + name.replace("_", "-")
        monkeypatch.setattr("minivllm.cli._serve", lambda args: None)
        try:
            main(["serve", flag])
        except SystemExit:
            assert "expected" in (error := capsys.readouterr().err) and "argument" in error
            assert main(["serve", flag, "x"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert "swap-space" not in (text := capsys.readouterr().out) and "uvicorn" not in text
    for arguments, message in (
        (["--swap-space", "4", "--load-format", "x"], "minivllm: swap_space has no effect: preempted requests are"),
        (["--no-enable-lora", "--load-format", "x"], ""),
    ):
        done = run("generate", *arguments, text="x")
        assert done.returncode == 1 and message in done.stderr and "load_format must be one of" in done.stderr


def test_generate(embedded):
    done = run("generate", embedded, "--temperature", "0", "--max-tokens", "4", "--device", "cpu",
               "--max-model-len", "64", "--prompt", "1, 2, 3,", "--prompt", "The capital of France is")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "--- 1, 2, 3,\n 4, \n--- The capital of France is\n Paris.\n\n\n"
    piped = run("generate", embedded, "--temperature", "0", "--max-tokens", "4", "--device", "cpu", "--max-model-len",
                "64", text="The capital of France is")  # fmt: skip
    assert "Paris" in piped.stdout and piped.returncode == 0
    lines = run("generate", embedded, "--temperature", "0", "--max-tokens", "4", "--device", "cpu", "--max-model-len",
                "64", text="The capital of France is\n")  # fmt: skip
    assert lines.stdout == piped.stdout, "the line break at the end is the shell's"


def test_a_reader_that_has_gone_is_no_error(embedded):
    end, pipe = os.pipe()
    os.close(end)
    command = [sys.executable, "-m", "minivllm", "generate", "--device", "cpu", "--prompt", "a", "--max-tokens", "1"]
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, b"")


def test_wrong_standard_input():
    done = subprocess.run([sys.executable, "-m", "minivllm", "generate"], input=b"a\xff", capture_output=True)
    assert done.returncode == 1 and done.stderr == b"minivllm: error: standard input is not UTF-8 (byte 1)\n"
    done = run("generate", "--skip-tokenizer-init", text="x")
    assert done.returncode == 1 and "leave --skip-tokenizer-init out" in done.stderr
    for arguments in (["--port", "99999"], ["--allowed-origins", "[1]"]):
        done = run("serve", *arguments)
        assert done.returncode == 2 and f"argument {arguments[0]}: must be" in done.stderr
        assert len(done.stderr.splitlines()) == 2, "usage is a line"


def test_chat_with_a_server(server):
    lines = "What is the capital of France?\nAnd of Italy?\n/stats\n/nothing\n/exit now\n"
    done = run("chat", "--url", server.url, "--temperature", "0", "--max-tokens", "30", text=lines)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "Rome" in done.stdout
    assert "/exit stands alone" in done.stdout
    assert "answers: 2" in done.stdout and "there is no /nothing" in done.stdout and " cached" in done.stdout
    wrong = run("chat", "gpt-9", "--url", server.url + "/v1", text="Hi\n")
    assert wrong.returncode == 1 and "the server has no model 'gpt-9'; it has smol" in wrong.stderr
    refused = run("chat", "--url", server.url, "--system", "x " * 3000, text="Hi\n")
    assert "the server says HTTP 400" in refused.stdout and "max_model_len" in refused.stdout
    assert refused.returncode == 1 and refused.stderr == "minivllm: error: not one question was answered\n"


def test_chat_in_this_process(embedded):
    done = run("chat", embedded, "--device", "cpu", "--temperature", "0", "--max-tokens", "20",
               "--max-model-len", "512", text="What is the capital of France?\n")  # fmt: skip
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr


def test_bench_latency(tiny, tmp_path):
    done = run("bench", "latency", "--model", tiny("mha"), "--batch-size", "2", "--input-len", "5", "--output-len", "4",
               "--num-iters", "3", "--num-iters-warmup", "1", "--json", str(tmp_path / "out.json"))  # fmt: skip
    assert done.returncode == 0 and "latency_mean_s" in done.stdout, done.stderr
    assert '"latency_p99_s"' in (tmp_path / "out.json").read_text()


@contextlib.contextmanager
def server_that_answers(models, stream, status=200):
    """The URL of one that knows nothing but these two answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(models)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(stream)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()


MODELS = b'{"data": [{"id": "m", "max_model_len": 99}]}'
PIECE, LAST = b'data: {"choices":[{"delta":{"content":"Hi"}}]}\n\n', b'data:{"choices":[{"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":null,"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("stream", "shown"),
    [
        (PIECE * 2 + LAST + USAGE, "HiHi\n2 tokens, "),
        (PIECE + LAST, "Hi\nfirst after "),
        (PIECE + USAGE, "Hi\n2 tokens, "),
        (PIECE * 2, "HiHi\nthe server broke off in the middle of its answer, which is forgotten"),
        (PIECE + b'data: {"error": "boom"}\n\n', "Hi\nthe server reported an error: boom"),
        (b"data: 3\n\n", "the server sent an event that is no JSON object: 3"),
    ],
)
def test_chat_with_servers_of_all_kinds(stream, shown, capsys):
    with server_that_answers(MODELS, stream) as url:
        chat = Chat(RemoteModel(url, None, None), None, {})
        chat.answer("?")
        assert capsys.readouterr().out.startswith(shown)
        assert len(chat.turns) == (2 if LAST in stream or USAGE in stream else 0)


@pytest.mark.parametrize("models", [b'{"detail": "x"}', b"[]", b"<html>", b'{"data": []}', b'{"data": [1]}'])
def test_chat_with_what_is_no_server(models):
    with server_that_answers(models, b"") as url, pytest.raises(ValueError, match=r"/v1/models names no model"):
        RemoteModel(url, None, None)
    for url in ("http://localhost:80a0", "http://local host"):
        with pytest.raises(ValueError, match="does not answer"):
            RemoteModel(url, None, None)


def test_what_helps_where_a_server_cannot_be_asked():
    with (
        server_that_answers(b"{}", b"", status=401) as url,
        pytest.raises(ValueError, match="HTTP 401.*; give its key with --api-key"),
    ):
        RemoteModel(url, None, None)
    for url in ("127.0.0.1:8000", ""):
        with pytest.raises(ValueError, match="--url must begin with http:// or https://"):
            RemoteModel(url, None, None)
    for key in ("ké", "k\n"):
        with pytest.raises(ValueError, match="--api-key .* has characters that an HTTP header cannot hold"):
            RemoteModel("http://127.0.0.1:9", None, key)


def test_a_terminal_that_lacks_characters():
    done = run("generate", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "\\u2026" in done.stdout
