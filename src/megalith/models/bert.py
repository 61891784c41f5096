"""BERT: a bidirectional encoder that guesses masked tokens, and which half of a text comes first.

Two wirings by config, Megatron's and the original; a pipeline stage is this model with parts deleted. Knows the order of
layers and what is predicted of which hidden states. Knows nothing of processes, optimizers or text.

    tokens ─ token_embedding + position_embedding + type_embedding ─ [norm] ─ drop ─ blocks ─ [final_norm] ─▶ hidden

    hidden ─┬─ where a target is: lm_head ─ · token tableᵀ + output_bias ─▶ "lm"
            └─ first position: pooler ─ binary_head ─────────────────────▶ "sop"

Legend: B batch, T time, D width, V true vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megalith.models.bert_config import BertConfig
from megalith.models.heads import MaskedHead, Pooler, binary_head
from megalith.models.stack import Blocks, LanguageModel, Stack
from megalith.nn.embedding import OutputBias, OutputHead, TokenEmbedding, TypeEmbedding
from megalith.nn.linear import Linear
from megalith.nn.loss import NOT_COUNTED, CrossEntropy, LossTerm
from megalith.nn.precision import at_least_fp32


class Bert(Stack, LanguageModel):
    """`first` and `last` say which ends of the model this stage holds; names of parameters are the whole model's."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, config.num_layers)
        self.config: BertConfig = config
        self.first, self.last = True, True
        self.compute_dtype: torch.dtype | None = None
        self.residual_dtype: torch.dtype | None = None
        width, rows = config.hidden_size, config.padded_vocab_size
        self.token_embedding = TokenEmbedding(config.vocab_size, rows, width)
        self.type_embedding: TypeEmbedding | None = None
        if config.token_types:
            self.type_embedding = TypeEmbedding(config.token_types, width)
        self.lm_head: MaskedHead | None = MaskedHead(config)
        self.output_bias: OutputBias | None = OutputBias(rows)
        self.head: OutputHead | None = None
        if not config.share_embeddings_and_output_weights:
            self.head = OutputHead(config.vocab_size, rows, width)
        self.pooler: Pooler | None = None
        self.binary_head: Linear | None = None
        if config.bert_binary_head:
            self.pooler, self.binary_head = Pooler(width), binary_head(width)
        self.cross_entropy = CrossEntropy()
        self.loss_rows = config.vocab_size
        """Rows of the head that the loss's softmax runs over."""

    def forward(
        self,
        x: torch.Tensor,
        *,
        types: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, T) tokens on the first stage, (B, T, D) activations on others → (B, T, D), final norm applied on the last.

        `types` (B, T), None: all of type 0; `lengths` (B,): tokens of each row before its padding, which nobody looks at,
        None: no padding; `keys` (B,) dropout keys of the samples (needed in training with dropout); `positions` (B, T), which say
        how long the sequence is where activations hold a part of it only.
        Errors: `UnsupportedError` for too long a sequence.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        shared = self.share(positions, x.device, lengths)
        if self.first:
            x = self.embed(x, positions, types, keys)
        x = self.run(x, shared, keys)
        return self.leave(x) if self.last else x

    def embed(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        types: torch.Tensor | None,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """(B, T) tokens → the residual stream (B, T, D), in `residual_dtype`."""
        x = self.token_embedding(tokens)
        if self.position_embedding is not None:
            self.position_embedding.check(tokens.shape[1])
            x = x + self.position_embedding(positions)
        if self.type_embedding is not None:
            x = x + self.type_embedding(torch.zeros_like(tokens) if types is None else types)
        return self.enter(x.to(self.residual_dtype or x.dtype), keys)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, V) over the true vocabulary, in the compute dtype."""
        return self.head_table.logits(self.before_head(hidden), self.output_bias.bias)

    def before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…, D): what the token table's rows are compared with."""
        return self.lm_head(hidden)

    def binary_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, D) → (B, 2): the halves in order, and swapped."""
        return self.binary_head(self.pooler(hidden))

    def loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, order: torch.Tensor | None = None
    ) -> dict[str, LossTerm]:
        """hidden (B, T, D), targets (B, T) and `order` (B,), both with −1 not counted → {"lm": …, "sop": …}.

        "sop" where the model has a binary head, which needs `order`. The head sees the positions with a target alone: of
        every seven or so one.
        """
        rows, wanted = self.lm_head.counted(hidden, targets)
        bias = self.output_bias.bias
        total = self.cross_entropy(self.lm_head(rows), self.head_weight, wanted, self.loss_rows, bias)
        terms = {"lm": LossTerm(total, (targets >= 0).sum())}
        if self.binary_head is None:
            return terms
        if order is None:
            raise ValueError("a model with a binary head needs the order of the halves: pass order=(B,)")
        answers = self.binary_logits(hidden)
        swapped = F.cross_entropy(
            answers.to(at_least_fp32(answers)), order, ignore_index=NOT_COUNTED, reduction="sum"
        )
        return {**terms, "sop": LossTerm(swapped, (order >= 0).sum())}

    def cut(self, stage: int, stages: int, layers: range) -> None:
        """Becomes pipeline stage number `stage` of `stages`, with these layers: deletes what other stages hold.

        A tied token table stays on both ends, a relative bias on every stage.
        """
        self.first, self.last = stage == 0, stage == stages - 1
        self.blocks = Blocks({str(i): self.blocks[str(i)] for i in layers})
        if not self.first:
            self.position_embedding = self.type_embedding = self.norm_embedding = None
            if self.head is not None or not self.last:
                del self.token_embedding
        if not self.last:
            self.final_norm = self.head = self.lm_head = self.output_bias = None
            self.pooler = self.binary_head = None
