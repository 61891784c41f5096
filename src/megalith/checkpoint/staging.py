"""Host memory that a save works from while training goes on: copied into once a save, kept for the next.

Knows tensors of any device. Kept because first-touched memory costs several times what the copy does; pinned where the source
is a GPU, so that the copy runs at the speed of the bus. Costs as much host memory as the checkpoint has bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Staging:
    """Buffers by name. One save at a time may use them: `copy` overwrites what the last one holds."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Host memory held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def copy(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Private copies of `tensors`; when this returns, their owner may change them."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        devices = set()
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
            if tensor.device.type == "cuda":
                devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
            return kept
        return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
