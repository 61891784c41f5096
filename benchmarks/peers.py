"""The sides of the training benchmarks: megalith, transformers' GPT-2 and a GPT in plain PyTorch, same shape, same batch.

Every side is a function that makes one whole optimizer step and gives its loss: forward, backward, clipping at 1, fused
AdamW, fp32 weights, bf16 products. `tuned` sides compile block by block and, on a CPU, keep freed memory (mallopt), as
megalith does itself. "megalith documents" is megalith on rows of four packed documents that do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megalith.topology.memory_allocator import tune_allocator

SIDES = ("megalith", "transformers", "transformers tuned", "torch", "torch tuned")
WITH_DOCUMENTS = "megalith documents"
LEARNING_RATE, DECAY, CLIP = 1e-4, 0.01, 1.0
Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch, taken `micro_batch` samples at a time (0: all at once); all sides leave dropout out."""

    layers: int = 6
    width: int = 512
    heads: int = 8
    length: int = 512
    vocabulary: int = 50304
    batch: int = 2
    device: str = "cpu"
    recompute: bool = False
    micro_batch: int = 0
    compile: bool = True

    @property
    def parameters(self) -> int:
        """Weights, the tied table once."""
        block = 12 * self.width**2 + 13 * self.width
        return self.layers * block + (self.vocabulary + self.length + 2) * self.width

    @property
    def flops(self) -> float:
        """Model FLOPs of a step: 6 a weight and token, and the attention's two products."""
        tokens = self.batch * self.length
        attention = 12 * self.layers * self.width * self.length * tokens // 2
        return 6 * (self.parameters - self.length * self.width) * tokens + attention


def make_step(side: str, shape: Shape) -> Step:
    """A side, ready to run; tuning the allocator holds for the whole process, so a process makes one side."""
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    ours = side.startswith("megalith")
    if (ours or side.endswith("tuned")) and shape.device == "cpu":
        tune_allocator()
    text = torch.randint(
        shape.vocabulary, (shape.batch, shape.length + 1), generator=torch.Generator().manual_seed(0)
    )
    if ours:
        return _megalith(shape, text, documents=side == WITH_DOCUMENTS)
    with torch.device(shape.device):
        model, loss = (_transformers if side.startswith("transformers") else _torch)(shape)
    if side.endswith("tuned") and shape.compile:
        for block in model.blocks if isinstance(model, PlainGPT) else model.transformer.h:
            block.forward = torch.compile(block.forward)
    micros = text.to(shape.device).split(shape.micro_batch or shape.batch)
    return autocast_step(model, loss, micros)


def _megalith(shape: Shape, text: torch.Tensor, *, documents: bool) -> Step:
    from megalith.models.config import ModelConfig

    config = ModelConfig(
        vocab_size=shape.vocabulary,
        num_layers=shape.layers,
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        hidden_dropout=0.0,
    )
    engine = make_engine(config, shape)
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "sample": torch.arange(shape.batch)}
    if documents:
        numbers = torch.arange(shape.length, dtype=torch.int32) * 4 // shape.length
        batch["documents"] = numbers.expand(shape.batch, -1).contiguous()
    return lambda: engine.train_step(batch).loss


def make_engine(config: Any, shape: Shape) -> Any:
    """Megalith's engine on a model of any family, with what all sides have: learning rate, decay, clipping, bf16 products."""
    from megalith.engine.engine import Engine
    from megalith.engine.objective import objective_of
    from megalith.models.family import class_of
    from megalith.optim.config import OptimConfig
    from megalith.optim.schedule import make_schedule
    from megalith.parallel.apply import build
    from megalith.parallel.memory import Recompute
    from megalith.topology.topology import Topology

    topology = Topology.single(shape.device)
    optim = OptimConfig(lr=LEARNING_RATE, weight_decay=DECAY)
    schedule = make_schedule(optim, max_steps=10**6, global_batch=shape.batch, sequence_length=shape.length)
    stages = build(
        class_of(config),
        config,
        topology,
        seed=1,
        precision="bf16-mixed",
        compile=shape.compile,
        recompute=Recompute() if shape.recompute else None,
    )
    return Engine(
        stages,
        topology,
        optim=optim,
        schedule=schedule,
        seed=1,
        micro_batch_size=shape.micro_batch or shape.batch,
        precision="bf16-mixed",
        clip=CLIP,
        objective=objective_of(config),
    )


def _transformers(shape: Shape) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).train()
    if shape.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers shifts the labels itself: the last position has no target there, one of 512
    return model, lambda text: model(text[:, :-1], labels=text[:, :-1]).loss


def _torch(shape: Shape) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    model = PlainGPT(shape)
    return model, lambda text: F.cross_entropy(
        model(text[:, :-1]).flatten(0, 1).float(), text[:, 1:].flatten()
    )


def autocast_step(model: nn.Module, loss: Callable[..., torch.Tensor], micros: Sequence[Any]) -> Step:
    """A whole step of a peer; `loss` gets one of the `micros` after the other."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    device = next(model.parameters()).device

    def step() -> float:
        total = torch.zeros((), device=device)
        for micro in micros:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(micro) / len(micros)
            value.backward()
            total += value.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()  # megalith's step returns its loss too

    return step


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward, as a page of PyTorch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → the same."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 in plain PyTorch, head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.recompute = shape.recompute
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.length, shape.width)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) → logits (B, T, V)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            if self.recompute:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)
