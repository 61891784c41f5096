"""`megalith plan`: memory, exchange and time of a run, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from megalith.cli.options import JsonFile
from megalith.cli.pretrain import ConfigFile, ConfigName, ConfigPath, Overrides, root_of
from megalith.errors import EXIT_FAILURE, EXIT_SUCCESS


def plan(
    overrides: Overrides = None,
    config_name: ConfigName = None,
    config_path: ConfigPath = None,
    config: ConfigFile = None,
    device: Annotated[
        str | None,
        typer.Option(help="A100-80, H100, H200, B200, V100-32, …; default: this machine", show_default=False),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="tokens of the vocabulary, without a tokenizer", show_default=False),
    ] = None,
    step_time: Annotated[
        float | None, typer.Option(help="measured seconds a step: what was achieved", show_default=False)
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            help="share of the peak, 0 to 1; default: what published runs reached", show_default=False
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """What a run needs of every process and how long it takes, before you pay for it.

    Takes the configuration of `megalith pretrain` (a BERT's, T5's or BART's with --config-name megatron_bert_config, …);
    needs no GPU, no data, no tokenizer and no trial run. The layout is trainer.devices × trainer.num_nodes processes; memory
    and exchange come from a rehearsal of the real step, on tensors without numbers.

    Example: megalith plan model.preset=llama2-7b trainer.devices=8 model.zero_stage=3 --device H100

    Exit code: 0 it fits, 1 it does not, 2 something to mend.
    """
    _check(step_time, efficiency)
    from megalith.cli.parity import settled_without_data
    from megalith.config.compose import gather

    more = [f"++model.vocab_size={vocab_size}"] if vocab_size is not None else []
    root = root_of(config_name, config_path, config)
    gathered = gather(
        root,
        config_name=config_name,
        config_path=config_path,
        config_file=config,
        overrides=[*(overrides or ()), *more],
    )
    settled = settled_without_data(root, gathered)
    from rich.console import Console

    from megalith.tools.plan.as_json import as_json
    from megalith.tools.plan.devices import find
    from megalith.tools.plan.plan import make_plan
    from megalith.tools.plan.remedies import remedies
    from megalith.tools.plan.show import show

    named = find(device) if device is not None else None
    with _progress() as say:
        made = make_plan(settled, named, efficiency=efficiency, step_time=step_time, say=say)
        offered = remedies(made, say) if made.verdict != "fits" else []
    show(made, offered, Console(highlight=False))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(as_json(made, offered), indent=1, ensure_ascii=False) + "\n", "utf-8")
    raise typer.Exit(EXIT_FAILURE if made.verdict == "does not fit" else EXIT_SUCCESS)


def _check(step_time: float | None, efficiency: float | None) -> None:
    """Errors: `ConfigError` for numbers that cannot be."""
    from megalith.errors import ConfigError, Problem

    problems = []
    if step_time is not None and step_time <= 0:
        problems.append(Problem("--step-time", f"{step_time:g} is not a time", "seconds above 0"))
    if efficiency is not None and not 0 < efficiency <= 1:
        problems.append(Problem("--efficiency", f"{efficiency:g} is not a share", "above 0, up to 1"))
    if problems:
        raise ConfigError(problems)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being rehearsed: a line that turns on a terminal, nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(f"rehearsing {text} …")
