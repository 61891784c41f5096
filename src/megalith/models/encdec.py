"""Encoder-decoders: T5, Megatron's T5 and BART are one class with different configs.

    encoder_tokens ─ embed ─ encoder (all see all but padding) ─▶ memory
                                                                   │
    tokens ───────── embed ─ decoder (look back, and across ───────┘) ─▶ hidden ─ · token tableᵀ [+ output_bias]

Either side is a `Stack` of its own; token table and head are the model's. Knows what the sides share. Knows nothing of
processes, optimizers or text.

Legend: B batch, S time of the encoder, T time of the decoder, D width, V true vocabulary
"""

from __future__ import annotations

import torch

from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.stack import LanguageModel, Rule, Stack, init_rules
from megalith.nn.cache import KVCache
from megalith.nn.dropout import SITE_DECODER_EMBEDDING
from megalith.nn.embedding import OutputBias, OutputHead, PositionEmbedding, TokenEmbedding
from megalith.nn.loss import CrossEntropy, LossTerm


class EncoderDecoder(LanguageModel):
    """Layers of the decoder are numbered behind the encoder's for dropout, from 0 in names."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config: EncoderDecoderConfig = config
        self.first, self.last = True, True
        self.compute_dtype: torch.dtype | None = None
        self.residual_dtype: torch.dtype | None = None
        width, rows = config.hidden_size, config.padded_vocab_size
        self.token_embedding = TokenEmbedding(config.vocab_size, rows, width)
        self.position_embedding: PositionEmbedding | None = None
        shared = config.share_position_embeddings
        if shared and config.position_embedding_type == "learned_absolute":
            self.position_embedding = PositionEmbedding(config.max_position_embeddings, width)
        self.encoder = Stack(config, config.encoder_layers, own_positions=not shared)
        self.decoder = Stack(
            config,
            config.decoder_layers,
            first_layer=config.encoder_layers,
            causal=True,
            across=True,
            own_positions=not shared,
            site=SITE_DECODER_EMBEDDING,
            ffn_size=config.decoder_ffn_size,
        )
        self.output_bias: OutputBias | None = OutputBias(rows) if config.output_bias else None
        self.head: OutputHead | None = None
        if not config.share_embeddings_and_output_weights:
            self.head = OutputHead(config.vocab_size, rows, width)
        self.cross_entropy = CrossEntropy()
        self.loss_rows = config.vocab_size
        """Rows of the head that the loss's softmax runs over."""

    def forward(
        self,
        encoder_tokens: torch.Tensor,
        *,
        tokens: torch.Tensor,
        encoder_lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        encoder_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S) tokens that the encoder reads, (B, T) that the decoder reads → the decoder's hidden states (B, T, D).

        `encoder_lengths` (B,): tokens of each row before its padding, which nobody looks at, None: no padding; the decoder's
        rows may end in anything, for no token looks at what stands behind it. `keys` (B,) dropout keys of the samples (needed in
        training with dropout); `positions` (B, T) and `encoder_positions` (B, S), None: from 0. Errors: `UnsupportedError` for
        too long a sequence.
        """
        memory = self.encode(encoder_tokens, encoder_lengths, keys, positions=encoder_positions)
        source = encoder_tokens.shape[1]
        return self.decode(tokens, memory, encoder_lengths, keys, source=source, positions=positions)

    def encode(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S) tokens → the memory (B, S, D) that the decoder looks at."""
        stack = self.encoder
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        shared = stack.share(positions, tokens.device, lengths)
        return stack.leave(stack.run(self.embed(stack, tokens, positions, keys), shared, keys))

    def decode(
        self,
        tokens: torch.Tensor,
        memory: torch.Tensor,
        lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        *,
        source: int | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) tokens and the memory (B, S, D) of an encoder that read `lengths` (B,) tokens → (B, T, D).

        `source`: S, where the memory is a part of the sequence only.
        """
        stack = self.decoder
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        across = stack.look_across(tokens.shape[1], source or memory.shape[1], tokens.device, lengths=lengths)
        shared = stack.share(positions, tokens.device)._replace(memory=memory, across=across)
        return stack.leave(stack.run(self.embed(stack, tokens, positions, keys), shared, keys))

    def new_cache(
        self,
        memory: torch.Tensor,
        lengths: torch.Tensor | None,
        max_length: int,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """A cache of the decoder's layers that holds no token yet, and the keys and values of this memory (B, S, D).

        `lengths` (B,), `dtype`: as `decode` and `empty_cache` have them.
        """
        cache = self.empty_cache(self.decoder.blocks, len(memory), max_length, dtype)
        cache.remember([b.cross.look_up(memory) for b in self.decoder.blocks.values()], lengths)
        return cache

    def go_on(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """(B, T) tokens of the decoder behind those that the cache holds → (B, T, D).

        Errors: `UnsupportedError` for a full cache, or positions that the model has not.
        """
        cache.check(*tokens.shape)
        stack, length = self.decoder, tokens.shape[1]
        positions, start = cache.positions(length), cache.furthest
        source = cache.across[0][0].shape[2]
        across = stack.look_across(length, source, tokens.device, lengths=cache.sources)
        shared = stack.share(positions, tokens.device, cache=cache)._replace(across=across)
        x = self.embed(stack, tokens, positions, None, start=start)
        x = stack.run(x, shared, None, cache)
        cache.advance(length)
        return stack.leave(x)

    def embed(
        self,
        stack: Stack,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        keys: torch.Tensor | None,
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """(B, T) tokens behind `start` others → the residual stream (B, T, D) of that side, in `residual_dtype`."""
        x = self.token_embedding(tokens)
        table = stack.position_embedding if self.position_embedding is None else self.position_embedding
        if table is not None:
            table.check(start + tokens.shape[1])
            x = x + table(positions)
        return stack.enter(x.to(self.residual_dtype or x.dtype), keys)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, V) over the true vocabulary, in the compute dtype."""
        bias = None if self.output_bias is None else self.output_bias.bias
        return self.head_table.logits(self.before_head(hidden), bias)

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> dict[str, LossTerm]:
        """hidden (B, T, D), targets (B, T) with −1 not counted → {"lm": sum, count, weight}."""
        bias = None if self.output_bias is None else self.output_bias.bias
        total = self.cross_entropy(self.before_head(hidden), self.head_weight, targets, self.loss_rows, bias)
        return {"lm": LossTerm(total, (targets >= 0).sum())}

    def before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the head wants it: T5 1.0's table serves both ends, so its logits are made smaller."""
        return hidden * self.config.hidden_size**-0.5 if self.config.scale_decoder_output else hidden

    def init_rules(self) -> list[Rule]:
        """As every model's; the depth that residual weights are scaled by is the encoder's on both sides, as Megatron's."""
        return init_rules(self.config, self.config.encoder_layers)
