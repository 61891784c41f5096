"""`megalith`: the table of commands, each imported only when it is called, and what becomes of an error.

    megalith --help            imports no command
    megalith data merge …      imports megalith.cli.data
    a user's mistake           one message on stderr, the error's exit code, no traceback
    anything else              "this is a bug", with the traceback in a file

Knows names of commands. Logic lives below, in the packages that the commands import.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from megalith.errors import EXIT_USER_ERROR, MegalithError

EXIT_INTERRUPTED = 130
UsageError = typer.BadParameter.__mro__[1]
"""Of click, or of the copy of it that newer typer versions bring along."""
MACHINE_ERRORS = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "EMFILE", "ENAMETOOLONG")
    if hasattr(errno, name)
)
"""What a disk or its owner says no to, wherever we may be: nothing that a traceback would explain."""


@dataclass(frozen=True)
class Command:
    """Where a command lives ("module:app", or "module:function") and the line of help that lists it."""

    target: str
    help: str

    def load(self, name: str) -> Any:
        """Import it and make it a command."""
        module, _, attribute = self.target.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name)(found)
        return typer.main.get_command(single)


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "megalith.cli.quickstart:quickstart", "Text to a trained model in a few minutes, no download."
    ),
    "doctor": Command("megalith.cli.doctor:doctor", "What this machine will use, why, and what is missing."),
    "tokenizer": Command("megalith.cli.tokenizer:app", "Train, try and inspect tokenizers."),
    "data": Command("megalith.cli.data:app", "Turn text into token files; merge, inspect and verify them."),
    "pretrain": Command(
        "megalith.cli.pretrain:app", "Pretrain a model from a configuration and key=value overrides."
    ),
    "tune": Command("megalith.cli.tune:app", "Tune prompts or LoRA beside a model: kilobytes a task."),
    "prompt-tune": Command(
        "megalith.cli.tune:prompt_tune", "Tune soft prompts: the same as tune soft-prompt."
    ),
    "finetune": Command("megalith.cli.finetune:app", "Tune all of a model on a task's rows."),
    "plan": Command("megalith.cli.plan:plan", "Memory, exchange and time of a run, before you pay for it."),
    "parity": Command("megalith.cli.parity:parity", "Compare a layout with one process, number by number."),
    "evaluate": Command("megalith.cli.evaluate:app", "Measure a model: perplexity, WikiText, LAMBADA."),
    "generate": Command("megalith.cli.generate:generate", "Continue a text, a file of texts, or nothing."),
    "adapter": Command(
        "megalith.cli.adapter:app", "What tuning made: look into it, write it for PEFT or NeMo."
    ),
    "checkpoint": Command(
        "megalith.cli.checkpoint:app", "Look into checkpoints, and check that they are whole."
    ),
    "hub": Command("megalith.cli.hub:app", "Published models and vocabularies: list them, fetch one."),
    "explain": Command("megalith.cli.explain:explain", "What a configuration key means and where it is set."),
}


DIRECT = {("data", "preprocess"): "megalith.cli.preprocess:main"}
"""Commands that read their own arguments, because their start counts: typer's parser takes 0.1 s."""


DISTRIBUTED = frozenset({"pretrain", "tune", "prompt-tune", "finetune", "evaluate", "generate"})
"""Commands that may run as one of several processes."""


_CHECKPOINT = "model.init_from=CHECKPOINT begins with its weights (a path, or a name of `megalith hub list`)"
DEAD_FLAGS = {
    "--bert_checkpoint": f"{_CHECKPOINT}; --checkpoint where one is read",
    "--bert_config": f"{_CHECKPOINT}; sizes come with it, or are keys: model.num_layers, model.hidden_size, …; "
    "--config-file where a checkpoint is read or converted",
    "--model_file": "--checkpoint takes a .nemo and any other checkpoint",
    "--path_to_file": "--input-file takes it",
    "--use_soft_prompts": "--prompts takes a folder or a .nemo that holds them; in tuning leave it out",
}
"""Options of NeMo's scripts and documents, and what says the same here."""


class LazyGroup(TyperGroup):
    """Lists commands from the table; imports the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in with the line of help: enough to list it."""
        found = COMMANDS.get(cmd_name)
        return TyperCommand(cmd_name, help=found.help) if found else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command itself."""
        name = args[0]
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(COMMANDS)}."
            ctx.fail(f"There is no command {name!r}. {hint}")
        return name, COMMANDS[name].load(name), args[1:]


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut off the names of options that do not fit into 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from megalith import __version__

        typer.echo(f"megalith {__version__}")
        raise typer.Exit


@app.callback()
def megalith(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option("--traceback", help="Show where an error comes from (as MEGALITH_TRACEBACK=1 does)."),
    ] = False,
) -> None:
    """Pretrain, tune, evaluate and serve transformers, on one process or on many, by one configuration.

    Begin with: megalith quickstart
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Always leaves by SystemExit, with the code of `errors`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show = "--traceback" in arguments or os.environ.get("MEGALITH_TRACEBACK", "") not in ("", "0")
    arguments = without_local_rank([a for a in arguments if a != "--traceback"])
    try:
        if direct := DIRECT.get(tuple(arguments[:2])):
            module, _, attribute = direct.partition(":")
            getattr(import_module(module), attribute)(arguments[2:])
            sys.exit(0)
        code = app(args=arguments, prog_name="megalith", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except MegalithError as error:
        sys.exit(_tell(error, show=show))
    except UsageError as error:
        sys.exit(_tell_usage(cast(Any, error)))
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:
            print("\nInterrupted.", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as bug:
        if isinstance(bug, OSError) and bug.errno in MACHINE_ERRORS:
            sys.exit(_tell(_machine_error(bug), show=show))
        from megalith.cli.errors import report_bug

        sys.exit(report_bug(bug, show=show))


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """`torch.distributed.launch` adds --local-rank=N to every process's arguments; LOCAL_RANK says the same."""
    found, names = list(arguments), ("--local-rank", "--local_rank")
    if DISTRIBUTED.isdisjoint(found):
        return found
    for name in names:
        while name in found:  # as two words
            place = found.index(name)
            del found[
                place : place + (2 if found[place + 1 : place + 2] and found[place + 1].isdecimal() else 1)
            ]
    return [word for word in found if not word.startswith(tuple(f"{name}=" for name in names))]


def _tell(error: MegalithError, *, show: bool) -> int:
    from megalith.cli.errors import show_error

    if show:
        import traceback

        traceback.print_exc()
    show_error(error)
    return error.exit_code


def _tell_usage(error: Any) -> int:
    """A command line that cannot be read; a command without its arguments gets its help. → exit code"""
    from megalith.cli.errors import show_error

    command = error.ctx.command_path if error.ctx else "megalith"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        what, fix = error.format_message().strip(), f"{command} --help lists what there is"
        if near := getattr(error, "possibilities", None):
            what, fix = f"there is no option {error.option_name}", f"did you mean {' or '.join(near)}?"
        if (flag := str(getattr(error, "option_name", ""))) in DEAD_FLAGS:
            what, fix = f"there is no option {flag}: it was NeMo's", DEAD_FLAGS[flag]
        show_error(MegalithError(what, where=command, fix=fix))
    return EXIT_USER_ERROR


def _machine_error(error: OSError) -> MegalithError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "make room, or write elsewhere" if full else "check the path, its permissions and the file system"
    where = str(error.filename) if error.filename is not None else ""
    return MegalithError(str(error.strerror or error), where=where, fix=fix)


if __name__ == "__main__":
    main()
