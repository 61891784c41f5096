"""The tokens that both sides of a conversion compute, and the English text that an imported model is tried on.

    GPT                predicts each token of the passage behind the first
    BERT               guesses every seventh, which [MASK] stands for, between [CLS] and [SEP]
    encoder-decoders   are not tried: what they were taught is to fill gaps or to translate, each in a way of its own

The passage was written for this purpose: no model has been trained on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megalith.errors import DataError
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.tokenizers.base import Tokenizer

PASSAGE = (
    "The ferry left the harbour a little before noon, and by the time the bells of the old church had stopped "
    "ringing, the town behind us was only a line of white houses under the hills. Most of the passengers stayed "
    "inside, where it was warm, but my sister wanted to see the island as soon as it came out of the mist. She "
    "stood at the rail with her hands in the pockets of her coat and told me what she remembered of the summers "
    "that we had spent there when we were children: the path along the cliff, the small shop that sold bread and "
    "paraffin, and the dog that followed everyone to the beach and never seemed to belong to anybody."
)
LENGTH = 64
"""Tokens computed at most."""
SEED = 20
EVERY = 7
"""Of so many tokens one is hidden from a BERT."""


@dataclass(frozen=True)
class Tokens:
    """`ids` (T,). The first `scored` of them are the passage's beginning; `guessed` (T,): what some stand for, −1 elsewhere.

    `why` none are scored.
    """

    ids: torch.Tensor
    scored: int
    guessed: torch.Tensor | None = None
    why: str = "there is no tokenizer: whether the weights make sense of text was not tried"


def choose_tokens(config: ModelConfig, tokenizer: Tokenizer | None) -> Tokens:
    """With a tokenizer the passage's beginning; behind it ids from all over the vocabulary, the last one among them.

    Errors: `DataError` for a tokenizer that has more tokens than the model.
    """
    length = min(LENGTH, config.max_position_embeddings)
    scored = tokenizer is not None and length >= 8
    draw = torch.Generator().manual_seed(SEED)
    random = torch.randint(0, config.vocab_size, (max(1, length // (4 if scored else 2)),), generator=draw)
    random[-1] = config.vocab_size - 1
    if tokenizer is None or not scored:
        return Tokens(random, 0)
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"it has {tokenizer.vocab_size} tokens, the model knows {config.vocab_size}",
            where="the tokenizer",
            fix="give the tokenizer that the model was trained with",
        )
    if isinstance(config, EncoderDecoderConfig):
        return Tokens(
            random, 0, why="what an encoder-decoder answers to a plain text depends on what it was taught"
        )
    text = torch.tensor(tokenizer.encode(PASSAGE), dtype=torch.int64)
    if isinstance(config, BertConfig):
        return _masked(text, tokenizer, length)
    text = text[: length - len(random)]
    return Tokens(torch.cat([text, random]), len(text))


def _masked(text: torch.Tensor, tokenizer: Tokenizer, length: int) -> Tokens:
    """The passage as BERT reads one. A text ends with [SEP] there, so nothing stands behind it."""
    ends = [tokenizer.cls, tokenizer.sep, tokenizer.mask]
    if None in ends:
        return Tokens(text[:length], 0, why="its tokenizer has no [MASK] between [CLS] and [SEP]")
    ids = torch.tensor([ends[0], *text[: length - 2].tolist(), ends[1]])
    guessed = torch.full_like(ids, -1)
    hidden = torch.arange(EVERY, len(ids) - 1, EVERY)
    guessed[hidden] = ids[hidden]
    ids[hidden] = ends[2]  # type: ignore[assignment]
    return Tokens(ids, len(ids), guessed)


def passage_loss(logits: torch.Tensor, tokens: Tokens) -> float:
    """Mean loss, in nats, of the passage's tokens behind the first, or of those guessed, by `logits` (T, V)."""
    if tokens.guessed is not None:
        return float(F.cross_entropy(logits.double(), tokens.guessed, ignore_index=-1))
    targets = tokens.ids[1 : tokens.scored, None]
    return -float(logits[: len(targets)].double().log_softmax(-1).gather(1, targets).mean())


def most(config: ModelConfig) -> float:
    """The loss above which a model has learnt nothing of a text: that of guessing among all tokens, less 1."""
    return math.log(config.vocab_size) - 1
