"""BERT and encoder-decoders on a layout, for processes of a pool: loss and every gradient of one micro-batch, whole."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from megalith.engine.objective import CausalLanguageModel
from megalith.engine.step import Forward, finish_gradients
from megalith.models.family import FAMILIES
from megalith.nn.dropout import sample_keys
from megalith.parallel.apply import build
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

SHAPE = {
    "vocab_size": 21,
    "make_vocab_size_divisible_by": 8,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_dropout": 0.1,
}
MODELS = {
    "bert": ("bert", {}),
    "bert-original": (
        "bert",
        {"transformer_block_type": "post_ln", "share_embeddings_and_output_weights": False},
    ),
    "megatron-t5": ("t5", {"output_bias": True, "attention_dropout": 0.1, "num_query_groups": 2}),
    "t5-1.0": (
        "t5",
        {
            "position_embedding_type": "relative",
            "normalization": "rmsnorm",
            "bias": False,
            "attention_scale": 1.0,
            "scale_decoder_output": True,
        },
    ),
    "t5-1.1": (
        "t5",
        {
            "position_embedding_type": "relative",
            "normalization": "rmsnorm",
            "bias": False,
            "activation": "geglu",
            "share_embeddings_and_output_weights": False,
        },
    ),
    "bart": ("bart", {"transformer_block_type": "post_ln", "share_position_embeddings": False}),
}


def config_of(name):
    family, fields = MODELS[name]
    model_class, config_class = FAMILIES[family]
    return model_class, config_class(**SHAPE, **fields)


def mean_loss(model):
    """Of three rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    source, tokens, targets = (torch.randint(21, (3, 8), generator=generator) for _ in range(3))
    lengths, keys = torch.tensor([8, 5, 1]), sample_keys(1, 2, torch.arange(3))
    targets[torch.arange(8) >= lengths[:, None]] = -1
    if hasattr(model, "encoder"):
        hidden = model(source, tokens=tokens[:, :6], encoder_lengths=lengths, keys=keys)
        terms = model.loss(hidden, targets[:, :6])
    else:
        hidden = model(source, types=tokens % 2, lengths=lengths, keys=keys)
        terms = model.loss(hidden, targets, torch.tensor([1, -1, 0]))
        assert model.binary_logits(hidden).shape == (3, 2)
    assert model.logits(torch.zeros(1, 8, 16, dtype=torch.float64)).shape[-1] == 21
    return sum(term.sum / term.count for term in terms.values())


def record(name, sizes=None, **how):
    """Loss, and every gradient by name, of shared ones the whole. Data ranks read the same rows: theirs are summed."""
    model_class, config = config_of(name)
    topology = Topology.single("cpu") if sizes is None else Topology.of(Sizes(**sizes))
    (model,) = build(model_class, config, topology, seed=3, precision="64", **how)
    with torch.no_grad():
        for (
            key,
            parameter,
        ) in model.named_parameters():  # biases start at zero, where a lost one is not missed
            if key.endswith("bias"):
                parameter.fill_(0.1)
    loss = mean_loss(model)
    loss.backward()
    finish_gradients(Forward([model], CausalLanguageModel(), topology), dict(model.named_parameters()))
    found = {"loss": loss.detach()}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        found[key] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def in_process(name, sizes):
    """For the pool: plain lists, which need no shared memory."""
    return {key: value.tolist() for key, value in record(name, sizes).items()}
