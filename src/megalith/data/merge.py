"""Joins pairs of token files into one: items back to back, the document index shifted, in constant memory.

Knows pairs and side-cars. Refuses to mix tokenizers, storage types or damaged files silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalith import __version__
from megalith.data.indexed.builder import IndexedWriter, Written
from megalith.data.indexed.format import as_prefix, bin_path, pairs_in
from megalith.data.indexed.mmap import IndexedDataset, open_indexed
from megalith.data.indexed.sidecar import SideCar, content_record, read_side_car, write_side_car
from megalith.data.indexed.verify import structure_problems
from megalith.errors import DataError


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote, from which prefixes, and what the user should know about it."""

    written: Written
    prefix: Path
    inputs: list[Path]
    notices: list[str]


def find_inputs(names: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Prefixes in the order given; a folder stands for its pairs, sorted by name."""
    found: list[Path] = []
    for name in names:
        folder = Path(name)
        if folder.is_dir() and not bin_path(as_prefix(name)).is_file():
            pairs = pairs_in(folder)
            if not pairs:
                raise DataError(
                    "holds no token files (.bin with .idx)", where=str(folder), fix="check the folder"
                )
            found += pairs
        else:
            found.append(as_prefix(name))
    return found


def merge(
    names: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[int], None] = lambda count: None,
) -> Merged:
    """Write the items of all inputs, in order, as one mmap pair with its side-car.

    DataError for damaged inputs, different storage types, an output that is also an input, and, unless `force`,
    different tokenizers. `progress` is called with the bytes copied since the last call.
    """
    inputs, prefix = find_inputs(names), as_prefix(output)
    _refuse_own_output(inputs, prefix)
    datasets = [open_indexed(name, allow_empty=True) for name in inputs]
    side_cars = [read_side_car(dataset.prefix) for dataset in datasets]
    notices = _check(datasets, side_cars, force)
    with IndexedWriter(prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_dataset(dataset, progress)
        written = writer.finish()
    write_side_car(prefix, _joined(written, inputs, side_cars))
    return Merged(written, prefix, inputs, notices)


def _refuse_own_output(inputs: Sequence[Path], prefix: Path) -> None:
    if prefix.resolve() in {name.resolve() for name in inputs}:
        raise DataError(
            "the output is also an input",
            where=str(prefix),
            fix="choose another output prefix, or remove an earlier output from the input folder",
        )


def _check(datasets: Sequence[IndexedDataset], side_cars: Sequence[SideCar | None], force: bool) -> list[str]:
    """Notices; DataError for what must not be joined."""
    notices = []
    for dataset in datasets:
        problems = structure_problems(dataset.index, bin_path(dataset.prefix))
        if problems:
            raise DataError(
                problems[0],
                where=str(dataset.prefix),
                fix=f"megalith data verify {dataset.prefix} lists every fault",
            )
        if dataset.dtype != datasets[0].dtype:
            raise DataError(
                f"holds {dataset.dtype}, {datasets[0].prefix} holds {datasets[0].dtype}",
                where=str(dataset.prefix),
                fix="token files of one storage type only can be merged: preprocess with one tokenizer",
            )
        if not len(dataset):
            notices.append(f"{dataset.prefix} holds no documents")
    if not any(len(dataset) for dataset in datasets):
        raise DataError("none of the inputs holds a document", where=str(datasets[0].prefix))
    without = [str(dataset.prefix) for dataset, car in zip(datasets, side_cars, strict=True) if car is None]
    if without:
        notices.append(f"no side-car, so its tokenizer is not known: {', '.join(without)}")
    notices += _disagreements(datasets, side_cars, force)
    return notices


def _disagreements(
    datasets: Sequence[IndexedDataset], side_cars: Sequence[SideCar | None], force: bool
) -> list[str]:
    """Tokenizers or eod settings that differ: an error, or notices with `force`."""
    known = [
        (dataset.prefix, car) for dataset, car in zip(datasets, side_cars, strict=True) if car is not None
    ]
    notices = []
    for prefix, car in known[1:]:
        first_prefix, first = known[0]
        what = ""
        if car.tokenizer and first.tokenizer and car.tokenizer.hash != first.tokenizer.hash:
            what = f"made by another tokenizer ({car.tokenizer.type}) than {first_prefix} ({first.tokenizer.type})"
        elif car.append_eod != first.append_eod:
            what = f"made {'with' if car.append_eod else 'without'} --append-eod, unlike {first_prefix}"
        if what and not force:
            raise DataError(
                what, where=str(prefix), fix="preprocess it alike, or give --force if you are sure"
            )
        if what:
            notices.append(f"{prefix}: {what} (--force)")
    return notices


def _joined(written: Written, inputs: Sequence[Path], side_cars: Sequence[SideCar | None]) -> SideCar:
    """Side-car of the result. Its tokenizer is noted only if every input had the same."""
    cars = [car for car in side_cars if car is not None]
    records = [car.tokenizer for car in cars]
    agreed = len(cars) == len(side_cars) and len({record.hash if record else None for record in records}) == 1
    return SideCar(
        tokenizer=records[0] if agreed else None,
        content=content_record(written),
        items=written.items,
        documents=written.documents,
        tokens=written.tokens,
        append_eod=len(cars) == len(side_cars) and all(car.append_eod for car in cars),
        created_by=f"megalith {__version__}",
        sources=list(dict.fromkeys(source for car in cars for source in car.sources)),
        details={"merged_from": [str(prefix) for prefix in inputs]},
    )
