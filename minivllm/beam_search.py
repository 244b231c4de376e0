"""Beam search on top of the engine: each round asks every beam for its next token's log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from minivllm.outputs import Logprob, RequestOutput
from minivllm.sampling_params import BeamSearchParams, SamplingParams


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam: `tokens` are those of the prompt and of the output."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # of the output's tokens
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the token that ended it

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
    step = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True)
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
                        longer.finish_reason, longer.stop_reason = "stop", token
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
