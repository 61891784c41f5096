"""What a pair of token files holds: header, counts, lengths, and documents as text again.

Knows how to look. Refuses to judge (`indexed.verify` does) and to print (`cli.data` does).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megalith.data.indexed.format import bin_path, idx_path
from megalith.data.indexed.mmap import IndexedDataset, open_indexed
from megalith.data.indexed.sidecar import SideCar, read_side_car
from megalith.errors import DataError, MegalithError
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import TokenizerFiles, TokenizerSource

_MOST_LENGTHS = 1 << 24
_PERCENTILES = (10, 50, 90, 99)


@dataclass(frozen=True)
class Sample:
    """One document: its number, all its ids, and their text if a tokenizer was at hand."""

    document: int
    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class Inspection:
    """Everything `data inspect` shows."""

    dataset: IndexedDataset
    side_car: SideCar | None
    lengths: dict[str, float]
    samples: list[Sample]
    notices: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        prefix, index = self.dataset.prefix, self.dataset.index
        return {
            "prefix": str(prefix),
            "layout": index.layout,
            "dtype": str(index.dtype),
            "modes": index.modes is not None,
            "items": len(self.dataset),
            "documents": self.dataset.num_documents,
            "tokens": self.dataset.num_tokens,
            "bin_bytes": bin_path(prefix).stat().st_size,
            "idx_bytes": idx_path(prefix).stat().st_size,
            "item_lengths": self.lengths,
            "side_car": asdict(self.side_car) if self.side_car else None,
            "samples": [asdict(sample) for sample in self.samples],
            "notices": self.notices,
        }


def inspect(
    prefix: str | os.PathLike[str],
    *,
    tokenizer: TokenizerSource | None = None,
    documents: Sequence[int] | None = None,
) -> Inspection:
    """Look into a pair. `documents` are shown whole (the first three by default), as text if a tokenizer is given or
    the side-car's can be found."""
    dataset = open_indexed(prefix, allow_empty=True)
    side_car = read_side_car(dataset.prefix)
    chosen = range(min(3, dataset.num_documents)) if documents is None else documents
    decoder, notices = _decoder(tokenizer, side_car)
    samples = []
    for number in chosen:
        ids = document_tokens(dataset, number).tolist()
        text = None
        if decoder is not None:
            try:
                text = decoder.decode(ids)
            except DataError as error:
                notices.append(f"document {number}: {error.problem.what}")
        samples.append(Sample(number, ids, text))
    return Inspection(dataset, side_car, length_statistics(dataset.sizes), samples, notices)


def document_tokens(dataset: IndexedDataset, number: int) -> npt.NDArray:
    """Tokens of all items of a document."""
    if not 0 <= number < dataset.num_documents:
        raise DataError(
            f"there is no document {number}",
            where=str(dataset.prefix),
            fix=f"documents go from 0 to {dataset.num_documents - 1}"
            if dataset.num_documents
            else "it is empty",
        )
    first, last = (int(end) for end in dataset.document_indices[number : number + 2])
    items = [dataset[item] for item in range(first, last)]
    return np.concatenate(items) if items else np.empty(0, dataset.dtype)


def length_statistics(sizes: npt.NDArray[np.int32]) -> dict[str, float]:
    """min, mean, percentiles, max and number of empty items; percentiles of an even sample beyond 16 million items."""
    if not len(sizes):
        return {}
    sample = np.asarray(sizes[:: -(-len(sizes) // _MOST_LENGTHS)])
    return {
        "min": int(sizes.min()),
        "mean": round(float(np.mean(sizes, dtype=np.float64)), 1),
        **{f"p{p}": int(np.percentile(sample, p, method="nearest")) for p in _PERCENTILES},
        "max": int(sizes.max()),
        "empty": int(np.count_nonzero(sizes == 0)),
    }


def _decoder(
    tokenizer: TokenizerSource | None, side_car: SideCar | None
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer asked for, or the side-car's if its files are still there; notices say what is amiss."""
    record = side_car.tokenizer if side_car is not None else None
    if tokenizer is not None:
        given = load_tokenizer(tokenizer)
        if record is not None and given.hash() != record.hash:
            return given, ["this is not the tokenizer that made these tokens: the text may be wrong"]
        return given, []
    if record is None or not record.config:
        return None, ["no tokenizer is known: ids only; give one to see text"]
    try:
        found = load_tokenizer(TokenizerFiles(**record.config))
    except (MegalithError, TypeError) as error:
        return None, [f"the side-car's tokenizer cannot be opened: {error}".splitlines()[0]]
    if found.hash() != record.hash:
        return None, ["the tokenizer's files have changed since these tokens were made: ids only"]
    return found, []
