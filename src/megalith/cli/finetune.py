"""`megalith finetune gpt`: all of a model learns from rows of text and answer."""

from __future__ import annotations

import typer

from megalith.cli.tune import command_of

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Tune all of a model on a task's rows.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def finetune() -> None:
    """Tune all of a model on a task's rows."""


_GPT = """Tune all of a GPT on rows of text and answer. Started again, the same command goes on from the newest checkpoint.

Example: megalith finetune gpt restore_from_path=megatron_gpt.nemo
model.data.train_ds=train.jsonl model.data.valid_ds=valid.jsonl

Rows are {"text": …, "answer": …} or {"input": …, "output": …}. The checkpoints are whole models.

Exit code: 0 done, 2 something to mend, 3 stopped by a signal after saving (start it again).
"""
app.command("gpt", help=_GPT)(command_of("full"))
