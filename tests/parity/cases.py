"""The models of the parity suite: between them every option that a layout could get wrong, two a stage at least."""

from __future__ import annotations

from typing import Any

from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.parallel.memory import Recompute
from megalith.testing.parity import Case
from megalith.topology.sizes import Sizes

SHAPE = {
    "vocab_size": 130,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
    "hidden_dropout": 0.1,
}
"""130 tokens padded to 256: with four tensor ranks the last one holds padding alone."""


def model(layers: int = 4, **changes: Any) -> ModelConfig:
    """A GPT."""
    return ModelConfig(**{**SHAPE, "num_layers": layers, **changes})


def bert(layers: int = 4, **changes: Any) -> BertConfig:
    """Megatron's BERT, with a binary head."""
    return BertConfig(**{**SHAPE, "num_layers": layers, **changes})


def encoder_decoder(layers: int = 2, **changes: Any) -> EncoderDecoderConfig:
    """Megatron's T5, so many layers on each side."""
    sides = {"num_layers": layers, "max_position_embeddings": 16, "output_bias": True}
    return EncoderDecoderConfig(**{**SHAPE, **sides, **changes})


LLAMA = {
    "position_embedding_type": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "bias": False,
    "num_query_groups": 2,
    "share_embeddings_and_output_weights": False,
    "hidden_dropout": 0.0,
}

CASES = {
    "gpt2": Case(model(8)),
    "llama": Case(model(**LLAMA, num_attention_heads=4), micro_batch=1),
    "relative": Case(
        model(position_embedding_type="relative", activation="geglu", transformer_block_type="post_ln"),
        reset=True,
    ),
    "probabilities": Case(model(attention_dropout=0.1), reset=True),
    "recompute": Case(model(), recompute=Recompute("full", "block", 1)),
    "recompute in groups": Case(model(), recompute=Recompute("full", "uniform", 2)),
    "selective": Case(model(attention_core="eager"), recompute=Recompute("selective")),
    "compiled": Case(model(8), compile=True),
    "frozen": Case(model(), frozen=(r"^(?!.*(norm_mlp|blocks\.3)).*",)),
    "micro-batch means": Case(model(), loss_average="micro_batches"),
    "odd rows": Case(model(hidden_size=18, num_attention_heads=2, ffn_hidden_size=70)),
    "uneven stages": Case(model(5)),
    "few micro-batches": Case(model(), micro_batches=2),
    "fp32": Case(model(), precision="32"),
    "bf16": Case(model(hidden_dropout=0.0), precision="bf16-mixed"),
}

T5 = {"position_embedding_type": "relative", "normalization": "rmsnorm", "bias": False, "output_bias": False}
"""T5 1.0's; with the rest, 1.1's."""
GATED = {**T5, "activation": "geglu", "share_embeddings_and_output_weights": False}
BART = {
    "transformer_block_type": "post_ln",
    "share_position_embeddings": False,
    "decoder_num_layers": 3,
    "decoder_ffn_hidden_size": 40,
}


def few(config: ModelConfig, **how: Any) -> Case:
    """Four micro-batches of two rows."""
    return Case(config, micro_batches=4, **how)


CASES |= {
    "bert": few(bert()),
    "bert original": few(
        bert(
            transformer_block_type="post_ln", share_embeddings_and_output_weights=False, attention_dropout=0.1
        )
    ),
    "bert without order": few(bert(2, bert_binary_head=False, num_tokentypes=3, num_query_groups=2)),
    "bert recomputed": few(bert(2), recompute=Recompute("full", "uniform", 1)),
    "bert compiled": few(bert(), compile=True),
    "bert frozen": few(bert(2), frozen=(r"^(?!.*(norm_mlp|blocks\.1|pooler)).*",)),
    "bert micro-batch means": few(bert(2), loss_average="micro_batches"),
    "bert fp32": few(bert(2), precision="32"),
    "bert bf16": few(bert(2, hidden_dropout=0.0), precision="bf16-mixed"),
    "t5": few(encoder_decoder()),
    "t5 1.0": few(encoder_decoder(**T5, scale_decoder_output=True)),
    "t5 1.1": few(encoder_decoder(**GATED)),
    "bart": few(encoder_decoder(**BART, attention_dropout=0.1)),
    "bart selective": few(encoder_decoder(**BART, attention_core="eager"), recompute=Recompute("selective")),
    "t5 recomputed": few(encoder_decoder(), recompute=Recompute("full", "block", 1)),
    "t5 compiled": few(encoder_decoder(), compile=True),
    "t5 frozen": few(encoder_decoder(**GATED), frozen=(r"^encoder\..*",)),
    "t5 fp32": few(encoder_decoder(**GATED), precision="32"),
    "t5 bf16": few(encoder_decoder(hidden_dropout=0.0), precision="bf16-mixed"),
}

UNEVEN = Sizes(pipeline=2, layers=(4, 1))
