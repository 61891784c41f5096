"""NeMo's archives of BERT, T5 and BART, and of models of tasks with a BERT inside: straight-line, as `nemo_files`."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.golden import megatron_files, nemo_files, tiny, tiny_sides
from tests.golden.megatron_files import sided_model
from tests.golden.nemo_files import pack, place, saved
from tests.golden.sides import Sides

MODELS = "nemo.collections.nlp.models.language_modeling"
TARGETS = {
    "bert": f"{MODELS}.megatron_bert_model.MegatronBertModel",
    "t5": f"{MODELS}.megatron_t5_model.MegatronT5Model",
    "bart": f"{MODELS}.megatron_bart_model.MegatronBARTModel",
}
TASK = "nemo.collections.nlp.models.text_classification.text_classification_model.TextClassificationModel"


def keys(family: str, **more: object) -> dict[str, object]:
    """`model_config.yaml` in the keys of NeMo 1.8: a BERT's or GPT's length is called otherwise than a T5's."""
    found = nemo_files.gpt_keys(target=TARGETS[family])
    if family == "bert":
        return found | {"bert_binary_head": True, **more}
    del found["encoder_seq_length"]
    sizes = {
        "num_layers": tiny_sides.ENCODER,
        "decoder_num_layers": tiny_sides.DECODER,
        "ffn_hidden_size": 48,
    }
    length = {"seq_length": tiny.POSITIONS, "max_position_embeddings": "${.seq_length}"}
    return found | sizes | length | {"encoder_arch": "transformer", **more}


def sectioned(family: str) -> dict[str, object]:
    """The same of a T5 in NeMo 1.10 and later: a section for each side."""
    found = keys(family)
    layers = {"encoder": found.pop("num_layers"), "decoder": found.pop("decoder_num_layers")}
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "layernorm_epsilon", "kv_channels")
    each = {name: found.pop(name) for name in names}
    sides = {side: {"arch": "transformer", "num_layers": count, **each} for side, count in layers.items()}
    return found | sides | {"share_token_embeddings": True}


@dataclass(frozen=True)
class Part:
    """Rank `r` of a stage."""

    r: int
    stage: int


def write(
    path: Path, whole: Sides, layout: nemo_files.Layout, said: dict[str, object], split: int = 1
) -> Path:
    """Writes the archive of a language model; `split`: the first stage of a decoder."""
    sizes = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
    members = {"model_config.yaml": yaml.safe_dump(sizes | said).encode(), **layout.artifacts}
    for stage in range(layout.pp):
        for r in range(layout.tp):
            tree = sided_model(whole.to(layout.dtype), megatron(layout, split), r, stage)
            flat = OrderedDict(flattened(tree))
            named = encoder_decoder(flat, layout, stage) if whole.decoder else bert(flat)
            members[place(layout, r, stage) + "model_weights.ckpt"] = saved(named)
    return pack(path, members, layout)


def megatron(layout: nemo_files.Layout, split: int, **more: object) -> megatron_files.Layout:
    return megatron_files.Layout(tp=layout.tp, pp=layout.pp, split=split, **more)


def flattened(tree: object, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value.clone()


def bert(flat: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    renamed = {
        name.replace("word_embeddings_for_head", "word_embeddings"): each for name, each in flat.items()
    }
    return OrderedDict((f"model.{name}", tensor) for name, tensor in renamed.items())


def encoder_decoder(
    flat: dict[str, torch.Tensor], layout: nemo_files.Layout, stage: int
) -> OrderedDict[str, torch.Tensor]:
    """Names of MegatronTokenLevelEncoderDecoderModule: both sides name the embedding that they share."""
    out: OrderedDict[str, torch.Tensor] = OrderedDict()
    for name, tensor in flat.items():
        if name.startswith("language_model.embedding."):
            table = name.removeprefix("language_model.embedding.")
            if stage == 0:
                out[f"enc_dec_model.encoder_embedding.{table}"] = tensor
            if stage > 0 or layout.pp == 1:
                out[f"enc_dec_model.decoder_embedding.{table}"] = tensor
        elif name.startswith("language_model."):
            side, rest = name.removeprefix("language_model.").split(".", 1)
            out[f"enc_dec_model.enc_dec_model.{side}.model.{rest}"] = tensor
        elif name == "lm_head.bias":
            out["enc_dec_model.tokens_head.bias"] = tensor
        else:
            assert name == "word_embeddings_for_head.weight"
            out["enc_dec_model.word_embeddings.weight"] = tensor
    return out


def write_task(path: Path, whole: Sides, layout: nemo_files.Layout, version: float, **named: str) -> Path:
    """The listing of the original documents: a task's model of NeMo 1.0 to 1.4 with a BERT that has no heads."""
    encoder = {
        "hidden_size": tiny.WIDTH,
        "num_attention_heads": tiny.HEADS,
        "num_layers": tiny.LAYERS,
        "max_position_embeddings": tiny.POSITIONS,
    }
    said = {
        "tokenizer": {
            "tokenizer_name": "megatron-bert-uncased",
            "vocab_file": "/raid/data/vocab.txt",
            "tokenizer_model": None,
        },
        "language_model": {"pretrained_model_name": "megatron-bert-uncased", "lm_checkpoint": None},
        "classifier_head": {"num_output_layers": 2, "fc_dropout": 0.1},
        "target": TASK,
    }
    members = {
        "megatron-bert-uncased_encoder_config.json": json.dumps(encoder).encode(),
        "megatron_checkpoint_version.json": json.dumps({"checkpoint_version": version}).encode(),
        "model_config.yaml": yaml.safe_dump(said).encode(),
        **layout.artifacts,
    }
    ends = {name: tensor for name, tensor in whole.ends.items() if name == "nothing"}
    bare = Sides(**{**vars(whole.to(layout.dtype)), "ends": ends})
    for r in range(layout.tp):
        tree = sided_model(bare, megatron(layout, 1, version=version, tree="V1"), r, 0)
        state = OrderedDict((f"bert_model.{name}", tensor) for name, tensor in flattened(tree))
        state["classifier.mlp.layer0.weight"] = torch.ones(3, tiny.WIDTH)
        state["classifier.mlp.layer0.bias"] = torch.zeros(3)
        members[place(layout, r, 0) + "model_weights.ckpt"] = saved(state)
    return pack(path, members, layout)
