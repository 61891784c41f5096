"""Checkpoints of Megatron-LM and megatron-core, every version, as models of ours.

    megatron_files ─▶ megatron_read ─▶ tensors by whole-model names ─┐
    args, config_file, shapes ─ megatron_args ─▶ ModelConfig ────────┴─▶ Foreign

Decides which table holds and what the true vocabulary is. Where files lie, what they hold, what arguments mean and what tensors
are called is said by the modules of these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalith.checkpoint.formats.foreign import DIVISORS, Foreign, padding, with_heads
from megalith.checkpoint.formats.huggingface import find_tokenizer
from megalith.checkpoint.formats.megatron_args import Facts, refuse_others, settle
from megalith.checkpoint.formats.megatron_read import Read, read_files
from megalith.checkpoint.formats.megatron_shapes import Seen, family_of, see
from megalith.checkpoint.formats.megatron_tables import VERSIONS, core, legacy
from megalith.checkpoint.formats.megatron_told import Told
from megalith.checkpoint.mapping import Table
from megalith.checkpoint.pickles.stub import Stub
from megalith.errors import CheckpointError, MegalithError
from megalith.models.config import ModelConfig
from megalith.models.family import FAMILIES
from megalith.tokenizers.bpe import ROLES_FILE
from megalith.tokenizers.load import load_tokenizer


def open_files(path: Path, told: Told) -> Foreign:
    """The model of an iteration's folder, a torch_dist folder or a single file; no tensor is read.

    Errors: `CheckpointError` for missing ranks, unknown versions, arguments that make another model than ours can be.
    """
    return understand_files(path, read_files(path), told)


def understand_files(path: Path, read: Read, told: Told) -> Foreign:
    """The model that tensors by Megatron's names and what is said beside them make, whoever kept them.

    Errors: as `open_files`.
    """
    where = str(path)
    args = _arguments(read.common.get("args", read.common.get("arguments")))
    facts = _facts(args, told, where)
    facts.source = read.source if args else facts.source
    refuse_others(facts, where=where)
    _refuse_missing_ranks(args, read.sizes, where)
    version = _version(read.common, where)
    table = _table(read, version)
    seen = see(table, read.tensors, where=where)
    settle(facts, seen, where=where)
    tokenizer = _find_tokenizer(path, read, told, facts, seen.family)
    vocabulary, source = _vocabulary(seen, facts, told, tokenizer)
    if vocabulary > seen.rows:
        what = f"{source} has {vocabulary} tokens, its table {seen.rows} rows"
        raise CheckpointError(what, where=where, fix="give the tokenizer that it was trained with")
    divisor, said = _padded(vocabulary, source, seen, args=args, ranks=read.sizes[0])
    fields = facts.fields | {"vocab_size": vocabulary, "make_vocab_size_divisible_by": divisor}
    foreign = Foreign(
        kind=read.kind,
        path=path,
        family=seen.family,
        config=_config(seen.family, fields, where),
        table=table,
        parts=read.tensors,
        tokenizer=tokenizer,
        state=_state(read.common, args),
        provenance={
            "format": read.kind,
            "checkpoint_version": version,
            "tensor_model_parallel_size": read.sizes[0],
            "pipeline_model_parallel_size": read.sizes[1],
            "iteration": read.common.get("iteration"),
            "vocabulary": f"{vocabulary} by {source or 'the stored size'}, {seen.rows} rows stored",
            "origins": facts.origins,
            "args": {name: value for name, value in args.items() if _is_plain(value)},
        },
        notices=said,
    )
    return with_heads(foreign)


def _arguments(args: Any) -> dict[str, Any]:
    """A pickled Namespace's values, which was never unpickled."""
    values = args.state if isinstance(args, Stub) else args
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}


def _facts(args: Mapping[str, Any], told: Told, where: str) -> Facts:
    """The file's own arguments, filled up by what a person says. Errors: `CheckpointError` where the two contradict."""
    given = {name: value for name, value in told.facts.items() if value is not None}
    wrong = [
        f"{name}: {args[name]!r} in the file's args, {value!r} in {told.source}"
        for name, value in given.items()
        if args.get(name) is not None and args[name] != value
    ]
    if wrong:
        raise CheckpointError(
            "\n    ".join(["it is told to be another model than it says", *wrong]), where=where
        )
    own = {name: value for name, value in args.items() if value is not None}
    return Facts({**given, **args, **own}, "args" if args else told.source)


