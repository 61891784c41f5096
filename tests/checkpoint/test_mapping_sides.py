"""Tables of BERT and of encoder-decoders there and back, for every family, version, TP and PP; and the steps that they need."""

from __future__ import annotations

import random

import pytest
import torch

from megalith.checkpoint.drawn import Drawn
from megalith.checkpoint.exported import foreigns
from megalith.checkpoint.formats.foreign import heads_of
from megalith.checkpoint.formats.huggingface_tables import TABLES
from megalith.checkpoint.formats.megatron_stages import divide, join, split_of
from megalith.checkpoint.formats.megatron_tables import core, legacy
from megalith.checkpoint.local import Held
from megalith.checkpoint.mapped import natives
from megalith.checkpoint.mapping import Behind, HeadOrder, Heads, OneRow, Woven
from megalith.errors import CheckpointError
from megalith.models.bert_config import BertConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.family import class_of
from tests.checkpoint.foreign_files import Kept
from tests.checkpoint.test_mapping import same, shapes

SHAPE = {
    "vocab_size": 29,
    "make_vocab_size_divisible_by": 8,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
T5 = {"encoder_num_layers": 2, "decoder_num_layers": 4, "decoder_ffn_hidden_size": 32}
RELATIVE = {
    "position_embedding_type": "relative",
    "normalization": "rmsnorm",
    "bias": False,
    "attention_scale": 1.0,
}
BART = T5 | {"transformer_block_type": "post_ln", "share_position_embeddings": False}
UNTIED = {"share_embeddings_and_output_weights": False}
MEGATRON = {
    "bert": BertConfig(**SHAPE, num_layers=4),
    "bert-bare": BertConfig(**SHAPE, num_layers=4, bert_binary_head=False),
    "t5": EncoderDecoderConfig(**SHAPE, **T5, output_bias=True),
}
HUGGING_FACE = {
    "bert": BertConfig(**SHAPE, num_layers=2, transformer_block_type="post_ln"),
    "bert-untied": BertConfig(**SHAPE, num_layers=2, transformer_block_type="post_ln", **UNTIED),
    "megatron-bert": BertConfig(**SHAPE, num_layers=2, bert_binary_head=False, num_tokentypes=2),
    "t5": EncoderDecoderConfig(**SHAPE, **T5, **RELATIVE, activation="relu"),
    "t5-1.1": EncoderDecoderConfig(**SHAPE, **T5, **RELATIVE, **UNTIED, activation="geglu", kv_channels=6),
    "bart": EncoderDecoderConfig(**SHAPE, **BART),
    "bart-bias": EncoderDecoderConfig(**SHAPE, **BART, output_bias=True),
}


def model_tensors(config):
    """Random numbers; zero in the rows that pad the vocabulary."""
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in class_of(config)(config).named_parameters()}
    draw = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=draw) for name, shape in wanted.items()}
    for name in ("token_embedding.weight", "head.weight", "output_bias.bias"):
        if name in found:
            found[name][config.vocab_size :] = 0
    return {name: Kept(name, tensor) for name, tensor in found.items()}


CASES = [
    (name, form, ranks, stages)
    for name in MEGATRON
    for form in (0, 1, 2, 3, "core")
    for ranks in (1, 2, 4)
    for stages in (1, 2)
]


def check(name, form, ranks, stages):
    config, family = MEGATRON[name], name.partition("-")[0]
    table = core(family) if form == "core" else legacy(form, family)
    tensors = model_tensors(config)
    cuts = foreigns(table, tensors, heads_of(config), tensor_parallel=ranks, vocabulary_rows=40)
    files = divide(table, list(cuts), stages)
    chunks = [[{local: cuts[whole] for local, whole in stage.items()}] for stage in files]
    back = natives(table, shapes(tensors), join(chunks), heads_of(config), where="here")
    same(back, tensors)


