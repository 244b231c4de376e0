"""The engine in a process of its own, where what its users' programs do cannot hold up a step.

Its parent (`AsyncLLM`) starts it and talks to it over one connection.  Commands and messages are tuples, the first
entry a word; threads of their own read and write them, so the loop below never waits for the other side:

    model, arguments: the first of all           ->  ready  EngineFacts; or failed  error or None, traceback
    add  request_id, token_ids, pickled params, prompt
                                                 ->  added  request_id, what is wrong with it or None
    abort  request_ids
    call  call_id, name                          ->  result  call_id, value, error or None
    a step has outputs, or 0.5 s have passed     ->  outputs  [packed RequestOutput, …], metrics
    the engine failed                            ->  dead  traceback

The process ends when its parent closes the connection, or is gone.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from minivllm.metrics import Metric, collect
from minivllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from minivllm.sampling_params import StructuredOutputsParams

Packed = tuple[str, bool, int, list[tuple[Any, ...]], tuple[Any, ...], tuple[Any, Any]]
CHECK_SECONDS = 1.0  # between looks at the workers of an engine without requests
METRICS_SECONDS = 0.5  # between figures at most, while steps have no outputs
NUM_COMPILERS = 4  # grammars at once
CALLS = ("reset_prefix_cache", "check_integrity")


@dataclass(frozen=True)
class EngineFacts:
    """What the parent is told of an engine that is ready."""

    max_model_len: int
    max_num_seqs: int
    metrics: list[Metric]


def pack(output: RequestOutput) -> Packed:
    """A RequestOutput as plain tuples, which take a tenth of the time to pickle; without the prompt."""
    completions = [
        (c.index, c.text, c.token_ids, c.cumulative_logprob, c.logprobs, c.finish_reason, c.stop_reason)
        for c in output.outputs
    ]
    m = output.metrics
    moments = (m.arrival_time, m.first_scheduled_time, m.first_token_time, m.last_token_time, m.num_preemptions)
    of_prompt = output.prompt_logprobs, output.prompt_token_id_logprobs
    return output.request_id, output.finished, output.num_cached_tokens, completions, moments, of_prompt


def unpack(packed: Packed, prompt: str | None, prompt_token_ids: list[int]) -> RequestOutput:
    """The RequestOutput that was packed."""
    request_id, finished, num_cached, completions, moments, (prompt_logprobs, scores) = packed
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=prompt_token_ids,
        outputs=[CompletionOutput(*fields) for fields in completions],
        finished=finished,
        metrics=RequestMetrics(*moments),
        num_cached_tokens=num_cached,
        prompt_logprobs=prompt_logprobs,
        prompt_token_id_logprobs=scores,
    )


class EngineLoop:
    """Steps an engine for as long as it has requests, and does what the parent says in between."""

    def __init__(self, connection: Connection) -> None:
        self._engine: Any = None
        self._connection = connection
        self.commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._preparing: dict[str, bool] = {}  # requests whose grammars are compiled: whether they were aborted since
        self._lock = threading.Lock()  # of that
        self._compilers = ThreadPoolExecutor(NUM_COMPILERS, "compiler")
        self._reported = 0.0
        self._sender = threading.Thread(target=self._send, daemon=True)
        threading.Thread(target=self._receive, daemon=True).start()

    def run(self, llm: Any, facts: EngineFacts) -> None:
        """Never returns but by a failure of the engine, of which the parent is told."""
        self._engine = llm.engine
        self._messages.put(("ready", facts))
        self._sender.start()
        try:
            while True:
                idle = not self._engine.has_unfinished_requests()
                while idle or not self.commands.empty():
                    try:
                        word, *arguments = self.commands.get(timeout=CHECK_SECONDS)
                    except queue.Empty:
                        self._engine.executor.check()
                        continue
                    self._do(word, *arguments)
                    idle = False
                if self._engine.has_unfinished_requests():
                    self._report(self._engine.step())
        except BaseException:
            self._say_dead()
            raise

    def _do(self, word: str, *arguments: Any) -> None:
        if word == "add":
            try:
                self._engine.add_request(*arguments)
            except Exception as error:
                self._refuse(arguments[0], error)
            else:
                self._messages.put(("added", arguments[0], None))
        elif word == "abort":
            self._report(self._engine.abort_requests(*arguments))
        elif word == "call":
            call_id, name = arguments
            assert name in CALLS
            try:
                owner = self._engine if name == "reset_prefix_cache" else self._engine.scheduler
                value = getattr(owner, name)()
            except Exception as raised:
                self._messages.put(("result", call_id, None, f"{type(raised).__name__}: {raised}"))
            else:
                self._messages.put(("result", call_id, value, None))

    def _report(self, outputs: list[RequestOutput]) -> None:
        if outputs or time.monotonic() > self._reported + METRICS_SECONDS:
            self._reported = time.monotonic()
            self._messages.put(("outputs", [pack(output) for output in outputs], collect(self._engine.scheduler)))

    def _receive(self) -> None:
        try:
            self.commands.put(self._connection.recv())
            while True:
                word, *arguments = self._connection.recv()
                if word == "add":
                    self._receive_request(*arguments)
                elif word == "abort":
                    self._receive_abort(*arguments)
                else:
                    self.commands.put((word, *arguments))
        except (EOFError, OSError):
            if self._engine is not None:  # or workers that are about to start see that this process is gone
                self._engine.executor.shutdown()
            os._exit(0)  # the parent is gone, or wants no more
        except BaseException as error:  # what was sent cannot be read, or ends the program
            if self._engine is None:
                say_failed(self._connection, error)
            else:
                self._say_dead()
                self._engine.executor.shutdown()
            os._exit(1)

    def _receive_request(
        self, request_id: str, token_ids: list[int], pickled_params: bytes, prompt: str | None
    ) -> None:
        """Steps go on while its parameters import what they name; if it has a grammar to be compiled, which may take
        long, other requests go by."""
        try:
            params = pickle.loads(pickled_params)
        except Exception as error:
            self._refuse(request_id, error)
            return
        command = "add", request_id, token_ids, params, prompt
        if params.structured_outputs is None:
            self.commands.put(command)
        else:
            with self._lock:
                self._preparing[request_id] = False
            self._compilers.submit(self._compile, params.structured_outputs, request_id, command)

    def _compile(self, asked: StructuredOutputsParams, request_id: str, command: tuple[Any, ...]) -> None:
        """Let the request follow once its grammar is there, and its abort after it."""
        try:
            self._engine.start_grammar(asked)
        except Exception as error:
            with self._lock:
                del self._preparing[request_id]
            self._refuse(request_id, error)
            return
        with self._lock:
            self.commands.put(command)
            if self._preparing.pop(request_id):
                self.commands.put(("abort", [request_id]))

    def _receive_abort(self, request_ids: list[str]) -> None:
        with self._lock:
            early = self._preparing.keys() & set(request_ids)
            self._preparing.update(dict.fromkeys(early, True))
            self.commands.put(("abort", [one for one in request_ids if one not in early]))

    def _refuse(self, request_id: str, error: Exception) -> None:
        """Whatever functions, a tokenizer or a grammar come to: the others go on."""
        wrong = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        self._messages.put(("added", request_id, wrong))

    def _say_dead(self) -> None:
        """Of the error at hand, and of nothing after it."""
        self._messages.put(("dead", traceback.format_exc()))
        self._messages.put(None)
        self._sender.join()

    def _send(self) -> None:
        try:
            while (message := self._messages.get()) is not None:
                self._connection.send(message)
        except OSError:
            os._exit(0)
        except BaseException:  # there is no memory, say
            traceback.print_exc()
            os._exit(1)


def main(file_descriptor: int) -> None:
    """What the process runs: makes the LLM that its parent describes over the connection, and serves it."""
    connection = Connection(file_descriptor)
    loop = EngineLoop(connection)
    try:
        from minivllm.llm import LLM  # takes seconds, in which the parent finds the model's files

        model, arguments = loop.commands.get()
        llm = LLM(model, **arguments)
    except BaseException as error:
        say_failed(connection, error)
        return
    config = llm.config
    facts = EngineFacts(
        max_model_len=config.max_model_len or 0,
        max_num_seqs=config.max_num_seqs or 0,
        metrics=llm.get_metrics(),
    )
    gc.collect()
    gc.freeze()  # what is there stays: a collection that goes through it takes a dozen steps' time
    loop.run(llm, facts)


def say_failed(connection: Connection, error: BaseException) -> None:
    """Of the error at hand, in place of "ready"."""
    connection.send(("failed", error if isinstance(error, (ValueError, OSError)) else None, traceback.format_exc()))
