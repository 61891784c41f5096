"""A tiny BERT, T5 or BART with larger weights, a WordPiece tokenizer of its size, and a checkpoint of both at any layout."""

from __future__ import annotations

from pathlib import Path

import torch

from megalith.checkpoint.native import Checkpointer
from megalith.generate.jobs import Options, answer_all
from megalith.generate.loading import Loaded, load_model
from megalith.generate.sampling import Sampling
from megalith.generate.text import search_texts
from megalith.models.family import FAMILIES, describe
from megalith.parallel.apply import build
from megalith.tokenizers.load import load_tokenizer
from megalith.tokenizers.names import WORD_PIECE_LOWER
from megalith.tokenizers.wordpiece import from_vocabulary
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from tests.generate.ranks import ONE, crew_of

TEXT = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat dog and ran home . , big red hat ##s ##ed see saw"
PIECES = [*TEXT.split()]
PROMPTS = {
    "bert": ["the [MASK] sat on the <mask>.", "[MASK] dog", "the big red hat and the [MASK]"],
    "t5": ["the <mask> sat on the <mask>.", "<extra_id_0> dog", "a dog ran home"],
    "bart": ["the <mask> sat on the [MASK].", "<mask> dog", "a dog ran home"],
}
OPTIONS = {
    "bert": {},
    "t5": {"normalization": "rmsnorm", "position_embedding_type": "relative", "bias": False, "activation": "geglu"},
    "bart": {"transformer_block_type": "post_ln", "share_position_embeddings": False, "output_bias": True},
}  # fmt: skip


def tokenizer_at(folder: Path, sentinels: int = 5):
    """Of the words above, in a folder."""
    vocabulary = {piece: id for id, piece in enumerate(PIECES)}
    made = from_vocabulary(vocabulary, type=WORD_PIECE_LOWER, extra_ids=sentinels, where="here")
    made.save(folder)
    return load_tokenizer(folder)


def save_family(run: str | Path, family: str, sizes: Sizes | None = None, precision: str = "64") -> None:
    """A run folder with a model that these processes hold together, step 7."""
    run = Path(run)
    topology = Topology.of(sizes) if sizes else Topology.single("cpu")
    if topology.is_main:
        tokenizer_at(run / "tokenizer", sentinels=0 if family == "bart" else 5)
    model_class, config_class = FAMILIES[family]
    config = config_class(
        vocab_size=len(PIECES) + (2 if family == "bart" else 7), num_layers=2, hidden_size=32, num_attention_heads=4,
        max_position_embeddings=24, **OPTIONS[family],
    )  # fmt: skip
    stages = build(model_class, config, topology, seed=3, precision=precision)
    named = {name: p.detach() for stage in stages for name, p in stage.named_parameters()}
    with torch.no_grad():
        for tensor in named.values():
            tensor.mul_(4)
    state = {"step": 7, "seed": 3, "data_plan": {"train": {"seq_length": 24}}, **describe(family, config)}
    keeper = Checkpointer(run / "checkpoints", topology)
    tensors = {f"model.{name}": tensor for name, tensor in named.items()}
    keeper.save(7, tensors, state, config_yaml="", tokenizer=run / "tokenizer")


def answers(run: str, sizes: Sizes = ONE) -> dict[str, list]:
    """What jobs make of a run folder, in plain values."""
    loaded = load_model(run, precision="64", crew=crew_of(sizes))
    settings = {"greedy": {}}
    if loaded.family != "bert":
        settings |= {"drawn": {"temperature": 1.2, "seed": 3}, "beams": {"beams": 3}}
    prompts, options = PROMPTS[loaded.family], Options(batch_size=2)
    found = {
        name: [row.to_json() for row in answer_all(loaded, prompts, sampling_of(**given), options)]
        for name, given in settings.items()
    }
    if loaded.family != "bert":
        best = search_texts(loaded, prompts[:1], sampling_of(beams=3, num_samples=2))[0]
        found["best"] = [row.to_json() for row in best]
        again = answer_all(loaded, prompts, sampling_of(beams=2), Options(batch_size=2, recompute=True))
        found["recomputed"] = [row.to_json() for row in again]
    return found


def sampling_of(**given) -> Sampling:
    return Sampling(tokens_to_generate=8, **given)


def loaded_of(run: str | Path) -> Loaded:
    return load_model(run, precision="64")
