"""The two ways to read a token file: windows of its joint stream (GPT), or groups of its sentences (BERT, T5, BART).

Each says how a file is split, whether it can give a sample and what to do if not, how its samples are opened, and what of
it is not read. `reading(shape)` chooses. Knows files and orders. Refuses to know plans, blends and configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from megalith.data.cache import IndexCache
from megalith.data.gpt import GPTDataset
from megalith.data.groups import SentenceDataset, Sentences, make_groups
from megalith.data.orders import make_order
from megalith.data.sentence_index import Census, census, cut_off
from megalith.data.shape import Order, Shape
from megalith.data.sources import OpenFile
from megalith.data.splits import Range, split_ranges
from megalith.data.stream import Samples


class Part(NamedTuple):
    """Items `items` of a file, read as the split `split`; `chapters` as in `orders`."""

    file: OpenFile
    items: Range
    split: str
    chapters: Sequence[int] = ()


class Wanted(NamedTuple):
    """What all sources of a run have in common. `seq_length`: tokens by which windows advance."""

    order: Order
    seq_length: int
    seed: int
    shape: Shape


class Reading(Protocol):
    """A way to read token files."""

    def range(self, file: OpenFile, splits: str, split: str) -> Range:
        """Items of a split; the shares are of the documents."""

    def fault(self, part: Part, wanted: Wanted) -> tuple[str, str] | None:
        """Why items with tokens cannot give a sample, and what to do; None: they can."""

    def open(self, part: Part, wanted: Wanted, cache: IndexCache) -> Samples: ...

    def unread(self, samples: Samples, wanted: Wanted) -> str:
        """What of the text is never read, for people; empty: nothing worth a word."""


def reading(shape: Shape) -> Reading:
    """How samples of this shape are read."""
    return Groups() if shape.grouped else Windows()


@dataclass(frozen=True)
class Windows:
    """GPT and prefix-LM: an item is a document."""

    def range(self, file: OpenFile, splits: str, split: str) -> Range:
        return split_ranges(splits, len(file.indexed))[split]

    def fault(self, part: Part, wanted: Wanted) -> tuple[str, str] | None:
        file, (first, last) = part.file, part.items
        if wanted.shape.kind != "gpt" and file.indexed.num_documents < len(file.indexed):
            return (
                f"is cut into sentences ({len(file.indexed):,} in {file.indexed.num_documents:,} documents), which "
                f"{wanted.shape.kind} would read in shuffled order",
                "preprocess the corpus without --split-sentences, and name that file",
            )
        tokens = file.tokens(part.items)
        if tokens >= (wanted.seq_length + 1 if wanted.order == "native" else 1):
            return None
        what = f"the {last - first} documents of {part.split} hold {tokens} tokens; one sample needs {wanted.seq_length + 1}"
        fix = "more text, or another model.data.splits_string"
        if tokens > 1 and wanted.shape.kind == "gpt":
            fix = f"model.encoder_seq_length={tokens - 1} or less; {fix}"
        return what, fix

    def open(self, part: Part, wanted: Wanted, cache: IndexCache) -> Samples:
        file, seq_length = part.file, wanted.seq_length
        items = file.items(part.items, part.split)
        order = make_order(
            wanted.order, items, cache, seq_length=seq_length, seed=wanted.seed, chapters=part.chapters
        )
        return GPTDataset(file.indexed, order, seq_length)

    def unread(self, samples: Samples, wanted: Wanted) -> str:
        return ""


@dataclass(frozen=True)
class Groups:
    """BERT, T5 and BART: an item is a sentence, and the split's borders lie between documents."""

    def range(self, file: OpenFile, splits: str, split: str) -> Range:
        borders = file.indexed.document_indices
        first, last = split_ranges(splits, file.indexed.num_documents)[split]
        return Range(int(borders[first]), int(borders[last]))

    def fault(self, part: Part, wanted: Wanted) -> tuple[str, str] | None:
        found, shape = _census(_sentences(part), wanted), wanted.shape
        if found.usable:
            return None
        if found.few < found.documents:
            what = f"each of the {found.documents:,} documents of {part.split} holds a sentence of more than 512 tokens"
            return what, "model.data.order=native cuts such sentences instead of leaving the documents out"
        what = (
            f"none of the {found.documents:,} documents of {part.split} has {shape.min_sentences} sentences, which "
            "sentence-order pairs are made of"
        )
        if found.single == found.documents:
            what += " (each is one piece: the file was not split into sentences)"
        fix = "preprocess the corpus with --split-sentences and name the …_sentence file; or model.bert_binary_head=false"
        return what, fix

    def open(self, part: Part, wanted: Wanted, cache: IndexCache) -> SentenceDataset:
        order = make_groups(
            wanted.order,
            _sentences(part),
            wanted.shape,
            seed=wanted.seed,
            chapters=part.chapters,
            cache=cache,
        )
        return SentenceDataset(part.file.indexed, order)

    def unread(self, samples: Samples, wanted: Wanted) -> str:
        assert isinstance(samples, SentenceDataset)
        sentences = samples.order.sentences
        found = _census(sentences, wanted)
        tokens, cut = cut_off(samples.order.groups(), sentences.sizes)
        said = []
        if found.few:
            said.append(
                f"{found.few:,} documents of fewer than {wanted.shape.min_sentences} sentences left out"
            )
        if found.long and wanted.order == "megatron":
            said.append(f"{found.long:,} documents with a sentence of more than 512 tokens left out")
        if cut:
            never = wanted.order == "megatron" and wanted.shape.kind != "bert"
            fate = "are never read" if never else "are left out, other ones in each epoch"
            said.append(f"{cut / tokens:.2g} of the tokens do not fit into their samples and {fate}")
        if cut and found.single == found.documents:
            said.append("the documents are one piece each: --split-sentences when preprocessing loses less")
        return "; ".join(said)


def _sentences(part: Part) -> Sentences:
    file = part.file
    return Sentences.of(file.indexed, part.items, f"{file.name}.{part.split}", file.idx_sha256)


def _census(sentences: Sentences, wanted: Wanted) -> Census:
    sizes, documents = np.asarray(sentences.sizes), sentences.documents
    return census(sizes, documents, wanted.shape, drop_long=wanted.order == "megatron")
