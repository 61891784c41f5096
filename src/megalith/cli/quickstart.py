"""`megalith quickstart`: the whole road in a few minutes, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    folder: Annotated[Path, typer.Option(help="where everything goes; made when absent")] = Path(
        "quickstart"
    ),
    steps: Annotated[int, typer.Option(min=4, help="training steps")] = 560,
) -> None:
    """Text → tokenizer → tokens → a GPT → killed and resumed → perplexity → text, on Python's own documentation.

    Prints each step's command for a text of your own. Example: megalith quickstart --folder /tmp/quickstart
    """
    from megalith.tools.quickstart import run

    raise typer.Exit(run(folder, steps=steps))
