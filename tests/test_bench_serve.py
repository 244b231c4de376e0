"""`bench serve`: its figures are those of a server whose timing is known, its load is the one asked for."""

import argparse
import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from array import array

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

pytest.importorskip("aiohttp")
from aiohttp import web

from minivllm.bench import serve, serve_client, serve_plot, serve_workload
from minivllm.bench.serve_metrics import (
    RequestRecord,
    compute_figures,
    concurrency,
    format_table,
    tokens_per_bin,
)

TTFT, GAP = 0.05, 0.01  # seconds, of the server below


class Server:
    """Answers with as many tokens as asked for, the first after TTFT and one each GAP.  Runs in a thread."""

    def __init__(self):
        self.bodies, self.headers, self.num_running, self.peak = [], [], 0, 0
        self.sends_usage, self.piece_len, self.fails = True, None, {}  # fails: by the request's number, how
        self.models, self.models_status = [{"id": "first"}, {"id": "second"}], 200
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self, port=0):
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(port), self._loop).result()
        return self

    def stop(self):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self, port):
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def _models(self, request):
        return web.json_response({"data": self.models}, status=self.models_status)

    async def _generate(self, request):
        begin = time.perf_counter()
        body = await request.json()
        fails = self.fails.get(len(self.bodies))
        self.bodies.append(body)
        self.headers.append(request.headers)
        if isinstance(fails, int):
            return web.json_response({"error": {"message": f"no such luck {fails}"}}, status=fails)
        self.num_running += 1
        self.peak = max(self.peak, self.num_running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = "messages" in body
        num_tokens = body["max_completion_tokens"] if chat else body["max_tokens"]
        if chat:
            await self._send(response, choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for i in range(num_tokens):
            await asyncio.sleep(max(0, begin + TTFT + i * GAP - time.perf_counter()))
            if fails == "cut" and i == 2:
                request.transport.abort()
                return response
            if fails == "error" and i == 2:
                await self._send(response, error={"message": "out of luck", "code": 500})
                break
            text = 'data: "é"\n\ndata: '
            await self._send(response, choices=[{"index": 0, "delta": {"content": text}} if chat else {"text": text}])
        else:
            if self.sends_usage:
                prompt = body["prompt"] if not chat else body["messages"][-1]["content"].split()
                await self._send(
                    response, choices=[], usage=dict(prompt_tokens=len(prompt), completion_tokens=num_tokens)
                )
        self.num_running -= 1
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response, **event):
        data = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
        step = self.piece_len or len(data)
        for i in range(0, len(data), step):
            await response.write(data[i : i + step])
            if self.piece_len:
                await asyncio.sleep(0)


@pytest.fixture
def server():
    server = Server().start()
    yield server
    server.stop()


def parse(*options):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


SMALL = ("--random-input-len", 5, "--random-output-len", 11, "--disable-tqdm")


def bench(server, tmp_path, *options, num_prompts=8):
    """Run the benchmark; returns what it wrote with --json."""
    path = tmp_path / "result.json"
    serve.run(parse("--port", server.port, "--num-prompts", num_prompts, "--json", path, *SMALL, *options))
    return json.loads(path.read_text())


# ---- figures


def test_figures_are_those_of_the_server(server, tmp_path, capsys):
    options = ("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "25,99.9", "--num-warmups", 8)
    result = bench(server, tmp_path, *options, "--goodput", "ttft:1000", "e2el:2000")
    assert (result["completed"], result["failed"]) == (8, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (8 * 5, 8 * 11)
    # The server is never early with a first token, but on busy cores late, and then less than GAP before the next.
    for name in ("mean", "median", "p25"):
        assert 50 <= result[f"{name}_ttft_ms"] < 120 and 148 <= result[f"{name}_e2el_ms"] < 250
        assert result[f"{name}_tpot_ms"] == pytest.approx(10, abs=4)
    assert result["mean_itl_ms"] == pytest.approx(10, abs=4)
    for metric in ("ttft", "tpot", "itl", "e2el"):
        values = np.hstack([request[f"{metric}_ms"] for request in result["requests"]])
        assert result[f"mean_{metric}_ms"] == pytest.approx(values.mean(), abs=0.001)
        assert result[f"median_{metric}_ms"] == pytest.approx(np.median(values), abs=0.001)
        assert result[f"std_{metric}_ms"] == pytest.approx(values.std(), abs=0.001)
        for percentile in (25, 99, 99.9):
            assert result[f"p{percentile}_{metric}_ms"] == pytest.approx(np.percentile(values, percentile), abs=0.001)
    assert 0.15 <= result["duration"] < 1
    assert result["request_throughput"] == result["request_goodput"] == pytest.approx(8 / result["duration"])
    assert result["output_throughput"] == pytest.approx(88 / result["duration"])
    assert result["total_token_throughput"] == pytest.approx(128 / result["duration"])
    assert result["max_concurrent_requests"] == 8
    assert result["model_id"] == "first"
    for request in result["requests"]:
        assert request["tpot_ms"] == pytest.approx((request["e2el_ms"] - request["ttft_ms"]) / 10)
        assert sum(request["itl_ms"]) == pytest.approx(request["e2el_ms"] - request["ttft_ms"], abs=0.01)
        assert len(request["itl_ms"]) == 10
    table = capsys.readouterr().out
    assert "============ Serving Benchmark Result ============" in table
    assert "---------------Time to First Token----------------" in table
    for row in (
        "Successful requests:                     8",
        "Request goodput (req/s):",
        "P25 ITL (ms):",
        "Std E2EL (ms):",
    ):
        assert row in table


def test_definitions():
    a = RequestRecord(10.0, 10.9, array("d", [10.2, 10.3, 10.3, 10.8]), 3, 7)  # 7 tokens in 4 chunks
    b = RequestRecord(10.5, 11.5, array("d", [11.5]), 4, 1)  # a single token has no TPOT and no ITL
    c = RequestRecord(10.6, 10.9, error="broken")
    figures = compute_figures([a, b, c], 2.0, [50], {})
    assert (figures.completed, figures.failed, figures.request_goodput) == (2, 1, None)
    assert (figures.total_input_tokens, figures.total_output_tokens) == (7, 8)
    assert (figures.request_throughput, figures.output_throughput, figures.total_token_throughput) == (1.0, 4.0, 7.5)
    metrics = figures.metrics
    assert metrics["ttft"].mean == pytest.approx(600) and metrics["ttft"].std == pytest.approx(400)
    assert metrics["tpot"].mean == pytest.approx(100) == metrics["tpot"].percentiles[99]
    assert metrics["itl"].median == pytest.approx(100) and metrics["itl"].mean == pytest.approx(200)
    assert metrics["e2el"].mean == pytest.approx(900)
    assert figures.max_concurrent_requests == 3
    assert figures.max_output_tokens_per_s == pytest.approx(7)
    assert tokens_per_bin([a, b, c], 0.5) == pytest.approx([7 * 3 / 4, 7 / 4, 0, 1])
    early = RequestRecord(8.0, 8.1, error="broken")
    assert tokens_per_bin([early, a, b], 0.5) == pytest.approx([0, 0, 0, 0, 7 * 3 / 4, 7 / 4, 0, 1])
    late = RequestRecord(7.6, 8.1, error="broken")  # the bins of a whole run begin with its first request
    assert compute_figures([a, late], 2.0, [50], {}).max_output_tokens_per_s == pytest.approx(7 * 3 / 4)


def test_goodput_counts_requests_within_all_objectives():
    def record(ttft, gap, num_tokens=3):
        return RequestRecord(0.0, 9.0, array("d", ttft + gap * np.arange(num_tokens)), 1, num_tokens)

    records = [record(0.1, 0.01), record(0.3, 0.01), record(0.1, 0.03), record(0.1, 9, num_tokens=1)]
    for goodput, num_good in [
        ({"ttft": 200}, 3),
        ({"tpot": 20}, 3),  # one token alone is in time
        ({"ttft": 200, "tpot": 20}, 2),
        ({"e2el": 130}, 2),
        ({"ttft": 200, "e2el": 50}, 0),
    ]:
        assert compute_figures(records, 2.0, [], goodput).request_goodput == num_good / 2


def test_concurrency_of_requests_that_follow_each_other_at_once():
    records = [RequestRecord(float(i), i + 1.0) for i in range(5)]
    assert concurrency(records)[1].max() == 1 and concurrency(records)[1][-1] == 0


def test_metrics_that_no_request_has():
    one = RequestRecord(0.0, 1.0, array("d", [0.5]), 1, 1)
    figures = compute_figures([one], 1.0, [], {})
    assert figures.metrics["tpot"] is None and figures.metrics["itl"] is None
    assert "TPOT" not in format_table(figures, ["ttft", "tpot"]) and "mean_tpot_ms" not in figures.to_json()


# ---- load


def test_max_concurrency(server, tmp_path):
    result = bench(server, tmp_path, "--max-concurrency", 3, num_prompts=9)
    assert server.peak == result["max_concurrent_requests"] == 3
    assert result["duration"] > 3 * 0.15
    assert result["median_ttft_ms"] < 120  # waiting for a place is not in it


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_moments_of_a_gamma_distribution(burstiness):
    rate, num_requests = 8.0, 40_000
    arrivals = serve_workload.plan_arrivals(num_requests, rate, burstiness, seed=1)
    gaps = np.diff(arrivals, prepend=0)
    assert arrivals.shape == (num_requests,) and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / rate)
    assert gaps.var() == pytest.approx(1 / (rate**2 * burstiness), rel=0.1)
    assert ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3 == pytest.approx(2 / math.sqrt(burstiness), rel=0.2)
    assert arrivals.tolist() == serve_workload.plan_arrivals(num_requests, rate, burstiness, seed=1).tolist()
    assert arrivals.tolist() != serve_workload.plan_arrivals(num_requests, rate, burstiness, seed=2).tolist()


def test_arrivals_without_chance():
    assert serve_workload.plan_arrivals(3, math.inf, 1.0, 0).tolist() == [0, 0, 0]
    assert serve_workload.plan_arrivals(4, 2.0, math.inf, 0) == pytest.approx([0.5, 1, 1.5, 2])
    with pytest.raises(ValueError, match="all gaps between requests are 0"):
        serve_workload.plan_arrivals(4, 2.0, 1e-5, 0)


def test_requests_are_sent_when_they_are_due(server, tmp_path):
    result = bench(server, tmp_path, "--request-rate", 60, "--burstiness", 0.5, num_prompts=30)
    late = [request["start_s"] - request["arrival_s"] for request in result["requests"]]
    assert min(late) >= 0 and np.median(late) < 0.02
    assert result["requests"][-1]["arrival_s"] == pytest.approx(0.5)


def test_a_late_loop_does_not_thin_the_rate(server):
    body = json.dumps(dict(prompt="x", max_tokens=2)).encode()
    arrivals = [0.02 * i for i in range(20)]

    async def run():
        async with serve_client.open_session(None) as session:
            asyncio.get_running_loop().call_later(0.1, time.sleep, 0.15)
            url = f"http://127.0.0.1:{server.port}/v1/completions"
            return await serve_client.run_load(session, url, [body] * 20, arrivals)

    begin, records = asyncio.run(run())
    late = [record.start - begin - arrival for record, arrival in zip(records, arrivals, strict=True)]
    assert max(late) > 0.1 and max(late[-5:]) < 0.09


def test_warm_ups_are_sent_before_and_not_counted(server, tmp_path):
    options = (
        "--num-warmups",
        3,
        "--random-prefix-len",
        4,
        "--random-vocab-size",
        1000,
        "--ready-check-timeout-sec",
        5,
    )
    result = bench(server, tmp_path, *options)
    assert result["completed"] == len(result["requests"]) == 8 and len(server.bodies) == 1 + 3 + 8
    prompts = [body["prompt"] for body in server.bodies]
    assert len({tuple(prompt[:4]) for prompt in prompts}) == 1 and all(len(prompt) == 9 for prompt in prompts)
    measured = {tuple(prompt) for prompt in prompts[4:]}
    assert len(measured) == 8 and not measured & {tuple(prompt) for prompt in prompts[:4]}
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)


# ---- requests


def test_body_and_headers(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    bench(server, tmp_path, num_prompts=1)
    extra = '{"top_k": 3, "temperature": 0.9}'
    result = bench(
        server, tmp_path, "--model", "m", "--top-p", 0.5, "--api-key", "k3y", "--extra-body", extra, num_prompts=1
    )
    first, second = server.bodies
    assert first.pop("prompt") == second.pop("prompt")  # the same seed
    always = dict(max_tokens=11, stream=True, stream_options={"include_usage": True}, ignore_eos=True)
    assert first == always | dict(model="first", temperature=0.0)
    assert second == always | dict(model="m", temperature=0.9, top_p=0.5, top_k=3)
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer of the environment", "Bearer k3y"]
    assert "k3y" not in json.dumps(result) and result["settings"]["extra_body"] == json.loads(extra)
    assert result["settings"]["request_rate"] == "inf"


def test_chat(server, tmp_path):
    result = bench(
        server, tmp_path, "--backend", "openai-chat", "--random-range-ratio", '{"input": 0.4}', num_prompts=20
    )
    assert result["median_ttft_ms"] > 45  # the opening, which names the role at once, is not the first token
    assert all(len(request["itl_ms"]) == 10 for request in result["requests"])
    lengths = [len(body["messages"][0]["content"].split()) for body in server.bodies]
    assert set(lengths) == {3, 4, 5, 6, 7}
    assert sum(lengths) == result["total_input_tokens"]
    assert {body["max_completion_tokens"] for body in server.bodies} == {11}


def test_random_samples_do_not_hang_on_their_number():
    lengths = serve_workload.RandomLengths(10, 8, 0.5, 0.25, prefix_len=3)
    many = serve_workload.random_samples(300, lengths, 50, seed=7, chat=False)
    assert many[:5] == serve_workload.random_samples(5, lengths, 50, seed=7, chat=False)
    assert {len(sample.prompt) - 3 for sample in many} == set(range(5, 16))
    assert {sample.output_len for sample in many} == set(range(6, 11))
    chat = serve_workload.random_samples(300, lengths, 50, seed=7, chat=True)
    assert [len(sample.prompt.split()) for sample in chat] == [len(sample.prompt) for sample in many]


def test_custom_data_set(server, tmp_path):
    rows = [{"prompt": "abc", "max_tokens": 2}, {"prompt": [1, 2, 3, 4]}, {"prompt": "defgh", "output_tokens": 3}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    options = ("--dataset-name", "custom", "--dataset-path", path, "--custom-output-len", 4)
    result = bench(server, tmp_path, *options, "--disable-shuffle", "--max-concurrency", 1, num_prompts=5)
    sent = [(body["prompt"], body["max_tokens"]) for body in server.bodies]
    assert sent == [("abc", 2), ([1, 2, 3, 4], 4), ("defgh", 3), ("abc", 2), ([1, 2, 3, 4], 4)]
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (3 + 4 + 5 + 3 + 4, 2 + 4 + 3 + 2 + 4)
    assert "ignore_eos" not in server.bodies[0]
    server.bodies.clear()
    assert bench(server, tmp_path, *options, "--no-oversample", "--ignore-eos")["completed"] == 3
    assert all(body["ignore_eos"] for body in server.bodies)


def test_custom_messages(server, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages, "max_tokens": 2}))
    options = ("--dataset-name", "custom", "--dataset-path", path, "--backend", "openai-chat")
    assert bench(server, tmp_path, *options, num_prompts=2)["total_input_tokens"] == 6
    assert all(body["messages"] == messages for body in server.bodies)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "line 2"),
        ("[1]", "line 2: expected an object"),
        ('{"text": "a"}', 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "--backend openai-chat"),
        ('{"prompt": []}', "text or a list of token ids"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    ],
)
def test_wrong_rows_are_refused(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + row)
    with pytest.raises(ValueError, match="--dataset-path .*rows.jsonl") as error:
        serve.run(parse("--dataset-name", "custom", "--dataset-path", path))
    assert message in str(error.value)


