"""`megalith adapter show|export`: what tuning made, and how it gets into other programs' files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalith.cli.options import Checkpoint, ConfigFile, TokenizerPath

if TYPE_CHECKING:
    from megalith.adapt.adapter import Adapter

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="What tuning made (soft prompts, LoRA): look into it, write it for PEFT or NeMo.",
)
HELP = "what tuning made: its folder, a run's, one of PEFT's, or a .nemo with soft prompts"
Force = Annotated[bool, typer.Option("--force", help="also of another base model or tokenizer")]


@app.command()
def show(
    adapter: Annotated[str, typer.Argument(help=HELP)],
    checkpoint: Annotated[
        str | None, typer.Option(help="the model that it was tuned on, which LoRA of PEFT's is read beside")
    ] = None,
) -> None:
    """Shows what it is: its tags, its sizes, what it was made for.

    Example: megalith adapter show runs/sst2
    """
    from megalith.adapt.artefact import open_adapter
    from megalith.checkpoint.convert.source import open_source
    from megalith.cli.output import print_rows

    config = None if checkpoint is None else open_source(checkpoint).config
    print_rows(_said(open_adapter(adapter, config)))


@app.command()
def export(
    adapter: Annotated[list[str], typer.Argument(help=f"{HELP}; several: their tags together")],
    checkpoint: Checkpoint,
    to: Annotated[
        str,
        typer.Option(help="native, peft (a folder for each tag), nemo (model and prompts in one archive)"),
    ],
    output: Annotated[Path, typer.Option(help="the folder (of nemo: the file) to write")],
    tensor: Annotated[
        int, typer.Option("--tensor-model-parallel-size", min=1, help="ranks that an archive is cut for")
    ] = 1,
    force: Force = False,
    tokenizer: TokenizerPath = None,
    config_file: ConfigFile = None,
) -> None:
    """Writes it in another form, for the model that it was tuned on. Prints what was written.

    Example: megalith adapter export runs/sst2 --checkpoint gpt2 --to peft --output sst2-peft
    """
    from megalith.adapt.adapter import joined
    from megalith.adapt.artefact import open_adapter
    from megalith.adapt.export import export as write
    from megalith.checkpoint.convert.source import open_source

    opening = {"tokenizer": tokenizer, "config_file": config_file}
    config = open_source(checkpoint, **opening).config
    found = joined([open_adapter(each, config) for each in adapter], force=force)
    for place in write(found, output, to, checkpoint, ranks=tensor, force=force, opening=opening):
        typer.echo(place)


def _said(adapter: Adapter) -> dict[str, str]:
    from megalith.config.tree import plain

    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors.values()})
    said = {
        "method": adapter.method,
        "family": adapter.family or "any with an encoder and a decoder",
        "tags": ", ".join(f"{tag.name} ({tag.length} virtual tokens)" for tag in adapter.tags),
        "numbers": f"{numbers:,} ({', '.join(kinds)})",
        "base model": adapter.base.name,
        "fingerprint": adapter.base.fingerprint,
        "tokenizer": adapter.base.tokenizer,
        "settings": ", ".join(
            f"{name} {plain(value)}"
            for name, value in adapter.settings.items()
            if name != "tags" and value != {}
        ),
    }
    return {name: value for name, value in said.items() if value}