def _refuse_missing_ranks(args: Mapping[str, Any], sizes: tuple[int, int], where: str) -> None:
    if sizes == (1, 1) and args.get("use_dist_ckpt"):
        return
    said = (
        args.get("tensor_model_parallel_size") or args.get("model_parallel_size") or sizes[0],
        args.get("pipeline_model_parallel_size") or sizes[1],
    )
    if said != sizes:
        raise CheckpointError(
            f"it is of {said[0]} tensor-parallel ranks and {said[1]} pipeline stages by its args, there are files of "
            f"{sizes[0]} and {sizes[1]}",
            where=where,
            fix="give the folder of the whole iteration, with every mp_rank folder in it",
        )


def _version(common: Mapping[str, Any], where: str) -> int:
    version = common.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version not in VERSIONS:
        raise CheckpointError(f"its checkpoint_version is {version!r}; 0 to 3 are known", where=where)
    return int(version)


def _table(read: Read, version: int) -> Table:
    family = family_of(read.tensors)
    if read.kind == "megatron":
        return legacy(version, family)
    return core(family, split=any(name.endswith(".linear_fc1.weight_w") for name in read.tensors))


def _find_tokenizer(path: Path, read: Read, told: Told, facts: Facts, family: str) -> Path | None:
    if told.tokenizer is not None or read.tokenizer is not None:
        return told.tokenizer or read.tokenizer
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder.parent):
        if find_tokenizer(place) is not None and _is_all_of_it(place, facts, family):
            return place
    return None


def _is_all_of_it(folder: Path, facts: Facts, family: str) -> bool:
    """Does a folder say all tokens? Megatron adds some to a bare vocabulary: BERT needs none of them, and some types get none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt", ROLES_FILE)):
        return True
    if (folder / "vocab.txt").is_file():
        return family == "bert"
    return facts.said.get("tokenizer_type") in (None, "Llama2Tokenizer", "GPTSentencePieceTokenizer")


def _vocabulary(seen: Seen, facts: Facts, told: Told, tokenizer: Path | None) -> tuple[int, str]:
    """(true vocabulary, who says so); the stored size and "" where nobody does."""
    if told.vocab_size is not None:
        return told.vocab_size, "the model's keys"
    if tokenizer is not None:
        try:
            size = load_tokenizer(tokenizer).vocab_size
        except MegalithError:
            if told.tokenizer is not None:
                raise
        else:
            if told.tokenizer is not None or size <= seen.rows:
                return (
                    size,
                    f"the tokenizer {tokenizer}" if tokenizer is told.tokenizer else "its own tokenizer",
                )
    said = facts.said.get("vocab_size")
    if isinstance(said, int) and 0 < said <= seen.rows:
        return said, f"vocab_size ({facts.source})"
    return seen.rows, ""


def _padded(
    vocabulary: int, source: str, seen: Seen, *, args: Mapping[str, Any], ranks: int
) -> tuple[int, tuple[str, ...]]:
    """What the vocabulary is padded to a multiple of, and what to say where it is a guess or does not fit."""
    each = args.get("make_vocab_size_divisible_by")
    each = each if isinstance(each, int) else DIVISORS[0]
    own = [each * count for count in (ranks, 1, 2, 4, 8, 16)]
    divisor = padding(vocabulary, seen.rows, *own)
    if not source:
        text = f"the true vocabulary is not known: {vocabulary:,} tokens are kept as stored, padding included"
        return divisor or DIVISORS[0], (f"{text} (--tokenizer tells it)",)
    if divisor is None:
        text = f"its table of {seen.rows:,} rows is not what {vocabulary:,} tokens are padded to ({source})"
        return DIVISORS[0], (f"{text}: is this the tokenizer that it was trained with?",)
    return divisor, ()


def _config(family: str, fields: Mapping[str, Any], where: str) -> ModelConfig:
    try:
        return FAMILIES[family][1](**fields)
    except ValueError as error:
        raise CheckpointError(f"its sizes make no model: {error}", where=where) from None


def _state(common: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Step and consumed samples, as our state.json names them."""
    step, consumed = common.get("iteration"), args.get("consumed_train_samples")
    found = {"step": step if isinstance(step, int) else 0}
    return found | ({"consumed_samples": consumed} if isinstance(consumed, int) else {})


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
