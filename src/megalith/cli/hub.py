"""`megalith hub list|download|path`: published models and vocabularies, and where they are on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megalith.hub.catalogue import Entry
    from megalith.hub.obtain import Watch
    from megalith.tokenizers.names import TokenizerSource

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Published models and vocabularies: what there is, fetch one, where it lies.",
)
Name = Annotated[str, typer.Argument(help="a name or another name of it, as `megalith hub list` shows them")]
To = Annotated[
    Path | None, typer.Option("--to", help="put its folder into this one (default: MEGALITH_HOME/hub)")
]


@app.command("list")
def list_entries(
    as_json: Annotated[bool, typer.Option("--json", help="everything that is known, as JSON")] = False,
) -> None:
    """Lists what is published by name, and what of it is on this machine. Needs no network.

    Example: megalith hub list
    """
    import json

    from megalith.cli.output import print_table
    from megalith.hub.catalogue import ENTRIES

    if as_json:
        typer.echo(json.dumps([_described(entry) for entry in ENTRIES], indent=1, ensure_ascii=False))
        return
    rows = []
    for entry in ENTRIES:
        known = _described(entry)
        size = known["bytes_on_disk"] or known["bytes"]
        rows.append(
            (
                entry.name,
                entry.kind,
                f"{size / 1e6:,.1f} MB" if size else "unknown",
                "yes" if known["path"] else "no",
                ", ".join(entry.aliases),
                entry.about,
            )
        )
    print_table(("name", "kind", "size", "here", "also called", "what it is"), rows)


@app.command()
def download(name: Name, to: To = None) -> None:
    """Fetches a model or a vocabulary, or the rest of one, checks it, and prints where it is. What is there already is not
    fetched again; MEGALITH_HUB_URL names a mirror (MEGALITH_HUB_URL/NAME/FILE).

    Example: megalith hub download gpt2
    """
    from megalith.hub.obtain import obtain

    entry = _entry(name)
    with watching() as watch:
        found = obtain(entry, None if to is None else to.expanduser().absolute(), watch=watch)
    typer.echo(str(found))


@app.command()
def path(name: Name, to: To = None) -> None:
    """Prints where a model or a vocabulary is on this machine; exit code 2 where it is not. Fetches nothing.

    Example: cp -r "$(megalith hub path gpt2)" tokenizer
    """
    from megalith.errors import DataError
    from megalith.hub.store import hub_folder, installed

    entry, root = _entry(name), hub_folder() if to is None else to.expanduser().absolute()
    found = installed(entry, root)
    if found is None:
        place = "" if to is None else f" --to {to}"
        what = f"{entry.name} is not on this machine, or not whole"
        raise DataError(what, where=str(root / entry.name), fix=f"megalith hub download {entry.name}{place}")
    typer.echo(str(found))


def fetched(checkpoint: str) -> str:
    """A checkpoint's path as it is; of a published model's name, where that is, fetched under a bar if need be."""
    from megalith.hub.obtain import resolve

    with watching() as watch:
        return str(resolve(checkpoint, watch))


def fetch_vocabulary(tokenizer: TokenizerSource) -> None:
    """Sees to it that the published vocabulary that a tokenizer is named by, if it is, is on this machine."""
    from megalith.tokenizers.names import published_name

    if name := published_name(tokenizer):
        from megalith.hub.obtain import obtain_vocabulary

        with watching() as watch:
            obtain_vocabulary(name, watch)


@contextmanager
def watching() -> Iterator[Watch]:
    """Notices on stderr, and a bar of bytes once something comes."""
    from megalith.cli.progress import bytes_progress
    from megalith.hub.obtain import Watch

    bar = bytes_progress()
    tasks: dict[str, Any] = {}

    def report(file: str, done: int, total: int | None) -> None:
        if file not in tasks:
            bar.start()
            tasks[file] = bar.add_task(file, total=total)
        bar.update(tasks[file], completed=done, total=total)

    try:
        yield Watch(report=report)
    finally:
        bar.stop()


def _entry(name: str) -> Entry:
    from megalith.errors import DataError
    from megalith.hub.catalogue import entry_of, near

    entry = entry_of(name)
    if entry is None:
        names = near(name)
        fix = f"did you mean {' or '.join(names)}?" if names else "megalith hub list shows all names"
        raise DataError(f"nothing is published as {name!r}", where="megalith hub", fix=fix)
    return entry


def _described(entry: Entry) -> dict[str, Any]:
    from dataclasses import asdict

    from megalith.hub.store import hub_folder, installed, read_record, url_of

    found = installed(entry, hub_folder())
    files = [asdict(file) | {"url": url_of(entry, file), "publisher": file.url} for file in entry.files]
    on_disk = sum(read_record(hub_folder() / entry.name)["files"].values()) if found else None
    return asdict(entry) | {
        "files": files,
        "bytes": entry.bytes,
        "bytes_on_disk": on_disk,
        "path": str(found) if found else None,
    }
