"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): a model cut into shares, one a worker.

The first projections of attention and of the MLP are cut by their outputs, so each worker has heads and columns of its
own; the last ones by their inputs, so that their results are summands, added up over the workers.  The vocabulary is
cut in ranges, but for the embedding, which every worker has: half a GB for an 8B model, against an exchange a step.
Everything else (norms, the residual stream) every worker does for itself, with the same numbers.

Where GPUs see each other's memory, no library is called between kernels: the sums are left to the norm that comes
next, whose kernel exchanges the summands (`kernels/inbox.py`), as that of sampling does the tokens that each worker
has drawn from its logits.  In steps of more tokens than SENT_ROWS, workers share the norms' rows out
(`row_shares.py`).  Elsewhere, to gather the rows that such a step samples from, and the logits of those that ask for
more than a draw, it is NCCL, or gloo on CPUs.
"""

from minivllm.parallel.row_shares import RowExchange, Rows, RowShare
from minivllm.parallel.shared_tensors import see_each_other
from minivllm.parallel.tensor_parallel import (
    ALONE,
    SENT_ROWS,
    WHOLE,
    Index,
    Parts,
    Share,
    Summand,
    TensorParallel,
    open_inbox,
)

__all__ = [
    "ALONE",
    "SENT_ROWS",
    "WHOLE",
    "Index",
    "Parts",
    "RowExchange",
    "RowShare",
    "Rows",
    "Share",
    "Summand",
    "TensorParallel",
    "open_inbox",
    "see_each_other",
]
