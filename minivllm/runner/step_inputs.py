"""StepInputs: the host arrays of one step, sent to the device as one copy.

The arrays are packed into a pinned buffer, 16 bytes aligned, and land in one device buffer whose address never changes,
so arrays of the same shapes in the same order always lie at the same device addresses: what a CUDA graph was captured
with is where the next step's inputs arrive.  On a CPU the arrays are used as they are.
"""

from __future__ import annotations

import numpy as np
import torch

ALIGNMENT = 16
NUM_BUFFERS = 3  # one more than steps in flight, so that a buffer's copy is long done when it is rewritten


class StepInputs:
    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.on_host = device.type == "cpu"
        if self.on_host:
            return
        self._device_buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._host_buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
        self._host_arrays = [buffer.numpy() for buffer in self._host_buffers]
        self._copied = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        self._turn = 0

    def upload(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """The arrays as device tensors, valid until the next upload's steps run (the copy is ordered by the stream)."""
        if self.on_host:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._turn = (self._turn + 1) % NUM_BUFFERS
        host = self._host_arrays[self._turn]
        self._copied[self._turn].synchronize()
        tensors = {}
        end = 0
        for name, array in arrays.items():
            begin, end = end, end + array.nbytes
            host[begin:end] = array.reshape(-1).view(np.uint8)
            dtype = torch.from_numpy(array[:0]).dtype
            tensors[name] = self._device_buffer[begin:end].view(dtype).view(array.shape)
            end = -(-end // ALIGNMENT) * ALIGNMENT
        self._device_buffer[:end].copy_(self._host_buffers[self._turn][:end], non_blocking=True)
        self._copied[self._turn].record()
        return tensors
