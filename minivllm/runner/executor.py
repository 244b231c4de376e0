"""Executor: who runs the steps.  For now, one runner in this process."""

from __future__ import annotations

import gc

import torch

from minivllm.config import EngineConfig
from minivllm.engine.batch import ScheduledBatch
from minivllm.loading.weights import WeightSource
from minivllm.model_config import ModelConfig
from minivllm.runner.model_runner import ModelRunner, PendingStep


class LocalExecutor:
    """A runner in this process.  `num_blocks`: blocks of KV cache."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, weights: WeightSource | None) -> None:
        try:
            self.runner: ModelRunner | None = ModelRunner(config, model_config, weights)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "out of GPU memory at start-up; lower gpu_memory_utilization (if other programs use the GPU), "
                "max_num_batched_tokens, max_num_seqs or max_model_len, or take a smaller model"
            ) from error
        self.num_blocks = self.runner.num_blocks

    def execute(self, batch: ScheduledBatch) -> PendingStep:
        """Launch a step."""
        assert self.runner is not None, "the executor was shut down"
        return self.runner.execute(batch)

    def shutdown(self) -> None:
        """Free the model, the KV cache and the CUDA graphs."""
        self.runner = None
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
