"""A worker of tensor parallelism: a process with a share of the model, which runs the steps that the executor sends.

It reads order forms and answers "done" with a step's result (the first worker alone) or "failed" with what went wrong.
It ends when the executor closes the connection, or is gone.
"""

from __future__ import annotations

import datetime
import gc
import os
import queue
import threading
import traceback
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minivllm.config import EngineConfig
from minivllm.model_config import ModelConfig
from minivllm.parallel import SENT_ROWS, RowExchange, TensorParallel, open_inbox, see_each_other
from minivllm.runner.model_runner import ModelRunner
from minivllm.runner.pending_step import PendingStep
from minivllm.runner.shared_masks import SharedMasks

START_SECONDS = 600  # a worker may load its share of the weights later than another


class Worker:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pending: queue.SimpleQueue[PendingStep] = queue.SimpleQueue()
        self._saying = threading.Lock()
        threading.Thread(target=self._receive, daemon=True).start()

    def run(self, masks_file: int) -> None:
        """Make the runner, and run steps until the process is ended."""
        try:
            config, model_config, weights, rank, port = self._orders.get()
            config = _placed(config, rank)
            gc.freeze()  # the modules, which no collection has to go through
            assert config.max_num_seqs is not None
            masks = SharedMasks(config.max_num_seqs, model_config.vocab_size, masks_file).array
            tp = _join(config, model_config, rank, port)
            runner = ModelRunner(config, model_config, weights, tp)
            self._say(("done", None))
            num_blocks = runner.make_ready()
            gc.collect()
            gc.freeze()  # what is there stays, and all workers wait for one that goes through it
            self._say(("done", num_blocks))
            if rank == 0:
                threading.Thread(target=self._answer, args=(config.device,), daemon=True).start()
            while True:
                batch = self._orders.get()
                if batch.token_masks:
                    batch.token_masks.receive = partial(self._masks_of_step, masks, len(batch.token_masks))
                pending = runner.execute(batch)
                if rank == 0:
                    self._pending.put(pending)
        except BaseException as error:
            self._say_failed(error)

    def _masks_of_step(self, masks: np.ndarray, count: int) -> np.ndarray | None:
        """Waits for word of where they are."""
        turn = self._orders.get()
        return None if turn is None else masks[turn, :count]

    def _answer(self, device: str) -> None:
        """Wait for steps, on a thread, while the next are launched already."""
        try:
            if device != "cpu":
                torch.cuda.set_device(device)  # a thread's own
            while True:
                self._say(("done", self._pending.get().wait()))
        except BaseException as error:
            self._say_failed(error)

    def _say_failed(self, error: BaseException) -> None:
        told = error if isinstance(error, (ValueError, OSError, torch.OutOfMemoryError)) else None
        try:
            self._say(("failed", (told, traceback.format_exc())))
        finally:
            threading.Event().wait()  # until the executor, which has to read that, ends this process

    def _receive(self) -> None:
        try:
            while True:
                self._orders.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(0)
        except Exception as error:  # what was sent cannot be read here: a function of the caller's script, say
            self._say_failed(error)

    def _say(self, message: Any) -> None:
        with self._saying:
            self._connection.send(message)


def main(connection: int, masks_file: int) -> None:
    """What the process runs, with these file descriptors."""
    Worker(Connection(connection)).run(masks_file)


def _placed(config: EngineConfig, rank: int) -> EngineConfig:
    """The config with the worker's own device."""
    if config.device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.tensor_parallel_size))
        return config
    index = int(config.device.partition(":")[2]) + rank
    torch.cuda.set_device(index)
    return replace(config, device=f"cuda:{index}")


def _join(config: EngineConfig, model_config: ModelConfig, rank: int, port: int) -> TensorParallel:
    """Meet the other workers at the executor's store."""
    size = config.tensor_parallel_size
    seconds = datetime.timedelta(seconds=START_SECONDS)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=seconds)
    on_gpu = config.device != "cpu"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=seconds,
        device_id=torch.device(config.device) if on_gpu else None,
    )  # fmt: skip
    device = torch.device(config.device)
    if config.backend != "triton" or not see_each_other(device, rank, size):
        return TensorParallel(rank, size)
    dtype, width = getattr(torch, config.dtype), model_config.hidden_size
    max_num_tokens = config.max_num_batched_tokens
    assert config.max_num_seqs is not None and max_num_tokens is not None
    decode_rows = max(config.max_num_seqs, config.draft_limits.max_rows)
    sent_rows = max(decode_rows, min(SENT_ROWS, max_num_tokens))
    sums = open_inbox(sent_rows, size - 1, width, dtype.itemsize * 8, rank, size, device)
    draws = open_inbox(decode_rows, size, 4, 32, rank, size, device)
    rows = None
    more_than = max(sent_rows, size - 1)  # so that each worker has a row
    if max_num_tokens > more_than:
        rows = RowExchange(rank, size, more_than, max_num_tokens, width, dtype, device)
    return TensorParallel(rank, size, sums, draws, rows)
