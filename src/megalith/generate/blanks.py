"""Blanks in a prompt: where they stand, what the model reads there, and the prompt with its blanks filled.

    The <mask> sat on the <mask>.      T5: sentinels in order, as if <extra_id_0>, <extra_id_1> had been typed
                                       BART, BERT: the mask token
    <extra_id_0> cat <extra_id_1> mat  what T5 wrote  ─▶  The cat sat on the mat.

`[MASK]` is another spelling of `<mask>`. White space before a blank is no token's, as `transformers` has it. Knows text and
ids, no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megalith.errors import DataError
from megalith.tokenizers.base import Tokenizer

BLANK = re.compile(r"<mask>|\[MASK\]|<extra_id_(\d+)>")
SENTINEL = re.compile(r"<extra_id_(\d+)>")
CONTINUES = "##"
"""How WordPiece writes a piece that belongs to the word before it."""


@dataclass(frozen=True)
class Blanked:
    """A prompt's text around its blanks (one piece more than blanks), and the number of each blank: its sentinel's, or its place."""

    pieces: tuple[str, ...]
    numbers: tuple[int, ...]

    def ids(self, tokenizer: Tokenizer, blanks: Sequence[int]) -> list[int]:
        """The prompt's ids, with these in the places of its blanks."""
        found = tokenizer.encode_batch([piece.rstrip() for piece in self.pieces[:-1]] + [self.pieces[-1]])
        ids = list(found[0])
        for blank, behind in zip(blanks, found[1:], strict=True):
            ids += [blank, *behind]
        return ids

    def filled(self, fillings: Sequence[str]) -> str:
        """The text with one of these in each blank."""
        text = self.pieces[0]
        for filling, behind in zip(fillings, self.pieces[1:], strict=True):
            text = joined(joined(text, filling.strip()), behind)
        return text


def joined(left: str, right: str) -> str:
    """Both, with one space where both have one, and none within a word."""
    if right.startswith(CONTINUES):
        return left.rstrip() + right.removeprefix(CONTINUES)
    return left + (right.lstrip(" ") if left.endswith(" ") else right)


def find(prompt: str, *, sentinels: int | None = None) -> Blanked:
    """The blanks of a prompt. `sentinels`: how many the tokenizer has; None: the model has a mask token instead.

    Errors: `DataError` for sentinels that are not there, come twice, or stand beside masks.
    """
    found = list(BLANK.finditer(prompt))
    named = [int(match[1]) for match in found if match[1] is not None]
    if sentinels is None and named:
        raise _refused(f"<extra_id_{named[0]}> is T5's", "write <mask>")
    if 0 < len(named) < len(found):
        raise _refused("it has masks and sentinels", "write all of them as <mask>, or all as <extra_id_0> …")
    twice = next((number for number in named if named.count(number) > 1), None)
    if twice is not None:
        raise _refused(f"<extra_id_{twice}> comes twice", "give each blank a sentinel of its own")
    numbers = named or range(len(found))
    if sentinels is not None and numbers and max(numbers) >= sentinels:
        have = (
            f"{sentinels} sentinel tokens (<extra_id_0> …)"
            if sentinels
            else "no sentinel tokens (<extra_id_0> …)"
        )
        fix = "fewer blanks" if sentinels else "give --tokenizer: one with sentinels, as T5 is trained with"
        raise _refused(f"it asks for <extra_id_{max(numbers)}>, but the tokenizer has {have}", fix)
    ends = [0, *(match.end() for match in found)]
    begins = [*(match.start() for match in found), len(prompt)]
    pieces = tuple(prompt[end:begin] for end, begin in zip(ends, begins, strict=True))
    return Blanked(pieces, tuple(numbers))


def spans(written: str, numbers: Sequence[int]) -> list[str]:
    """Of a text `<extra_id_0> … <extra_id_1> …` what stands behind each of these sentinels; nothing where one did not come."""
    parts = SENTINEL.split(written)
    found: dict[int, str] = {}
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        found.setdefault(int(number), text)
    return [found.get(number, "") for number in numbers]


def _refused(what: str, fix: str) -> DataError:
    return DataError(f"the prompt cannot be read: {what}", where="prompt", fix=fix)
