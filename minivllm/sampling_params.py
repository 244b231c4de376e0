"""SamplingParams: what a user may ask of the sampling of one request, under vLLM's names and defaults."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from minivllm.output_params import RepetitionDetectionParams, StructuredOutputsParams
from minivllm.validation import NotSupported, check_int, check_text, refuses_unknown_options

MIN_TEMPERATURE = 0.01  # below it logits / temperature overflows; vLLM raises smaller ones to it too
MAX_FLOAT32 = 3.4e38
MAX_LOGIT_BIAS = 1e30  # which overflows at no temperature
MAX_INT32 = 2**31 - 1
MAX_N = 16384  # as in vLLM
MAX_LENGTH_PENALTY = 50  # a power of lengths that no float overflows at
NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
SWITCHES = (
    "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    "flat_logprobs",
)  # fmt: skip

MAX_LOGPROB_TOKEN_IDS = 128

# vLLM's options that there are not.
NOT_SUPPORTED: NotSupported = {
    "best_of": ((None,), "use n, and choose among the outputs"),
    "extra_args": ((None, {}), "leave it out"),
    "guided_decoding": ((None,), "use structured_outputs"),
    "routed_experts_prompt_start": ((None, 0), "mixtures of experts are not supported"),
    "thinking_token_budget": ((None,), "use max_tokens"),
    "trace_decode_token_ids": ((None, []), "leave it out"),
    "watermarking": ((None,), "use logits_processors"),
}


# (output token ids, logits) -> logits, or (prompt token ids, output token ids, logits) -> logits
LogitsProcessor = Callable[..., Any]


class RequestOutputKind(Enum):
    """What the outputs of a request carry: all text so far, what is new, or only the end result."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@refuses_unknown_options(NOT_SUPPORTED)
