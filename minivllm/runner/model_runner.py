"""ModelRunner: a model on one device, its KV cache, and the steps it runs.

The rule of this file: `execute` never waits for the device.  It packs the step's inputs, launches, and returns a handle
on the tokens.  Token values stay on the device: `last_token[slot]` is written by sampling and read by the next step.
"""

from __future__ import annotations

import numpy as np
import torch

from minivllm.backends import make_backend
from minivllm.config import EngineConfig, ModelConfig
from minivllm.engine.batch import AdmittedRequest, ScheduledBatch
from minivllm.loading.weights import WeightSource, fill_dummy, load_weights
from minivllm.models import model_class
from minivllm.runner.cuda_graph import DecodeGraphs, DecodeOutput, graph_sizes
from minivllm.runner.forward_batch import QUERY_TILE, ForwardBatch
from minivllm.runner.memory import allocate_kv_cache, kv_cache_blocks
from minivllm.runner.sampler import mask_logits, needs_masks, sample, sampling_arrays, sampling_inputs, truncate
from minivllm.runner.slots import Slots
from minivllm.runner.step_inputs import NUM_BUFFERS, StepInputs
from minivllm.sampling_params import SamplingParams

Changes = tuple[np.ndarray, np.ndarray]  # of the block table: flat indices, values


