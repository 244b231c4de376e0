"""PendingStep: a launched step, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from minivllm.engine.batch import StepResult
from minivllm.runner.logits import LogprobTensors


@dataclass(slots=True)
class Sampled:
    """What a step leaves on the device, or on its way to the host."""

    tokens: torch.Tensor  # [sampled rows] int32
    logprobs: LogprobTensors | None = None  # of the rows that ask for them
    num_logprobs: np.ndarray | None = None  # [sampled rows]: how many each asks for; −1: none
    prompt_logprobs: list[list[LogprobTensors]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)  # rows whose own functions failed, and how
    draft_lengths: list[int] = field(default_factory=list)  # so many of `tokens`, at their end, follow draft tokens


class PendingStep:
    """A launched step."""

    def __init__(self, sampled: Sampled, event: torch.cuda.Event | None) -> None:
        self._sampled = sampled
        self._event = event

    def wait(self) -> StepResult:
        """Wait until the step has run."""
        if self._event is not None:
            self._event.synchronize()
        sampled = self._sampled
        tokens = sampled.tokens.tolist()
        result = StepResult(tokens[: len(tokens) - sum(sampled.draft_lengths)], failed=sampled.failed)
        end = len(result.tokens)
        for length in sampled.draft_lengths:
            result.draft_tokens.append(tokens[end : end + length])
            end += length
        if sampled.logprobs is not None and sampled.num_logprobs is not None:
            entries = iter(sampled.logprobs.entries())
            result.logprobs = [None if n < 0 else next(entries).first(n) for n in sampled.num_logprobs.tolist()]
            del result.logprobs[len(result.tokens) :]  # nothing is drafted for those who ask
        for parts in sampled.prompt_logprobs:
            result.prompt_logprobs.append([entry for part in parts for entry in part.entries()])
        return result
