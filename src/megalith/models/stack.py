"""What all families are made of: numbered blocks and what they share, a table with a head, initial numbers.

    x ─ [norm_embedding] ─ drop ─ blocks ─ [final_norm] ─▶         post_ln has the first norm, pre_ln the last

Knows how a config becomes blocks. Knows no family: where x comes from and what is predicted is theirs.

Legend: B batch, T time, S keys, D width
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from megalith.models.config import ModelConfig
from megalith.nn.attention import AttentionSpec, Shared
from megalith.nn.block import Block, BlockSpec
from megalith.nn.cache import KVCache
from megalith.nn.dropout import SITE_CROSS_PROBABILITIES, SITE_EMBEDDING, Dropout, layer_keys
from megalith.nn.embedding import OutputBias, OutputHead, PositionEmbedding, TokenEmbedding
from megalith.nn.loss import CrossEntropy
from megalith.nn.mlp import MLPSpec
from megalith.nn.norm import make_norm
from megalith.nn.position import RelativeBias, Rotary, RotaryScaling
from megalith.nn.precision import set_compute_dtype
from megalith.nn.prompt import Prompts
from megalith.nn.visibility import Lookaround, Lookback, Visibility

Rule = tuple[str, tuple[str, float] | float]
INPUT = "input"
"""The sequence that a model's first pipeline stage reads; others have the names of keyword arguments."""


class Blocks(nn.ModuleDict):
    """Blocks by layer number; prints equal neighbours once."""

    def __repr__(self) -> str:
        lines, run = [], []
        for name, block in [*self.items(), ("", None)]:
            if run and repr(block) != repr(run[-1][1]):
                names = run[0][0] if len(run) == 1 else f"{run[0][0]}-{run[-1][0]}"
                count = "" if len(run) == 1 else f"{len(run)} × "
                lines.append(f"({names}): {count}{run[0][1]!r}")
                run = []
            run.append((name, block))
        body = "\n".join(lines).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  {body}\n)" if lines else f"{type(self).__name__}()"


def named_blocks(stage: nn.Module) -> dict[str, Block]:
    """Every block of a stage, in both towers where there are two, by its name in it ("blocks.3", "encoder.blocks.0")."""
    return {name: module for name, module in stage.named_modules() if isinstance(module, Block)}


def towers(stage: nn.Module) -> list[Blocks]:
    """Blocks that follow each other: one row of them, or the encoder's and the decoder's."""
    return [module for module in stage.modules() if isinstance(module, Blocks)]


