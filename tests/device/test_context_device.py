"""Chunks of context parallelism on the device: a kernel's own triangle equals the mask that a CPU gets."""

from __future__ import annotations

import pytest
import torch

from megalith.nn.attention import AttentionSpec
from megalith.nn.cores import make_core
from megalith.nn.visibility import Lookback, Visibility, triangle

pytestmark = pytest.mark.device


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_queries_of_a_late_chunk(device, dtype, limit, groups, compiled):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 8, 192, 64), (2, groups, 768, 64), (2, groups, 768, 64))
    tensors = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    core = make_core(AttentionSpec(512, 8, groups, 64))
    attend = torch.compile(core, fullgraph=True) if compiled else core
    sees = Lookback()(576, 192, device)
    mask = Visibility(mask=triangle(192, 768, device))
    ours, theirs = attend(*tensors, sees, None), core(*tensors, mask, None)
    direction = torch.randn(ours.shape, generator=generator).to(device, dtype)
    gradients = [torch.autograd.grad((y * direction).sum(), tensors) for y in (ours, theirs)]
    for a, b in zip((ours, *gradients[0]), (theirs, *gradients[1]), strict=True):
        assert (a - b).abs().max() <= limit * b.abs().max()
