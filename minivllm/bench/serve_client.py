"""The client of `minivllm bench serve`: sends requests when they are due and notes when their tokens come.

An event costs little here, or the client is what is measured: while a request runs its bytes are only counted into
lines, and what the JSON in them says is read when it is over, of the first and the last events alone.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, TypeVar

import aiohttp

from minivllm import openai_events
from minivllm.bench.serve_metrics import RequestRecord

T = TypeVar("T")

NUM_KEPT = 8  # pieces of a stream kept from its start and from its end


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    """A session for any number of streams at once.  To be opened inside the event loop, and closed.  Raises ValueError
    for a key that cannot be sent."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # compressed, events come in heaps
    headers |= openai_events.authorization(api_key)
    # A server that closes an idle connection as a request comes in on it fails the request; common servers do so after
    # five seconds, so let go before them.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4, ttl_dns_cache=None)
    timeout = aiohttp.ClientTimeout(total=6 * 60 * 60)
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout)


async def first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    """The first model that the server names.

    Raises:
        ConnectionError: the server cannot be reached, or says that it is not ready.
        ValueError: it answers with something else than models.
    """
    url = f"{base_url}/v1/models"
    try:
        async with session.get(url) as response:
            if response.status >= 500:
                raise ConnectionError(f"{url}: {await _http_error(response)}")
            if response.status != 200:
                remedy = "give its key with --api-key" if response.status == 401 else "name the model with --model"
                raise ValueError(f"{url}: {await _http_error(response)}; {remedy}")
            return str(json.loads(await response.read())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConnectionError(f"cannot reach a server at {url}: {error or type(error).__name__}") from error
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url} names no model; name it with --model") from error


async def test_request(session: aiohttp.ClientSession, url: str, body: bytes) -> None:
    """Send a request that counts for nothing.

    Raises:
        ConnectionError: the server cannot be reached, or says that it is not ready.
        ValueError: it refuses the request.
    """
    record = await stream(session, url, body)
    if record.error and (record.status is None or record.status >= 500):
        raise ConnectionError(f"{url}: {record.error}")
    if record.error:
        raise ValueError(f"the test request to {url} failed: {record.error}")


async def until_ready(attempt: Callable[[], Awaitable[T]], timeout_sec: float) -> T:
    """Make attempts, one a second, until one raises no ConnectionError.  After `timeout_sec` the next is raised."""
    deadline = perf_counter() + timeout_sec
    while True:
        try:
            return await attempt()
        except ConnectionError:
            if perf_counter() >= deadline:
                raise
            await asyncio.sleep(min(1.0, max(0.0, deadline - perf_counter())))


async def run_load(
    session: aiohttp.ClientSession,
    url: str,
    bodies: Sequence[bytes],
    arrivals: Sequence[float],
    max_concurrency: int | None = None,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[float, list[RequestRecord]]:
    """Send each body at its arrival, in seconds from now, with at most `max_concurrency` under way.

    Arrivals are points in time: a loop that comes late sends all that is due, and the rate holds.

    Returns:
        When the run began (`time.perf_counter`), and the records, in the order of the bodies.
    """
    free = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def send(body: bytes) -> RequestRecord:
        async with free:
            record = await stream(session, url, body)
        on_done()
        return record

    begin, tasks = perf_counter(), []
    for body, arrival in zip(bodies, arrivals, strict=True):
        delay = begin + arrival - perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(send(body)))
    return begin, await asyncio.gather(*tasks)


async def stream(session: aiohttp.ClientSession, url: str, body: bytes) -> RequestRecord:
    """Send one request and read its events to the end.  Failures are in the record, not raised."""
    events, status = EventLog(), None
    start = perf_counter()
    try:
        async with session.post(url, data=body) as response:
            status = response.status
            if status != 200:
                return RequestRecord(start, perf_counter(), error=await _http_error(response), status=status)
            read = response.content.readany
            while data := await read():
                events.feed(data, perf_counter())
        token_times, usage = events.finish()
        return RequestRecord(
            start=start,
            end=perf_counter(),
            token_times=token_times,
            num_prompt_tokens=int(usage["prompt_tokens"]),
            num_output_tokens=int(usage["completion_tokens"]),
            status=status,
        )
    except Exception as error:  # whatever a server does to one request, the others go on
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}".rstrip(": ")
        return RequestRecord(start, perf_counter(), error=text, status=status)


class EventLog:
    """The server-sent events of one response, from bytes in pieces of any size.

    An event is a line that begins with "data:" (a line break inside JSON is escaped), and came when its end did.
    """

    def __init__(self) -> None:
        self._times = array("d")
        self._partial_line = b""
        self._head: list[bytes] = []  # the first and the last pieces, in whole lines
        self._tail: deque[bytes] = deque(maxlen=NUM_KEPT)

    def feed(self, data: bytes, now: float) -> None:
        """Add the next bytes, read at `now`."""
        if self._partial_line:
            data = self._partial_line + data
        end = data.rfind(b"\n") + 1
        self._partial_line = data[end:]
        lines = data[:end]
        num_events = lines.count(b"\ndata:") + lines.startswith(b"data:")
        if num_events:
            self._times.extend([now] * num_events)
            self._tail.append(lines)
            if len(self._head) < NUM_KEPT:
                self._head.append(lines)

    def finish(self) -> tuple[array[float], dict[str, int]]:
        """The response is over: returns (when each chunk of tokens came, the server's usage).

        Raises:
            ValueError: the server reported an error, or sent no token or no usage, or no JSON.
        """
        if self._partial_line:
            self.feed(b"\n", self._times[-1] if self._times else perf_counter())
        usage: dict[str, int] | None = None
        end, last = len(self._times), _payloads(self._tail)
        for event in map(openai_events.decode, reversed(last)):
            usage = usage or event.get("usage")
            if _has_token(event):
                break
            end -= 1
        begin = 0
        for event in map(openai_events.decode, _payloads(self._head)):
            if _has_token(event):
                break
            begin += 1
        if usage and end - begin > usage["completion_tokens"]:
            end -= 1  # the chunk that says "stop" tells of no token
        if begin >= end:
            raise ValueError("the server sent no token")
        if not usage:
            raise ValueError(
                "the server sent no usage, from which tokens are counted; it must know stream_options.include_usage"
                if openai_events.DONE in last
                else "the server broke off in the middle of an answer"
            )
        return self._times[begin:end], usage


def _payloads(pieces: Iterable[bytes]) -> list[bytes]:
    return list(openai_events.payloads(b"".join(pieces).split(b"\n")))


def _has_token(event: dict[str, Any]) -> bool:
    """Whether the event stands for tokens, be their text empty: not the usage, not a chat's opening, which names
    the role and which some servers send before they compute anything, and not a chunk that only says that the chat is
    over, but for "stop": that one comes with the token that ends a sequence."""
    choices = event.get("choices")
    if not choices:
        return False
    delta = choices[0].get("delta")
    if delta == {}:
        return bool(choices[0].get("finish_reason") == "stop")
    return delta is None or "role" not in delta or any(value for key, value in delta.items() if key != "role")


async def _http_error(response: aiohttp.ClientResponse) -> str:
    return openai_events.http_error(response.status, await response.read(), response.reason)
