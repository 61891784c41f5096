"""GPT: a decoder-only model. A loop that skips absent parts, so a pipeline stage is this model with layers deleted.

Knows the order of layers and what they share. Knows nothing of processes, optimizers or
text; names no axis itself (its layers do).

    tokens ─ token_embedding (+ position_embedding) ─ drop [─ prompts] ─ blocks ─ final_norm ─▶ hidden ─┬─ logits
                                                                                                        └─ loss

Legend: B batch, T time, D width, V true vocabulary
"""

from __future__ import annotations

import torch
from torch import nn

from megalith.errors import UnsupportedError
from megalith.models.config import ModelConfig
from megalith.models.stack import Blocks, LanguageModel, angle_dtype, block_spec, relative_bias, rotary
from megalith.nn.attention import Shared
from megalith.nn.block import Block
from megalith.nn.cache import KVCache
from megalith.nn.dropout import SITE_EMBEDDING, Dropout, layer_keys
from megalith.nn.embedding import OutputBias, OutputHead, PositionEmbedding, TokenEmbedding
from megalith.nn.loss import CrossEntropy, LossTerm
from megalith.nn.norm import make_norm
from megalith.nn.visibility import Lookback


class GPT(LanguageModel):
    """`first` and `last` say which ends of the model this stage holds; names of parameters are the whole model's."""

    accepts_prompts = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.first, self.last = config, True, True
        self.compute_dtype: torch.dtype | None = None
        self.residual_dtype: torch.dtype | None = None
        width = config.hidden_size
        self.token_embedding = TokenEmbedding(config.vocab_size, config.padded_vocab_size, width)
        self.position_embedding: PositionEmbedding | None = None
        if config.position_embedding_type == "learned_absolute":
            self.position_embedding = PositionEmbedding(config.max_position_embeddings, width)
        self.drop_embedding = Dropout(config.hidden_dropout, SITE_EMBEDDING)
        self.prompts = None
        self.relative_bias = relative_bias(config, bidirectional=False)
        self.lookback = Lookback()
        self.rotary = rotary(config)
        spec = block_spec(config)
        self.blocks = Blocks({str(i): Block(spec) for i in range(config.num_layers)})
        self.final_norm: nn.Module | None = None
        if config.transformer_block_type == "pre_ln":
            self.final_norm = make_norm(config.normalization, width, config.layernorm_epsilon)
        self.output_bias: OutputBias | None = None
        self.head: OutputHead | None = None
        if not config.share_embeddings_and_output_weights:
            self.head = OutputHead(config.vocab_size, config.padded_vocab_size, width)
        self.cross_entropy = CrossEntropy()
        self.loss_rows = config.vocab_size
        """Rows of the head that the loss's softmax runs over."""

    def forward(
        self,
        x: torch.Tensor,
        *,
        keys: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        documents: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """(B, T) tokens on the first stage, (B, T, D) activations on others → (B, T, D), final norm applied on the last.

        `keys` (B,) dropout keys of the samples (needed in training with dropout); `positions` (B, T) and `documents`
        (B, T): restarted positions, and attention within the same document only; `cache`: tokens seen before. Where
        activations hold a part of the sequence only, `positions` say how long it is.
        Errors: `UnsupportedError` for too long a sequence, a full cache, or documents with a cache.
        """
        if cache is not None:
            self._check(x, documents, cache)
        if positions is None:
            length = x.shape[1]
            positions = torch.arange(length, device=x.device) if cache is None else cache.positions(length)
        shared = self._shared(x, positions, documents, cache)
        if self.first:
            x = self.embed(x, positions, 0 if cache is None else cache.furthest, keys)
        for i, (layer, block) in enumerate(self.blocks.items()):
            layer_key = None if keys is None else layer_keys(keys, int(layer))
            x = block(x, shared, layer_key, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.advance(positions.shape[-1])
        return self.final_norm(x) if self.last and self.final_norm is not None else x

    def embed(
        self, tokens: torch.Tensor, positions: torch.Tensor, start: int, keys: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T) tokens → the residual stream (B, T, D), in `residual_dtype`."""
        x = self.token_embedding(tokens if self.prompts is None else self.prompts.clip(tokens))
        places = None
        if self.position_embedding is not None:
            self.position_embedding.check(start + tokens.shape[1])
            places = self.position_embedding(positions)
            x = x + places
        x = self.drop_embedding(x.to(self.residual_dtype or x.dtype), keys)
        return x if self.prompts is None else self.prompts(x, tokens, places, keys)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, V) over the true vocabulary, in the compute dtype."""
        return self.head_table.logits(hidden)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, LossTerm]:
        """hidden (B, T, D), targets (B, T) with −1 not counted → {"lm": sum, count, weight}."""
        total = self.cross_entropy(hidden, self.head_weight, targets, self.loss_rows)
        return {"lm": LossTerm(total, (targets >= 0).sum())}

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty key-value cache for this stage's layers, where its weights are. Attention over it runs in its `dtype`.

        None: the compute dtype.
        """
        return self.empty_cache(self.blocks, batch, max_length, dtype)

    def cut(self, stage: int, stages: int, layers: range) -> None:
        """Becomes pipeline stage number `stage` of `stages`, with these layers: deletes what other stages hold.

        A tied token table stays on both ends, a relative bias on every stage.
        """
        self.first, self.last = stage == 0, stage == stages - 1
        self.blocks = Blocks({str(i): self.blocks[str(i)] for i in layers})
        if not self.first:
            self.position_embedding = self.prompts = None
            if self.head is not None or not self.last:
                del self.token_embedding
        if not self.last:
            self.final_norm = self.head = None

    def _check(self, x: torch.Tensor, documents: torch.Tensor | None, cache: KVCache) -> None:
        cache.check(x.shape[0], x.shape[1])
        if documents is not None:
            raise UnsupportedError(
                "a key-value cache does not remember which document a token belonged to",
                where="GPT.forward(documents=…, cache=…)",
                fix="run without the cache, or generate one document a row",
            )

    def _shared(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        documents: torch.Tensor | None,
        cache: KVCache | None,
    ) -> Shared:
        length = positions.shape[-1]
        cores = [block.attention.core for block in self.blocks.values()]
        visibility = self.lookback(
            0 if cache is None else cache.length,
            length,
            x.device,
            mask=None if cache is None else cache.visible(length),
            documents=documents,
            bias=self.relative_bias,
            blocks=documents is not None
            and self.relative_bias is None
            and any(core.wants_blocks(x.device) for core in cores[:1]),
        )
        if self.rotary is None:
            return Shared(visibility)
        return Shared(visibility, self.rotary.angles(positions, angle_dtype(self)))
