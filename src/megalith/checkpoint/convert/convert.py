"""From a checkpoint of any format to one of another, cut for any number of ranks, and proved before it gets its name.

    open ─ write DST.partial ─ open what was written ─ compare logits ─ conversion.json ─ rename ─▶ DST

Memory: the largest tensor twice, and a constant. Knows the order of these; each is a module of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megalith.checkpoint.convert import to_huggingface, to_megatron, to_native, to_nemo
from megalith.checkpoint.convert.certificate import document, judge
from megalith.checkpoint.convert.compare import Report, compute, open_back, told
from megalith.checkpoint.convert.hashing import Hashing
from megalith.checkpoint.convert.megatron_optimizer import HALF, open_optimizer
from megalith.checkpoint.convert.passage import choose_tokens
from megalith.checkpoint.convert.source import Source, of_foreign, open_native
from megalith.checkpoint.convert.target import publishing
from megalith.checkpoint.convert.to_megatron import Sizes
from megalith.checkpoint.convert.tokenizer_files import read_tokenizer
from megalith.checkpoint.convert.verify import CERTIFICATE
from megalith.checkpoint.convert.views import rounded
from megalith.checkpoint.files import FileRecord, Progress, write_file
from megalith.checkpoint.foreign import find, open_foreign
from megalith.checkpoint.formats.nemo_prompts import SoftPrompts, prompts_of
from megalith.checkpoint.formats.nemo_read import CURRENT
from megalith.checkpoint.lazy import Lazy
from megalith.errors import CheckpointError
from megalith.tokenizers.base import Tokenizer

Format = Literal["native", "huggingface", "megatron", "nemo"]
WEIGHTS_ALONE = {"huggingface": "transformers' folders", "nemo": "NeMo's archives"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Plan:
    """What to make of a source. `dtype`: keep, fp32, bf16, fp16, or auto (native: at least fp32; others: keep).

    `optimizer`: None takes it along where both sides have it. `untrained`: do not ask whether the weights know English. `prompts`:
    soft prompts that a NeMo archive gets; None: those that the source has, where it is one.
    """

    to: Format
    sizes: Sizes = field(default_factory=Sizes)
    dtype: str = "auto"
    megatron_version: int = 3
    optimizer: bool | None = None
    untrained: bool = False
    shard: int = to_huggingface.SHARD
    prompts: SoftPrompts | None = None


@dataclass(frozen=True)
class Done:
    """A finished conversion: its folder (of NeMo's: its file), its certificate, and what a person should know."""

    folder: Path
    certificate: Mapping[str, Any]
    notices: tuple[str, ...]


class Writer(Protocol):
    """What writes a format."""

    @property
    def nbytes(self) -> int: ...
    def write(self, folder: Path, progress: Progress) -> dict[str, FileRecord]: ...


def convert(
    path: str | Path,
    target: str | Path,
    plan: Plan,
    *,
    config_file: str | Path | None = None,
    tokenizer: str | Path | None = None,
    report: Report = lambda what, done, total: None,
) -> Done:
    """Converts a checkpoint. Errors: `CheckpointError` and its kin for what cannot be converted; `Failed` for what could be and is
    not the same model. `target` exists after success only."""
    try:
        with _a_core_left():
            return _convert(
                path, Path(target).expanduser().absolute(), plan, (config_file, tokenizer), report
            )
    except EOFError as error:
        raise CheckpointError(
            f"{error}; nothing was written", where=str(path), fix="convert it when nobody writes it"
        ) from error


@contextmanager
def _a_core_left() -> Iterator[None]:
    """Computes on a core less than usual: reading, hashing and writing go on beside, and whoever shares a core makes all others wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _convert(path: str | Path, target: Path, plan: Plan, named: tuple[Any, Any], report: Report) -> Done:
    if plan.to == "nemo":
        to_nemo.refuse_name(target)
    source = _open(path, named, plan)
    spelling, said = read_tokenizer(source.tokenizer, named=named[1] is not None)
    tokens = choose_tokens(source.config, spelling)
    weights = source.masters(fix="--no-optimizer converts the weights alone") or source.tensors
    tensors = rounded(weights, _dtype(source, plan))
    writer = _writer(source, weights, tensors, spelling, plan)
    archive = to_nemo.ARCHIVE if isinstance(writer, to_nemo.Writer) else ""
    notices = (*source.notices, *said, *getattr(writer, "notices", ()))
    with publishing(target, writer.nbytes, part=archive) as folder:
        outputs = writer.write(folder, told(report, "writing", writer.nbytes))
        hashing = Hashing(source)  # now, for writing keeps two cores busy, and comparing one
        try:
            back = open_back(folder / archive, source, plan.to)
            computed = compute(source, (weights, tensors), back, (tokens, spelling), report)
            found = judge(computed, source, untrained=plan.untrained)
            inputs = hashing.finish()
        finally:
            hashing.close()
        certificate = document(source, _said(back, plan), found, inputs, outputs, notices)
        content = (json.dumps(certificate, indent=1) + "\n").encode()
        if isinstance(writer, to_nemo.Writer):
            writer.add(folder, CERTIFICATE, content)
        else:
            record = write_file(folder / CERTIFICATE, [content])
            if isinstance(writer, to_native.Writer):
                writer.add(folder, CERTIFICATE, record)
    return Done(target, certificate, notices)


def _open(path: str | Path, named: tuple[Any, Any], plan: Plan) -> Source:
    """The source, with optimizer state where it is wanted and there."""
    config_file, tokenizer = named
    found = find(path)
    if found.is_native:
        source = open_native(found.folder, None if tokenizer is None else Path(tokenizer))
        why = "" if source.optimizer else "it holds no whole Adam state"
    else:
        foreign = open_foreign(found.folder, config_file=config_file, tokenizer=tokenizer)
        source = of_foreign(foreign)
        state, why = (None, "") if plan.optimizer is False else open_optimizer(foreign)
        source = replace(
            source, optimizer=state, tokenizer=Path(tokenizer) if tokenizer else source.tokenizer
        )
    if plan.optimizer is False or plan.to in WEIGHTS_ALONE:
        if plan.optimizer:
            raise CheckpointError(
                f"{WEIGHTS_ALONE[plan.to]} have no place for optimizer state", where="--optimizer"
            )
        return replace(source, optimizer=None)
    if plan.optimizer and source.optimizer is None:
        raise CheckpointError(
            why or "it holds no optimizer state",
            where=str(path),
            fix="convert the weights alone, without --optimizer",
        )
    if source.optimizer is None and why.startswith("its "):
        return replace(
            source, notices=(*source.notices, f"{why}, which is left behind: weights alone are converted")
        )
    return source


def _dtype(source: Source, plan: Plan) -> torch.dtype | None:
    """What tensors are rounded to; None: each as it is."""
    if plan.dtype not in ("auto", "keep", *DTYPES):
        raise CheckpointError(f"{plan.dtype!r} is none of keep, {', '.join(DTYPES)}", where="--dtype")
    asked = DTYPES.get(plan.dtype)
    if plan.to != "native":
        kept = source.dtype if source.optimizer is not None and source.optimizer.masters else None
        return asked or kept
    if plan.dtype == "auto":
        asked = torch.float32 if source.dtype in HALF else None
    if source.optimizer is not None and (asked or torch.float32) in HALF:
        raise CheckpointError(
            f"optimizer state belongs to fp32 weights, not to {plan.dtype}",
            where="--dtype",
            fix="leave --dtype out, or give --no-optimizer",
        )
    return asked


def _writer(
    source: Source,
    weights: Mapping[str, Lazy],
    tensors: Mapping[str, Lazy],
    tokenizer: Tokenizer | None,
    plan: Plan,
) -> to_huggingface.Writer | to_megatron.Writer | to_native.Writer | to_nemo.Writer:
    if plan.to == "huggingface":
        return to_huggingface.Writer(source, tensors, tokenizer, plan.shard)
    if plan.to == "native":
        return to_native.Writer(source, tensors, tokenizer, source.optimizer)
    if plan.to == "nemo":
        own = prompts_of(source.folder) if source.kind == "nemo" else None
        return to_nemo.Writer(source, tensors, tokenizer, plan.sizes, prompts=plan.prompts or own)
    optimizer = source.optimizer
    if optimizer is not None:
        half = next(iter(tensors.values())).dtype in HALF
        optimizer = replace(optimizer, masters=rounded(weights, torch.float32) if half else {})
    return to_megatron.Writer(
        source, tensors, tokenizer, plan.sizes, version=plan.megatron_version, optimizer=optimizer
    )


def _said(back: Source, plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "format": plan.to,
        "dtype": str(back.dtype).removeprefix("torch."),
        "config": back.config.model_dump(mode="json"),
    }
    if plan.to in ("megatron", "nemo"):
        found |= {
            "checkpoint_version": plan.megatron_version if plan.to == "megatron" else CURRENT,
            "tensor_model_parallel_size": plan.sizes.ranks,
            "pipeline_model_parallel_size": plan.sizes.stages,
            "virtual_pipeline_model_parallel_size": plan.sizes.chunks,
        }
    return found