@pytest.mark.parametrize("case", random.Random(2).sample(CASES, 20), ids=str)
def test_megatron_there_and_back(case):
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_megatron_there_and_back_always(case):
    check(*case)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_there_and_back(name):
    config, table = (
        HUGGING_FACE[name],
        TABLES[name.replace("-untied", "").replace("-1.1", "").replace("-bias", "")],
    )
    tensors = model_tensors(config)
    cuts = foreigns(table, tensors, heads_of(config), vocabulary_rows=config.vocab_size)
    same(natives(table, shapes(tensors), cuts, heads_of(config), where="here"), tensors)


def test_stages_of_an_encoder_decoder():
    """The encoder on the first, the decoder on the others, which begin with copies of the embedding."""
    table, config = legacy(3, "t5"), MEGATRON["t5"]
    names = list(foreigns(table, model_tensors(config), heads_of(config)))
    files = divide(table, names, 3)
    words = "language_model.embedding.word_embeddings.weight"
    assert [words in stage for stage in files] == [True, True, False]
    assert ["word_embeddings_for_head.weight" in stage for stage in files] == [False, False, True]
    assert "language_model.encoder.final_layernorm.weight" in files[0]
    assert "language_model.decoder.layers.1.inter_attention.query.weight" in files[1]
    assert files[2]["language_model.decoder.layers.0.mlp.dense_4h_to_h.bias"].startswith(
        "language_model.decoder.layers.2."
    )
    assert "lm_head.bias" in files[2]
    assert "word_embeddings_for_head.weight" not in divide(table, names, 2)[1]
    with pytest.raises(CheckpointError, match="the decoder cannot begin on stage 3 of 3"):
        divide(table, names, 3, 3)
    with pytest.raises(CheckpointError, match="4 layers do not divide into 3 pipeline stages"):
        divide(table, names, 5, 2)


@pytest.mark.parametrize(
    ("layers", "stages", "split"), [((2, 4), 6, 2), ((12, 12), 2, 1), ((6, 6), 4, 2), ((3, 5), 4, 3)]
)
def test_where_a_decoder_begins(layers, stages, split):
    assert split_of(*layers, stages) == split


def test_orders_of_keys_and_values():
    """Two heads of two channels: the rows of each order written out."""
    ours = torch.tensor(
        [[100 * kind + 10 * head + channel] for head in (0, 1) for kind in (0, 1) for channel in (0, 1)]
    )
    version0 = [[0], [1], [10], [11], [100], [101], [110], [111]]
    version1 = [[0], [100], [1], [101], [10], [110], [11], [111]]
    for stored, order in ((version0, "2hd"), (version1, "hd2")):
        (made,) = HeadOrder(order).inward([torch.tensor(stored)], Heads(2, 1))
        assert torch.equal(made, ours)
        assert HeadOrder(order).outward([made], Heads(2, 1))[0].tolist() == stored
    (fused,) = Woven(queries=False).inward(
        [torch.tensor([0, 1, 10, 11]), torch.tensor([100, 101, 110, 111])], Heads(2, 1)
    )
    assert fused.tolist() == ours[:, 0].tolist()


def test_rows_in_front_and_one_row():
    (made,) = Behind(2).inward([torch.arange(5)[:, None]], Heads(1, 1))
    assert made[:, 0].tolist() == [2, 3, 4]
    assert Behind(2).outward([made], Heads(1, 1))[0][:, 0].tolist() == [0, 0, 2, 3, 4]
    (row,) = OneRow().inward([torch.arange(3)[None]], Heads(1, 1))
    assert row.tolist() == [0, 1, 2]
    assert OneRow().outward([row], Heads(1, 1))[0].shape == (1, 3)


def test_layers_that_begin_anew_are_the_same_everywhere():
    weight = Drawn("lm_head.dense.weight", torch.float32, (8, 6), 0.02)
    part = torch.empty(3, 6, dtype=torch.float64)
    weight.fill(Held(part, (8, 6), ((2, 5), (0, 6))))
    assert torch.equal(part.float(), weight.read()[2:5])
    assert torch.equal(weight.rows(2, 5), weight.read()[2:5])
    assert Drawn("lm_head.norm.weight", torch.float32, (4,), 0.02).read().tolist() == [1.0] * 4
    assert Drawn("output_bias.bias", torch.float32, (4,), 0.02).read().tolist() == [0.0] * 4
