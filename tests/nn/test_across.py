"""Attention that looks both ways and across: the same as written out with explicit masks, whatever the core."""

from __future__ import annotations

import pytest
import torch

from megalith.nn.attention import AttentionSpec, CrossAttention, Shared
from megalith.nn.cores import make_core
from megalith.nn.position import RelativeBias
from megalith.nn.visibility import Lookaround, Visibility, as_mask

CPU = torch.device("cpu")
B, T, S, H, K = 3, 4, 6, 2, 8
LENGTHS = torch.tensor([6, 2, 1])


def spec(core="auto", groups=H, **options):
    return AttentionSpec(H * K, H, groups, K, core=core, **options)


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_full_rows_need_no_mask():
    look = Lookaround()
    full = torch.full((B,), S)
    assert look(T, S, CPU) == Visibility()
    assert look(T, S, CPU, lengths=full) == Visibility()
    assert torch.equal(look(T, S, CPU, lengths=LENGTHS).lengths, LENGTHS)
    assert as_mask(Visibility(lengths=LENGTHS), T, S, CPU).shape == (B, 1, 1, S)  # never (T, S)
    empty = look(T, S, CPU, lengths=torch.tensor([6, 0, 1])).lengths
    assert empty.tolist() == [6, 1, 1]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("core", ["sdpa", "flex", "eager"])
def test_padding_is_hidden(core, groups, biased):
    q, k, v = numbers(B, H, T, K), numbers(B, groups, S, K), numbers(B, groups, S, K)
    bias = RelativeBias(8, 6, H, bidirectional=True).double()
    torch.nn.init.normal_(bias.weight)
    if biased and core == "flex":
        core = "auto"
    sees = Lookaround()(T, S, CPU, lengths=LENGTHS, bias=bias if biased else None)
    found = make_core(spec(core, groups))(q, k, v, sees, None)
    for row, length in enumerate(LENGTHS.tolist()):
        keys, values = (x[row, :, :length].repeat_interleave(H // groups, 0) for x in (k, v))
        scores = q[row] @ keys.transpose(-1, -2) / K**0.5
        if biased:
            scores = scores + bias(torch.arange(T), torch.arange(length))[0]
        assert (found[row] - scores.softmax(-1) @ values).abs().max() < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_across_written_out(groups):
    layer = CrossAttention(spec(groups=groups)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, memory = numbers(B, T, H * K), numbers(B, S, H * K)
    shared = Shared(Visibility(causal=True), memory=memory, across=Visibility(lengths=LENGTHS))
    found = layer(x, shared)
    heads = []
    rows = layer.kv(memory)
    for head in range(H):
        q = layer.q(x)[..., head * K : (head + 1) * K]
        first = head * groups // H * 2 * K  # rows of [k | v] a key-value head
        k, v = rows[..., first : first + K], rows[..., first + K : first + 2 * K]
        scores = q @ k.transpose(-1, -2) / K**0.5
        hidden = torch.arange(S) >= LENGTHS[:, None, None]
        heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v)
    assert (found - layer.out(torch.cat(heads, -1))).abs().max() < 1e-12