@dataclass(kw_only=True)
class SamplingParams:
    """How to sample one request.  Raises ValueError, naming the option, for values that make no sense.

    n: outputs to generate for the prompt, at most 16,384, and 1 at temperature 0; they share the blocks of its KV
        cache, if prefix caching is on.
    presence_penalty, frequency_penalty: subtracted from the logit of a token that the output has, once, and once for
        each time it has it; in [-2, 2].
    repetition_penalty: divides the logits > 0, and multiplies the others, of tokens in the prompt or output; > 0.
    temperature: in [0, 2]; 0 is greedy, values in (0, 0.01) are raised to 0.01.
    top_k: sample from the k most likely tokens (0 or -1: all).
    top_p: sample from the smallest set of tokens with at least this probability, in (0, 1].
    min_p: drop tokens less likely than this times the most likely one, in [0, 1].
    seed: the same seed draws the same tokens, alone or in a batch; None: one derived from the engine's.
    stop: strings that end the output; the text ends before them, unless include_stop_str_in_output.
    stop_token_ids: further tokens that end the output; they stay in `token_ids`.
    bad_words: texts whose last token is not sampled where the tokens before it have been.
    ignore_eos: go on after an end-of-sequence token.
    max_tokens: tokens to generate at most; None: up to max_model_len.
    min_tokens: no end-of-sequence, stop token or stop string before this many.
    logprobs: how many of the most likely tokens to report at each place, beside the one sampled; -1: all.
    logprob_token_ids: report these tokens' (up to 128) in place of the most likely ones', without their ranks.
    prompt_logprobs: what logprobs is, for the tokens of the prompt.
    prompt_logprob_token_ids: in place of prompt_logprobs, lists or an array [num_rows, num_ids] of token ids: report
        the logprobs of those in row i where the prompt has its token prompt_logprob_start + i + 1, up to the last one,
        as the output's `prompt_token_id_logprobs`.  A −1, which fills up shorter rows, has −inf.
    flat_logprobs: both come as FlatLogprobs, a few lists in place of dicts and objects.
    detokenize: False leaves `text` empty.
    skip_special_tokens: leave special tokens out of the text.
    spaces_between_special_tokens: False leaves out the spaces that slow tokenizers put there; fast ones put none.
    logit_bias: added to logits, by token id; at most 1e30, and -inf rules a token out.
    allowed_token_ids: the only tokens that may be sampled.
    logits_processors: functions called for every token with the ids of the output so far, or of prompt and output, and
        the logits of the next token, a float32 tensor [vocab_size] on the model's device, that return these changed.
        They come before the penalties.  The next step waits until this token is known.  With tensor_parallel_size > 1
        copies of them run in another process, which must be able to import them.
    skip_reading_prefix_cache: compute the whole prompt, whatever of it is cached; the default with prompt_logprobs.
    repetition_detection: end the output when its last tokens are a pattern over and over (finish_reason "repetition").
    stream_interval: in streams, an output for every so many tokens, beside the first and the last one.
    truncate_prompt_tokens: keep only so many tokens, the last ones, of the prompt; -1: what max_model_len has room for.
    structured_outputs: a grammar that the text must follow; it ends where that does, whatever min_tokens and ignore_eos
        say.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[list[int]] | None = None
    prompt_logprob_start: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    logits_processors: list[LogitsProcessor] | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    stream_interval: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_FLOAT32:
                raise ValueError(f"{name} must be a number, got {value!r}")
        check_int("n", self.n, 1, MAX_N)
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be in [-2, 2], got {getattr(self, name)}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be greater than 0, got {self.repetition_penalty}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], 0 being greedy, got {self.temperature}")
        if 0 < self.temperature < MIN_TEMPERATURE:
            warnings.warn(f"temperature {self.temperature} raised to {MIN_TEMPERATURE}; 0 is greedy", stacklevel=4)
            self.temperature = MIN_TEMPERATURE
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n must be 1 with temperature 0, which has one output only, got {self.n}")
        check_int("top_k", self.top_k, -1, MAX_INT32)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if self.seed == -1:  # vLLM's other way to say None
            self.seed = None
        if self.seed is not None:
            check_int("seed", self.seed, -1 << 63)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0, MAX_INT32)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                setattr(self, name, 1)
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), -1)
        self.logprob_token_ids = _token_ids("logprob_token_ids", self.logprob_token_ids)
        if self.logprob_token_ids is not None:
            number = len(self.logprob_token_ids)
            if not 1 <= number <= MAX_LOGPROB_TOKEN_IDS:
                raise ValueError(f"logprob_token_ids must have 1 to {MAX_LOGPROB_TOKEN_IDS} token ids, got {number}")
            if self.logprobs not in (None, number):
                raise ValueError(
                    f"logprobs ({self.logprobs}) must be the number of logprob_token_ids ({number}); leave it out"
                )
            self.logprobs = number
        self.prompt_logprob_token_ids = _rows_of_token_ids(self.prompt_logprob_token_ids)
        if self.prompt_logprob_start is not None:
            check_int("prompt_logprob_start", self.prompt_logprob_start, 0)
            if self.prompt_logprob_token_ids is None:
                raise ValueError("prompt_logprob_start needs prompt_logprob_token_ids")
        if self.prompt_logprob_token_ids is not None and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprob_token_ids and prompt_logprobs cannot be combined; send two requests")
        self.stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids) or []
        self.allowed_token_ids = _token_ids("allowed_token_ids", self.allowed_token_ids)
        if self.allowed_token_ids == []:
            raise ValueError("allowed_token_ids is empty; give at least one token, or None")
        self.stop = _texts("stop", self.stop)
        self.bad_words = _texts("bad_words", self.bad_words)
        if self.stop and not self.detokenize:
            raise ValueError("stop needs the text of the output; leave detokenize=False out, or use stop_token_ids")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise ValueError(f"logit_bias must be a dict of token id: number, got {self.logit_bias!r}")
            bias = {}
            for token_id, value in self.logit_bias.items():
                if isinstance(token_id, str) and token_id.isdecimal():  # as keys in JSON are
                    token_id = int(token_id)
                check_int("logit_bias", token_id, 0)
                if not isinstance(value, (int, float)) or isinstance(value, bool) or not value <= MAX_LOGIT_BIAS:
                    raise ValueError(f"logit_bias must be a dict of token id: number up to 1e30, got {value!r}")
                bias[token_id] = float(value) if value >= -MAX_FLOAT32 else float("-inf")
            self.logit_bias = bias
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise ValueError(f"structured_outputs must be StructuredOutputsParams, got {self.structured_outputs!r}")
        if not isinstance(self.repetition_detection, (RepetitionDetectionParams, type(None))):
            raise ValueError(
                f"repetition_detection must be RepetitionDetectionParams, got {self.repetition_detection!r}"
            )
        if not isinstance(self.skip_reading_prefix_cache, (bool, type(None))):
            raise ValueError(f"skip_reading_prefix_cache must be True or False, got {self.skip_reading_prefix_cache!r}")
        if self.stream_interval is not None:
            check_int("stream_interval", self.stream_interval, 1)
        processors = self.logits_processors or []
        if not isinstance(processors, (list, tuple)) or any(not callable(f) or isinstance(f, type) for f in processors):
            raise ValueError(f"logits_processors must be a list of functions, got {self.logits_processors!r}")
        self.logits_processors = list(processors) or None
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")

    def clone(self) -> SamplingParams:
        """A copy that shares nothing but logits_processors."""
        processors = {id(function): function for function in self.logits_processors or ()}
        return copy.deepcopy(self, processors)

    @property
    def truncates(self) -> bool:
        """Whether the distribution is cut by top_k, top_p or min_p, which a greedy choice does not notice."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before are less, or more, likely."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def reads_prefix_cache(self) -> bool:
        """Whether what is cached of the prompt need not be computed: its logprobs need all of it."""
        return not self.skip_reading_prefix_cache and self.num_prompt_logprobs is None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Logprobs wanted at each place of the prompt, beside that of its own token; −1: all, None: not even that."""
        return len(self.prompt_logprob_token_ids[0]) if self.prompt_logprob_token_ids else self.prompt_logprobs

    @property
    def can_be_drafted(self) -> bool:
        """Whether tokens may be drafted for it: what comes next hangs on no other tokens than through the model."""
        return not (
            self.penalizes or self.bad_words or self.min_tokens or self.stop or self.structured_outputs
            or self.logits_processors or self.logprobs is not None
        )  # fmt: skip


@refuses_unknown_options({"structured_outputs": ((None,), "use SamplingParams")})
@dataclass(kw_only=True)
class BeamSearchParams:
    """Under vLLM's names.  Beams are ranked by the sum of their tokens' log probabilities, divided by their length, the
    prompt's included, to the power of `length_penalty`."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # the only one; for scripts that name it
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False  # there are no stop strings

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1)
        check_int("max_tokens", self.max_tokens, 1)
        penalty = self.length_penalty
        if not isinstance(penalty, (int, float)) or not abs(penalty) <= MAX_LENGTH_PENALTY:
            raise ValueError(f"length_penalty must be a number of at most ±{MAX_LENGTH_PENALTY}, got {penalty!r}")
        if self.include_stop_str_in_output:
            raise ValueError("include_stop_str_in_output: beam search has no stop strings; leave it out")
        if self.temperature != 0:
            raise ValueError("beam search with a temperature is not supported; leave temperature at 0")


def _token_ids(name: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set)):
        raise ValueError(f"{name} must be a list of token ids, got {value!r}")
    for token_id in value:
        check_int(name, token_id, 0)
    return list(value)


def _rows_of_token_ids(value: Any) -> list[list[int]] | None:
    """The rows as long as the longest of them."""
    name = "prompt_logprob_token_ids"
    if value is None:
        return None
    rows = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(f"{name} must be lists of token ids, one for each place, or a 2-dimensional array of integers")
    for row in rows:
        for token_id in row:
            check_int(name, token_id, -1)
    longest = max(map(len, rows), default=0)
    if not longest:
        raise ValueError(f"{name} has no token ids; leave it out")
    return [[*row, *[-1] * (longest - len(row))] for row in rows]


def _texts(name: str, value: Any) -> list[str]:
    """One string or several, none of them empty."""
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple, set)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
    if "" in texts:
        raise ValueError(f"{name} must not contain an empty string")
    for text in texts:
        check_text(name, text)
    return list(texts)
