"""What `evaluate` and `generate` share: keys beside their options, processes of their own, and one of them that speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megalith.generate.crew import Crew
    from megalith.generate.layout import Layout
    from megalith.generate.loading import Loaded

Keys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="trainer.devices=N, trainer.accelerator=, trainer.precision=, model.tensor_model_parallel_size=N, "
        "model.pipeline_model_parallel_size=N",
        show_default=False,
    ),
]


def begin(keys: list[str] | None, *, device: str, precision: str, copies: str = "") -> Layout:
    """The layout that keys and options ask for. Where that is several processes and no launcher started us, starts them,
    and does not return: they run this command again.

    `copies`: what must not be shared out among copies of the model ("one prompt"); empty where it may be.
    """
    import torch

    from megalith.cli.again import again
    from megalith.generate.layout import read_layout
    from megalith.topology.launch import environment

    layout, launched = read_layout(keys or (), device=device, precision=precision), environment()
    count = layout.to_spawn(torch.cuda.device_count()) if launched is None else 0
    if copies:
        layout.needs_one_copy(launched.world if launched else layout.wanted, copies)
    if count:
        raise typer.Exit(again(count))
    return layout


@contextmanager
def reading(layout: Layout, *, patient: bool = False) -> Iterator[Crew]:
    """Within, this process is one of the layout's; only the main one writes to the standard output."""
    from megalith.cli.errors import show_notices
    from megalith.generate.crew import joined

    with ExitStack() as stack:
        crew = stack.enter_context(joined(layout, patient=patient))
        if crew.is_main:
            show_notices(layout.notices)
        else:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(silence))
        yield crew


def load(
    checkpoint: str,
    layout: Layout,
    crew: Crew,
    *,
    tokenizer: str | None,
    config_file: str | None,
    families: Sequence[str] | None = ("gpt",),
    prompts: Sequence[str] = (),
    force: bool = False,
) -> Loaded:
    """The model of a checkpoint in any format; the main process tells what a person should know of it.

    `families`: those that the command can use; None: all. `prompts`, `force`: as `load_adapted` takes adapters.
    """
    from megalith.cli.errors import show_notices
    from megalith.cli.hub import fetched
    from megalith.generate.adapting import load_adapted
    from megalith.models.family import FAMILIES

    loaded = load_adapted(
        fetched(checkpoint),
        prompts,
        force=force,
        precision=layout.precision,
        tokenizer=tokenizer,
        config_file=config_file,
        crew=crew,
        families=families or tuple(FAMILIES),
    )
    if crew.is_main:
        show_notices(loaded.notices)
    return loaded


@contextmanager
def progress(crew: Crew, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of the main process."""
    from megalith.cli.progress import progress_bar

    if not crew.is_main:
        yield lambda done, total: None
        return
    with progress_bar(what) as report:
        yield report
