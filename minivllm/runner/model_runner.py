"""ModelRunner: a model on one device, its KV cache, and the steps it runs.

The rule of this file: `execute` never waits for the device, but where a grammar has to know the token before.  It packs
the step's inputs, launches, and returns a handle on the tokens.  Token values stay on the device: `last_token[slot]` is
written by sampling and read by the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from minivllm.backends import make_backend
from minivllm.backends.base import KVCache
from minivllm.config import EngineConfig
from minivllm.engine.batch import AdmittedRequest, ScheduledBatch
from minivllm.layers.fp8_linear import quantize_linears
from minivllm.loading.weights import WeightSource, fill_dummy, load_weights
from minivllm.model_config import ModelConfig
from minivllm.models import model_class
from minivllm.parallel import ALONE, TensorParallel
from minivllm.runner.cuda_graph import StepGraphs, graph_sizes, mixed_graph_sizes
from minivllm.runner.drafts import expand, keep_last_accepted, put_drafts
from minivllm.runner.forward_batch import ForwardBatch
from minivllm.runner.logits import needs_processing, process_logits, to_device, token_logprobs
from minivllm.runner.memory import allocate_kv_cache, check_weights_fit, kv_cache_blocks
from minivllm.runner.mixed_arrays import mixed_arrays, named_targets, padded_size, prompt_targets
from minivllm.runner.pending_step import PendingStep, Sampled
from minivllm.runner.sampler import SamplingInputs, sample, sampling_arrays, sampling_inputs
from minivllm.runner.slots import Slots
from minivllm.runner.step_inputs import NUM_BUFFERS, StepInputs
from minivllm.runner.warm_up import kernels_compiled_meanwhile
from minivllm.sampling_params import SamplingParams

Changes = tuple[np.ndarray, np.ndarray]  # of the block table: flat indices, values
Arrays = dict[str, np.ndarray]
Tensors = dict[str, torch.Tensor]
MAX_LOGITS_ROWS = 256  # of a prompt whose logprobs are wanted, at once


class ModelRunner:
    """`config` must be resolved.  After construction the weights are loaded; `make_ready` has to follow.  `tp`: whose
    share of the model this is."""

    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        weights: WeightSource | None,
        tp: TensorParallel = ALONE,
    ) -> None:
        assert config.max_num_seqs and config.max_model_len and config.max_num_batched_tokens, "config is not resolved"
        self.config = config
        self.model_config = model_config
        self.device = torch.device(config.device)
        self._use_device()
        self.dtype = getattr(torch, config.dtype)
        self.kv_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else self.dtype
        if "fp8" in (config.kv_cache_dtype, config.quantization) and config.backend == "triton":
            _check_fp8(self.device)
        self.max_num_tokens = config.max_num_batched_tokens
        self.backend = make_backend(config.backend)
        self.tp = tp
        self.vocab_share = tp.vocab_share(model_config.vocab_size)
        self.model = model_class(model_config.architecture)(
            model_config, self.backend, self.dtype, self.device, config.max_model_len, tp
        )
        if self.device.type == "cpu":
            check_weights_fit(self.model)
        self.own_config = model_config.share(tp.size)  # heads and columns of this worker
        self.slots = Slots(config.max_num_seqs, config.max_model_len, config.block_size, model_config.vocab_size)
        num_slots, num_columns = self.slots.block_table.shape
        self.on_gpu, on_triton = self.device.type == "cuda", config.backend == "triton"
        compiling: AbstractContextManager[None] = nullcontext()
        if self.on_gpu and on_triton:
            caches = self._allocate(1)[0]
            compiling = kernels_compiled_meanwhile(self.backend, self.own_config, self.dtype, caches, num_columns)
        with compiling:
            targets = self.model.weight_targets()
            if weights is None:
                fill_dummy(targets, config.seed)
            else:
                load_weights(targets, weights, self.model.ignores_weight, progress=tp.rank == 0)
            del targets  # or what is packed or quantized now would stay beside what it is made of
        if config.quantization is not None:
            quantize_linears(self.model)
        self.model.finish_loading()
        self.history: torch.Tensor | None = None  # [slots, max_model_len] int32: tokens; made when a request needs it
        most_drafts = config.draft_limits.max_rows
        self.last_token = torch.zeros(num_slots + most_drafts, dtype=torch.int32, device=self.device)
        self.block_table = torch.from_numpy(self.slots.block_table).to(self.device)  # on a CPU the very same memory
        self.inputs = StepInputs(32 * self.max_num_tokens + 64 * num_slots * (num_columns + 1) + 4096, self.device)
        # Eager steps pad to the graphs' sizes too: the same kernels on the same shapes give the same bits.
        self.sizes = graph_sizes(max(config.max_num_seqs, most_drafts)) if on_triton else []
        self.mixed_sizes = mixed_graph_sizes(self.max_num_tokens, tp.size) if on_triton else []
        self.first_draft = num_slots  # in last_token, behind the slots
        self._host_tokens = [
            torch.empty(len(self.last_token), dtype=torch.int32, pin_memory=True)
            for _ in range(NUM_BUFFERS if self.on_gpu else 0)
        ]
        self._turn = 0
        self.graphs = StepGraphs()
        self.kv_caches: list[KVCache] = []

    @torch.inference_mode()
    def make_ready(self) -> int:
        """Allocate the KV cache and capture the CUDA graphs.  Returns the number of blocks."""
        config = self.config
        use_graphs = self.on_gpu and config.backend == "triton" and not config.enforce_eager
        self.kv_caches = self._allocate(1)
        num_blocks = kv_cache_blocks(config, self.own_config, self.kv_dtype, lambda: self._profile(use_graphs))
        num_blocks = self.tp.minimum(num_blocks, self.device)
        self.graphs = StepGraphs()
        self.kv_caches = []
        self.kv_caches = self._allocate(num_blocks)
        if use_graphs:
            self._capture(self.sizes, self.mixed_sizes)
        elif self.on_gpu:  # nothing is left to compile later
            for size in self.sizes:
                self._decode(self._decode_padding(size))
            for size in self.mixed_sizes:
                self._mixed(self._mixed_padding(size))
        return num_blocks

    def _allocate(self, num_blocks: int) -> list[KVCache]:
        return allocate_kv_cache(self.own_config, num_blocks, self.config.block_size, self.kv_dtype, self.device)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> PendingStep:
        """Launch a step."""
        self._use_device()
        changes = self.slots.apply(batch)
        self._remember_admitted(batch)
        if batch.num_decodes == len(batch.slots):
            sampled = self._decode_step(batch, changes)
        else:
            sampled = self._mixed_step(batch, changes)
        assert self.tp.rows is None or self.tp.rows.is_at_rest, "or the next replay takes old messages for its own"
        return self._hand_over(sampled)

    def _use_device(self) -> None:
        """Kernels, events and graphs go to the current device, which is a thread's own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _decode_step(self, batch: ScheduledBatch, changes: Changes) -> Sampled:
        """One token for every row, the one sampled last, and drafts: replays a graph if there is one."""
        given = expand(batch, self.first_draft)
        num_rows = len(given.slots)
        size = next(size for size in self.sizes if size >= num_rows) if self.sizes else num_rows
        padding = self.slots.padding
        slots, places, seq_lens = (np.full(size, fill, np.int32) for fill in (padding, padding, 0))
        slots[:num_rows], places[:num_rows], seq_lens[:num_rows] = given.slots, given.places, given.seq_lens
        if batch.drafts:
            put_drafts(batch, self.last_token, self.first_draft)
        tensors = self._upload_decode(slots, places, seq_lens, num_rows, changes)
        tokens, logits = self.graphs.replay("decode", size) or self._decode(tensors, seq_lens)
        inputs = sampling_inputs(tensors, num_rows)
        sampled = self._sample(logits[:num_rows], given.slots, given.seq_lens, inputs, batch, tokens[:num_rows])
        if batch.drafts:
            keep_last_accepted(batch, sampled.tokens, self.last_token)
            sampled.draft_lengths = [len(drafted) for _, drafted in batch.drafts]
        return sampled

    def _sample(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        seq_lens: np.ndarray,
        inputs: SamplingInputs,
        batch: ScheduledBatch,
        tokens: torch.Tensor | None = None,
    ) -> Sampled:
        """Draw a token a row.  `tokens`: those that the backend drew by itself already, which hold if no row asks for
        more."""
        num_logprobs = self.slots.num_logprobs[rows]
        wants_logprobs = (num_logprobs >= 0).any()
        processes = batch.token_masks or batch.processed or needs_processing(self.slots, rows, seq_lens)
        whole = self._whole(logits) if processes or wants_logprobs else logits
        failed: dict[int, str] = {}
        if processes:
            processed, failed = process_logits(
                self.backend, whole, self.slots, rows, seq_lens, inputs.temperature, self.history, batch, self.tp
            )
            tokens = sample(self.backend, processed, inputs, self.last_token)  # of whole rows, the same for all
        elif tokens is None:
            tokens = self._draw(logits, inputs)
        if self.slots.remembers[rows].any():
            assert self.history is not None
            self.history[to_device(rows, self.device), to_device(seq_lens, self.device)] = tokens
        sampled = Sampled(tokens, failed=failed)
        if wants_logprobs:
            own = np.flatnonzero(num_logprobs >= 0)
            asking = to_device(own, self.device)
            named = [self.slots.logprob_token_ids[slot] for slot in rows[own]]
            sampled.num_logprobs = num_logprobs
            sampled.logprobs = token_logprobs(whole[asking], tokens[asking], int(num_logprobs.max()), named)
        return sampled

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab], or of this worker's token ids where `_draw` can do with them."""
        logits = self.model.compute_logits(hidden)
        return self._gather(logits) if self.vocab_share is None else logits

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        """All of `_logits`: [rows, vocab]."""
        return logits if self.vocab_share is None else self._gather(logits)

    def _gather(self, logits: torch.Tensor) -> torch.Tensor:
        return self.tp.gather_logits(logits, self.model_config.vocab_size)

    def _draw(self, logits: torch.Tensor, inputs: SamplingInputs) -> torch.Tensor:
        """A token for each row of `_logits`."""
        return sample(self.backend, logits, inputs, self.last_token, self.vocab_share)

    def _remember_admitted(self, batch: ScheduledBatch) -> None:
        """Write the known tokens of new requests that ask for what hangs on them to `history`."""
        for request in batch.admitted:
            if self.slots.remembers[request.slot]:
                if self.history is None:
                    num_slots, longest = len(self.slots.block_table), self.config.max_model_len
                    assert longest is not None
                    self.history = torch.zeros(num_slots, longest, dtype=torch.int32, device=self.device)
                tokens = to_device(self.slots.token_ids[request.slot], self.device)
                self.history[request.slot, : len(tokens)] = tokens

    def _upload_decode(
        self, slots: np.ndarray, places: np.ndarray, seq_lens: np.ndarray, num_rows: int, changes: Changes | None
    ) -> Tensors:
        positions = np.maximum(seq_lens - 1, 0)
        slot_mapping = self.slots.slot_mapping(slots, positions)
        slot_mapping[num_rows:] = -1
        return self._upload(
            {
                "slots": slots,
                "seq_lens": seq_lens,
                "positions": positions,
                "slot_mapping": slot_mapping,
                **sampling_arrays(self.slots, slots, seq_lens),
                "sample_slots": places,
            },
            changes,
        )

    def _decode(self, tensors: Tensors, host_seq_lens: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole decode step, from the tokens sampled last to the next ones: tokens [rows] int32, logits [rows,
        vocab].  This is what graphs capture.  `host_seq_lens` is for the torch backend, which is never captured."""
        slots = tensors["slots"]
        batch = ForwardBatch(
            token_ids=self.last_token[tensors["sample_slots"]],
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            block_tables=self.block_table[slots],
            seq_lens=tensors["seq_lens"],
            num_decodes=slots.shape[0],
            host_seq_lens=[] if host_seq_lens is None else host_seq_lens.tolist(),
        )
        logits = self._logits(self.model(batch, self.kv_caches))
        return self._draw(logits, sampling_inputs(tensors, len(slots))), logits

    def _mixed_step(self, batch: ScheduledBatch, changes: Changes) -> Sampled:
        """Decodes and chunks of prompts in one pass."""
        size = padded_size(batch, self.mixed_sizes)
        arrays = mixed_arrays(self.slots, batch, size)
        sampled = np.array(batch.sampled_rows, np.int32)
        slots, seq_lens = arrays["slots"][sampled], arrays["seq_lens"][sampled]
        tensors = self._upload(arrays | sampling_arrays(self.slots, slots, seq_lens), changes)
        replayed = None if size is None else self.graphs.replay("mixed", size)
        (hidden,) = replayed or self._mixed(tensors, arrays)
        begin = len(sampled)
        result = Sampled(self.last_token[:0])
        if begin:
            logits = self._logits(hidden[:begin])
            inputs = sampling_inputs(tensors, begin)
            result = self._sample(logits, slots, seq_lens, inputs, batch)
        for row in batch.prompt_logprobs_rows:
            num_top = int(self.slots.num_prompt_logprobs[batch.slots[row]])
            result.prompt_logprobs.append([])
            named = named_targets(self.slots, batch, row)
            for part in to_device(prompt_targets(self.slots, batch, row), self.device).split(MAX_LOGITS_ROWS):
                end = begin + len(part)
                logits = self._gather(self.model.compute_logits(hidden[begin:end]))
                result.prompt_logprobs[-1].append(token_logprobs(logits, part, num_top, named[: len(part)]))
                begin, named = end, named[len(part) :]
        return result

    def _mixed(self, tensors: Tensors, host: Arrays | None = None) -> tuple[torch.Tensor]:
        """The model's part of a mixed step.  This is what graphs capture.  `host`: the same on the host, for the torch
        backend, which is never captured."""
        last_tokens, token_ids = self.last_token[tensors["token_slots"]], tensors["token_ids"]
        batch = ForwardBatch(
            token_ids=torch.where(token_ids < 0, last_tokens, token_ids),
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            block_tables=self.block_table[tensors["slots"]],
            seq_lens=tensors["seq_lens"],
            num_decodes=len(tensors["decode_seq_lens"]),
            query_start_loc=tensors["query_start_loc"],
            query_tiles=tensors["query_tiles"],
            decode_seq_lens=tensors["decode_seq_lens"],
            output_tokens=tensors["output_tokens"],
            host_seq_lens=[] if host is None else host["seq_lens"].tolist(),
            host_query_start_loc=[] if host is None else host["query_start_loc"].tolist(),
        )
        return (self.model(batch, self.kv_caches),)

    def _upload(self, arrays: dict[str, np.ndarray], changes: Changes | None) -> Tensors:
        """Send a step's inputs, and bring the block table up to date."""
        if changes is None or not self.on_gpu or not len(changes[0]):
            return self.inputs.upload(arrays)
        tensors = self.inputs.upload({**arrays, "changed": changes[0], "new_values": changes[1]})
        self.block_table.view(-1).index_copy_(0, tensors["changed"], tensors["new_values"])
        return tensors

    def _hand_over(self, sampled: Sampled) -> PendingStep:
        """Start the copy of the tokens to the host."""
        if not self.on_gpu:
            return PendingStep(sampled, None)
        self._turn = (self._turn + 1) % NUM_BUFFERS
        host = self._host_tokens[self._turn][: len(sampled.tokens)]
        sampled.tokens = host.copy_(sampled.tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return PendingStep(sampled, event)

    def _capture(self, sizes: Sequence[int], mixed_sizes: Sequence[int]) -> None:
        self.graphs.capture("decode", sizes, self._decode_padding, self._decode)
        self.graphs.capture("mixed", mixed_sizes, self._mixed_padding, self._mixed)

    def _decode_padding(self, size: int) -> Tensors:
        """The inputs of a decode step of padding only."""
        padding = np.full(size, self.slots.padding, np.int32)
        return self._upload_decode(padding, padding, np.zeros(size, np.int32), 0, None)

    def _mixed_padding(self, size: int) -> Tensors:
        return self._upload(mixed_arrays(self.slots, ScheduledBatch(), size), None)

    def _profile(self, use_graphs: bool) -> None:
        """Run the largest steps there can be, options of sampling apart, for their memory to be measured; compiles on
        the way what `compile_kernels` has left.

        The KV cache is a single block here, which is what a block table of zeros names throughout.
        """
        longest = self.config.max_model_len
        assert longest is not None
        batch = ScheduledBatch()
        left = min(self.max_num_tokens, self.slots.padding * longest)
        while left > 0:
            slot, num_tokens = len(batch.slots), min(left, longest)
            batch.admitted.append(AdmittedRequest(slot, [0] * num_tokens, num_tokens, SamplingParams(), 0, []))
            batch.slots.append(slot)
            batch.num_computed.append(0)
            batch.num_scheduled.append(num_tokens)
            batch.sampled_rows.append(slot)
            left -= num_tokens
        self.execute(batch).wait()
        size = self.sizes[-1] if self.sizes else self.slots.padding
        logits = self._whole(self._decode(self._decode_padding(size), np.zeros(size, np.int32))[1])
        ones = torch.ones(size, device=self.device)
        self.backend.truncate(logits.float(), ones, ones.int(), ones, ones)
        if use_graphs:
            self._capture(self.sizes[-1:], self.mixed_sizes[-1:])


def _check_fp8(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"fp8 (kv_cache_dtype, quantization) needs a GPU of compute capability 8.9 or later; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        )
