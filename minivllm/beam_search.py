"""Beam search on top of the engine: each round asks every beam for its next token's log probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from minivllm.outputs import Logprob, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.validation import check_int


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
        if not isinstance(self.length_penalty, (int, float)) or not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be a number, got {self.length_penalty!r}")
        if self.include_stop_str_in_output:
            raise ValueError("include_stop_str_in_output: beam search has no stop strings; leave it out")
        if self.temperature != 0:
            raise ValueError("beam search with a temperature is not supported; leave temperature at 0")


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: `tokens` are those of the prompt and of the output."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # of the output's tokens
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None

    def score(self, eos_token_ids: Collection[int], length_penalty: float) -> float:
        length = len(self.tokens) - (self.tokens[-1] in eos_token_ids)
        return self.cum_logprob / max(length, 1) ** length_penalty


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


def beam_search(
    generate: Callable[[list[list[int]], SamplingParams], list[RequestOutput]],
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    eos_token_ids: Collection[int],
    use_tqdm: bool = False,
) -> list[BeamSearchOutput]:
    """Search from each prompt.  `generate` is the engine's: one output a prompt."""
    step = SamplingParams(
        temperature=0, max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True, detokenize=False
    )
    beams = [[BeamSearchSequence(list(prompt))] for prompt in prompts]
    finished: list[list[BeamSearchSequence]] = [[] for _ in prompts]
    ends = () if params.ignore_eos else eos_token_ids

    def rank(sequence: BeamSearchSequence) -> float:
        return -sequence.score(ends, params.length_penalty)

    for _ in tqdm(range(params.max_tokens), desc="Beam search", unit="token", disable=not use_tqdm):
        outputs = iter(generate([beam.tokens for own in beams for beam in own], step))
        for i, own in enumerate(beams):
            candidates = []
            for beam in own:
                logprobs = next(outputs).outputs[0].logprobs
                assert logprobs is not None
                for token, found in logprobs[0].items():
                    longer = BeamSearchSequence(
                        [*beam.tokens, token], [*beam.logprobs, logprobs[0]], beam.cum_logprob + found.logprob
                    )
                    if token in ends:
                        longer.finish_reason = "stop"
                        finished[i].append(longer)
                    else:
                        candidates.append(longer)
            beams[i] = sorted(candidates, key=rank)[: params.beam_width]
    results = []
    for own, ended in zip(beams, finished, strict=True):
        for beam in own:
            beam.finish_reason = "length"
        results.append(BeamSearchOutput(sorted([*ended, *own], key=rank)[: params.beam_width]))
    return results
