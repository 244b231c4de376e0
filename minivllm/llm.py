"""LLM: the offline front door."""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from minivllm.beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from minivllm.chat_template import Message
from minivllm.config import EngineConfig
from minivllm.engine.engine import Engine
from minivllm.inputs import (
    CHAT_OPTIONS,
    NOT_SUPPORTED,
    CheckedRequest,
    InputProcessor,
    Prompt,
    checked_model,
    is_one_prompt,
)
from minivllm.loading import find_model
from minivllm.loading.weights import has_own_head
from minivllm.metrics import Metric, collect
from minivllm.model_config import ModelConfig, override
from minivllm.models import model_class
from minivllm.outputs import RequestOutput
from minivllm.process_state import deferred_interrupt, heap_left_alone
from minivllm.runner.executor import make_executor
from minivllm.sampling_params import RequestOutputKind, SamplingParams
from minivllm.validation import take_options

# What vLLM's LLM has beside, and where to look here.
NOT_HERE = dict.fromkeys(
    ("classify", "embed", "encode", "reward", "score"), "only models that generate are supported"
) | {
    "apply_model": "the model is llm.engine.executor.runner.model, with one GPU",
    "collective_rpc": "workers do what minivllm/runner/worker.py says",
    "llm_engine": "the engine is llm.engine, its settings are llm.config, the model's llm.model_config",
    "set_tokenizer": "give LLM a tokenizer",
    "sleep": "shutdown() frees the GPU",
    "start_profile": "python bench.py --profile FILE writes a trace",
    "wake_up": "after shutdown() make another LLM",
}


