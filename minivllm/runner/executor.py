"""Executors: who runs the steps.  A runner in this process, or one in each of several workers that share the model."""

from __future__ import annotations

import gc
import math
import pickle
import signal
import socket
import subprocess
import time
from collections import deque
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore

from minivllm.child_process import WorkerError, set_write_timeout, start_process
from minivllm.config import EngineConfig
from minivllm.engine.batch import ScheduledBatch, StepResult
from minivllm.loading.weights import WeightSource
from minivllm.model_config import ModelConfig
from minivllm.runner.model_runner import ModelRunner
from minivllm.runner.pending_step import PendingStep
from minivllm.runner.shared_masks import SharedMasks

ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",  # all workers are on this host
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink is left alone
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
KILLED = " (killed, as the system does when memory runs out)"
READY_SECONDS = 300  # for workers to compile, to measure their memory and to capture graphs
GRACE_SECONDS = 2.0  # after a worker is gone, for others to say what they know of it

Failure = tuple[int, Exception | None, str]  # rank, an error to be raised as it is, traceback

OUT_OF_MEMORY = (
    "out of GPU memory at start-up; lower gpu_memory_utilization (if other programs use the GPU), "
    "max_num_batched_tokens, max_num_seqs or max_model_len, or take a smaller model"
)


def make_executor(
    config: EngineConfig, model_config: ModelConfig, weights: WeightSource | None
) -> LocalExecutor | WorkersExecutor:
    """The executor for a resolved config."""
    executor = LocalExecutor if config.tensor_parallel_size == 1 else WorkersExecutor
    return executor(config, model_config, weights)


