"""Documents do not see each other: in every core that can be chosen, forward and backward, or it refuses by name."""

from __future__ import annotations

import pytest
import torch

from megalith.errors import UnsupportedError
from megalith.models.config import ModelConfig
from megalith.nn.attention import AttentionSpec
from megalith.nn.cores import EagerCore, FlexCore, SDPACore, make_core, worth_splitting
from megalith.nn.visibility import Visibility, document_blocks, document_lengths, document_mask
from tests.reference.common import random_model

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 3, 4, 4, 4, 4]])
LONG = torch.arange(200).ge(90).int()[None].repeat(2, 1)  # long enough for one call a document
CORES = {
    "sdpa": {"attention_core": "sdpa"},
    "auto": {"attention_core": "auto"},
    "eager": {"attention_core": "eager"},
    "eager with dropout": {"attention_core": "auto", "attention_dropout": 0.2, "hidden_dropout": 0.1},
    "relative": {"position_embedding_type": "relative", "attention_core": "sdpa"},
    "relative eager": {"position_embedding_type": "relative", "attention_core": "eager"},
    "grouped rotary": {"position_embedding_type": "rope", "num_query_groups": 2},
}


def make_model(**fields):
    shape = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "max_position_embeddings": 200}
    dropout = {"hidden_dropout": 0.0}
    return random_model(ModelConfig(vocab_size=13, **{**shape, **dropout, **fields}))