# ---- failures


def test_failures_are_counted_and_named(server, tmp_path, capsys):
    server.fails = {1: 503, 2: 503, 4: "cut", 5: "error"}
    result = bench(server, tmp_path, "--max-concurrency", 1)
    assert (result["completed"], result["failed"]) == (4, 4)
    assert result["total_output_tokens"] == 44
    errors = [request["error"] for request in result["requests"]]
    assert errors[1] == errors[2] == "HTTP 503: no such luck 503"
    assert "ClientPayloadError" in errors[4] and errors[5] == "the server reported an error: out of luck"
    assert [i for i, request in enumerate(result["requests"]) if "ttft_ms" not in request] == [1, 2, 4, 5]
    out = capsys.readouterr().out
    assert "Failed requests:                         4" in out and "2 failed: HTTP 503: no such luck 503" in out


def test_a_file_that_cannot_be_written_leaves_the_table(server, capsys):
    with pytest.raises(OSError, match="--json /dev/full: No space left"):
        serve.run(parse("--port", server.port, "--num-prompts", 2, "--json", "/dev/full", *SMALL))
    assert "Successful requests:                     2" in capsys.readouterr().out


def test_all_failed(server, tmp_path, capsys):
    server.fails = {i: 400 for i in range(8)}
    with pytest.raises(ValueError, match="all 8 requests failed: HTTP 400: no such luck 400"):
        bench(server, tmp_path, "--plot", tmp_path / "plot.png")
    assert json.loads((tmp_path / "result.json").read_text())["failed"] == 8
    out = capsys.readouterr().out
    assert "no such luck" not in out and "Successful requests" not in out


