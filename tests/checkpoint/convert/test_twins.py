"""Weights of both sides, bit by bit: what is a difference, what is not, and that one which changes no logit is noticed too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from megalith.checkpoint.convert import convert as module
from megalith.checkpoint.convert.certificate import Failed
from megalith.checkpoint.convert.convert import Plan, convert
from megalith.checkpoint.convert.passage import choose_tokens
from megalith.checkpoint.convert.twins import Twin, different, same_bits
from megalith.models.config import ModelConfig
from tests.checkpoint.foreign_files import LLAMA_LIKE, hugging_face, random_model


@dataclass
class Live:
    tensor: torch.Tensor
    name: str = "weight"

    def __post_init__(self):
        self.dtype, self.shape, self.nbytes = (
            self.tensor.dtype,
            tuple(self.tensor.shape),
            self.tensor.nbytes,
        )

    def read(self):
        return self.tensor.clone()

    def rows(self, start, stop):
        return self.tensor[start:stop].clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (4, 16)])
def test_one_bit_is_a_difference(dtype, shape):
    one = torch.arange(1, 1 + torch.Size(shape).numel()).to(dtype).reshape(shape)
    assert same_bits(one, one.clone())
    other = one.clone()
    other.view(-1).view(torch.uint8)[-1] ^= 1
    assert not same_bits(one, other)


def test_what_are_the_same_numbers():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([1.5]), torch.tensor([1.5]).bfloat16())
    assert not same_bits(torch.tensor([1.501]), torch.tensor([1.5]).bfloat16())
    assert not same_bits(torch.ones(4), torch.ones(2, 2))
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))


@pytest.mark.parametrize("row", range(6))
def test_every_row_is_compared_once_however_they_are_asked_for(monkeypatch, row):
    monkeypatch.setattr("megalith.checkpoint.convert.twins.BLOCK", 32)
    tensor = torch.arange(24.0).reshape(6, 4)
    other = tensor.clone()
    other[row, 1] = -1
    for rows in ([], [(2, 3), (0, 1)], [(0, 4), (4, 6)], [(0, 3), (1, 5)]):
        good, bad = Twin(Live(tensor), Live(tensor)), Twin(Live(tensor), Live(other))
        for start, stop in rows:
            assert torch.equal(good.rows(start, stop), tensor[start:stop])
            bad.rows(start, stop)
        assert different([good]) == []
        assert different([bad]) == ["weight"]
    short = Twin(Live(tensor), Live(other[:5]), rows=3)
    assert different([short]) == (["weight"] if row < 3 else [])
    assert different([Twin(Live(tensor), Live(other[:5]))]) == ["weight"]


def test_a_row_that_no_token_asks_for(tmp_path, monkeypatch):
    config = ModelConfig(**LLAMA_LIKE)
    folder = hugging_face(tmp_path / "in", random_model(config))
    unused = next(i for i in range(config.vocab_size) if i not in choose_tokens(config, None).ids)
    open_back = module.open_back

    def otherwise(*arguments):
        back = open_back(*arguments)
        table = back.tensors["token_embedding.weight"].read()
        table[unused, 0] += 1e-9
        changed = Live(table, "token_embedding.weight")
        return replace(back, tensors={**back.tensors, "token_embedding.weight": changed})

    monkeypatch.setattr(module, "open_back", otherwise)
    with pytest.raises(Failed, match=r"not what the source holds; .* read back of token_embedding\.weight"):
        convert(folder, tmp_path / "out", Plan("megatron"))
    assert not (tmp_path / "out").exists()