class StepTokens:
    """The tokens of a launched step."""

    def __init__(self, tokens: torch.Tensor, event: torch.cuda.Event | None) -> None:
        self._tokens = tokens
        self._event = event

    def wait(self) -> list[int]:
        """Wait until the step has run; its tokens, in the order of the batch's `sampled_rows`."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class ModelRunner:
    """`config` must be resolved.  After construction the KV cache is allocated: `num_blocks` blocks."""

    @torch.inference_mode()
    def __init__(self, config: EngineConfig, model_config: ModelConfig, weights: WeightSource | None) -> None:
        assert config.max_num_seqs and config.max_model_len and config.max_num_batched_tokens, "config is not resolved"
        self.config = config
        self.model_config = model_config
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self.max_num_tokens = config.max_num_batched_tokens
        self.backend = make_backend(config.backend)
        self.model = model_class(model_config.architecture)(
            model_config, self.backend, self.dtype, self.device, config.max_model_len
        )
        targets = self.model.weight_targets()
        if weights is None:
            fill_dummy(targets, config.seed)
        else:
            load_weights(targets, weights, self.model.ignores_weight, progress=True)
        self.model.finish_loading()
        self.slots = Slots(config.max_num_seqs, config.max_model_len, config.block_size)
        num_slots, num_columns = self.slots.block_table.shape
        self.last_token = torch.zeros(num_slots, dtype=torch.int32, device=self.device)
        self.block_table = torch.from_numpy(self.slots.block_table).to(self.device)  # on a CPU the very same memory
        self.inputs = StepInputs(32 * self.max_num_tokens + 64 * num_slots * (num_columns + 1) + 4096, self.device)
        self.on_gpu = self.device.type == "cuda"
        # Eager decode steps pad to the graphs' sizes too: the same kernels on the same shapes give the same bits.
        self.sizes = graph_sizes(config.max_num_seqs) if config.backend == "triton" else []
        self._host_tokens = [
            torch.empty(num_slots, dtype=torch.int32, pin_memory=True) for _ in range(NUM_BUFFERS if self.on_gpu else 0)
        ]
        self._turn = 0
        use_graphs = self.on_gpu and config.backend == "triton" and not config.enforce_eager
        self.graphs = DecodeGraphs()
        self.kv_caches = allocate_kv_cache(model_config, 1, config.block_size, self.dtype, self.device)
        self.num_blocks = kv_cache_blocks(config, model_config, self.dtype, lambda: self._profile(use_graphs))
        self.graphs = DecodeGraphs()
        self.kv_caches = []
        self.kv_caches = allocate_kv_cache(model_config, self.num_blocks, config.block_size, self.dtype, self.device)
        if use_graphs:
            self.graphs.capture(self.sizes, self._padding_inputs, self._decode)
        elif self.on_gpu:
            for size in self.sizes:  # nothing is left to compile later
                self._decode(self._padding_inputs(size))

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepTokens:
        """Launch a step."""
        changes = self.slots.apply(batch)
        if batch.num_decodes == len(batch.slots):
            tokens = self._decode_step(batch, changes)
        else:
            tokens = self._mixed_step(batch, changes)
        return self._hand_over(tokens)

    def _decode_step(self, batch: ScheduledBatch, changes: Changes) -> torch.Tensor:
        """One token for every row, the one sampled last: replays a graph if there is one.  Returns [rows] int32."""
        num_rows = len(batch.slots)
        size = next(size for size in self.sizes if size >= num_rows) if self.sizes else num_rows
        slots = np.full(size, self.slots.padding, np.int32)
        slots[:num_rows] = batch.slots
        seq_lens = np.zeros(size, np.int32)
        seq_lens[:num_rows] = batch.num_computed
        seq_lens[:num_rows] += 1
        tensors = self._upload_decode(slots, seq_lens, num_rows, changes)
        output = self.graphs.replay(size) or self._decode(tensors, seq_lens)
        tokens, logits = output
        rows, seq_lens = slots[:num_rows], seq_lens[:num_rows]
        if needs_masks(self.slots, rows, seq_lens):  # the tokens drawn already are drawn again, from masked logits
            inputs = sampling_inputs(tensors, num_rows)
            logits = mask_logits(logits[:num_rows], self.slots, rows, seq_lens, inputs.temperature)
            tokens = sample(self.backend, logits, inputs, self.last_token)
        return tokens[:num_rows]

    def _upload_decode(
        self, slots: np.ndarray, seq_lens: np.ndarray, num_rows: int, changes: Changes | None
    ) -> dict[str, torch.Tensor]:
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
            },
            changes,
        )

    def _decode(self, tensors: dict[str, torch.Tensor], host_seq_lens: np.ndarray | None = None) -> DecodeOutput:
        """The whole decode step, from the tokens sampled last to the next ones.  This is what graphs capture.

        `host_seq_lens` is for the torch backend, which is never captured.
        """
        slots = tensors["slots"]
        batch = ForwardBatch(
            token_ids=self.last_token[slots],
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            block_tables=self.block_table[slots],
            seq_lens=tensors["seq_lens"],
            num_decodes=slots.shape[0],
            host_seq_lens=[] if host_seq_lens is None else host_seq_lens.tolist(),
        )
        logits = self.model.compute_logits(*self.model(batch, self.kv_caches))
        inputs = sampling_inputs(tensors, len(slots))
        return sample(self.backend, logits, inputs, self.last_token), logits

    def _mixed_step(self, batch: ScheduledBatch, changes: Changes) -> torch.Tensor:
        """Decodes and chunks of prompts in one pass.  Returns the tokens of the rows that sample: [sampled] int32."""
        slots = np.array(batch.slots, np.int32)
        num_computed = np.array(batch.num_computed, np.int32)
        num_scheduled = np.array(batch.num_scheduled, np.int32)
        query_start_loc = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(num_scheduled, out=query_start_loc[1:])
        row_of_token = np.repeat(np.arange(len(slots)), num_scheduled)
        positions = np.arange(query_start_loc[-1], dtype=np.int32)
        positions += (num_computed - query_start_loc[:-1])[row_of_token]
        token_ids = np.zeros(len(positions), np.int32)
        for row in range(batch.num_decodes, len(slots)):
            known = self.slots.token_ids[slots[row]]
            begin = num_computed[row]
            token_ids[query_start_loc[row] : query_start_loc[row + 1]] = known[begin : begin + num_scheduled[row]]
        seq_lens = num_computed + num_scheduled
        sampled = np.array(batch.sampled_rows, np.int32)
        tensors = self._upload(
            {
                "slots": slots,
                "seq_lens": seq_lens,
                "positions": positions,
                "slot_mapping": self.slots.slot_mapping(slots[row_of_token], positions),
                "token_ids": token_ids,
                "query_start_loc": query_start_loc,
                "query_tiles": query_tiles(num_scheduled, batch.num_decodes),
                "last_tokens_of_rows": query_start_loc[1:][sampled] - 1,
                **sampling_arrays(self.slots, slots[sampled], seq_lens[sampled]),
            },
            changes,
        )
        if batch.num_decodes:
            decode_slots = tensors["slots"][: batch.num_decodes]
            tensors["token_ids"][: batch.num_decodes] = self.last_token[decode_slots]
        forward_batch = ForwardBatch(
            token_ids=tensors["token_ids"],
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            block_tables=self.block_table[tensors["slots"]],
            seq_lens=tensors["seq_lens"],
            num_decodes=batch.num_decodes,
            query_start_loc=tensors["query_start_loc"],
            query_tiles=tensors["query_tiles"],
            host_seq_lens=seq_lens.tolist(),
            host_query_start_loc=query_start_loc.tolist(),
        )
        x, residual = self.model(forward_batch, self.kv_caches)
        if not len(sampled):
            return self.last_token[:0]
        last = tensors["last_tokens_of_rows"]
        logits = self.model.compute_logits(x[last], residual[last])
        inputs = sampling_inputs(tensors, len(sampled))
        if needs_masks(self.slots, slots[sampled], seq_lens[sampled]):
            logits = mask_logits(logits, self.slots, slots[sampled], seq_lens[sampled], inputs.temperature)
        return sample(self.backend, logits, inputs, self.last_token)

    def _upload(self, arrays: dict[str, np.ndarray], changes: Changes | None) -> dict[str, torch.Tensor]:
        """Send a step's inputs, and bring the block table up to date."""
        if changes is None or not self.on_gpu or not len(changes[0]):
            return self.inputs.upload(arrays)
        tensors = self.inputs.upload({**arrays, "changed": changes[0], "new_values": changes[1]})
        self.block_table.view(-1).index_copy_(0, tensors["changed"], tensors["new_values"])
        return tensors

    def _hand_over(self, tokens: torch.Tensor) -> StepTokens:
        """Start the copy of the tokens to the host."""
        if not self.on_gpu:
            return StepTokens(tokens, None)
        self._turn = (self._turn + 1) % NUM_BUFFERS
        host = self._host_tokens[self._turn][: len(tokens)]
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return StepTokens(host, event)

    def _padding_inputs(self, size: int) -> dict[str, torch.Tensor]:
        """The inputs of a decode step of padding only."""
        return self._upload_decode(np.full(size, self.slots.padding, np.int32), np.zeros(size, np.int32), 0, None)

    def _profile(self, use_graphs: bool) -> None:
        """Run the largest steps there can be, for their memory to be measured; compiles every kernel on the way.

        The KV cache is a single block here, which is what a block table of zeros names throughout.
        """
        longest = self.slots.block_table.shape[1] * self.config.block_size
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
        size = self.slots.padding
        _, logits = self._decode(self._padding_inputs(size))
        ones = torch.ones(size, device=self.device)
        truncate(logits.float(), ones, ones.int(), ones, ones)
        if use_graphs:
            self.graphs.capture(self.sizes[-1:], self._padding_inputs, self._decode)


def query_tiles(num_scheduled: np.ndarray, num_decodes: int) -> np.ndarray:
    """[tiles, 2] int32: the row and first query of every tile of prefill attention; in a row, the last tile first."""
    num_tiles = -(-num_scheduled // QUERY_TILE)
    num_tiles[:num_decodes] = 0
    rows = np.repeat(np.arange(len(num_tiles)), num_tiles)
    tiles_left = np.cumsum(num_tiles)[rows] - np.arange(len(rows)) - 1
    return np.stack([rows, tiles_left * QUERY_TILE], 1).astype(np.int32)