def test_missing_usage_is_refused(server, tmp_path):
    server.sends_usage = False
    with pytest.raises(ValueError, match="the server sent no usage, .* stream_options.include_usage"):
        bench(server, tmp_path)


def test_server_that_is_not_there():
    with pytest.raises(OSError, match="cannot reach a server at http://127.0.0.1:9/v1/models"):
        serve.run(parse("--port", 9, *SMALL))
    with pytest.raises(ValueError, match="all 2 requests failed: ClientConnectorError"):
        serve.run(parse("--base-url", "http://127.0.0.1:9/", "--model", "m", "--num-prompts", 2, *SMALL))


def test_server_without_models(server, tmp_path):
    server.models = []
    with pytest.raises(ValueError, match="/v1/models names no model; name it with --model"):
        bench(server, tmp_path)


@pytest.mark.parametrize("status, option", [(401, "--api-key"), (404, "--model")])
def test_what_helps_where_no_model_is_told(server, tmp_path, status, option):
    server.models_status = status
    with pytest.raises(ValueError, match=f"/v1/models: HTTP {status}: .*; .* with {option}$"):
        bench(server, tmp_path, "--api-key", "wrong")


def test_a_key_that_no_header_can_hold():
    for key in ("ké", "k\n"):
        with pytest.raises(ValueError, match="--api-key .* has characters that an HTTP header cannot hold"):
            serve.run(parse("--port", 9, "--api-key", key, *SMALL))


