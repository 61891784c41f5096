"""From a prompt to what a model is given: its ids, what stands around them, and which of them are blanks.

    GPT      a row that begins with the prompt
    T5       the encoder reads the prompt, sentinels in its blanks; the row begins with the decoder's start
    BART     the same, mask tokens in its blanks
    BERT     the prompt, mask tokens in its blanks, of which there is one at least

A row that asks for a prompt of a task (`prompting`) has virtual tokens in what the model reads, and no blanks. Knows text, ids and how many a model has room for. Decodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalith.errors import DataError
from megalith.generate.blanks import Blanked, find
from megalith.generate.engine import check_prompt, check_source
from megalith.generate.loading import Loaded
from megalith.generate.prompting import TEXT, Prompt, Tagged
from megalith.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Asked:
    """One prompt. `tokens`: what its row begins with; `source`: what an encoder reads, or a BERT; None: there is none.

    `blanks`: to be filled with spans, or guesses; `context`: ids that a continuation is spelled behind; `unspelled`: how many
    of the continuation's first tokens are no text. `row`: that of a job with tasks' prompts.
    """

    prompt: str
    tokens: list[int]
    source: list[int] | None = None
    blanks: Blanked | None = None
    context: tuple[int, ...] = ()
    unspelled: int = 0
    row: Tagged | None = None

    @property
    def length(self) -> int:
        """Tokens that a model reads before it writes."""
        return len(self.tokens if self.source is None else self.source)


def ask(loaded: Loaded, prompt: Prompt) -> Asked:
    """Errors: `DataError` for a prompt that this model cannot take: too long, empty, of a tag or with blanks that it does not know."""
    if isinstance(prompt, str) and loaded.prompting is not None and loaded.prompting.tag is not None:
        prompt = Tagged(loaded.prompting.tag, {TEXT: prompt})
    if isinstance(prompt, Tagged):
        if prompt.tag is not None:
            return _ask_for(loaded, prompt)
        return replace(_ask(loaded, prompt.text), row=prompt)
    return _ask(loaded, prompt)


def _ask(loaded: Loaded, prompt: str) -> Asked:
    """A text for the model alone."""
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


def _ask_for(loaded: Loaded, row: Tagged) -> Asked:
    """A row with a tag."""
    if loaded.prompting is None:
        raise DataError(
            f"asks for the prompt {row.tag!r}, and no prompts were given",
            where="prompt_tag",
            fix="--prompts FOLDER",
        )
    manner, two_sides = loaded.manner, loaded.family != "gpt"
    found = loaded.prompting.read(row, loaded.needs_tokenizer(), manner, two_sides=two_sides)
    room, tokens = loaded.model.config.max_positions, found.tokens
    if room is not None and len(tokens) + (not two_sides) > room:
        raise DataError(
            f"the text has {len(tokens) - found.virtual} tokens, its prompt {found.virtual} virtual ones; the model reads "
            f"{room - (not two_sides)} at most",
            where="prompt",
            fix="shorten the text",
        )
    shown = loaded.prompting.shown(row)
    if two_sides:
        unspelled = int(manner.forced[0] is not None)
        return Asked(shown, list(found.start), tokens, unspelled=unspelled, row=row)
    return Asked(shown, tokens, context=found.text, row=row)


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
