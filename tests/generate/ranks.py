"""What the processes of a pool do: save a tiny model at a layout, read it together, talk to a person together."""

from __future__ import annotations

import signal
from pathlib import Path

import torch

from megalith.checkpoint.native import Checkpointer
from megalith.checkpoint.team import Team
from megalith.errors import ConfigError
from megalith.generate.crew import Crew
from megalith.generate.engine import decode
from megalith.generate.interactive import converse
from megalith.generate.jobs import Options, continue_all, sample_all
from megalith.generate.loading import load_model
from megalith.generate.sampling import Sampling
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.family import describe
from megalith.models.gpt import GPT
from megalith.nn.prompt import Prompts, SoftPrompt
from megalith.parallel.apply import build
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from tests.generate.tiny import VARIANTS

PROMPTS = ["the cat", "a dog sat on", "", "sat", "naïve 中文 the", "mat, the cat", "on"]
GREEDY = Sampling(tokens_to_generate=9)
DRAWN = Sampling(tokens_to_generate=9, temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=5)


ONE = Sizes()


def save_shared(run: str, variant: str, vocab_size: int, sizes: Sizes, layers: int = 2) -> None:
    """A run folder with a float64 model that every process holds a part of."""
    topology = Topology.of(sizes)
    config = ModelConfig(
        vocab_size=vocab_size, num_layers=layers, hidden_size=32, num_attention_heads=4, max_position_embeddings=48,
        **VARIANTS[variant],
    )  # fmt: skip
    stages = build(GPT, config, topology, seed=3, precision="64")
    named = {name: p.detach() for stage in stages for name, p in stage.named_parameters()}
    with torch.no_grad():
        for tensor in named.values():
            tensor.mul_(4)
    tensors = {f"model.{name}": tensor for name, tensor in named.items()}
    keeper = Checkpointer(Path(run) / "checkpoints", topology)
    state = {"step": 7, "seed": 3, **describe("gpt", config)}
    keeper.save(7, tensors, state, config_yaml="", tokenizer=Path(run) / "tokenizer")


def crew_of(sizes: Sizes = ONE) -> Crew:
    """The crew of this process in a pool, or alone."""
    topology = Topology.of(sizes)
    return Crew(topology, Team(topology))


def texts(run: str, sizes: Sizes = ONE, precision: str = "64") -> dict:
    """Everything that jobs make of a run folder, in plain values."""
    loaded = load_model(run, precision=precision, crew=crew_of(sizes))
    options = Options(batch_size=2, logprobs=True)
    found = {
        name: list(continue_all(loaded, PROMPTS, sampling, options))
        for name, sampling in {"greedy": GREEDY, "drawn": DRAWN}.items()
    }
    found["samples"] = list(sample_all(loaded, 5, Sampling(tokens_to_generate=2), options))
    found["recomputed"] = list(continue_all(loaded, PROMPTS[:2], GREEDY, Options(2, recompute=True)))
    return {name: [(row.text, row.tokens, row.logprobs) for row in rows] for name, rows in found.items()}


def refusal(run: str, sizes: Sizes) -> str:
    """What is said of a model that so many cannot share."""
    try:
        load_model(run, precision="64", crew=crew_of(sizes))
    except ConfigError as error:
        return str(error)
    return ""


def local_shapes(run: str, sizes: Sizes) -> dict:
    """What this process holds of each kind of weight."""
    model = load_model(run, precision="64", crew=crew_of(sizes)).model
    layer = model.blocks["0"]
    return {
        "class": type(layer.mlp.up).__name__,
        "table": tuple(model.token_embedding.weight.to_local().shape),
        "cache": tuple(model.new_cache(1, 8).keys.shape),
    }


def local_names(run: str, sizes: Sizes) -> tuple[set[str], int]:
    """Which parts of the model this process holds, and for how many layers it keeps keys and values."""
    model = load_model(run, precision="64", crew=crew_of(sizes)).model
    names = (name.split(".") for name, _ in model.named_parameters())
    parts = {".".join(name[: 2 if name[0] == "blocks" else 1]) for name in names}
    return parts, len(model.new_cache(1, 8).keys)


def behind_virtual_tokens(run: str, sizes: Sizes = ONE) -> list[list[int]]:
    """What follows rows, or sources, that begin with tokens behind the vocabulary, under rules that look at all a row holds."""
    loaded = load_model(run, precision="64", crew=crew_of(sizes))
    model, v = loaded.model, loaded.model.config.vocab_size
    table = SoftPrompt(3, model.config.hidden_size, own_positions=False)
    table.tokens.data = (
        4 * torch.randn(table.tokens.shape, generator=torch.Generator().manual_seed(1)).double()
    )
    model.prompts = Prompts(v, [table]).eval() if model.first else None
    rows = [[v, v + 1, v + 2, 5, 9], [v + 2, 7, v, 3], [8, 5]]
    two_sides = isinstance(model, EncoderDecoder)
    *_, found = decode(
        model,
        [[1]] * 3 if two_sides else rows,
        Sampling(tokens_to_generate=8, repetition_penalty=1.3, no_repeat_ngram=1),
        eod=None,
        sources=rows if two_sides else None,
        agree=loaded.crew.same,
        relay=loaded.crew.relay,
    )
    return [row.continuation for row in found]


def talk(run: str, sizes: Sizes, stop_after: int) -> tuple[int, str]:
    """Two prompts; Ctrl-C at the main process while it writes its `stop_after`-th piece. → prompts, what was written"""
    loaded = load_model(run, precision="64", crew=crew_of(sizes))
    waiting, written = iter(["the cat", "", "a dog"]), []

    def ask() -> str:
        assert loaded.crew.is_main
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    def write(piece: str) -> None:
        written.append(piece)
        if loaded.crew.is_main and len(written) == stop_after:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    number = converse(
        loaded, Sampling(tokens_to_generate=30), Options(), ask=ask, write=write, complain=written.append
    )
    assert signal.getsignal(signal.SIGINT) is before
    return number, "".join(written)


def logits_of(path: str, tokens: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """Of a checkpoint in any format, read by these processes together."""
    loaded = load_model(path, precision="64", crew=crew_of(sizes))
    relay, model = loaded.crew.relay, loaded.model
    with torch.no_grad():
        hidden = relay.forward(model, tokens).flatten(0, 1)
        return relay.logits(model, hidden, tokens.numel()).unflatten(0, tokens.shape)