class LLM:
    """A model, ready to generate.  Threads may share it: they take turns, step by step.

    model: a directory, a hub id, a .gguf file, or None for the embedded SmolLM2-135M-Instruct.
    tokenizer: where the tokenizer comes from, if not from the model.
    revision: branch, tag or commit of a hub model.
    skip_tokenizer_init: load no tokenizer; prompts must be token ids and outputs have no text.
    hf_overrides: entries of the model's config.json to change.
    chat_template: for `chat`, in place of the model's own: text, or the path of a file.
    trust_remote_code: makes no difference; code that comes with a model is never run.
    arguments: the fields of `EngineConfig`, under vLLM's names.

    Raises FileNotFoundError or PermissionError for a model that cannot be had, ValueError for one that is not
    supported, for wrong arguments, and when memory does not suffice; each says what to do.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        skip_tokenizer_init: bool = False,
        hf_overrides: dict[str, Any] | None = None,
        chat_template: str | Path | None = None,
        trust_remote_code: bool = False,
        **arguments: Any,
    ) -> None:
        model = checked_model(model)
        config = EngineConfig.from_arguments(arguments)
        device = _device(config.device, config.tensor_parallel_size)
        files, defaults = find_model(model, tokenizer, revision, skip_tokenizer_init, config)
        self.model = files.name
        hf_config = override(files.config, hf_overrides or {})
        model_config = ModelConfig.from_hf(hf_config, {**files.generation_config, **defaults})
        is_asked_for = "tie_word_embeddings" in (hf_overrides or {})
        if model_config.tie_word_embeddings and not is_asked_for and has_own_head(files.weights):
            warnings.warn(
                "the checkpoint's lm_head.weight is used, as it differs from the embeddings, although config.json says "
                "tie_word_embeddings; hf_overrides={'tie_word_embeddings': True} leaves it out, as vLLM does",
                stacklevel=2,
            )
            model_config = replace(model_config, tie_word_embeddings=False)
        # Refuses what is not supported before anything is loaded.
        self.model_config = model_class(model_config.architecture, trust_remote_code).adapt(model_config)
        self.model_config.share(config.tensor_parallel_size)  # refuses what cannot be cut so
        self.config = config.resolve(self.model_config, device)
        assert self.config.max_model_len is not None
        self.inputs = InputProcessor(files.load_tokenizer(), chat_template, defaults, self.config.max_model_len)
        if config.override_generation_config:
            self.get_default_sampling_params()  # refuses wrong values
        gc.collect()  # an LLM that nobody has any more, and its memory
        with heap_left_alone():
            self._executor = make_executor(self.config, self.model_config, files.weights)
        self.engine = Engine(self.config, self.model_config, self._executor, self.inputs.tokenizer)
        self._request_ids = itertools.count()
        self._inboxes: dict[str, deque[RequestOutput]] = {}  # by request: the outputs its call has not taken yet
        self._left: deque[str] = deque()  # requests that nobody waits for any more, to be aborted
        self._is_changing = False  # the engine, by a call of the lock's owner
        self._is_shut_down = False
        self._lock = threading.RLock()  # of the engine, the inboxes and the tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
        **more: Any,
    ) -> list[RequestOutput]:
        """Complete the prompts, all at once; one output a prompt, in their order.

        Those with the largest max_tokens are started first: so the last to run are short ones, and the batch stays full
        (longest processing time first; Graham 1969).

        prompts: one or a list of: text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.
        sampling_params: one for all, or one a prompt; None: the model's defaults (`get_default_sampling_params`).
        use_tqdm: show progress; or what makes the bar, called as tqdm is.
        more: vLLM's other arguments, as long as they ask for nothing (lora_request=None).

        Raises ValueError for wrong input before any request is started, and for one of `logits_processors` that fails;
        other calls go on.  Ctrl-C aborts these requests and raises KeyboardInterrupt; the engine stays usable.
        """
        take_options(more, "generate", NOT_SUPPORTED)
        requests = self._check_requests(prompts, sampling_params, RequestOutputKind.FINAL_ONLY)
        done: list[RequestOutput] = []
        make_bar = use_tqdm if callable(use_tqdm) else partial(tqdm, disable=not use_tqdm)
        with heap_left_alone(), make_bar(total=len(requests), desc="Processed prompts", unit="req") as bar:
            start = time.monotonic()
            num_in = num_out = 0
            for output in self._run(requests, longest_first=True):
                done.append(output)
                num_in += len(output.prompt_token_ids)
                num_out += sum(len(completion.token_ids) for completion in output.outputs)
                seconds = max(time.monotonic() - start, 1e-9)
                bar.set_postfix_str(
                    f"input: {num_in / seconds:.1f} tok/s, output: {num_out / seconds:.1f} tok/s", False
                )
                bar.update()
        return sorted(done, key=lambda output: int(output.request_id))  # ids count up in the order of the prompts

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields an output whenever a request has new tokens, with only what is new in it.

        Request ids are numbers that count up in the order of the prompts.  Closing the generator aborts the requests.
        """
        return self._run(self._check_requests(prompts, sampling_params, RequestOutputKind.DELTA))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm[Any]] = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, written with the model's chat template.

        messages: [{"role": "user", "content": "…"}, …], or a list of such lists.
        options: as for `preprocess_chat`; vLLM's others as long as they ask for nothing.
        """
        options = take_options(options, "chat", NOT_SUPPORTED, CHAT_OPTIONS)
        if not isinstance(messages, Sequence) or not messages:
            raise ValueError(f"messages must be a conversation or a list of them, got {messages!r}")
        conversations = [messages] if isinstance(messages[0], dict) else messages
        prompts = [self.preprocess_chat(m, **options) for m in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def preprocess_chat(self, messages: Sequence[Message], **options: Any) -> Prompt:
        """The prompt that `chat` makes of a conversation, as `generate` and `stream` take it; options as for
        `InputProcessor.preprocess_chat`."""
        with self._lock:
            return self.inputs.preprocess_chat(messages, **options)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False, **more: Any
    ) -> list[BeamSearchOutput]:
        """The most likely continuations of each prompt; prompts and `more` as for `generate`.

        Every round asks for 2 · beam_width log probabilities: `max_logprobs` must allow that.  use_tqdm: show the
        rounds.
        """
        take_options(more, "beam_search", {**NOT_SUPPORTED, "concurrency_limit": ((None,), "leave it out")})
        if not isinstance(params, BeamSearchParams):
            raise ValueError(f"params must be BeamSearchParams, got {type(params).__name__}")
        if 0 <= self.config.max_logprobs < 2 * params.beam_width:
            raise ValueError(
                f"beam_width ({params.beam_width}) asks for {2 * params.beam_width} logprobs, more than max_logprobs "
                f"({self.config.max_logprobs}); lower it, or raise max_logprobs"
            )
        checked = self._check_requests(
            prompts, SamplingParams(max_tokens=params.max_tokens), RequestOutputKind.FINAL_ONLY
        )
        for i, (token_ids, _, _) in enumerate(checked):
            if len(token_ids) + params.max_tokens > self.inputs.max_model_len:
                raise ValueError(
                    f"prompts[{i}]: {len(token_ids)} tokens and max_tokens ({params.max_tokens}) are more than "
                    f"max_model_len ({self.inputs.max_model_len}); lower max_tokens"
                )
        outputs = beam_search(
            lambda beams, step: self.generate(beams, step, use_tqdm=False),
            [token_ids for token_ids, _, _ in checked],
            params,
            self.engine.scheduler.eos_token_ids,
            use_tqdm,
        )
        if self.inputs.tokenizer is not None:
            for output in outputs:
                for sequence in output.sequences:
                    with self._lock:
                        sequence.text = str(self.inputs.tokenizer.decode(sequence.tokens))
        return outputs

    def get_metrics(self) -> list[Metric]:
        """Figures of the engine, under vLLM's names."""
        return collect(self.engine.scheduler)

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer; ValueError if there is none (skip_tokenizer_init)."""
        return self.inputs.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What is recommended for the model: by its generation_config.json, if `generation_config` names no other."""
        return SamplingParams(**self.inputs.default_options())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes."""
        with self._lock:
            return self.engine.reset_prefix_cache()

    def shutdown(self) -> None:
        """Free the model and its memory.  Another LLM can be made in the same process afterwards."""
        with self._lock:
            self._is_shut_down = True
            self._hand_out(self.engine.abort_requests(list(self.engine.request_ids)))
            self._executor.shutdown()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    if not TYPE_CHECKING:  # which would take every name for one that is there

        def __getattr__(self, name: str) -> Any:
            hint = f": {NOT_HERE[name]}" if name in NOT_HERE else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def _check_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        output_kind: RequestOutputKind,
    ) -> list[CheckedRequest]:
        """What `_run` takes, or a ValueError that says which prompt or params are wrong."""
        self._check_is_there()
        if is_one_prompt(prompts):
            prompts = [prompts]  # type: ignore[assignment]
        if not isinstance(prompts, Sequence):
            raise ValueError(f"prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence):
            raise ValueError(f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r}")
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts; give one for all or "
                "one a prompt"
            )
        checked = []
        for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
            if not isinstance(params, SamplingParams):
                raise ValueError(f"sampling_params[{i}] must be a SamplingParams, got {type(params).__name__}")
            try:
                with self._lock:  # tokenizers are not made for several threads
                    request = self.inputs.check(prompt, params, output_kind)
                    self.engine.check_request(*request[:2])
            except ValueError as error:
                raise ValueError(f"prompts[{i}]: {error}") from None
            checked.append(request)
        return checked

    def _check_is_there(self) -> None:
        if self._is_shut_down:
            raise ValueError("this LLM was shut down; make another")

    def _run(self, requests: Sequence[CheckedRequest], longest_first: bool = False) -> Iterator[RequestOutput]:
        """Queue requests and step the engine until they are done; abort what is left of them if that is cut short.

        Other calls may run meanwhile, in other threads too: whoever steps the engine puts each output where its own
        call finds it.
        """
        inbox: deque[RequestOutput] = deque()
        request_ids = [str(next(self._request_ids)) for _ in requests]
        try:
            queue = list(zip(request_ids, requests, strict=True))
            if longest_first:
                queue.sort(key=lambda entry: -(entry[1][1].max_tokens or sys.maxsize))
            with self._change():
                self._check_is_there()
                for request_id, (token_ids, params, text) in queue:
                    self._inboxes[request_id] = inbox
                    self.engine.add_request(request_id, token_ids, params, text)
            unfinished = set(request_ids)
            while unfinished:
                with self._change():
                    if not inbox:  # which another thread may have filled
                        if self.engine.request_ids.isdisjoint(unfinished):  # they were aborted
                            break
                        self._hand_out(self.engine.step())
                while inbox:
                    output = inbox.popleft()
                    if output.finished:
                        unfinished.discard(output.request_id)
                    output.raise_failure()
                    yield output
        finally:
            self._left += request_ids
            with deferred_interrupt(), self._lock:
                if not self._is_changing:  # or the collector of garbage closes a stream in the middle of it
                    self._abort_left()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change of the engine, which none other comes into, not even Ctrl-C; at its end what was left is aborted.
        Raises ValueError where a function of a request, which is called in a step, wants another."""
        with deferred_interrupt(), self._lock:
            if self._is_changing:
                raise ValueError("an LLM cannot be called by the functions of its own requests; make another LLM")
            self._is_changing = True
            try:
                yield
            finally:
                self._abort_left()

    def _abort_left(self) -> None:
        """The end of a change, or one by itself."""
        self._is_changing = True
        try:
            while self._left:
                request_ids = [self._left.popleft() for _ in range(len(self._left))]
                for request_id in request_ids:
                    self._inboxes.pop(request_id, None)
                self.engine.abort_requests(request_ids)
        finally:
            self._is_changing = False

    def _hand_out(self, outputs: list[RequestOutput]) -> None:
        """Put each output where its own call finds it."""
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)


def _device(name: str, num_workers: int) -> str:
    """ "auto", "cuda", "cuda:N" or "cpu" to a device there is, the first worker's: "cuda:N" or "cpu"."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    index = int(name.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs; use another, or 'cpu'")
    if index + num_workers > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel_size ({num_workers}) needs as many GPUs, from {index} on; there are "
            f"{torch.cuda.device_count()}"
        )
    return f"cuda:{index}"