class LocalExecutor:
    """A runner in this process.  `num_blocks`: blocks of KV cache."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, weights: WeightSource | None) -> None:
        try:
            self.runner: ModelRunner | None = ModelRunner(config, model_config, weights)
            self.num_blocks = self.runner.make_ready()
        except torch.OutOfMemoryError as error:
            raise ValueError(OUT_OF_MEMORY) from error

    def execute(self, batch: ScheduledBatch) -> PendingStep:
        """Launch a step."""
        assert self.runner is not None, "the executor was shut down"
        return self.runner.execute(batch)

    def check(self) -> None:
        """There is nothing that could have ended."""

    def shutdown(self) -> None:
        """Free the model, the KV cache and the CUDA graphs."""
        self.runner = None
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


class WorkersExecutor:
    """tensor_parallel_size processes (`worker.py`), each with a share of the model, on GPUs of its own or on the CPU.

    All get each step's order form and run it side by side; the first one answers with what it found out.  The engine's
    process takes no part in their collective operations, so it is never caught in one: when a worker fails or is
    silent, it ends them all and says so.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, weights: WeightSource | None) -> None:
        assert config.distributed_timeout_seconds is not None
        self._timeout = config.distributed_timeout_seconds
        self._num_sent = self._num_answered = 0  # steps
        self._lost: str | None = None  # why there are no workers any more
        self._has_started = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        size = config.tensor_parallel_size
        self._answers: list[deque[Any]] = [deque() for _ in range(size)]  # that nobody has waited for yet
        listener = socket.create_server(("127.0.0.1", 0))  # at a free port, for this host alone
        self._store: TCPStore | None = TCPStore(
            "127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        assert config.max_num_seqs is not None
        masks = SharedMasks(config.max_num_seqs, model_config.vocab_size)
        self._masks, self._turn = masks.array, 0  # and which of the two sets was written last
        try:
            with masks.file as file:
                for _ in range(size):
                    process, connection = start_process("minivllm.runner.worker", ENVIRONMENT, [file.fileno()])
                    self._processes.append(process)
                    self._connections.append(connection)
                    set_write_timeout(connection, self._timeout)
            for rank, connection in enumerate(self._connections):
                connection.send((config, model_config, weights, rank, self._store.port))
            for rank in range(size):
                self._answer(rank, None)  # its weights are loaded, which takes as long as it takes
            timeout = max(self._timeout, READY_SECONDS)
            self.num_blocks = int(min(self._answer(rank, timeout) for rank in range(size)))
            self._has_started = True
        except BaseException:
            self.shutdown()
            raise

    def execute(self, batch: ScheduledBatch) -> PendingResult:
        """Launch a step."""
        if self._lost is not None:
            raise WorkerError(self._lost)
        message = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
        self._num_sent += 1
        turn = None
        try:
            self._send(message)
            if batch.token_masks:
                batch.token_masks.words(self._masks[1 - self._turn])
                turn = self._turn = 1 - self._turn
        finally:
            if batch.token_masks:  # the workers wait for them, even if there are none to be had
                self._send(pickle.dumps(turn))
        return PendingResult(self, self._num_sent)

    def _send(self, message: bytes) -> None:
        """To all workers."""
        try:
            for connection in self._connections:
                connection.send_bytes(message)
        except BlockingIOError:
            self._fail(reason=self._silence(self._timeout))
        except OSError:
            self._fail()
        except BaseException:
            self._give_up("interrupted while a step was sent to the workers")
            raise

    def result(self, number: int) -> StepResult:
        """Wait for a step.  What was found out by earlier ones, if nobody has waited for them, is dropped."""
        try:
            while self._num_answered < number:
                if self._lost is not None:
                    raise WorkerError(self._lost)
                answer = self._answer(0, self._timeout)
                self._num_answered += 1
        except BaseException:
            self._give_up("interrupted while a worker was answering")
            raise
        return answer

    def _give_up(self, reason: str) -> None:
        """What is on its way between the processes is not to be trusted any more."""
        self._lost = self._lost or reason
        self.shutdown()

    def check(self) -> None:
        """Raise WorkerError if a worker has ended."""
        if any(process.poll() is not None for process in self._processes):
            self._fail()

    def shutdown(self) -> None:
        """End the workers."""
        self._lost = self._lost or "the executor was shut down"
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._connections, self._processes, self._store = [], [], None

    def _answer(self, rank: int, timeout: float | None) -> Any:
        """The next answer of a worker.  Raises WorkerError, after all workers were ended, if one of them fails first,
        or if none comes within `timeout` seconds."""
        left = math.inf if timeout is None else timeout
        while not self._answers[rank]:
            seconds, begin = max(0.0, min(left, 1.0)), time.monotonic()
            ready = wait(self._connections, seconds)
            left -= min(time.monotonic() - begin, seconds)  # but for the time in which all processes were stopped
            if not ready and left <= 0:
                self._fail(reason=self._silence(timeout))
            for other, connection in enumerate(self._connections):
                if connection in ready:
                    try:
                        word, content = connection.recv()
                    except (EOFError, OSError):
                        self._fail()
                    if word == "failed":
                        self._fail((other, *content))
                    self._answers[other].append(content)
        return self._answers[rank].popleft()

    @staticmethod
    def _silence(seconds: float | None) -> str:
        return f"no worker has answered for {seconds:.0f} s (distributed_timeout_seconds)"

    def _fail(self, failure: Failure | None = None, reason: str | None = None) -> NoReturn:
        """End all workers and raise: `reason`, or what was the first to go wrong.  One that has ended cannot have said
        why, and the others then fail for its absence."""
        if failure is None and reason is None:
            failure = self._first_failure()
        deadline = time.monotonic() + (GRACE_SECONDS if failure is None and reason is None else 0.1)
        while all(process.poll() is None for process in self._processes) and time.monotonic() < deadline:
            time.sleep(0.01)
        statuses = [process.poll() for process in self._processes]
        self.shutdown()
        ended = [
            f"worker {rank} has ended with status {code}{KILLED if code == -signal.SIGKILL else ''}"
            for rank, code in enumerate(statuses)
            if code is not None
        ]
        rank, error, trace = failure or (0, None, "")
        self._lost = (
            ", ".join(ended) or reason or (f"worker {rank} has failed:\n{trace}" if failure else "they are gone")
        )
        if not ended and not self._has_started and error is not None:
            raise ValueError(OUT_OF_MEMORY) if isinstance(error, torch.OutOfMemoryError) else error
        raise WorkerError(self._lost) from error

    def _first_failure(self) -> Failure | None:
        """What the next worker to fail says, if one has the time to."""
        for connection in wait(self._connections, GRACE_SECONDS):
            assert isinstance(connection, Connection)
            try:
                while connection.poll(GRACE_SECONDS):
                    word, content = connection.recv()
                    if word == "failed":
                        return (self._connections.index(connection), *content)
            except (EOFError, OSError):
                pass  # it has ended
        return None


class PendingResult:
    """A step that the workers run."""

    def __init__(self, executor: WorkersExecutor, number: int) -> None:
        self._executor = executor
        self._number = number

    def wait(self) -> StepResult:
        """Wait until the step has run; steps are to be waited for in their order."""
        return self._executor.result(self._number)
