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
from megalith.models.stack import INPUT, LanguageModel, Rule, Stack, init_rules
from megalith.nn.cache import KVCache
from megalith.nn.dropout import SITE_DECODER_EMBEDDING
from megalith.nn.embedding import OutputBias, OutputHead, PositionEmbedding, TokenEmbedding
from megalith.nn.loss import CrossEntropy, LossTerm


class EncoderDecoder(LanguageModel):
    """Layers of the decoder are numbered behind the encoder's for dropout and for pipeline stages, from 0 in names.

    A stage holds a part of the encoder or of the decoder; `encoder` or `decoder` is then None. Prompts stand before what the
    encoder reads.
    """

    accepts_prompts = True

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config: EncoderDecoderConfig = config
        self.first, self.last = True, True
        self.gives = ("tokens",)
        self.compute_dtype: torch.dtype | None = None
        self.residual_dtype: torch.dtype | None = None
        width, rows = config.hidden_size, config.padded_vocab_size
        self.token_embedding = TokenEmbedding(config.vocab_size, rows, width)
        self.position_embedding: PositionEmbedding | None = None
        self.prompts = None
        shared = config.share_position_embeddings
        if shared and config.position_embedding_type == "learned_absolute":
            self.position_embedding = PositionEmbedding(config.max_position_embeddings, width)
        self.encoder: Stack | None = Stack(config, config.encoder_layers, own_positions=not shared)
        self.decoder: Stack | None = Stack(
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

    @property
    def input_positions(self) -> PositionEmbedding | None:
        """The encoder's, its own or shared by both sides."""
        own = self.encoder and self.encoder.position_embedding
        return own if self.position_embedding is None else self.position_embedding

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None = None,
        *,
        tokens: torch.Tensor,
        encoder_lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        encoder_positions: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, S) tokens that the encoder reads, (B, T) that the decoder reads → the decoder's hidden states (B, T, D).

        Pipeline stages pass the encoder's activations (B, S, D), at its end the memory; the decoder's pass (B, T, D) and the
        memory. `encoder_lengths` (B,): tokens of each row before its padding, which nobody looks at, None: no padding; the decoder's
        rows may end in anything, for no token looks at what stands behind it. `keys` (B,) dropout keys of the samples (needed in
        training with dropout); `positions` (B, T) and `encoder_positions` (B, S), None: from 0; they say how long the sequences
        are where activations hold a part of them only. Errors: `UnsupportedError` for too long a sequence.
        """
        length = encoder_positions if encoder_positions is not None else x if memory is None else memory
        hidden = None if memory is None else x
        if self.encoder is not None:
            x = self.encode(x, encoder_lengths, keys, positions=encoder_positions)
        if self.decoder is None:
            return x
        memory, source = x if memory is None else memory, length.shape[1]
        hidden = self.decode(
            tokens, memory, encoder_lengths, keys, source=source, positions=positions, hidden=hidden
        )
        return hidden if self.last else (hidden, memory)

    def encode(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S) tokens, on later stages (B, S, D) → the memory (B, S, D) that the decoder looks at, or what the next stage gets."""
        stack, x = self.encoder, tokens
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        shared = stack.share(positions, tokens.device, lengths)
        if self.first:
            x = self.embed(stack, tokens, positions, keys)
        return stack.leave(stack.run(x, shared, keys))

    def decode(
        self,
        tokens: torch.Tensor,
        memory: torch.Tensor,
        lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        *,
        source: int | None = None,
        positions: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) tokens and the memory (B, S, D) of an encoder that read `lengths` (B,) tokens → (B, T, D).

        `source`: S, where the memory is a part of the sequence only; `hidden` (B, T, D): what the decoder's stage before gave.
        """
        stack = self.decoder
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        across = stack.look_across(tokens.shape[1], source or memory.shape[1], tokens.device, lengths=lengths)
        shared = stack.share(positions, tokens.device)._replace(memory=memory, across=across)
        if hidden is None:
            hidden = self.embed(stack, tokens, positions, keys)
        return stack.leave(stack.run(hidden, shared, keys))

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

    def go_on(self, tokens: torch.Tensor, cache: KVCache, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T) tokens of the decoder behind those that the cache holds → (B, T, D). `hidden`: as `decode` has it.

        Errors: `UnsupportedError` for a full cache, or positions that the model has not.
        """
        cache.check(*tokens.shape)
        stack, length = self.decoder, tokens.shape[1]
        positions, start = cache.positions(length), cache.furthest
        source = cache.across[0][0].shape[2]
        across = stack.look_across(length, source, tokens.device, lengths=cache.sources)
        shared = stack.share(positions, tokens.device, cache=cache)._replace(across=across)
        x = self.embed(stack, tokens, positions, None, start=start) if hidden is None else hidden
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
        prompts, places = self.prompts if stack is self.encoder else None, None
        x = self.token_embedding(tokens if prompts is None else prompts.clip(tokens))
        table = stack.position_embedding if self.position_embedding is None else self.position_embedding
        if table is not None:
            table.check(start + tokens.shape[1])
            places = table(positions)
            x = x + places
        x = stack.enter(x.to(self.residual_dtype or x.dtype), keys)
        return x if prompts is None else prompts(x, tokens, places, keys, stack.norm_embedding)

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

    def cut(self, stage: int, stages: int, layers: range) -> None:
        """Becomes pipeline stage number `stage` of `stages`, with these layers of one side: deletes what other stages hold.

        The token table stays where either side begins and, tied, where the decoder ends; a relative bias on all stages of its side.
        """
        depth = self.config.encoder_layers
        assert layers.stop <= depth or layers.start >= depth, "a stage works on one sequence"
        self.first, self.last = stage == 0, stage == stages - 1
        begins = layers.start in (0, depth)
        self.prompts = self.prompts if self.first else None
        if layers.start < depth:
            self.decoder, self.gives = None, (INPUT,)
            self.encoder.keep(layers, last=layers.stop == depth)
        else:
            self.encoder = None
            self.takes = (INPUT,) if begins else ("tokens", INPUT)
            self.gives = ("tokens",) if self.last else ("tokens", INPUT)
            self.decoder.keep(range(layers.start - depth, layers.stop - depth), last=self.last)
        if not begins:
            self.position_embedding = None
            if self.head is not None or not self.last:
                del self.token_embedding
        if not self.last:
            self.head = self.output_bias = None