@pytest.mark.parametrize("documents", [DOCUMENTS, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", CORES)
def test_editing_a_document_leaves_the_others_unchanged(name, documents):
    """Other tokens in document A: same logits in B, and B's gradient reaches nothing of A (nor the reverse)."""
    model = make_model(**CORES[name]).train()
    batch, length = documents.shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(13, (batch, length), generator=generator)
    edited = documents == documents[:, :1]  # each row's first document
    other = torch.where(edited, (tokens + 1) % 13, tokens)
    keys = torch.arange(batch)

    def run(tokens):
        embedded = []
        hook = model.drop_embedding.register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
        logits = model.logits(model(tokens, keys=keys, documents=documents))
        hook.remove()
        return logits, embedded[0]

    (before, x), (after, y) = run(tokens), run(other)
    assert (before - after)[~edited].abs().max() == 0
    assert (before - after)[edited].abs().max() > 1e-3

    direction = torch.randn(before.shape, generator=generator, dtype=before.dtype)
    gradient = torch.autograd.grad((before * direction)[~edited].sum(), x, retain_graph=True)[0]
    again = torch.autograd.grad((after * direction)[~edited].sum(), y)[0]
    assert gradient[edited].abs().max() == 0
    assert gradient[~edited].abs().max() > 1e-3
    assert (gradient - again)[~edited].abs().max() <= 1e-12
    backwards = torch.autograd.grad((before * direction)[edited].sum(), x)[0]
    assert backwards[~edited].abs().max() == 0


@pytest.mark.parametrize("documents", [DOCUMENTS, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", CORES)
def test_a_packed_row_equals_its_documents_alone(name, documents):
    """Logits and parameter gradients of two documents in one row = of each in a batch of its own."""
    fields = {**CORES[name], "attention_dropout": 0.0, "hidden_dropout": 0.0}
    model = make_model(**fields)
    tokens = torch.randint(13, documents.shape, generator=torch.Generator().manual_seed(0))
    lengths = document_lengths(documents)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = model.logits(model(tokens, documents=documents, positions=positions))
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = torch.autograd.grad((packed * weight).sum(), list(model.parameters()))
    parts = [torch.zeros_like(p) for p in model.parameters()]
    for row, pieces in enumerate(lengths):
        begin = 0
        for n in pieces:
            window = slice(begin, begin + n)
            alone = model.logits(model(tokens[row : row + 1, window]))[0]
            assert (alone - packed[row, window]).abs().max() < 1e-11
            grads = torch.autograd.grad((alone * weight[row, window]).sum(), list(model.parameters()))
            parts = [a + b for a, b in zip(parts, grads, strict=True)]
            begin += n
    for a, b in zip(whole, parts, strict=True):
        assert (a - b).abs().max() <= 1e-11 * b.abs().max()


def qkv(heads=4, groups=4, length=10, size=8):
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, heads, length, size), (2, groups, length, size), (2, groups, length, size))
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def spec(core="auto", dropout=0.0, groups=4, scale=None):
    return AttentionSpec(32, 4, groups, 8, core=core, dropout=dropout, scale=scale)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_cores_agree(groups, scale):
    """The written-out core, SDPA with a mask, SDPA a document at a time: values and gradients."""
    tensors = qkv(groups=groups)
    visibility = Visibility(documents=DOCUMENTS)
    eager = EagerCore(spec(groups=groups, scale=scale))(*tensors, visibility, None)
    sdpa = SDPACore(spec(groups=groups, scale=scale))
    weight = torch.randn(eager.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.autograd.grad((eager * weight).sum(), tensors)
    for found in (
        sdpa.attend(*tensors, mask=document_mask(DOCUMENTS, DOCUMENTS.shape[1])),
        sdpa.by_document(*tensors, document_lengths(DOCUMENTS)),
        sdpa(*tensors, visibility, None),
    ):
        assert (found - eager).abs().max() < 1e-14
        for a, b in zip(torch.autograd.grad((found * weight).sum(), tensors), wanted, strict=True):
            assert (a - b).abs().max() < 1e-13


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("groups", [4, 2])
def test_flex_blocks_agree(groups):
    """Forward only: flex has no CPU backward."""
    q, k, v = (x.detach() for x in qkv(groups=groups))
    found = FlexCore(spec("flex", groups=groups))(
        q, k, v, Visibility(blocks=document_blocks(DOCUMENTS, DOCUMENTS.shape[1])), None
    )
    wanted = SDPACore(spec(groups=groups))(q, k, v, Visibility(documents=DOCUMENTS), None)
    assert (found - wanted).abs().max() < 1e-14


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_by_name_evaluates_here_and_refuses_to_train_here():
    flex, auto = make_model(attention_core="flex"), make_model()
    tokens = torch.zeros(2, 10, dtype=torch.int64)
    with torch.no_grad():
        assert (flex(tokens, documents=DOCUMENTS) - auto(tokens, documents=DOCUMENTS)).abs().max() < 1e-12
    flex(tokens)  # without documents it is SDPA, and trains
    with pytest.raises(UnsupportedError, match="flex attention has no backward on cpu"):
        flex(tokens, documents=DOCUMENTS)


def test_flex_is_part_of_a_compiled_block():
    """As on CUDA, where blocks are compiled whole: no graph break (forward only here)."""
    torch.compiler.reset()
    flex, auto = make_model(attention_core="flex"), make_model()
    tokens = torch.zeros(2, 10, dtype=torch.int64)
    for block in flex.blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert (flex(tokens, documents=DOCUMENTS) - auto(tokens, documents=DOCUMENTS)).abs().max() < 1e-12
    torch.compiler.reset()


@pytest.mark.parametrize("core", ["sdpa", "flex"])
def test_fast_cores_refuse_dropout_of_probabilities(core):
    with pytest.raises(UnsupportedError, match=f"the {core} core cannot drop"):
        make_core(spec(core, dropout=0.1))


@pytest.mark.parametrize("core", ["sdpa", "eager"])
def test_other_cores_refuse_block_masks(core):
    with pytest.raises(UnsupportedError, match="flex core"):
        make_core(spec(core))(*qkv(), Visibility(blocks=document_blocks(DOCUMENTS, DOCUMENTS.shape[1])), None)


def test_where_auto_means_flex(monkeypatch):
    """On CUDA with triton and wide heads; everywhere else a mask that SDPA honours."""
    core = make_core(AttentionSpec(64, 4, 4, 16))
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert core.wants_blocks(cuda)
    assert not core.wants_blocks(cpu)
    assert not make_core(spec()).wants_blocks(cuda)  # heads of 8 channels
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not core.wants_blocks(cuda)
    with pytest.raises(UnsupportedError, match="needs triton"):
        make_core(AttentionSpec(64, 4, 4, 16, core="flex")).wants_blocks(cuda)


def test_the_core_that_auto_means():
    assert isinstance(make_core(spec()), FlexCore)
    assert isinstance(make_core(spec(dropout=0.1)), EagerCore)


def test_the_mask_itself():
    """Rows are queries. Numbers may fall from one document to the next, or come back."""
    assert document_mask(torch.tensor([[5, 5, 2, 5]]), 4)[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [1, 1, 0, 1],
    ]


def test_lengths_of_documents():
    assert document_lengths(DOCUMENTS) == [[3, 4, 3], [6, 4]]
    assert document_lengths(torch.tensor([[1, 1, 0, 0, 0]])) == [[2, 3]]
    assert document_lengths(torch.tensor([[0, 1, 0]])) is None  # 0 comes back: only a mask can say it


def test_a_document_that_comes_back_is_masked_rightly():
    documents = torch.tensor([[0, 1, 0, 1, 1, 0, 2, 2, 0, 0]]).repeat(2, 1)
    tensors = qkv()
    eager, sdpa = EagerCore(spec()), SDPACore(spec())
    visibility = Visibility(documents=documents)
    assert (sdpa(*tensors, visibility, None) - eager(*tensors, visibility, None)).abs().max() < 1e-14


def test_when_splitting_pays():
    assert worth_splitting([[2048] * 1])
    assert worth_splitting([[256] * 8])
    assert not worth_splitting([[4] * 8])
