"""`megalith pretrain gpt|bert|t5|bart`: a configuration, overrides, and what to do with them: train, print, or show a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megalith.config.compose import Composed, Gathered
    from megalith.tasks.pretrain_config import PretrainConfig

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


PrintConfig = Annotated[bool, typer.Option("--print-config", help="print the configuration, and stop")]
WithDerived = Annotated[
    bool, typer.Option("--derived", help="with --print-config: also the numbers that follow")
]
ShowBatch = Annotated[
    int | None,
    typer.Option(
        "--show-batch",
        min=0,
        metavar="STEP",
        help="decode the batch of this step (0 is the first), and stop",
        show_default=False,
    ),
]

_HELP = """Pretrain a {title}. Started again, the same command goes on from the newest checkpoint.

Example: megalith pretrain {family} {example}

Exit code: 0 done, 2 something to mend, 3 stopped by a signal after saving (start it again).
"""
_SENTENCES = "model.data.data_prefix=corpus_text_sentence model.tokenizer.vocab_file=vocab.txt"
_FAMILIES = {
    "gpt": (
        "GPT",
        "model.data.data_prefix=corpus_text_document model.tokenizer.file=tokenizer.json\n"
        "model.preset=gpt2-124m trainer.max_steps=1000",
    ),
    "bert": ("BERT", f"{_SENTENCES}\nmodel.preset=bert-110m trainer.max_steps=1000"),
    "t5": ("T5", f"{_SENTENCES}\nmodel.preset=t5-220m trainer.max_steps=1000"),
    "bart": ("BART", f"{_SENTENCES}\nmodel.preset=bart-base trainer.max_steps=1000"),
}


def _add(family: str) -> None:
    title, example = _FAMILIES[family]

    @app.command(family, help=_HELP.format(title=title, family=family, example=example))
    def command(
        overrides: Overrides = None,
        config_name: ConfigName = None,
        config_path: ConfigPath = None,
        config: ConfigFile = None,
        print_config: PrintConfig = False,
        derived: WithDerived = False,
        show_batch: ShowBatch = None,
    ) -> None:
        from megalith.config.compose import gather
        from megalith.tasks.pretrain_config import ROOTS

        root = ROOTS[family]
        gathered = gather(
            root,
            config_name=config_name,
            config_path=config_path,
            config_file=config,
            overrides=overrides or (),
        )
        if print_config or derived:
            from megalith.cli.show_config import print_configuration

            print_configuration(root, gathered, derived=derived)
            return
        raise typer.Exit(_run(root, gathered, show_batch))


for _family in _FAMILIES:
    _add(_family)


def root_of(
    config_name: str | None, config_path: Path | None, config_file: Path | None
) -> type[PretrainConfig]:
    """The root configuration that a file is for: by the kind of its samples, its own name or what it calls its model."""
    from megalith.config.sources import load_yaml, locate
    from megalith.config.tree import get
    from megalith.tasks.pretrain_config import ROOTS

    file = locate(config_name, config_path, config_file)
    values = load_yaml(file)
    kind = str(get(values, ("model", "data", "dataset_type"), "")).removeprefix("standard_")
    said = (kind.removesuffix("_prefix_lm"), file.stem, values.get("name"))
    for family, root in ROOTS.items():
        if {family, root.packaged, root.model_fields["name"].default} & {*map(str, said)}:
            return root
    return ROOTS["gpt"]


def _run(root: type[PretrainConfig], gathered: Gathered, show_batch: int | None) -> int:
    """Train, or show a batch. → exit code"""
    from megalith.config.compose import settle

    composed = settle(root, gathered)
    if show_batch is None:
        return _train(composed)
    _tell_notices(composed)
    _find_vocabulary(composed.config)
    from megalith.tasks.show_batch import show

    return show(composed, show_batch)


def _train(composed: Composed[PretrainConfig]) -> int:
    """Alone, or as one of several processes, or by starting them. → exit code"""
    _find_data(composed.config)
    _find_vocabulary(composed.config)
    from megalith.cli.again import again
    from megalith.tasks.processes import is_main, joined, to_spawn

    if count := to_spawn(composed.config.trainer, composed.config.model.sizes):
        return again(count)
    with joined(composed.config.trainer) as member:
        if is_main():
            _tell_notices(composed)
        from megalith.tasks.pretrain import run

        return run(composed, member=member)


def _find_data(config: PretrainConfig) -> None:
    """Errors: `DataError` for token files that are not there, before the seconds that importing PyTorch takes."""
    from megalith.data.config import PATH_KEYS
    from megalith.data.indexed.format import existing_prefix

    data = config.model.data
    for files in (data.shared_files, *map(data.own_files, PATH_KEYS)):
        for path in files.paths if files else ():
            existing_prefix(path)


def _find_vocabulary(config: PretrainConfig) -> None:
    """Fetches a published vocabulary that is not here yet: now, by one process, before others are started."""
    from megalith.cli.hub import fetch_vocabulary

    fetch_vocabulary(config.model.tokenizer)


def _tell_notices(composed: Composed[PretrainConfig]) -> None:
    from megalith.cli.errors import show_notices

    show_notices(composed.notices)