class LanguageModel(nn.Module):
    """A table of tokens, a head over it, and the dtypes in which it computes: what a pass or a loader asks of any model.

    A pipeline stage `takes` and `gives` on hidden states of these sequences. `holders`: the stages that hold a parameter
    which several of them do, by its name. `prompts`: what ids behind the vocabulary stand for, on the stage that reads the
    text; a model that has no place for them does not say `accepts_prompts`.
    """

    takes: tuple[str, ...] = (INPUT,)
    gives: tuple[str, ...] = (INPUT,)
    holders: Mapping[str, Sequence[int]] = MappingProxyType({})

    config: ModelConfig
    first: bool
    last: bool
    token_embedding: TokenEmbedding
    position_embedding: PositionEmbedding | None
    head: OutputHead | None
    prompts: Prompts | None
    accepts_prompts = False
    cross_entropy: CrossEntropy
    loss_rows: int
    compute_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None
    output_bias: OutputBias | None

    @property
    def input_positions(self) -> PositionEmbedding | None:
        """The learned positions of the text that the model reads first, where there are any."""
        return self.position_embedding

    @property
    def head_table(self) -> TokenEmbedding:
        """The table whose rows are compared with hidden states."""
        return self.token_embedding if self.head is None else self.head

    @property
    def head_weight(self) -> nn.Parameter:
        """Its weight, (padded vocabulary, D)."""
        return self.head_table.weight

    def set_compute_dtype(self, dtype: torch.dtype | None, residual_dtype: torch.dtype | None = None) -> None:
        """Matrix products in `dtype` (None: the parameters'); the residual stream in `residual_dtype` (None: likewise)."""
        set_compute_dtype(self, dtype)
        self.residual_dtype = residual_dtype

    def before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the token table's rows are compared with: hidden states, or what a family makes of them."""
        return hidden

    def empty_cache(
        self, blocks: Blocks, batch: int, max_length: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """For these blocks, where the weights are. Attention over it runs in its `dtype`; None: the compute dtype."""
        weight = next(self.parameters())
        attention = next(iter(blocks.values())).attention
        return KVCache(
            len(blocks),
            batch,
            max_length,
            attention.kv_heads,
            attention.head_dim,
            dtype=dtype or self.compute_dtype or weight.dtype,
            device=weight.device,
        )

    def train_padding(self) -> None:
        """From now on the loss's softmax runs over the rows that pad the vocabulary, too, as Megatron's does."""
        self.loss_rows = self.config.padded_vocab_size

    def pick_targets(self) -> None:
        """From now on, on a CPU, rows without a target get no logits: texts before answers have none."""
        self.cross_entropy.picks = True

    def init_rules(self) -> list[Rule]:
        """Ordered (pattern of the parameter's name, ("normal", std) or a constant): the first that matches decides."""
        return init_rules(self.config, self.config.num_layers)


class Stack(nn.Module):
    """One tower of `layers` blocks, of all a model's the ones from `first_layer` on, by which dropout numbers them.

    `causal`: tokens look back; else all at all. `across`: each block also looks at an encoder's output. `own_positions`: the
    stack has a table of learned positions, where the config says that there are any. `site`: of its embedding's dropout.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        *,
        first_layer: int = 0,
        causal: bool = False,
        across: bool = False,
        own_positions: bool = True,
        site: int = SITE_EMBEDDING,
        ffn_size: int | None = None,
    ) -> None:
        super().__init__()
        width, kind, eps = config.hidden_size, config.normalization, config.layernorm_epsilon
        self.first_layer = first_layer
        self.position_embedding: PositionEmbedding | None = None
        if own_positions and config.position_embedding_type == "learned_absolute":
            self.position_embedding = PositionEmbedding(config.max_position_embeddings, width)
        post_ln = config.transformer_block_type == "post_ln"
        self.norm_embedding: nn.Module | None = make_norm(kind, width, eps) if post_ln else None
        self.drop_embedding = Dropout(config.hidden_dropout, site)
        self.relative_bias = relative_bias(config, bidirectional=not causal)
        self.look = Lookback() if causal else Lookaround()
        self.look_across = Lookaround() if across else None
        spec = block_spec(config, across=across, ffn_size=ffn_size)
        self.rotary = spec.attention.rotary
        self.blocks = Blocks({str(i): Block(spec) for i in range(layers)})
        self.final_norm: nn.Module | None = None if post_ln else make_norm(kind, width, eps)

    def enter(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """Sum of embeddings (B, T, D) → the residual stream."""
        x = x if self.norm_embedding is None else self.norm_embedding(x)
        return self.drop_embedding(x, keys)

    def run(
        self, x: torch.Tensor, shared: Shared, keys: torch.Tensor | None, cache: KVCache | None = None
    ) -> torch.Tensor:
        """(B, T, D) through the blocks that are here; `keys` (B,) dropout keys of the samples; `cache`: tokens seen before."""
        for i, (layer, block) in enumerate(self.blocks.items()):
            layer_key = None if keys is None else layer_keys(keys, self.first_layer + int(layer))
            x = block(x, shared, layer_key, None if cache is None else cache.layer(i))
        return x

    def keep(self, layers: range, *, last: bool) -> None:
        """Becomes a part of itself, with these blocks: deletes what stands before the first and behind the last of all."""
        self.blocks = Blocks({str(i): self.blocks[str(i)] for i in layers})
        if layers.start > 0:
            self.position_embedding = self.norm_embedding = None
        if not last:
            self.final_norm = None

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm, where there is one."""
        return x if self.final_norm is None else self.final_norm(x)

    def share(
        self,
        positions: torch.Tensor,
        device: torch.device,
        lengths: torch.Tensor | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Shared:
        """Who sees whom in (T,) or (B, T) positions, of each row the first `lengths` (B,); and rotary angles.

        Causal rows need no lengths: no token looks at what stands behind it. `cache`: tokens that stand before them.
        """
        length = positions.shape[-1]
        visibility: Visibility
        if isinstance(self.look, Lookback):
            start, mask = (0, None) if cache is None else (cache.length, cache.visible(length))
            visibility = self.look(start, length, device, mask=mask, bias=self.relative_bias)
        else:
            visibility = self.look(length, length, device, lengths=lengths, bias=self.relative_bias)
        if self.rotary is None:
            return Shared(visibility)
        return Shared(visibility, self.rotary.angles(positions, angle_dtype(self)))


def angle_dtype(stack: nn.Module) -> torch.dtype:
    """That of rotary angles: the weights', fp32 at least. A stage may hold no weight."""
    weight = next(stack.parameters(), torch.empty(0))
    return torch.promote_types(weight.dtype, torch.float32)


def block_spec(config: ModelConfig, *, across: bool = False, ffn_size: int | None = None) -> BlockSpec:
    """The options of every block of a stack. `across`: with attention to an encoder; `ffn_size` in place of the config's."""
    wiring = config.transformer_block_type
    attention = AttentionSpec(
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.has_qkv_bias,
        out_bias=config.bias,
        scale=config.attention_scale,
        dropout=config.attention_dropout,
        rotary=rotary(config),
        core=config.attention_core,
    )
    return BlockSpec(
        attention=attention,
        mlp=MLPSpec(config.hidden_size, ffn_size or config.ffn_size, config.activation, config.bias),
        norm=config.normalization,
        eps=config.layernorm_epsilon,
        dropout=config.hidden_dropout,
        wiring="pre_ln_residual_after_norm" if config.apply_residual_connection_post_layernorm else wiring,
        cross=replace(attention, rotary=None, site=SITE_CROSS_PROBABILITIES) if across else None,
    )


def rotary(config: ModelConfig) -> Rotary | None:
    """The rotary angles of a model, None when it has none."""
    if config.position_embedding_type != "rope":
        return None
    scaling = None
    if (asked := config.rotary_scaling) is not None:
        scaling = RotaryScaling(
            asked.type,
            asked.factor,
            asked.low_freq_factor,
            asked.high_freq_factor,
            asked.original_max_position_embeddings,
        )
    return Rotary(config.rotary_channels, config.rotary_base, config.rotary_interleaved, scaling)


def relative_bias(config: ModelConfig, *, bidirectional: bool) -> RelativeBias | None:
    """The relative bias of a stack; without `bidirectional` all buckets look back."""
    if config.position_embedding_type != "relative":
        return None
    return RelativeBias(
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        config.num_attention_heads,
        bidirectional=bidirectional,
    )


def init_rules(config: ModelConfig, layers: int) -> list[Rule]:
    """GPT-2's and Megatron's initial numbers: N(0, std); std / √(2 · `layers`) for what writes to the residual stream."""
    std = config.init_method_std
    residual = std / math.sqrt(2 * layers) if config.use_scaled_init_method else std
    return [
        (r"(^|\.)\w*norm\w*\.weight$", 1.0),
        (r"\.bias$", 0.0),
        (r"\.(attention\.out|cross\.out|mlp\.down)\.weight$", ("normal", residual)),
        (r"\.weight$", ("normal", std)),
    ]
