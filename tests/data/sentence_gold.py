"""Sentence borders of biomedical abstracts: their raw text, aligned with the tagged sentences of the same corpora."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path

PAIRS = (
    ("ner-ncbi-disease/pubtator/NCBItrainset_corpus.txt.gz", "ner-ncbi-disease/NCBI-disease-IOB/train.tsv"),
    ("ner-ncbi-disease/pubtator/NCBIdevelopset_corpus.txt.gz", "ner-ncbi-disease/NCBI-disease-IOB/devel.tsv"),
    ("ner-bc5cdr/pubtator/CDR_TrainingSet.PubTator.txt.gz", "ner-bc5cdr/BC5CDR-IOB/train.tsv"),
    ("ner-bc5cdr/pubtator/CDR_DevelopmentSet.PubTator.txt.gz", "ner-bc5cdr/BC5CDR-IOB/devel.tsv"),
)
_LINE = re.compile(r"(\d+)\|([ta])\|(.*)")


def gold(root: Path) -> Iterator[tuple[str, set[int]]]:
    """(text, where its sentences end, counted in characters that are no white space, the last end left out)."""
    for texts_name, tags_name in PAIRS:
        texts = {_packed(text): text for text in _abstracts(root / texts_name)}
        tagged = list(_tagged(root / tags_name))
        at = 0
        while at < len(tagged):
            joined, ends = "", []
            for sentence in tagged[at:]:
                joined += sentence
                ends.append(len(joined))
                if joined in texts:
                    break
            assert joined in texts, f"{tags_name}: sentence {at} belongs to no abstract"
            yield texts[joined], set(ends[:-1])
            at += len(ends)


def scores(root: Path, split: Callable[[str], list[str]]) -> tuple[float, int, int]:
    """(F1 of the borders inside texts, number of texts, number of their sentences)."""
    hits = found = wanted = texts = 0
    for text, ends in gold(root):
        lengths = [len(_packed(sentence)) for sentence in split(text)]
        own = {sum(lengths[:number]) for number in range(1, len(lengths))}
        hits, found, wanted, texts = hits + len(own & ends), found + len(own), wanted + len(ends), texts + 1
    return 2 * hits / (found + wanted), texts, wanted + texts


def _abstracts(path: Path) -> Iterator[str]:
    title = ""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            match = _LINE.match(line.rstrip("\n"))
            if match and match[2] == "t":
                title = match[3]
            elif match:
                yield f"{title} {match[3]}"


def _tagged(path: Path) -> Iterator[str]:
    words: list[str] = []
    for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
        if line.strip():
            words.append(line.split("\t")[0])
        elif words:
            yield "".join(words)
            words = []


def _packed(text: str) -> str:
    return "".join(text.split())
