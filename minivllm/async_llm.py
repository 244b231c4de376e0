"""AsyncLLM: the front door of servers.  Many requests at once, each an asynchronous stream of outputs.

The engine runs in a process of its own (`engine_process.py`): tokenizing, JSON and slow readers share an interpreter
here, and its lock, with each other but never with a GPU step.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import socket
import subprocess
import sys
import threading
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from minivllm.child_process import check_importable, start_process
from minivllm.config import NO_MEANING_HERE, EngineConfig
from minivllm.engine_process import EngineFacts, Packed
from minivllm.inputs import NOT_SUPPORTED, CheckedRequest, InputProcessor, Prompt, checked_model
from minivllm.metrics import Gauge, Metric
from minivllm.output_stream import OutputStream
from minivllm.outputs import RequestOutput
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.validation import take_options

SHUTDOWN_SECONDS = 10.0
Result = TypeVar("Result")


class EngineDeadError(RuntimeError):
    """The engine has failed; no request can be answered any more."""


class AsyncLLM:
    """A model, ready to generate for many callers at once.  Arguments and errors as for `LLM`.

    Returns when the engine is ready.  `async for output in llm.generate(prompt, params): …`
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        skip_tokenizer_init: bool = False,
        hf_overrides: dict[str, Any] | None = None,
        chat_template: str | Path | None = None,
        trust_remote_code: bool = False,
        **arguments: Any,
    ) -> None:
        model = checked_model(model)
        config = EngineConfig.from_arguments(arguments)  # mistakes show before anything is fetched
        self._error: str | None = None
        self._is_shut_down = False
        self._process, self._connection = start_process("minivllm.engine_process")
        try:
            from minivllm.loading import find_model  # takes seconds, and so does what the process imports meanwhile

            # What is fetched or converted is so once, here; the engine finds it done.
            files, defaults = find_model(model, tokenizer, revision, skip_tokenizer_init, config)
            with contextlib.suppress(OSError):  # from a process that has ended nothing will be received either
                self._connection.send((model, {
                    "tokenizer": tokenizer, "revision": revision, "skip_tokenizer_init": skip_tokenizer_init,
                    "hf_overrides": hf_overrides, "trust_remote_code": trust_remote_code,
                    **{name: value for name, value in arguments.items() if name not in NO_MEANING_HERE},
                }))  # fmt: skip
            self.model = files.name
            self.inputs = InputProcessor(files.load_tokenizer(), chat_template, defaults, 0)
            self.facts = self._receive_facts()  # the model was loaded beside the tokenizer
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self.inputs.max_model_len = self.facts.max_model_len
        self._metrics = self.facts.metrics
        self._streams: dict[str, OutputStream] = {}
        self._calls: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}
        self._call_ids = itertools.count()
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")  # tokenizers are not made for several threads
        self._sending = threading.Lock()
        threading.Thread(target=_receive, args=(weakref.ref(self), self._connection), daemon=True).start()
        weakref.finalize(self, _close, self._connection).atexit = False  # it ends with its parent anyway

    def _receive_facts(self) -> EngineFacts:
        """Returns when the engine's process is ready."""
        try:
            word, *content = self._connection.recv()
        except (EOFError, OSError):
            raise EngineDeadError(f"the engine's process ended with status {self._process.wait()}") from None
        if word == "failed":
            error, trace = content
            raise error or EngineDeadError(trace)
        return content[0]

    async def add_request(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> OutputStream:
        """Queue a request and return the stream of its outputs; to leave that early, call its `aclose`.

        prompt: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.  sampling_params: None for the model's
        defaults.  request_id: None for a new one.  Raises ValueError if the request cannot be run, EngineDeadError if
        the engine has failed.
        """
        if self.errored:
            raise self.dead_error()
        params = SamplingParams(**self.inputs.default_options()) if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"sampling_params must be a SamplingParams, got {type(params).__name__}")
        check_importable("logits_processors", params.logits_processors or ())
        final = params.output_kind == RequestOutputKind.FINAL_ONLY
        kind = RequestOutputKind.FINAL_ONLY if final else RequestOutputKind.DELTA
        token_ids, sent, text = await self.check(prompt, params, kind)
        request_id = uuid.uuid4().hex if request_id is None else request_id
        if request_id in self._streams:
            raise ValueError(f"request_id {request_id!r} is in use; choose another")
        stream = OutputStream(self, request_id, text, token_ids, params)
        self._streams[request_id] = stream
        try:
            self._send("add", request_id, token_ids, pickle.dumps(sent), text)
            await stream.accepted
        except asyncio.CancelledError:
            await self.abort(request_id)
            raise
        except Exception:
            if self.is_running(stream):  # else the id may be another's by now
                del self._streams[request_id]
            raise
        return stream

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **more: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request as they come; arguments and errors as for `add_request`; vLLM's others as long as
        they ask for nothing.  Closing the generator, or cancelling whoever waits for it, aborts the request."""
        take_options(more, "generate", NOT_SUPPORTED)
        stream = await self.add_request(prompt, sampling_params, request_id)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; whoever still reads one gets an output whose finish_reason is "abort"."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        if not self.errored:
            self._send("abort", request_ids)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; requests that run keep their blocks."""
        return await self._call("reset_prefix_cache")

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine has failed."""
        if self.errored:
            raise self.dead_error()

    async def check_integrity(self) -> None:
        """Raise RuntimeError if a request, slot or KV block has been lost.  Meant for tests."""
        await self._call("check_integrity")

    async def check(self, prompt: Prompt, params: SamplingParams, output_kind: RequestOutputKind) -> CheckedRequest:
        """A prompt and its params as the engine takes them.  Raises ValueError for a prompt that is none."""
        tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else prompt
        if isinstance(tokens, (list, tuple)):  # need not wait for others' texts
            return self.inputs.check(prompt, params, output_kind)
        return await self.with_tokenizer(self.inputs.check, prompt, params, output_kind)

    async def with_tokenizer(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What the function returns, run where the tokenizer is used by one at a time, and long texts hold up nobody
        else."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    def is_running(self, stream: OutputStream) -> bool:
        """Whether outputs of this very request may still come."""
        return self._streams.get(stream.request_id) is stream

    def get_metrics(self) -> list[Metric]:
        """The engine's figures after its last step, under vLLM's names."""
        return self._metrics

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer; ValueError if there is none (skip_tokenizer_init)."""
        return self.inputs.get_tokenizer()

    @property
    def errored(self) -> bool:
        """Whether the engine has failed, or was shut down."""
        return self._error is not None

    def dead_error(self) -> EngineDeadError:
        """What callers get once the engine has failed."""
        return EngineDeadError(f"the engine has failed: {self._error}")

    def shutdown(self) -> None:
        """End the engine's process and free its memory.  Requests that run end with EngineDeadError."""
        self._is_shut_down = True
        _close(self._connection)
        try:
            self._process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._tokenizing.shutdown(wait=False)

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def _call(self, name: str) -> Any:
        if self.errored:
            raise self.dead_error()
        loop = asyncio.get_running_loop()
        call_id, future = next(self._call_ids), loop.create_future()
        self._calls[call_id] = loop, future
        self._send("call", call_id, name)
        return await future

    def _send(self, *command: Any) -> None:
        try:
            with self._sending:
                self._connection.send(command)
        except OSError:
            raise EngineDeadError(f"the engine has failed: {self._error or 'its process is gone'}") from None

    def take(self, word: str, *content: Any) -> None:
        """Hand a message of the engine's process to the event loop that waits for it."""
        if word == "outputs":
            outputs, self._metrics = content
            loops: dict[asyncio.AbstractEventLoop, list[Packed]] = {}
            for packed in outputs:
                if (stream := self._streams.get(packed[0])) is not None:
                    loops.setdefault(stream.loop, []).append(packed)
            for loop, own in loops.items():
                if not _post(loop, self._deliver, own):
                    self._forget([packed[0] for packed in own])
        elif word == "added":
            if (stream := self._streams.get(content[0])) is not None:
                _post(stream.loop, self._accept, *content)
        elif word == "result":
            call_id, value, error = content
            loop, future = self._calls.pop(call_id)
            _post(loop, _settle, future, value, None if error is None else RuntimeError(error))
        elif word == "dead":
            self._error = str(content[0])

    def fail(self, reason: str | None) -> None:
        """Nothing more comes of the engine's process; `reason`: why, if it is known."""
        self._error = self._error or reason
        if self._error is None and self._is_shut_down:
            self._error = "it was shut down"
        elif self._error is None:
            self._error = "its process is gone"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._error += f" (status {self._process.wait(1.0)})"
            print(f"minivllm: the engine has failed: {self._error}", file=sys.stderr)
        self._metrics = [replace(one, value=0) if isinstance(one, Gauge) else one for one in self._metrics]
        for stream in list(self._streams.values()):
            _post(stream.loop, stream.fail)
        for loop, future in list(self._calls.values()):
            _post(loop, _settle, future, None, self.dead_error())

    def _deliver(self, outputs: list[Packed]) -> None:
        for packed in outputs:
            request_id, finished = packed[:2]
            stream = self._streams.pop(request_id, None) if finished else self._streams.get(request_id)
            if stream is not None:
                stream.put(packed)

    def _forget(self, request_ids: list[str]) -> None:
        """End requests whose event loop is closed."""
        for request_id in request_ids:
            self._streams.pop(request_id, None)
        with contextlib.suppress(EngineDeadError):
            self._send("abort", request_ids)

    def _accept(self, request_id: str, wrong: str | None) -> None:
        stream = self._streams.get(request_id) if wrong is None else self._streams.pop(request_id, None)
        if stream is not None:
            _settle(stream.accepted, None, None if wrong is None else ValueError(wrong))


def _receive(reference: weakref.ref[AsyncLLM], connection: Connection) -> None:
    """What a thread does: read messages, for as long as there is somebody to take them."""
    reason = None
    try:
        while True:
            message = connection.recv()
            if (llm := reference()) is None:
                return
            llm.take(*message)
            del llm, message
    except (EOFError, OSError):
        pass
    except Exception as error:
        reason = f"what it says cannot be read: {error!r}"
    if (llm := reference()) is not None:
        llm.fail(reason)


def _close(connection: Connection) -> None:
    """Let both sides' reads end, and with them the engine's process."""
    end = socket.socket(fileno=os.dup(connection.fileno()))
    with end, contextlib.suppress(OSError):  # the other side may be gone already
        end.shutdown(socket.SHUT_RDWR)


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _post(loop: asyncio.AbstractEventLoop, function: Any, *arguments: Any) -> bool:
    """Have the loop call this; False if it is closed, where nobody is left who waits."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True
