"""From a prompt to what a model is given: its ids, what stands around them, and which of them are blanks.

    GPT      a row that begins with the prompt
    T5       the encoder reads the prompt, sentinels in its blanks; the row begins with the decoder's start
    BART     the same, mask tokens in its blanks
    BERT     the prompt, mask tokens in its blanks, of which there is one at least

Knows text, ids and how many a model has room for. Decodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalith.errors import DataError
from megalith.generate.blanks import Blanked, find
from megalith.generate.engine import check_prompt, check_source
from megalith.generate.loading import Loaded
from megalith.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Asked:
    """One prompt. `tokens`: what its row begins with; `source`: what an encoder reads, or a BERT; None: there is none.

    `blanks`: to be filled with spans, or guesses; `context`: ids that a continuation is spelled behind; `unspelled`: how many
    of the continuation's first tokens are no text.
    """

    prompt: str
    tokens: list[int]
    source: list[int] | None = None
    blanks: Blanked | None = None
    context: tuple[int, ...] = ()
    unspelled: int = 0

    @property
    def length(self) -> int:
        """Tokens that a model reads before it writes."""
        return len(self.tokens if self.source is None else self.source)


def ask(loaded: Loaded, prompt: str) -> Asked:
    """Errors: `DataError` for a prompt that this model cannot take: too long, empty, or with blanks that it does not know."""
    tokenizer, manner, family = loaded.needs_tokenizer(), loaded.manner, loaded.family
    positions = loaded.model.config.max_positions
    if family == "gpt":
        ids = tokenizer.encode(prompt)
        tokens = [*manner.before, *ids] or [_beginning(tokenizer)]
        check_prompt(len(tokens), positions)
        return Asked(prompt, tokens, context=tuple(ids))
    if family == "t5":
        blanks = find(prompt, sentinels=len(tokenizer.sentinels))
        ids = blanks.ids(tokenizer, [tokenizer.sentinels[number] for number in blanks.numbers])
    else:
        blanks = find(prompt)
        ids = blanks.ids(tokenizer, [_mask(tokenizer)] * len(blanks.numbers))
    if not ids:
        check_source(0, positions)
    source = [*manner.before, *ids, *manner.behind]
    check_source(len(source), positions)
    if family == "bert" and not blanks.numbers:
        raise DataError(
            "the prompt has no blank for a BERT to guess",
            where="prompt",
            fix="write [MASK] or <mask> where a word is missing",
        )
    filled = blanks if family != "bart" and blanks.numbers else None
    return Asked(prompt, list(manner.start), source, filled, unspelled=int(manner.forced[0] is not None))


def _beginning(tokenizer: Tokenizer) -> int:
    """What an empty prompt begins with."""
    if tokenizer.eod is None:
        raise DataError(
            "an empty prompt, and this tokenizer has no end-of-document token to start from", where="prompt"
        )
    return tokenizer.eod


def _mask(tokenizer: Tokenizer) -> int:
    if tokenizer.mask is None:
        raise DataError(
            "the prompt has a blank, but the tokenizer has no mask token",
            where="tokenizer",
            fix="give --tokenizer: that of the model's training",
        )
    return tokenizer.mask
