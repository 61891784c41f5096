"""Text cut into sentences: sentencex, which needs no download, and rules for what it does not do well.

```
text ─▶ paragraphs (blank lines) ─▶ quotation marks taken out ─▶ sentencex ─▶ marks put back, joined before lower case
```
sentencex keeps a quoted speech whole, however many sentences it has: hence the marks are hidden from it. A closing mark
ends the sentence before it, an opening one begins the sentence behind it.

Knows text. Refuses to know tokens, files and documents.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from sentencex import segment

from megalith.errors import DataError

LANGUAGES = {
    "english": "en", "german": "de", "french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt", "dutch": "nl",
    "polish": "pl", "czech": "cs", "danish": "da", "estonian": "et", "finnish": "fi", "greek": "el", "norwegian": "no",
    "russian": "ru", "slovene": "sl", "swedish": "sv", "turkish": "tr",
}  # fmt: skip
"""Names that Megatron's `--lang` takes, and the code of each; the codes themselves are taken, too."""
_MORE_CODES = {
    "am", "ar", "as", "be", "bg", "bn", "ca", "eo", "et", "fa", "gu", "he", "hi", "hr", "hu", "hy", "id", "ja", "kk", "kn",
    "ko", "lt", "lv", "ml", "mr", "my", "or", "pa", "ro", "sk", "sr", "ta", "te", "uk", "ur", "vi", "zh",
}  # fmt: skip
CODES = frozenset(_MORE_CODES.union(LANGUAGES.values()))

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_MARK = re.compile('["“”„‟«»]')
_WITHOUT_MARKS = str.maketrans("", "", '"“”„‟«»')
_OPENING = frozenset('"“„‟«')
_FIRST_LETTER = re.compile(r"[\W_]*([^\W_])")


def language_code(name: str) -> str:
    """The code of a language given by Megatron's name for it or by its code; DataError for another."""
    code = LANGUAGES.get(name.lower(), name.lower())
    if code not in CODES:
        raise DataError(
            f"no sentence splitter for {name!r}",
            where="--lang",
            fix="one of " + ", ".join(LANGUAGES) + "; or a code: " + " ".join(sorted(CODES)),
        )
    return code


@dataclass(frozen=True)
class Sentences:
    """How documents are split. `language` is a code of `language_code`."""

    language: str
    keep_spaces: bool = False

    def split(self, document: bytes) -> list[bytes]:
        """The sentences of a document, all UTF-8."""
        found = split_sentences(document.decode(), self.language, keep_spaces=self.keep_spaces)
        return [sentence.encode() for sentence in found]


def split_sentences(text: str, language: str, *, keep_spaces: bool = False) -> list[str]:
    """The sentences of a text, in order. `language` is a code of `language_code`.

    White space around a sentence is dropped, and nothing else. With `keep_spaces` it stays at the end of the sentence
    before it (at the text's start, with the first), so that the sentences joined are the text.
    """
    starts = [
        start for start, paragraph in _paragraphs(text) for start in _starts(paragraph, start, language)
    ]
    if not starts:
        return [text] if keep_spaces and text else []
    borders = [0, *starts[1:], len(text)]
    sentences = [text[start:end] for start, end in pairwise(borders)]
    return sentences if keep_spaces else [sentence.strip() for sentence in sentences]


def last_paragraph(text: str) -> int:
    """Where the last paragraph of a text begins, the spaces before it left out: what stands before is split the same
    whatever follows. 0 if there is but one.
    """
    starts = [start for start, _ in _paragraphs(text)]
    return starts[-1] if len(starts) > 1 else 0


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """What is between blank lines, and where it begins, white space around it left out."""
    start = 0
    for end, following in [*((m.start(), m.end()) for m in _BLANK_LINES.finditer(text)), (len(text), 0)]:
        paragraph = text[start:end].strip()
        if paragraph:
            yield text.index(paragraph, start), paragraph
        start = following


def _starts(paragraph: str, offset: int, language: str) -> Iterator[int]:
    """Where each sentence of a paragraph begins, as places in the whole text."""
    yield offset
    plain = paragraph.translate(_WITHOUT_MARKS)
    hidden = _hidden_before(paragraph) if len(plain) < len(paragraph) else []
    at = 0
    for number, sentence in enumerate(segment(language, plain)):
        at = plain.find(sentence, at)
        begin = at + len(sentence) - len(sentence.lstrip())
        at += len(sentence)
        if number and begin < at and not _goes_on(sentence):
            yield offset + _with_opening_marks(paragraph, begin + bisect_right(hidden, begin))


def _hidden_before(paragraph: str) -> list[int]:
    """For each mark taken out, the place in the rest that follows it: with n of them at or before a place, the character
    there was n places further on.
    """
    return [match.start() - number for number, match in enumerate(_MARK.finditer(paragraph))]


def _with_opening_marks(paragraph: str, place: int) -> int:
    """The place of the marks that stand directly before a sentence's first letter and open it."""
    while place and paragraph[place - 1] in _OPENING:
        place -= 1
    return place


def _goes_on(sentence: str) -> bool:
    """Whether its first letter is a small one, with nothing but signs before: no sentence begins so."""
    found = _FIRST_LETTER.match(sentence)
    return found is not None and found[1].islower()
