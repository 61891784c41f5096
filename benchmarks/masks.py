"""How fast sentences are grouped, and rows of BERT, T5 and BART made of full groups:

    python benchmarks/masks.py

Processor time of one thread, best of five; tokens and words are random, a fifth of the tokens continue a word.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from megalith.data.groups import Group
from megalith.data.masked import BertMasks
from megalith.data.ngrams import generator
from megalith.data.sentence_index import megatron_groups, native_groups
from megalith.data.shape import Order, Shape
from megalith.data.span import SpanMasks
from megalith.data.token_ids import TokenIds

VOCABULARY, SEQ_LENGTH, ROWS, SENTENCES = 30_592, 512, 300, 2_000_000
ORDERS: tuple[Order, ...] = ("native", "megatron")


def best(work: Callable[[], object], times: int = 5) -> float:
    """Seconds of processor time."""
    found = []
    for _ in range(times):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def rows() -> None:
    """Rows of 512 tokens, all places filled."""
    random = np.random.default_rng(0)
    ids = TokenIds(VOCABULARY, 1, 2, 3, 0, 4, 5, range(30_400, 30_500), random.random(VOCABULARY) < 0.2)
    makers = {
        "bert": BertMasks(ids, SEQ_LENGTH),
        "t5": SpanMasks("t5", ids, SEQ_LENGTH, 128),
        "bart": SpanMasks("bart", ids, SEQ_LENGTH, SEQ_LENGTH),
    }
    lengths = [26] * 20
    groups = [Group(random.integers(6, 30_000, sum(lengths)), lengths, 509) for _ in range(ROWS)]
    for name, masks in makers.items():
        for order in ORDERS:

            def work(masks: BertMasks | SpanMasks = masks, order: Order = order) -> None:
                for i, group in enumerate(groups):
                    masks.sample(group, order, generator(order, 1234, i))

            print(f"{name:5} {order:9} {ROWS / best(work):7,.0f} rows/s")


def mapping() -> None:
    """Two million sentences of 5 to 59 tokens in documents of 30 on average."""
    random = np.random.default_rng(0)
    sizes = random.integers(5, 60, SENTENCES).astype(np.int32)
    ends = np.cumsum(random.integers(1, 60, SENTENCES // 30))
    documents = np.concatenate([[0], ends[ends < SENTENCES], [SENTENCES]])
    shape = Shape.bert(SEQ_LENGTH)
    native = best(lambda: native_groups(sizes, documents, shape, [1, 2]), 2)
    megatron = best(lambda: megatron_groups(sizes, documents, shape, samples=1, seed=3), 2)
    print(f"{SENTENCES:,} sentences grouped: native {native:.2f} s, megatron {megatron:.2f} s an epoch")


if __name__ == "__main__":
    rows()
    mapping()
