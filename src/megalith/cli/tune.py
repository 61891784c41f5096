"""`megalith tune soft-prompt|p-tuning|lora` and `megalith prompt-tune`: a little beside a model learns a task; the model stays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megalith.cli.pretrain import (
    ConfigFile,
    ConfigName,
    ConfigPath,
    Overrides,
    PrintConfig,
    ShowBatch,
    WithDerived,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from megalith.config.compose import Composed
    from megalith.tasks.tuning_config import MethodName, TuneConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Tune a little beside a model, which stays as it is: kilobytes a task.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def tune() -> None:
    """Tune a little beside a model, which stays as it is: kilobytes a task."""


_FILES = "model.data.train_ds=train.jsonl model.data.valid_ds=valid.jsonl"
_HELP = """{what} Started again, the same command goes on from the newest checkpoint.

Example: megalith {command} restore_from_path=megatron_gpt.nemo {example}
{files}

At the end the run's folder holds `adapter`, which `megalith generate --prompts` takes.

Exit code: 0 done, 2 something to mend, 3 stopped by a signal after saving (start it again).
"""
_TAGS = "model.new_prompt_tags=[Winogrande]"
METHODS: dict[MethodName, tuple[str, str]] = {
    "soft-prompt": (
        "Tune virtual tokens that stand before the texts of a task (prompt tuning).",
        f"{_TAGS} \"model.new_prompt_init_text=['fill the blank']\"",
    ),
    "p-tuning": ("Tune a small network that makes virtual tokens (p-tuning).", _TAGS),
    "lora": ("Tune low-rank matrices beside a model's products (LoRA).", "model.lora.rank=16"),
}


def helped(command: str, method: MethodName) -> str:
    """The help of a command."""
    what, example = METHODS[method]
    return _HELP.format(what=what, command=command, example=example, files=_FILES)


def command_of(method: MethodName) -> Callable[..., None]:
    """A command that tunes by this method."""

    def command(
        overrides: Overrides = None,
        config_name: ConfigName = None,
        config_path: ConfigPath = None,
        config: ConfigFile = None,
        print_config: PrintConfig = False,
        derived: WithDerived = False,
        show_batch: ShowBatch = None,
    ) -> None:
        from megalith.tasks.tuning_base import gather_tuning

        root, gathered = gather_tuning(
            method,
            config_name=config_name,
            config_path=config_path,
            config_file=config,
            overrides=tuple(overrides or ()),
        )
        if print_config or derived:
            from megalith.cli.show_config import print_configuration

            print_configuration(root, gathered, derived=derived)
            return
        from megalith.config.compose import settle

        raise typer.Exit(_run(settle(root, gathered), show_batch))

    return command


def _run(composed: Composed[TuneConfig], show_batch: int | None) -> int:
    """Tune, or show a batch. → exit code"""
    _find_files(composed.config)
    if show_batch is not None:
        from megalith.cli.errors import show_notices
        from megalith.tasks.show_tuning import show

        show_notices(composed.notices)
        return show(composed, show_batch)
    from megalith.cli.again import again
    from megalith.tasks.processes import is_main, joined, to_spawn

    if count := to_spawn(composed.config.trainer, composed.config.model.sizes):
        return again(count)
    with joined(composed.config.trainer) as member:
        if is_main():
            from megalith.cli.errors import show_notices

            show_notices(composed.notices)
        from megalith.tasks.pretrain import run
        from megalith.tasks.tuning import prepare_tuning

        return run(composed, member=member, prepare=prepare_tuning)


def _find_files(config: TuneConfig) -> None:
    """Errors: `DataError` for files that are not there, before processes are started."""
    from megalith.errors import DataError

    for split in ("train", "valid", "test"):
        for file in config.model.data.files(split):
            if not Path(file).expanduser().exists():
                raise DataError("no such file", where=file, fix=f"check model.data.{split}_ds")


for _method in METHODS:
    app.command(_method, help=helped(f"tune {_method}", _method))(command_of(_method))

prompt_tune = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prompt_tune.command("prompt-tune", help=helped("prompt-tune", "soft-prompt"))(command_of("soft-prompt"))
