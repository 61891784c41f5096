"""What is published: names, files, and where they come from. Data only; nothing is looked for or fetched.

URLs are those of NVIDIA's and Hugging Face's own pages and programs. A checksum stands here where one was published for
the very file; for the others the first download's is kept (`obtain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

_NGC = "https://api.ngc.nvidia.com/v2/models/nvidia"
_S3 = "https://s3.amazonaws.com/models.huggingface.co/bert"
GPT2_TYPE = "GPT2BPETokenizer"
BERT_TYPES = {"uncased": "BertWordPieceLowerCase", "cased": "BertWordPieceCase"}


@dataclass(frozen=True)
class File:
    """One file of the network: `name` is what it is called here; a .zip is unpacked beside and then removed."""

    name: str
    url: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def is_archive(self) -> bool:
        """Is what it holds wanted, not the file?"""
        return self.name.endswith(".zip")


@dataclass(frozen=True)
class Entry:
    """A model or a vocabulary. `opens`: the file in its folder that a reader is given; "" is the folder itself.

    `vocabulary`: the entry whose files a model's text was made with. `tokenizer`: Megatron's type of a vocabulary, and of a
    model's that lies in its archive alone.
    `config`: Megatron's arguments that the files may not hold.
    """

    name: str
    kind: Literal["model", "vocabulary"]
    files: tuple[File, ...]
    aliases: tuple[str, ...] = ()
    about: str = ""
    licence: str = "as its page on NGC says"
    opens: str = ""
    vocabulary: str = ""
    tokenizer: str = ""
    config: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int | None:
        """Of the download; None where a file's size was not published."""
        sizes = [file.bytes for file in self.files]
        return None if None in sizes else sum(size for size in sizes if size is not None)


def _of_345m(positions: int) -> dict[str, int]:
    sizes = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
    return {**sizes, "max_position_embeddings": positions}


def _bert_vocabulary(case: str, size: int, sha256: str) -> Entry:
    name = f"bert-large-{case}"
    return Entry(
        name,
        "vocabulary",
        (File("vocab.txt", f"{_S3}/{name}-vocab.txt", size, sha256),),
        aliases=(f"megatron-bert-{case}", f"bert-base-{case}"),
        about=f"BERT's {case} WordPiece",
        licence="Apache-2.0",
        tokenizer=BERT_TYPES[case],
    )


def _megatron_bert(case: str) -> Entry:
    name = f"megatron_bert_345m_v0.1_{case}.zip"
    return Entry(
        f"megatron-bert-345m-{case}",
        "model",
        (File(name, f"{_NGC}/megatron_bert_345m/versions/v0.1_{case}/zip"),),
        about=f"NVIDIA's BERT of 345M, {case} (Megatron-LM)",
        vocabulary=f"bert-large-{case}",
        config=_of_345m(512),
    )


def _biomegatron(case: str) -> tuple[Entry, Entry]:
    name, files = f"biomegatron-bert-345m-{case}", f"{_NGC}/biomegatron345m{case}/versions/0/files"
    weights = Entry(
        name,
        "model",
        (File("MegatronBERT.pt", f"{files}/MegatronBERT.pt"),),
        about=f"NVIDIA's BERT of 345M on PubMed, {case} (Megatron-LM)",
        opens="MegatronBERT.pt",
        vocabulary=f"{name}-vocabulary",
        config=_of_345m(512),
    )
    words = Entry(
        weights.vocabulary,
        "vocabulary",
        (File("vocab.txt", f"{files}/vocab.txt"),),
        about=f"{name}'s WordPiece",
        tokenizer=BERT_TYPES[case],
    )
    return weights, words


def _nemo(name: str, archive: str, about: str, *, vocabulary: str = "", tokenizer: str = "") -> Entry:
    return Entry(
        name,
        "model",
        (File(archive, f"{_NGC}/nemo/{name}/versions/1/files/{archive}"),),
        about=f"{about} (.nemo)",
        opens=archive,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
    )


_CASES = ("uncased", "cased")
ENTRIES: tuple[Entry, ...] = (
    Entry(
        "megatron-gpt2-345m",
        "model",
        (File("megatron_lm_345m_v0.0.zip", f"{_NGC}/megatron_lm_345m/versions/v0.0/zip"),),
        aliases=("megatron-gpt-345m", "megatron_lm_345m"),
        about="NVIDIA's GPT-2 of 345M (Megatron-LM)",
        vocabulary="gpt2",
        config=_of_345m(1024),
    ),
    *(_megatron_bert(case) for case in _CASES),
    *(entry for case in _CASES for entry in _biomegatron(case)),
    *(
        _nemo(
            f"megatron_bert_345m_{case}",
            f"megatron_bert_345m_{case}.nemo",
            f"NVIDIA's BERT of 345M, {case}",
            vocabulary=f"bert-large-{case}",
        )
        for case in _CASES
    ),
    *(
        _nemo(
            f"biomegatron345m_biovocab_{size}_{case}",
            f"BioMegatron345m-biovocab-{size}-{case}.nemo",
            f"NVIDIA's BERT of 345M on PubMed, {size} pieces of its own, {case}",
            tokenizer=BERT_TYPES[case],
        )
        for size in ("30k", "50k")
        for case in _CASES
    ),
    Entry(
        "gpt2",
        "vocabulary",
        (
            File(
                "vocab.json",
                f"{_S3}/gpt2-vocab.json",
                1_042_301,
                "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            ),
            File(
                "merges.txt",
                f"{_S3}/gpt2-merges.txt",
                456_318,
                "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            ),
        ),
        about="GPT-2's byte-level BPE",
        licence="MIT",
        tokenizer=GPT2_TYPE,
    ),
    _bert_vocabulary("uncased", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
    _bert_vocabulary("cased", 213_450, "eeaa9875b23b04b4c54ef759d03db9d1ba1554838f8fb26c5d96fa551df93d02"),
)


def entry_of(name: str) -> Entry | None:
    """The entry of a name or an alias."""
    return next((entry for entry in ENTRIES if name == entry.name or name in entry.aliases), None)


def vocabulary_of(name: str) -> Entry | None:
    """The vocabulary of that name, or that of the model of that name; None where it has none of its own here."""
    entry = entry_of(name)
    return entry_of(entry.vocabulary) if entry is not None and entry.kind == "model" else entry


def tokenizer_type(name: str) -> str:
    """Megatron's type of the vocabulary of that name, or of the model of that name; "" where nothing is published by it."""
    entry = vocabulary_of(name) or entry_of(name)
    return entry.tokenizer if entry is not None else ""


def near(name: str, kind: str = "") -> list[str]:
    """Names (of a kind) that may have been meant, the likeliest first."""
    entries = [entry for entry in ENTRIES if kind in ("", entry.kind)]
    names = [alias for entry in entries for alias in (entry.name, *entry.aliases)]
    return get_close_matches(name, names, n=3, cutoff=0.75)
