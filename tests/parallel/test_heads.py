"""BERT's heads over parts of a sequence: which rows a tensor rank sends to the token table, and which targets meet them."""

from __future__ import annotations

import pytest
import torch

from megalith.models.bert_config import BertConfig
from megalith.models.heads import MaskedHead
from megalith.parallel.layers import SequenceMaskedHead, Shares, become

PARTS = 4


def rows_of_all(hidden, targets):
    """What the ranks would gather, and the targets, of which every rank makes the same."""
    sent, wanted = [], []
    for part in range(PARTS):
        head = MaskedHead(BertConfig(vocab_size=50, hidden_size=8, num_attention_heads=2, num_layers=1))
        become(head, SequenceMaskedHead, Shares(None, part, PARTS, True))
        rows, mine = head.counted(hidden.chunk(PARTS, 1)[part], targets)
        sent.append(rows)
        wanted.append(mine)
    assert all(torch.equal(other, wanted[0]) for other in wanted)
    return torch.cat(sent, dim=1), wanted[0]


@pytest.mark.parametrize("share", [0.15, 1.0, 0.0])
def test_every_counted_row_meets_its_target_once(share):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 32, 8, generator=generator)
    targets = torch.randint(50, (3, 32), generator=generator)
    targets[torch.rand(3, 32, generator=generator) >= share] = -1
    rows, wanted = rows_of_all(hidden, targets)
    assert rows.shape[:2] == wanted.shape

    def pairs(states, numbers):
        return sorted((int(n), *s.tolist()) for s, n in zip(states, numbers, strict=True) if n >= 0)

    assert pairs(rows[0], wanted[0]) == pairs(hidden.flatten(0, 1), targets.flatten())


def test_as_many_rows_are_sent_as_the_fullest_part_counts():
    """Not the whole hidden states; and where nothing is counted a row that is not, since nothing cannot be sent."""
    targets = torch.full((2, 32), -1)
    targets[0, :5] = 1
    targets[1, 30] = 2
    hidden = torch.zeros(2, 32, 8)
    rows, wanted = rows_of_all(hidden, targets)
    assert rows.shape == (1, 5 * PARTS, 8)
    assert (wanted >= 0).sum() == 6
    rows, wanted = rows_of_all(hidden, torch.full((2, 32), -1))
    assert rows.shape == (1, PARTS, 8)
    assert wanted.tolist() == [[-1] * PARTS]
