"""DecodeGraphs: whole decode steps, captured as CUDA graphs and replayed.

A graph runs everything from the embedding of the last sampled tokens to the sampling of the next ones.  One graph for
each padded batch size; the largest is captured first and all share one memory pool, so that together they take little
more memory than it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]
DecodeOutput = tuple[torch.Tensor, torch.Tensor]  # tokens [rows] int32, logits [rows, vocab]


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Padded batch sizes: 1, 2, 4, 8, then steps of 8 to 64, then of 32, up to and including max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, max_num_seqs + 1, 32)]
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}
        self._pool: Any = None

    def capture(
        self, sizes: Sequence[int], prepare: Callable[[int], Inputs], decode: Callable[[Inputs], DecodeOutput]
    ) -> None:
        """Capture `decode(prepare(size))` for each size, without `prepare`: it puts inputs at fixed addresses, where a
        replay finds those of its own step.  The outputs have fixed addresses too."""
        gc.collect()
        for size in sorted(sizes, reverse=True):
            inputs = prepare(size)
            decode(inputs)  # compiles, and lets libraries set themselves up, which must not happen during capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = decode(inputs)
            self._pool = self._pool or graph.pool()
            self._graphs[size] = graph, output

    def replay(self, size: int) -> DecodeOutput | None:
        """Run the graph for `size`; the outputs are valid until the next replay.  None if there is no such graph."""
        if size not in self._graphs:
            return None
        graph, output = self._graphs[size]
        graph.replay()
        return output
