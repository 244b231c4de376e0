"""What `minivllm bench serve` sends, and when: prompts, request bodies, and arrival times planned up front."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTH_NAMES = ("max_tokens", "output_len", "output_tokens")  # of an answer, in a row of a dataset
# A token each in the vocabularies of common models, with the space before it.
_TEXT = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than
first water been call who oil its now find long down day did get come made may part over new sound take only little
work know place year live me back give most very after thing our just name good sentence man think say great where
help through much before line right too mean old any same tell boy follow came want show also around form three small
set put end does another well large must big even such because turn here why ask went men read need land different
home us move try kind hand picture again change off play spell air away animal house point page letter mother answer
found study still learn should world high every near add food between own below country plant last
"""
WORDS = _TEXT.split()


@dataclass(frozen=True)
class Sample:
    """One request's prompt — text, token ids, or the messages of a chat — and the tokens to generate at most."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int


@dataclass(frozen=True)
class RandomLengths:
    """Of random requests, in tokens.  Lengths are drawn from length ± length · ratio; the prefix comes on top of the
    input, and is the same in all prompts."""

    input_len: int
    output_len: int
    input_ratio: float = 0.0
    output_ratio: float = 0.0
    prefix_len: int = 0


def random_samples(num_samples: int, lengths: RandomLengths, vocab_size: int, seed: int, chat: bool) -> list[Sample]:
    """Random token ids in 0 … vocab_size - 1, or for a chat as many common English words.

    The first samples are the same whatever `num_samples` is, and with chat or without it the lengths are.
    """
    rng = np.random.default_rng(seed)
    num_kinds = len(WORDS) if chat else vocab_size
    prefix = rng.integers(num_kinds, size=lengths.prefix_len).tolist()
    samples = []
    for i in range(num_samples):
        own = np.random.default_rng((seed, i))
        input_len = _draw_length(own, lengths.input_len, lengths.input_ratio, least=0 if prefix else 1)
        output_len = _draw_length(own, lengths.output_len, lengths.output_ratio, least=1)
        ids = prefix + own.integers(num_kinds, size=input_len).tolist()
        samples.append(Sample(" ".join(WORDS[k] for k in ids) if chat else ids, output_len))
    return samples


def custom_samples(
    path: str, num_samples: int, output_len: int, seed: int, chat: bool, shuffle: bool = True, oversample: bool = True
) -> list[Sample]:
    """The requests of a JSONL file, whose rows have "prompt" (text or token ids) or "messages", and may have
    one of LENGTH_NAMES; `output_len` is for rows without.

    A file of fewer rows is gone through again, or with `oversample` off gives fewer samples.

    Raises:
        ValueError: a row is none; the message names its line.
        OSError: the file cannot be read.
    """
    samples = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    samples.append(_custom_sample(json.loads(line), output_len, chat))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"--dataset-path {path}, line {number}: {error}") from error
    if not samples:
        raise ValueError(f"--dataset-path {path} has no requests")
    if shuffle:
        samples = [samples[i] for i in np.random.default_rng(seed).permutation(len(samples))]
    if not oversample:
        num_samples = min(num_samples, len(samples))
    return [samples[i % len(samples)] for i in range(num_samples)]


def request_body(sample: Sample, model: str, chat: bool, options: Mapping[str, Any]) -> bytes:
    """The JSON to post.  `options`: sampling options and others, which come last and so override."""
    prompt, output_len = sample.prompt, sample.output_len
    body: dict[str, Any] = {"model": model}
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body |= {"messages": messages, "max_completion_tokens": output_len}
    else:
        body |= {"prompt": prompt, "max_tokens": output_len}
    body |= {"stream": True, "stream_options": {"include_usage": True}} | dict(options)
    return json.dumps(body, separators=(",", ":")).encode()


def plan_arrivals(num_requests: int, request_rate: float, burstiness: float, seed: int) -> np.ndarray:
    """When each request is due, in seconds from the start: [num_requests].

    Gaps are drawn from a gamma distribution of mean 1 / request_rate and shape `burstiness`: 1 makes a Poisson process,
    less makes bursts, inf even gaps.  They are scaled, as in vLLM, so that the last request is due at
    num_requests / request_rate whatever the seed.
    """
    if request_rate == math.inf:
        return np.zeros(num_requests)
    if burstiness == math.inf:
        gaps = np.ones(num_requests)
    else:
        gaps = np.random.default_rng(seed).gamma(burstiness, size=num_requests)
    arrivals = np.cumsum(gaps)
    if not arrivals[-1] > 0:
        raise ValueError(f"--burstiness {burstiness}: all gaps between requests are 0; give more than that")
    return arrivals * (num_requests / request_rate / arrivals[-1])


def _draw_length(rng: np.random.Generator, length: int, ratio: float, least: int) -> int:
    low, high = math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
    return int(rng.integers(max(low, least), max(high, least), endpoint=True))


def _custom_sample(row: Any, output_len: int, chat: bool) -> Sample:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise ValueError('expected an object with either "prompt" or "messages"')
    name = next((name for name in LENGTH_NAMES if name in row), LENGTH_NAMES[0])
    own_len = row.get(name, output_len)
    if type(own_len) is not int or own_len < 1:
        raise ValueError(f'"{name}" must be an integer of at least 1, got {own_len!r}')
    if "messages" in row:
        if not chat:
            raise ValueError('"messages" need --backend openai-chat')
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError('"messages" must be a list of objects')
        return Sample(messages, own_len)
    prompt = row["prompt"]
    is_ids = isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and (chat or not is_ids):
        raise ValueError(f'"prompt" must be text{"" if chat else " or a list of token ids"}')
    return Sample(prompt, own_len)
