"""Linear layers, single or merged: several checkpoint tensors side by side in one weight, for one matrix product."""

from __future__ import annotations

import torch
from torch import nn

from minivllm.backends import Backend
from minivllm.parallel import WHOLE, Index, Parts, Rows, RowShare, Share

Target = torch.Tensor | Parts
ALL = slice(None)


class Linear(nn.Module):
    """x Wᵀ + b, weight [out, in].

    With a share of the inputs, only the columns of the weight that go with them are kept; results are then summands,
    and the bias belongs to the first one alone.
    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        in_share: Share = WHOLE,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.in_share = in_share
        self.whole_in_size = in_size
        self.weight: torch.Tensor = nn.Parameter(
            torch.empty(out_size, in_size // in_share.count, dtype=dtype, device=device), requires_grad=False
        )
        self.has_bias = bias
        self.bias = None
        if bias and in_share.index == 0:
            self.bias = nn.Parameter(torch.empty(out_size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Rows) -> torch.Tensor:
        """x: [tokens, in] -> [tokens, out]."""
        if isinstance(x, RowShare):
            return x.product(
                lambda part, out: self.backend.linear_into(out, part, self.weight, self.bias), self.weight.shape[0]
            )
        return self.backend.linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Once loaded: keep the weight in the layout that the backend likes best."""
        packed = self.backend.pack(self.weight.data)
        del self.weight
        self.weight = packed

    def targets(self, name: str) -> dict[str, Target]:
        weight, share = self.weight.data, self.in_share
        if share == WHOLE:
            found: dict[str, Target] = {f"{name}.weight": weight}
        else:
            columns = ALL, share.of(self.whole_in_size)
            found = {f"{name}.weight": Parts((len(weight), self.whole_in_size), ((columns, weight),))}
        if self.bias is not None:
            found[f"{name}.bias"] = self.bias.data
        elif self.has_bias:
            found[f"{name}.bias"] = Parts((len(weight),), ())
        return found


class MergedLinear(Linear):
    """The projections `parts` (name in the checkpoint: output size) of one input, concatenated in that order; of each
    the share of its outputs that `shares` says."""

    def __init__(
        self,
        in_size: int,
        parts: dict[str, int],
        bias: bool,
        backend: Backend,
        dtype: torch.dtype,
        device: torch.device,
        shares: dict[str, Share],
    ) -> None:
        own = [size // shares[part].count for part, size in parts.items()]
        super().__init__(in_size, sum(own), bias, backend, dtype, device)
        self.parts = parts
        self.shares = shares
        self.own_sizes = own

    def targets(self, name: str) -> dict[str, Target]:
        """A checkpoint tensor for each part."""
        parent = name.rpartition(".")[0]
        found: dict[str, Target] = {}
        for suffix, (part, size), view in self._views():
            share = self.shares[part]
            target = view if share == WHOLE else Parts((size, *view.shape[1:]), ((_rows(share.of(size), view), view),))
            found[f"{parent}.{part}{suffix}"] = target
        return found

    def merged_targets(self, name: str) -> dict[str, Target]:
        """The same for checkpoints that have the parts merged."""
        pieces: dict[str, list[tuple[Index, torch.Tensor]]] = {}
        start = 0
        for suffix, (part, size), view in self._views():
            start = 0 if suffix not in pieces else start
            pieces.setdefault(suffix, []).append((_rows(self.shares[part].of(size, start), view), view))
            start += size
        total, in_size = sum(self.parts.values()), self.whole_in_size
        shapes: dict[str, tuple[int, ...]] = {".weight": (total, in_size), ".bias": (total,)}
        return {name + suffix: Parts(shapes[suffix], tuple(found)) for suffix, found in pieces.items()}

    def _views(self) -> list[tuple[str, tuple[str, int], torch.Tensor]]:
        """(".weight" or ".bias", part, what of the parameter is the part's)."""
        whole = {".weight": self.weight.data} | ({} if self.bias is None else {".bias": self.bias.data})
        return [
            (suffix, part, view)
            for suffix, parameter in whole.items()
            for part, view in zip(self.parts.items(), parameter.split(self.own_sizes), strict=True)
        ]


def _rows(rows: slice, view: torch.Tensor) -> Index:
    return (rows, *[ALL] * (view.ndim - 1))
