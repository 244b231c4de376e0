"""The server on Ray Serve: the same API, prefixes on the replica that has them, replicas replaced."""

import asyncio
import json
import os
import signal
import socket
import time
from types import SimpleNamespace

import aiohttp
import pytest
from conftest import ray_engines

pytest.importorskip("ray.serve")

from minivllm.ray_serve import Ingress, PrefixRouter, application, prefix_key

ENGINE = dict(device="cpu", max_model_len=512, max_num_seqs=16, block_size=16, kv_cache_memory_bytes=1 << 27)


def test_prefix_key():
    turn = [{"role": "system", "content": "s" * 600}, {"role": "user", "content": "Hi"}]
    more = [*turn, {"role": "assistant", "content": "Hello"}]
    short = [{"role": "user", "content": "Hi"}]
    longer = [*short, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "More"}]
    assert prefix_key(json.dumps(dict(messages=short)).encode()) == prefix_key(
        json.dumps(dict(messages=longer)).encode()
    )
    assert prefix_key(json.dumps(dict(messages=turn)).encode()) == prefix_key(json.dumps(dict(messages=more)).encode())
    keys = [
        prefix_key(json.dumps(dict(prompt=prompt)).encode()) for prompt in ("a", ["a", "b"], [1, 2], [[1, 2], [3]], "b")
    ]
    assert keys[0] == keys[1] and keys[2] == keys[3] and len(set(keys)) == 3
    for content in (b"", b"{", b"[]", b"3", b'{"prompt": 7}', b'{"prompt": null}', b'{"messages": [3]}'):
        assert isinstance(prefix_key(content), str)


def test_equal_keys_go_to_the_same_replica_and_few_move():
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica-{i}")) for i in range(4)]

    def choose(key, candidates):
        request = SimpleNamespace(args=[key])
        ranks = asyncio.run(PrefixRouter.choose_replicas(None, candidates, request))
        assert sorted(r.replica_id.unique_id for [r] in ranks) == sorted(r.replica_id.unique_id for r in candidates)
        return ranks[0][0]

    keys = [f"key {i}" for i in range(400)]
    before = {key: choose(key, replicas) for key in keys}
    assert all(choose(key, replicas[::-1]) is before[key] for key in keys)
    assert all(60 < sum(chosen is replica for chosen in before.values()) < 140 for replica in replicas)
    after = {key: choose(key, replicas[:3]) for key in keys}
    assert all(after[key] is before[key] for key in keys if before[key] is not replicas[3])


def test_wrong_options():
    with pytest.raises(ValueError, match="exclude each other"):
        application(num_replicas=2, autoscaling=(1, 3))
    with pytest.raises(ValueError, match="num_replicas must be an integer of at least 1"):
        application(num_replicas=0)
    for wrong in ((4, 1), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="autoscaling must be the fewest and the most"):
            application(autoscaling=wrong)


def test_engines_may_take_all_processors():
    """The entry takes none, or two replicas on two processors would wait for ever."""
    assert Ingress.ray_actor_options["num_cpus"] == 0


@pytest.fixture(scope="module")
def url(embedded):
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = application(embedded, num_replicas=2, served_model_name="smol", num_cpus=1, engine_arguments=ENGINE)
    serve.run(app)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def engine_pids():
    return [engine for _, engine in ray_engines()]


async def ask(session, url, messages, **options):
    body = dict(messages=messages, max_tokens=6, temperature=0, ignore_eos=True) | options
    async with session.post(url + "/v1/chat/completions", json=body) as answer:
        return answer.status, await answer.json()


def test_the_same_api_and_prefixes_are_found_again(url):
    async def run():
        async with aiohttp.ClientSession() as session:
            async with session.get(url + "/v1/models") as answer:
                assert (await answer.json())["data"][0]["id"] == "smol"
            assert (await ask(session, url, [], model="smol"))[0] == 400
            status, wrong = await ask(session, url, [{"role": "user", "content": "x"}], model="gpt-9")
            assert status == 404 and wrong["error"]["code"] == "model_not_found"
            body = dict(prompt="1, 2, 3,", max_tokens=5, temperature=0, stream=True)
            async with session.post(url + "/v1/completions", json=body) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = [line async for line in answer.content if line.startswith(b"data: ")]
            assert len(lines) > 3 and lines[-1].strip() == b"data: [DONE]"

            async def conversation(i):
                turns = [{"role": "user", "content": f"{i}: " + f"Word {i}, " * 20}]
                _, first = await ask(session, url, turns)
                turns.append(first["choices"][0]["message"])
                _, second = await ask(session, url, [*turns, {"role": "user", "content": "More."}])
                return first, second

            return await asyncio.gather(*map(conversation, range(12)))

    for first, second in asyncio.run(run()):
        # All full blocks of the first turn's prompt.
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] // 16 * 16
    assert len(engine_pids()) == 2


def test_a_client_that_hangs_up_and_a_replica_that_dies(url):
    async def run():
        async with aiohttp.ClientSession() as session:
            body = dict(prompt="Once upon", max_tokens=400, ignore_eos=True, stream=True)
            for _ in range(4):
                async with session.post(url + "/v1/completions", json=body) as answer:
                    await answer.content.readline()
            end = time.monotonic() + 30
            while time.monotonic() < end:  # the key of the body's prompt: the same replica
                async with session.get(url + "/metrics", json=dict(prompt=body["prompt"])) as answer:
                    figures = dict(line.rsplit(" ", 1) for line in (await answer.text()).splitlines() if line[0] != "#")
                running, generated = (
                    float(figures[f'vllm:{name}{{model_name="smol"}}'])
                    for name in ("num_requests_running", "generation_tokens_total")
                )
                if not running:
                    break
                await asyncio.sleep(0.05)
            assert running == 0 and 4 <= generated < 400, "no request came to its end"
            before = engine_pids()
            os.kill(before[0], signal.SIGKILL)
            end = time.monotonic() + 60
            while time.monotonic() < end:
                now = engine_pids()
                if len(now) == 2 and before[0] not in now:
                    break
                await asyncio.sleep(0.2)
            statuses = []
            while time.monotonic() < end and statuses[-8:] != [200] * 8:
                answers = [ask(session, url, [{"role": "user", "content": f"Number {i}"}]) for i in range(8)]
                statuses += [status for status, _ in await asyncio.gather(*answers)]
            assert statuses[-8:] == [200] * 8

    asyncio.run(run())
