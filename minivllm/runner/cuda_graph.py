"""StepGraphs: steps captured as CUDA graphs and replayed.

The graph of a decode step runs everything from the embedding of the last sampled tokens to the sampling of the next
ones, that of a mixed step the model, without the logits.  There is one for each padded size; the largest is captured
first and all share one memory pool, so that together they take little more memory than it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
Output = tuple[torch.Tensor, ...]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes: 1, 2, 4, 8, then steps of 8 to 64, of 16 to 224, 256, 320, steps of 128 from 384 on, and
    `max_num_seqs`.  On an H100 matrix products of 240 or 288 rows take about as long as of 256 or 320, and of 448 up to
    half as long again as of 512: cuBLAS divides them badly.
    """
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 240, 16), 256, 320, *range(384, max_num_seqs, 128)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


def mixed_graph_sizes(max_num_batched_tokens: int, num_workers: int = 1) -> list[int]:
    """Padded numbers of tokens of a mixed step: from 256 on in steps of 128, the rows that a matrix product takes
    together, so that padding costs little.

    Steps of more than 2,048 take longer to run than to launch, but for those that more than two workers share, with a
    dozen copies a layer: of these there are graphs in steps of 1,024 up to 8,192, then of twice as many each, and of
    the largest.
    """
    sizes = {32, 64, 128, 192, *range(256, 2049, 128)}
    if num_workers > 2:
        sizes |= {*range(3072, 8193, 1024), *(8192 << i for i in range(8)), max(2048, max_num_batched_tokens)}
    return sorted(size for size in sizes if size <= max_num_batched_tokens)


class StepGraphs:
    def __init__(self) -> None:
        self._graphs: dict[tuple[str, int], tuple[torch.cuda.CUDAGraph, Output]] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(
        self, kind: str, sizes: Sequence[int], prepare: Callable[[int], Inputs], run: Callable[[Inputs], Output]
    ) -> None:
        """Capture `run(prepare(size))` for each size, without `prepare`: it puts inputs at fixed addresses, where a
        replay finds those of its own step.  The outputs have fixed addresses too.

        `run` must not make a tensor that it keeps: made during capture, it would be worked out by a replay only, in
        memory that other graphs use.  Kernels may be compiled and loaded then.
        """
        gc.collect()
        if sizes:
            run(prepare(max(sizes)))  # lets libraries set themselves up
        for size in sorted(sizes, reverse=True):
            inputs = prepare(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
                output = run(inputs)
            self._pool = self._pool or graph.pool()
            self._graphs[kind, size] = graph, output

    def replay(self, kind: str, size: int) -> Output | None:
        """Run the graph; its outputs are valid until the next replay.  None if there is no such graph."""
        if (kind, size) not in self._graphs:
            return None
        graph, output = self._graphs[kind, size]
        graph.replay()
        return output
