"""A pipeline stage that has memory for a message only while it is awaited or in use.

torch's stage takes memory for the activation and the gradient of every micro-batch when its schedule is made, and keeps it:
192 micro-batches in a pipeline of 16 take twelve times what is ever in flight. Here asking for a message takes its
memory, and what uses it (a graph, a backward) is all that holds it.

And one that does its backward in one go where torch's halves, by inputs and by weights (zero_bubble), would go wrong.

Knows torch's stage. Knows no schedule, and no message but plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.pipelining import PipelineStage


class Stage(PipelineStage):
    """torch's stage; between micro-batches its buffers are shapes without memory.

    `undivided`: a part of its forward does not depend on what it is given (a decoder's first stage embeds tokens of its own; all
    layers add one relative bias). torch's backward by weights starts from what depends on the inputs, and would pass
    that part more than once.
    """

    undivided = False

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward or self.undivided, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.undivided:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    # -- making the schedule -------------------------------------------------------------------------------------

    def _setup_forward_recv_info(self, *arguments: Any) -> None:
        with self._shapes_only():
            super()._setup_forward_recv_info(*arguments)

    def _setup_backward_recv_info(self, *arguments: Any) -> None:
        with self._shapes_only():
            super()._setup_backward_recv_info(*arguments)

    @contextmanager
    def _shapes_only(self) -> Iterator[None]:
        device = self.device
        self.device = torch.device("meta")
        try:
            yield
        finally:
            self.device = device

    # -- a message -----------------------------------------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        _move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        _move(self.grad_recv_info.get(bwd_chunk_id, ()), self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        found = super()._retrieve_recv_activations(fwd_chunk_id)
        _move(self.args_recv_info[fwd_chunk_id], "meta")
        return found

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        found = super()._retrieve_recv_grads(bwd_chunk_id)
        _move(self.grad_recv_info[bwd_chunk_id], "meta")
        return found


def _move(infos: Iterable[Any], device: torch.device | str) -> None:
    """New buffers there, with nothing in them."""
    for info in infos:
        if info.buffer is not None:
            info.buffer = torch.empty_like(info.buffer, device=device, requires_grad=False)
