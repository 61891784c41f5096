"""`megalith pretrain gpt`: a configuration, overrides, and what to do with them: train, print, or show a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megalith.config.compose import Composed
    from megalith.tasks.pretrain_config import PretrainGPTConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Pretrain a model from a configuration and key=value overrides.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigName = Annotated[
    str | None,
    typer.Option("--config-name", "-cn", help="a packaged configuration, or a file in --config-path"),
]
ConfigPath = Annotated[
    Path | None, typer.Option("--config-path", "-cp", help="folder of --config-name", show_default=False)
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="overrides: key=value, +key=value, ~key", show_default=False),
]


@app.callback()
def pretrain() -> None:
    """Pretrain a model from a configuration and key=value overrides."""


@app.command()
def gpt(
    overrides: Overrides = None,
    config_name: ConfigName = None,
    config_path: ConfigPath = None,
    config: ConfigFile = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the configuration, and stop")
    ] = False,
    derived: Annotated[
        bool, typer.Option("--derived", help="with --print-config: also the numbers that follow")
    ] = False,
    show_batch: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="STEP",
            help="decode the batch of this step (0 is the first), and stop",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Pretrain a GPT. Started again, the same command goes on from the newest checkpoint.

    Example: megalith pretrain gpt model.data.data_prefix=corpus_text_document model.tokenizer.file=tokenizer.json
    model.preset=gpt2-124m trainer.max_steps=1000

    Exit code: 0 done, 2 something to mend, 3 stopped by a signal after saving (start it again).
    """
    from megalith.config.compose import gather, settle
    from megalith.tasks.pretrain_config import PretrainGPTConfig

    gathered = gather(
        PretrainGPTConfig,
        config_name=config_name,
        config_path=config_path,
        config_file=config,
        overrides=overrides or (),
    )
    if print_config or derived:
        from megalith.cli.show_config import print_configuration

        print_configuration(PretrainGPTConfig, gathered, derived=derived)
        return
    composed = settle(PretrainGPTConfig, gathered)
    if show_batch is not None:
        _tell_notices(composed)
        from megalith.tasks.show_batch import show

        raise typer.Exit(show(composed, show_batch))
    raise typer.Exit(_train(composed))


def _train(composed: Composed[PretrainGPTConfig]) -> int:
    """Alone, or as one of several processes, or by starting them. → exit code"""
    _find_data(composed.config)
    from megalith.cli.again import again
    from megalith.tasks.processes import is_main, joined, to_spawn

    if count := to_spawn(composed.config.trainer, composed.config.model.sizes):
        return again(count)
    with joined(composed.config.trainer) as member:
        if is_main():
            _tell_notices(composed)
        from megalith.tasks.pretrain import run

        return run(composed, member=member)


def _find_data(config: PretrainGPTConfig) -> None:
    """Errors: `DataError` for token files that are not there, before the seconds that importing PyTorch takes."""
    from megalith.data.config import PATH_KEYS
    from megalith.data.indexed.format import existing_prefix

    data = config.model.data
    for files in (data.shared_files, *map(data.own_files, PATH_KEYS)):
        for path in files.paths if files else ():
            existing_prefix(path)


def _tell_notices(composed: Composed[PretrainGPTConfig]) -> None:
    from megalith.cli.errors import show_notices

    show_notices(composed.notices)
