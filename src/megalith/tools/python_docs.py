"""The corpus that every machine already has: the documentation inside the running Python's own sources.

Reads docstrings from the standard library's files with `ast`, and the language reference topics of `pydoc_data`.
Nothing is imported or executed, nothing is downloaded. Knows no tokenizer and no model.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megalith.errors import DataError

# Tests and bundled third-party code are not documentation of the library.
SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "turtledemo",
        "ensurepip",
    }
)
TOPICS_FILE = "pydoc_data/topics.py"


def write_corpus(path: Path) -> tuple[int, int]:
    """Writes one JSON object a document (`text`, `source`) in a fixed shuffled order; returns documents, characters.

    The order is by a hash of the source's name, so that any contiguous split is a fair sample of modules and topics.
    """
    documents = sorted(collect(), key=lambda d: hashlib.sha256(d["source"].encode()).digest())
    if not documents:
        raise DataError(
            "the standard library's sources hold no docstrings",
            where=str(library_root()),
            fix="use a Python that ships its .py files, or your own text with `megalith data preprocess --input FILE`",
        )
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    return len(documents), sum(len(d["text"]) for d in documents)


def library_root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def collect() -> Iterator[dict[str, str]]:
    """Yields a document for each module that has docstrings, then one for each language topic."""
    root = library_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.as_posix() == TOPICS_FILE:
            continue
        tree = parse(path)
        text = module_text(module_name(relative), tree) if tree else ""
        if text:
            yield {"text": text, "source": relative.as_posix()}
    yield from topics(root / TOPICS_FILE)


def parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or None when it is not valid source (the library ships a few on purpose)."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return None


def module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_text(name: str, tree: ast.Module) -> str:
    """Docstrings of a module in source order, each under its signature, as `pydoc` would lay them out."""
    parts = list(described(tree, ""))
    if own := ast.get_docstring(tree):
        parts.insert(0, own)
    return "\n\n".join([f"module {name}", *parts]) if parts else ""


def described(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """Signature and docstring of every documented class and function below `node`."""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            title = f"class {prefix}{child.name}"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            title = f"{prefix}{child.name}({ast.unparse(child.args)})"
        else:
            continue
        if docstring := ast.get_docstring(child):
            yield f"{title}\n{docstring}"
        if isinstance(child, ast.ClassDef):
            yield from described(child, f"{prefix}{child.name}.")


def topics(path: Path) -> Iterator[dict[str, str]]:
    """The language reference's topics: a dict literal, read as a literal."""
    tree = parse(path) if path.exists() else None
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for name, text in ast.literal_eval(statement.value).items():
                yield {"text": text.strip(), "source": f"topic {name}"}
