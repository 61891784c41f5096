"""The index algorithms written out token by token and sample by sample: slow, obvious, and sharing nothing with the package."""

from __future__ import annotations

import numpy as np


def walk(lengths, order, seq_length, count):
    """Rows of the sample index: from each row, walk `seq_length` tokens on through the items."""
    place, offset = 0, 0
    rows = [[0, 0]]
    for _ in range(count):
        remaining = seq_length + 1
        while remaining > 0:
            here = lengths[order[place]] - offset
            remaining -= here
            if remaining <= 0:
                offset += remaining + here - 1
            else:
                place, offset = place + 1, 0
        rows.append([place, offset])
    return rows


def megatron(lengths, documents, seq_length, samples, seed):
    """documents, samples, shuffle as lists, by the rules of Megatron's gpt_dataset.py."""
    per_epoch = sum(lengths[d] for d in documents)
    epochs = 1
    while (epochs * per_epoch - 1) // seq_length < samples:
        epochs += 1
    separate, before = False, 0
    if epochs > 1:
        before = ((epochs - 1) * per_epoch - 1) // seq_length
        separate = samples - before < int(0.80 * ((per_epoch - 1) // seq_length))
    random = np.random.RandomState(seed)

    def shuffled(values, dtype=np.int64):
        array = np.array(values, dtype=dtype)
        random.shuffle(array)
        return array.tolist()

    if separate:
        order = shuffled(list(documents) * (epochs - 1)) + shuffled(list(documents))
    else:
        order = shuffled(list(documents) * epochs)
    count = (epochs * per_epoch - 1) // seq_length
    rows = walk(lengths, order, seq_length, count)
    border = before if separate else count
    return order, rows, shuffled(range(border)) + shuffled(range(border, count))


def blend(weights, count):
    """(source of each sample, number within the source), one sample after the other."""
    total = float(np.sum(weights))  # numpy's order of adding up: an ulp decides ties
    weights = [weight / total for weight in weights]
    taken = [0] * len(weights)
    sources, numbers = [], []
    for i in range(count):
        lags = [weight * max(i, 1.0) - count for weight, count in zip(weights, taken, strict=True)]
        source = lags.index(max(lags))
        sources.append(source)
        numbers.append(taken[source])
        taken[source] += 1
    return sources, numbers


def sample_tokens(items, order, seq_length, k):
    """Tokens of the k-th stream sample: the joint stream cut out."""
    stream = [token for item in order for token in items[item]]
    return stream[k * seq_length : (k + 1) * seq_length + 1]
