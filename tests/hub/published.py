"""Small things to publish: a vocabulary of two files and a model in a zip, with what a mirror of them holds."""

from __future__ import annotations

import hashlib
import io
import zipfile

from megalith.hub.catalogue import Entry, File

WORDS, MERGES = b'{"a": 0}' * 9000, b"#version: 0.2\n"
TRACKER, WEIGHTS = b"release", bytes(range(256)) * 800
RANK = "release/mp_rank_00/model_optim_rng.pt"


def archive(members: dict[str, bytes]) -> bytes:
    """A zip, as it is stored."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


MODEL = archive({"latest_checkpointed_iteration.txt": TRACKER, RANK: WEIGHTS})


def file(name: str, content: bytes, *, known: bool) -> File:
    url = f"https://publisher.example/{name}"
    if not known:
        return File(name, url)
    return File(name, url, len(content), hashlib.sha256(content).hexdigest())


VOCABULARY = Entry(
    "words",
    "vocabulary",
    (file("vocab.json", WORDS, known=True), file("merges.txt", MERGES, known=True)),
    aliases=("words-by-alias",),
    tokenizer="GPT2BPETokenizer",
)
TINY = Entry(
    "tiny",
    "model",
    (file("tiny_v0.zip", MODEL, known=False),),
    aliases=("tiny_by_alias",),
    vocabulary="words",
    config={"num_attention_heads": 8},
)
SINGLE = Entry("single", "model", (file("M.pt", WEIGHTS, known=False),), opens="M.pt")
ENTRIES = (TINY, SINGLE, VOCABULARY)
MIRRORED = {
    "/words/vocab.json": WORDS,
    "/words/merges.txt": MERGES,
    "/tiny/tiny_v0.zip": MODEL,
    "/single/M.pt": WEIGHTS,
}
