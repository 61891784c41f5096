"""Compile block by block: every block of a model shares one graph, so start-up does not grow with depth.

Replaces `block.forward`, never the module: names, hooks and `print(model)` stay as they are. Of the loss, the elementwise
part of one chunk is compiled. Knows nothing of devices; whether to compile at all is `topology.hardware.resolve_compile`.
"""

from __future__ import annotations

import torch
from torch import nn


def compile_block(block: nn.Module) -> None:
    """Compile a block as one whole graph (a graph break is an error, not a slow path)."""
    block.forward = torch.compile(block.forward, fullgraph=True)


def compile_loss(stage: nn.Module) -> None:
    """Compile what the loss does to the logits of one chunk."""
    for module in stage.modules():
        if hasattr(module, "elementwise"):
            module.elementwise = torch.compile(module.elementwise, fullgraph=True)
