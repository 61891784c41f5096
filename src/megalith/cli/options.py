"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    str,
    typer.Option(
        help="run or step folder; a folder of Hugging Face; what Megatron-LM or megatron-core saved; a published name "
        "(megalith hub list)"
    ),
]
ConfigFile = Annotated[
    str | None,
    typer.Option(help="JSON or YAML with what a Megatron file does not say: num-attention-heads: 16"),
]
TokenizerPath = Annotated[
    str | None,
    typer.Option("--tokenizer", "--tokenizer-model", help="tokenizer.json instead of the checkpoint's own"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]
PrecisionName = Annotated[str, typer.Option(help="auto, 32, bf16-mixed, 64")]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        "--micro-batch-size",
        min=1,
        help="rows at a time; changes results by rounding at most",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the numbers to this file")]
