"""Which tokens continue a word, by the marks of each family's vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from megalith.data.token_ids import TokenIds


class Pieces:
    """A vocabulary and its roles."""

    def __init__(self, pieces, sentinels=(), **special):
        self.pieces, self.special, self.sentinels, self.vocab_size = pieces, special, sentinels, len(pieces)

    def piece(self, id):
        return self.pieces[id]


@pytest.mark.parametrize(
    ("pieces", "continues"),
    [
        (["[CLS]", "play", "##ing", "##s", "▁", "#"], [False, False, True, True, False, False]),
        (["<s>", "▁play", "ing", "▁the", "<extra_id_0>"], [False, False, True, False, False]),
        (["<s>", "Ġplay", "ing", "##", "Ġ#", "Ċ"], [False, False, True, True, False, False]),
        (["[CLS]", "play", "the", "ing"], [False] * 4),
    ],
)
def test_families(pieces, continues):
    sentinels = [i for i, piece in enumerate(pieces) if piece.startswith("<extra")]
    ids = TokenIds.of(Pieces(pieces, sentinels, cls=0, unk=0))
    assert ids.continues.tolist() == continues
    assert (ids.size, ids.cls, ids.mask, ids["cls"]) == (len(pieces), 0, None, 0)
    assert list(ids.sentinels) == sentinels
    with pytest.raises(KeyError):
        ids["mask"]


def test_words_of_a_text():
    ids = TokenIds.of(Pieces(["[CLS]", "play", "##ing"], cls=0))
    text = np.array([2, 1, 2, 2, 1, 999])
    assert ids.begins(text, whole_words=True).tolist() == [False, True, False, False, True, False]
    assert ids.begins(text, whole_words=False).all()
