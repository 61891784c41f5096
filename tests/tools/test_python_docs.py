"""The quickstart's corpus comes from the running Python's sources, without importing or running them."""

import ast
import json
import sys

from megalith.tools import python_docs


def test_corpus_is_a_document_a_module_and_a_topic(tmp_path):
    path = tmp_path / "docs.jsonl"
    documents, characters = python_docs.write_corpus(path)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert len(rows) == documents > 400
    assert sum(len(r["text"]) for r in rows) == characters > 1_000_000
    sources = {r["source"] for r in rows}
    assert len(sources) == documents
    assert {"argparse.py", "json/__init__.py", "topic lambda"} <= sources
    by_source = {r["source"]: r["text"] for r in rows}
    assert "JSON (JavaScript Object Notation)" in by_source["json/__init__.py"]
    assert by_source["json/__init__.py"].startswith("module json\n")


def test_the_same_bytes_every_time(tmp_path):
    python_docs.write_corpus(tmp_path / "a")
    python_docs.write_corpus(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_imported():
    before = set(sys.modules)
    documents = list(python_docs.collect())
    assert len(documents) > 400
    assert not {"antigravity", "this", "tkinter"} & (set(sys.modules) - before)


def test_signatures_and_nesting():
    tree = ast.parse(
        '"""Top."""\nclass A:\n    """A class."""\n    def f(self, x: int = 3):\n        """Does f."""\n'
    )
    assert (
        python_docs.module_text("m", tree)
        == "module m\n\nTop.\n\nclass A\nA class.\n\nA.f(self, x: int=3)\nDoes f."
    )
    assert python_docs.module_text("m", ast.parse("x = 1")) == ""
