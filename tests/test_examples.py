"""The examples, run as a user would."""

import builtins
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# One thread: where other programs use the cores too, two that wait for each other are many times slower than one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(monkeypatch, capsys, name, *argv):
    """Standard output of an example, run in this process."""
    monkeypatch.setattr(sys, "argv", [name, *argv])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def chat(*argv, text):
    """`chat.py` with `text` piped into it."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "chat.py", "--temperature", "0", *argv],
        input=text,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_generate(monkeypatch, capsys):
    lines = run(monkeypatch, capsys, "generate.py").splitlines()
    assert len(lines) == 3 and lines[0].startswith("'1, 2, 3, 4, 5,' -> ' 6, 7, 8,")


def test_stream(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "stream.py", "--prompt", "What is the capital of France?")
    assert out == "The capital of France is Paris.\n"


@pytest.mark.parametrize("argv", [["--model", "/nowhere"], ["--max-tokens", "0"]])
def test_stream_mistakes(monkeypatch, capsys, argv):
    with pytest.raises(SystemExit, match="^stream.py: "):
        run(monkeypatch, capsys, "stream.py", *argv)


@pytest.mark.parametrize(
    "name, argv",
    [("chat.py", []), ("ray_batch.py", ["in", "out"]), ("ray_serve.py", [])],
)
def test_ctrl_c_in_the_first_moments(name, argv, monkeypatch, capsys):
    original = builtins.__import__

    def interrupted(module, *others):
        if module in ("minivllm", "ray"):
            raise KeyboardInterrupt
        return original(module, *others)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit, match="^130$"):
        run(monkeypatch, capsys, name, *argv)


@pytest.mark.parametrize("name", ["ray_batch.py", "ray_serve.py"])
def test_missing_ray_is_named(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=rf"^{name}: .*pip install"):
        run(monkeypatch, capsys, name, "in.jsonl", "out.jsonl")


def test_a_reader_that_has_gone_is_no_error():
    end, pipe = os.pipe()
    os.close(end)
    try:
        command = [sys.executable, EXAMPLES / "chat.py", "--max-tokens", "4"]
        done = subprocess.run(command, input=b"Hello!\n", stdout=pipe, stderr=subprocess.PIPE, env=ENVIRONMENT)
    finally:
        os.close(pipe)
    assert (done.returncode, done.stderr) == (0, b"")


def test_chat_piped():
    text = (
        "What is the capital of France?\n\nAnd of Italy?\n"
        "/stats\n/nonsense\n/help\n/reset\n/stats\n"
        "/system Answer in French.\nHello!\n" + "Tell me all about it. " * 40 + "\n/exit\nnever read\n"
    )
    done = chat("--max-tokens", "12", "--max-model-len", "160", text=text)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not re.search(r"[\x00-\x09\x0b-\x1f>]", done.stdout), "a prompt or escape codes in a pipe"
    lines = done.stdout.splitlines()
    assert "Paris" in lines[0] and "Rome" in lines[2]
    first, second = (re.search(r"(\d+) tokens, .* (\d+) of (\d+) prompt tokens cached", lines[i]) for i in (1, 3))
    assert int(first[2]) == 0 and 0 < int(second[2]) < int(second[3])
    assert re.search(r"tokens/s, first after \d+ ms", lines[3])
    stats = lines[4]
    assert f"answers: 2, of {int(first[1]) + int(second[1])} tokens" in stats
    assert f"prompts: {int(first[3]) + int(second[3])} tokens, {second[2]} " in stats
    assert "no /nonsense" in lines[5] and "/reset" in lines[6]
    assert "answers: 0, of 0 tokens" in done.stdout and "system prompt set" in done.stdout
    assert lines[-1].startswith("with this message the conversation has ") and "/reset" in lines[-1]


@pytest.mark.parametrize(
    "argv", [["--model", "/nowhere"], ["--max-tokens", "0"], ["--max-model-len", "1000000"], ["--temperature", "-1"]]
)
def test_chat_mistakes_are_one_line(argv, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="^chat.py: .*$"):
        run(monkeypatch, capsys, "chat.py", *argv)


def test_chat_survives_ctrl_c():
    """Ctrl-C stops the answer, at the prompt it gives up the line, and the chat goes on either way."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "chat.py", "--temperature", "0", "--max-tokens", "4000"],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    out = b""

    def read_until(pattern):
        nonlocal out
        while not re.search(pattern, out):
            assert select.select([ours], [], [], 60)[0], out
            out += os.read(ours, 4096)
        found, out = out, b""
        return found

    try:
        read_until(rb"/help lists the commands(?s:.)*> ")
        os.write(ours, b"Write a very long story about a fox and a bear.\n")
        read_until(rb"(?s)bear\.\r\n.+")
        process.send_signal(signal.SIGINT)
        read_until(rb"(?s)stopped; \d+ tokens, .*> ")
        os.write(ours, b"not to be")
        read_until(b"not to be")
        time.sleep(0.5)  # until the terminal waits for the next key, which alone a signal interrupts
        process.send_signal(signal.SIGINT)
        read_until(rb"> ")
        os.write(ours, b"/reset\nWhat is the capital of France?\n/stats\n")
        assert b"The capital of France is Paris." in read_until(rb"answers: 1, of 8 tokens")
        os.write(ours, b"/exit\n")
        assert process.wait(20) == 0 and b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        os.close(ours)


def test_ctrl_c_ends_a_chat_without_a_terminal():
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "chat.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )  # fmt: skip
    try:
        process.stdin.write(b"Tell me a long story about a fox and a crow.\n")
        process.stdin.flush()
        os.read(process.stdout.fileno(), 4096)  # of an answer
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130 and b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
