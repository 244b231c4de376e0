"""SamplingParams: what a user may ask of the sampling of one request, under vLLM's names and defaults."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from minivllm.config import check_int, reject_unknown

MIN_TEMPERATURE = 0.01  # below it logits / temperature overflows; vLLM raises smaller ones to it too
MAX_FLOAT32 = 3.4e38
MAX_INT32 = 2**31 - 1

# vLLM options that are not supported yet, each with the one value that asks for nothing.
NOT_SUPPORTED_YET = {
    "n": 1,
    "best_of": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "stop": None,
    "include_stop_str_in_output": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "logits_processors": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "truncate_prompt_tokens": None,
    "spaces_between_special_tokens": True,
    "extra_args": None,
}


class RequestOutputKind(Enum):
    """What the outputs of a request carry: all text so far, what is new, or only the end result."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def _checked(cls: type) -> type:
    """Let the constructor of `cls` refuse options it does not have with a ValueError that says why."""
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, **options: Any) -> None:
        for name in options.keys() & NOT_SUPPORTED_YET.keys():
            value = options.pop(name)
            if value != NOT_SUPPORTED_YET[name] and value not in ([], {}):
                raise ValueError(f"SamplingParams: {name} is not supported yet")
        reject_unknown(options, [f.name for f in fields(cls)], "SamplingParams")
        init(self, **options)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_checked
@dataclass(kw_only=True)
class SamplingParams:
    """How to sample one request.  Raises ValueError, naming the option, for values that make no sense.

    temperature: 0 is greedy; values in (0, 0.01) are raised to 0.01.
    top_k: sample from the k most likely tokens (0 or -1: all).
    top_p: sample from the smallest set of tokens with at least this probability, in (0, 1].
    min_p: drop tokens less likely than this times the most likely one, in [0, 1].
    seed: the same seed draws the same tokens, alone or in a batch; None: one derived from the engine's.
    max_tokens: tokens to generate at most; None: up to max_model_len.
    min_tokens: no end-of-sequence or stop token before this many.
    stop_token_ids: further tokens that end the output; they stay in `token_ids`.
    ignore_eos: go on after an end-of-sequence token.
    detokenize: False leaves `text` empty.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_FLOAT32:
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            warnings.warn(f"temperature {self.temperature} raised to {MIN_TEMPERATURE}; 0 is greedy", stacklevel=4)
            self.temperature = MIN_TEMPERATURE
        check_int("top_k", self.top_k, -1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.seed == -1:  # vLLM's other way to say None
            self.seed = None
        if self.seed is not None:
            check_int("seed", self.seed, 0)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        for name in ("top_k", "min_tokens"):
            if getattr(self, name) > MAX_INT32:
                raise ValueError(f"{name} must be at most {MAX_INT32}, got {getattr(self, name)}")
        if not isinstance(self.stop_token_ids, (list, tuple, set, type(None))):
            raise ValueError(f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}")
        self.stop_token_ids = list(self.stop_token_ids or [])
        for token_id in self.stop_token_ids:
            check_int("stop_token_ids", token_id, 0)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")

    @property
    def truncates(self) -> bool:
        """Whether the distribution is cut by top_k, top_p or min_p, which a greedy choice does not notice."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
