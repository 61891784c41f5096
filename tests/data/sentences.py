"""Small sentence-split token files in which every token is another, and the vocabularies that masks want."""

from __future__ import annotations

import numpy as np

from megalith.data.build import Request, open_run_data
from megalith.data.indexed.builder import IndexedWriter
from megalith.data.masked_config import BartDataConfig, BertDataConfig, T5DataConfig
from megalith.data.token_ids import TokenIds

PAD, CLS, SEP, MASK, BOS, EOS = 9, 1, 2, 3, 4, 5
"""The padding id is not 0 on purpose, and stands in the texts as well."""
FIRST_WORD, WORDS, SENTINELS = 6, 900, range(950, 1000)
SIZE = 1000


def token_ids(*, continues=True, **changes):
    """Every third word continues the one before."""
    marks = np.arange(SIZE) % 3 == 2
    marks[:FIRST_WORD] = marks[WORDS:] = False
    known = {"cls": CLS, "sep": SEP, "mask": MASK, "pad": PAD, "bos": BOS, "eos": EOS, "sentinels": SENTINELS}
    return TokenIds(SIZE, continues=marks if continues else None, **{**known, **changes})


def random_documents(seed, documents=20, sentences=8, longest=12):
    """Lengths of the sentences of each document."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, sentences, documents)
    return [random.integers(1, longest, count).tolist() for count in counts]


def write_sentences(path, documents, seed=0):
    """A file of `documents`, lists of sentence lengths; → (path as text, tokens of each item)."""
    random = np.random.default_rng(seed)
    items = []
    with IndexedWriter(path, np.uint16) as writer:
        for lengths in documents:
            for length in lengths:
                items.append(random.integers(FIRST_WORD, WORDS, length))
                writer.add_item(items[-1].astype(np.uint16))
            writer.end_document()
    return str(path), items


KINDS = {"bert": BertDataConfig, "t5": T5DataConfig, "t5_prefix_lm": T5DataConfig, "bart": BartDataConfig}


def run_data(kind, prefix, *, samples=50, seq_length=32, seed=1, binary_head=True, request=None, **config):
    """(data of a run, its masks), training on all of the files (other splits by `samples` as a dict)."""
    samples = samples if isinstance(samples, dict) else {"train": samples}
    made = KINDS[kind](data_prefix=prefix, **{"splits_string": "1,0,0", "dataset_type": kind, **config})
    head = {"binary_head": binary_head} if kind == "bert" else {}
    wanted = Request(
        seq_length=seq_length,
        seed=seed,
        samples=samples,
        shape=made.shape(seq_length, **head),
        **(request or {}),
    )
    return open_run_data(made, wanted), made.masks(token_ids(), seq_length, **head)