def test_ready_check_waits_for_the_server(tmp_path):
    early = Server().start()
    port = early.port
    early.stop()
    server = Server()
    server.port = port
    timer = threading.Timer(0.4, server.start, [port])
    timer.start()
    try:
        assert bench(server, tmp_path, "--ready-check-timeout-sec", 10)["completed"] == 8
    finally:
        timer.join()
        server.stop()


def test_ready_check_does_not_wait_for_what_is_refused(server, tmp_path):
    server.fails = {0: 404}
    with pytest.raises(ValueError, match="the test request to .* failed: HTTP 404"):
        bench(server, tmp_path, "--ready-check-timeout-sec", 60)
    server.fails = {1: 400, 2: 400}
    with pytest.raises(ValueError, match="all 2 warm-up requests to .* failed: HTTP 400"):
        bench(server, tmp_path, "--num-warmups", 2)


# ---- events

EVENTS = [
    ": a comment",
    'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
    'data: {"choices": [{"delta": {"content": "é data: \\n\\ndata: "}}]}',
    "event: message",
    'data: {"choices": [{"delta": {"content": ""}}]}',
    'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}',
    'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}',
    "data: [DONE]",
]


@pytest.mark.parametrize("end_of_line", ["\n", "\r\n"])
@pytest.mark.parametrize("piece_len", [1, 2, 7, 50, 1000])
def test_events_in_pieces(piece_len, end_of_line):
    raw = "".join(event + 2 * end_of_line for event in EVENTS).encode()
    log = serve_client.EventLog()
    for i in range(0, len(raw), piece_len):
        log.feed(raw[i : i + piece_len], now=float(min(i + piece_len, len(raw))))
    times, usage = log.finish()
    assert usage == {"prompt_tokens": 3, "completion_tokens": 2}
    expected = []  # an event's time is that of the piece with its line's end
    for event in (EVENTS[2], EVENTS[4]):
        end = raw.index(event.encode()) + len(event.encode()) + len(end_of_line)
        expected.append(float(min(-(-end // piece_len) * piece_len, len(raw))))
    assert list(times) == expected


@pytest.mark.parametrize(
    "finish_reason, num_tokens, num_chunks",
    [
        ("length", 2, 2),
        ("length", 5, 2),  # chunks hold several tokens
        ("stop", 3, 3),  # the token that ends a sequence has no text
        ("stop", 2, 2),  # it is not counted, or there was none
    ],
)
def test_the_chunk_that_ends_a_chat(finish_reason, num_tokens, num_chunks):
    log = serve_client.EventLog()
    events = [{"delta": {"role": "assistant"}}, *[{"delta": {"content": "a"}}] * 2]
    for i, choice in enumerate([*events, {"delta": {}, "finish_reason": finish_reason}]):
        log.feed(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n", float(i))
    usage = {"prompt_tokens": 1, "completion_tokens": num_tokens}
    log.feed(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n", 9.0)
    assert list(log.finish()[0]) == [1.0, 2.0, 3.0][:num_chunks]


def test_many_events_and_no_line_end_after_the_last():
    log = serve_client.EventLog()
    for i in range(100):
        log.feed(b'data: {"choices": [{"text": "a"}]}\n\n', float(i))
    log.feed(b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 100}}', 200.0)
    times, usage = log.finish()
    assert list(times) == list(range(100)) and usage["completion_tokens"] == 100


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "no token"),
        (b'{"id": "not a stream"}', "no token"),
        (b"data: [DONE]\n\n", "no token"),
        (b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', "no usage"),
        (b'data: {"choices": [{"text": "a"}]}\n\n', "broke off in the middle"),
        (b"data: {oops\n\n", "no JSON object: {oops"),
        (b'data: {"error": "full"}\n\ndata: [DONE]\n\n', "reported an error: full"),
    ],
)
def test_streams_that_are_refused(raw, message):
    log = serve_client.EventLog()
    log.feed(raw, 1.0)
    with pytest.raises(ValueError, match=message):
        log.finish()


def test_events_split_across_tcp_segments(server, tmp_path):
    server.piece_len = 9
    result = bench(server, tmp_path, num_prompts=3)
    assert result["completed"] == 3 and all(len(request["itl_ms"]) == 10 for request in result["requests"])


# ---- files and options


def test_plot(server, tmp_path):
    path = tmp_path / "plot.png"
    server.fails = {3: 500}
    bench(server, tmp_path, "--plot", path, "--request-rate", 100, "--max-concurrency", 5, num_prompts=30)
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (1050, 1650) and 0.02 < (picture[..., :3].min(-1) < 0.9).mean() < 0.5


def test_plot_of_single_tokens(server, tmp_path):
    bench(server, tmp_path, "--plot", tmp_path / "plot.png", "--random-output-len", 1)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_legends_bins_and_ticks_of_a_small_run(monkeypatch, tmp_path):
    """No legend lies on a bar, no bin is narrower than steps are long, numbers are plain."""
    records = [RequestRecord(0.0, 1.0, array("d", [0.0999 + 0.1 * i for i in range(10)]), 1, 10)]
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    figures = compute_figures(records, 1.0, [], {})
    serve_plot.plot(str(tmp_path / "plot.png"), "title", figures, records)
    drawn[0].draw_without_rendering()
    ttft, itl, throughput, _ = drawn[0].axes
    for axes in (ttft, itl):
        legend = axes.get_legend().get_window_extent()
        assert max(bar.get_window_extent().y1 for bar in axes.patches if bar.get_height()) < legend.y0
    assert throughput.patches[0].get_data().values == pytest.approx([10, 10, 10], abs=4)
    labels = [*itl.get_yticklabels(), *itl.get_yticklabels(minor=True)]
    assert {"1", "2", "5"} <= {label.get_text() for label in labels} and "$" not in str(labels)
    assert "\n1 request (" in serve._title(parse(), "m", 1)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--backend", "tgi"),
        ("--port", "none"),
        ("--port", "99999"),
        ("--dataset-name", "sonnet"),
        ("--num-prompts", "0"),
        ("--num-warmups", "-1"),
        ("--random-range-ratio", "1"),
        ("--random-range-ratio", '{"inputs": 0.1}'),
        ("--random-vocab-size", "0"),
        ("--request-rate", "0"),
        ("--request-rate", "nan"),
        ("--burstiness", "-2"),
        ("--max-concurrency", "0"),
        ("--temperature", "-0.1"),
        ("--extra-body", "[]"),
        ("--percentile-metrics", "ttft,ttl"),
        ("--metric-percentiles", "50,101"),
        ("--goodput", "itl:10"),
        ("--goodput", "ttft"),
        ("--json", "no/such/folder/file.json"),
        ("--plot", "no/such/folder/file.png"),
        ("--ready-check-timeout-sec", "soon"),
    ],
)
def test_wrong_values_are_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        parse(f"{option}={value}")
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, name",
    [
        (["--base-url", "127.0.0.1:8000"], "--base-url"),
        (["--base-url", "http://127.0.0.1:8000/v1/"], "--base-url"),
        (["--endpoint", "v1/completions"], "--endpoint"),
        (["--dataset-name", "custom"], "--dataset-path"),
        (["--dataset-path", "file"], "--dataset-name"),
        (["--random-input-len", "0"], "--random-input-len"),
        (["--extra-body", '{"stream": false}'], "--extra-body"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, name):
    with pytest.raises(ValueError, match=name):
        serve.run(parse(*options))


def test_missing_packages_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'minivllm\[server\]'"):
        serve.run(parse())
    with pytest.raises(SystemExit):
        parse("--plot", tmp_path / "plot.png")
    assert "argument --plot: needs matplotlib: pip install" in capsys.readouterr().err


def test_nothing_of_torch_is_imported():
    code = "import sys, minivllm.bench.serve, minivllm.bench.serve_client, minivllm.bench.serve_plot\n"
    code += "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- capacity

FLOOD = """
import asyncio, sys
NUM_TOKENS, SECONDS = int(sys.argv[1]), float(sys.argv[2])

def http_chunk(event):
    return b"%x\\r\\n%s\\r\\n" % (len(event), event)

TOKEN = http_chunk(
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000,'
    b'"model":"a","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null}],"usage":null}\\n\\n')
LAST = http_chunk(b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\\n\\n' % NUM_TOKENS)
LAST += http_chunk(b"data: [DONE]\\n\\n") + b"0\\r\\n\\r\\n"
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"
streams = {}

class Connection(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):  # a request is small enough to come in one piece, headers and body, or in two
        if b"POST" in data:
            self.transport.write(HEAD)
            streams[self] = NUM_TOKENS

    def connection_lost(self, error):
        streams.pop(self, None)

async def main():
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    while True:
        wait = asyncio.sleep(SECONDS)
        for connection, left in list(streams.items()):
            connection.transport.write(TOKEN if left else LAST)
            streams[connection] = left - 1
            if not left:
                del streams[connection]
        await wait

asyncio.run(main())
"""


def test_capacity(capsys):
    """Each token of each of 500 streams is a write of its own, as from a server that decodes them as one batch."""
    num_streams, num_tokens = 500, 60
    with subprocess.Popen([sys.executable, "-c", FLOOD, str(num_tokens), "0.02"], stdout=subprocess.PIPE) as flood:
        try:
            url = f"http://127.0.0.1:{int(flood.stdout.readline())}/v1/completions"

            async def run():
                async with serve_client.open_session(None) as session:
                    bodies = [b'{"prompt":[1],"stream":true}'] * num_streams
                    return await serve_client.run_load(session, url, bodies, [0.0] * num_streams)

            cpu, begin = time.process_time(), time.perf_counter()
            _, records = asyncio.run(run())
            cpu, wall = time.process_time() - cpu, time.perf_counter() - begin
        finally:
            flood.kill()
    assert {record.error for record in records} == {""}
    assert all(len(record.token_times) == num_tokens for record in records)
    num_events = num_streams * num_tokens
    with capsys.disabled():
        print(f"\nclient: {num_events / cpu:,.0f} events/s of CPU time, {num_events / wall:,.0f} events/s came")
    assert np.median([np.median(record.itls) for record in records]) > 0.01  # they came one by one
    assert num_events / cpu > 5_000
