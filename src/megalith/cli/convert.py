"""`megalith checkpoint convert`: from a checkpoint of any format to one of another, with a certificate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from megalith.cli.options import ConfigFile
from megalith.cli.progress import PATIENCE


def convert(
    source: Annotated[
        Path, typer.Argument(help="a run or step folder, or what Hugging Face, Megatron or NeMo saved")
    ],
    target: Annotated[
        Path, typer.Argument(help="the folder (of nemo: the file) to write; it must not exist")
    ],
    to: Annotated[str, typer.Option(help="native, huggingface, megatron, nemo")],
    tensor: Annotated[
        int,
        typer.Option("--tensor-model-parallel-size", "--target-tensor-parallel-size", min=1, help="ranks"),
    ] = 1,
    pipeline: Annotated[
        int,
        typer.Option(
            "--pipeline-model-parallel-size", "--target-pipeline-parallel-size", min=1, help="stages"
        ),
    ] = 1,
    virtual: Annotated[
        int,
        typer.Option("--virtual-pipeline-model-parallel-size", min=1, help="chunks of layers in each stage"),
    ] = 1,
    megatron_version: Annotated[int, typer.Option(help="checkpoint_version of the files: 0 to 3")] = 3,
    dtype: Annotated[
        str,
        typer.Option(help="keep, fp32, bf16, fp16, fp64; auto keeps it, but writes fp32 for native"),
    ] = "auto",
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "--vocab-file", help="a tokenizer.json, or a folder with a tokenizer"),
    ] = None,
    config_file: ConfigFile = None,
    optimizer: Annotated[
        bool | None,
        typer.Option("--optimizer/--no-optimizer", help="optimizer state: must go along, or stays behind"),
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="do not ask whether the weights know English")
    ] = False,
) -> None:
    """Converts a checkpoint of any format, cut for any number of ranks, and proves that both sides compute the same logits
    (TARGET/conversion.json). Exit code 1, and nothing left, where they do not. Model and optimizer are read tensor by tensor.

    Example: megalith checkpoint convert megatron_lm_345m gpt2 --to huggingface --tokenizer gpt2-vocab
    """
    from typing import get_args

    from megalith.checkpoint.convert.certificate import Failed
    from megalith.checkpoint.convert.convert import Format, Plan
    from megalith.checkpoint.convert.convert import convert as run
    from megalith.checkpoint.convert.to_megatron import Sizes
    from megalith.cli.errors import show_failure, show_notices
    from megalith.errors import EXIT_FAILURE, ConfigError, Problem
    from megalith.topology.memory_allocator import tune_allocator

    if to not in get_args(Format):
        raise ConfigError([Problem("--to", f"{to!r} is no format", f"one of {', '.join(get_args(Format))}")])
    if to not in ("megatron", "nemo") and (tensor, pipeline, virtual) != (1, 1, 1):
        fix = "leave the sizes out: a native checkpoint or a folder of transformers is read at any layout"
        raise ConfigError([Problem("--tensor-model-parallel-size", f"means nothing with --to {to}", fix)])
    plan = Plan(
        to,  # type: ignore[arg-type]
        Sizes(tensor, pipeline, virtual),
        dtype=dtype,
        megatron_version=megatron_version,
        optimizer=optimizer,
        untrained=untrained,
    )
    tune_allocator()  # one large tensor after another: each would be mapped and cleared anew
    try:
        with bytes_bar() as report:
            done = run(source, target, plan, config_file=config_file, tokenizer=tokenizer, report=report)
    except Failed as failure:
        show_failure(f"{failure}\n{target} was not written")
        raise typer.Exit(EXIT_FAILURE) from None
    show_notices(done.notices)
    for line in lines_of(done.certificate, target):
        typer.echo(line)


def lines_of(certificate: Mapping[str, Any], target: Path) -> list[str]:
    """What a person reads of a certificate."""
    c, passage = certificate, certificate["passage"]
    size = sum(file["bytes"] for file in c["target"]["files"].values())
    lines = [
        f"source     {c['source']['path']} ({c['source']['format']}, {c['source']['dtype']})",
        f"written    {target} ({c['target']['format']}, {c['target']['dtype']}): "
        f"{len(c['target']['files'])} files, {size / 1e6:,.1f} MB",
        f"logits     differ by {c['max_abs_logit_error']:.2g} at most (tolerance {c['tolerance']:.2g}), "
        f"{len(c['token_ids'])} tokens in {c['computed_in']}",
    ]
    if "max_abs_logit_change_by_rounding" in c:
        lines.append(f"rounding   changes logits by {c['max_abs_logit_change_by_rounding']:.2g} at most")
    read = c["read_back_by"]
    if "reader_max_abs_logit_error" in c:
        read += f": differ by {c['reader_max_abs_logit_error']:.2g} (tolerance {c['reader_tolerance']:.2g})"
    lines.append(f"read back  {read}")
    if passage["scored"]:
        lines.append(f"English    loss {passage['loss']:.2f} (guessing: {passage['limit'] + 1:.2f})")
    elif c["source"]["format"] != "native":
        lines.append(f"English    not scored: {passage['why']}")
    inside = c["target"]["format"] == "nemo"
    return [
        *lines,
        f"proof      {'conversion.json in ' + str(target) if inside else target / 'conversion.json'}",
    ]


@contextmanager
def bytes_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, all) that moves a bar of bytes: on a terminal, for what takes more than two seconds."""
    from megalith.cli.progress import bytes_progress

    bar = bytes_progress()
    tasks: dict[str, Any] = {}
    begun = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        if not bar.live.is_started and time.monotonic() - begun > PATIENCE:
            bar.start()
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()
