"""Prompts alone steer a frozen model: which of two answers a text gets depends on its tag, and on nothing else.

A tiny GPT learns to say the first or the second word of a text, by a marker before it. Then the marker goes: the same texts, with
either tag and both answers, are learnt by tuning prompts of random numbers. Without the right tag one answer is as good as the
other: half of them are right by chance.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megalith.adapt.p_tuning import PTuning
from megalith.adapt.prompts import NewPrompt, virtual_ids
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.engine.engine import Engine
from megalith.engine.objective import objective_of
from megalith.models.config import ModelConfig
from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.gpt import GPT
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.topology import Topology

WORDS, FIRST, SECOND, ASK = 12, 12, 13, 14
PROMPT, ROWS = 4, 64
TOPOLOGY = Topology.single()
SHAPE = {
    "vocab_size": 15, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 12,
    "make_vocab_size_divisible_by": 8, "hidden_dropout": 0.0, "init_method_std": 0.1,
}  # fmt: skip


def texts(samples, seed):
    """Two different words a row, and which of them is the answer."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(WORDS, (samples,), generator=generator)
    second = (first + torch.randint(1, WORDS, (samples,), generator=generator)) % WORDS
    which = torch.randint(2, (samples,), generator=generator)
    return torch.stack((first, second), 1), which


def batch(heads, samples, seed, *, gpt):
    """heads (2, P): what stands before a text whose answer is its first word, and its second one."""
    words, which = texts(samples, seed)
    ask = torch.full((samples, 1), ASK)
    tokens, answer = torch.cat((heads[which], words, ask), 1), words.gather(1, which[:, None])
    sample = {"sample": torch.arange(samples) + samples * seed}
    if not gpt:
        lengths = torch.full((samples,), tokens.shape[1])
        return {
            **sample,
            "encoder_tokens": tokens,
            "encoder_lengths": lengths,
            "tokens": ask,
            "targets": answer,
        }
    targets = torch.full_like(tokens, -1)
    targets[:, -1:] = answer
    return {**sample, "tokens": tokens, "targets": targets}


def train(model, heads, *, steps, lr, frozen=()):
    gpt = isinstance(model, GPT)
    optim = OptimConfig(lr=lr, weight_decay=0.0)
    engine = Engine(
        [model],
        TOPOLOGY,
        optim=optim,
        schedule=make_schedule(optim, max_steps=steps, global_batch=ROWS, sequence_length=7),
        seed=1,
        micro_batch_size=ROWS,
        frozen=frozen,
        objective=objective_of(model.config),
    )
    for step in range(steps):
        engine.train_step(batch(heads, ROWS, step, gpt=gpt))
    model.eval()


@torch.no_grad()
def right(model, heads):
    """Part of 500 new texts that get their answer."""
    gpt = isinstance(model, GPT)
    data = batch(heads, 500, 10_001, gpt=gpt)
    hidden = (
        model(data["tokens"])
        if gpt
        else model(data["encoder_tokens"], tokens=data["tokens"], encoder_lengths=data["encoder_lengths"])
    )
    return (model.logits(hidden)[:, -1].argmax(-1) == data["targets"][:, -1]).double().mean().item()


MARKERS = torch.tensor([[FIRST] * PROMPT, [SECOND] * PROMPT])


def pretrained(model_class, config):
    """The numbers of a model that knows both markers."""
    (model,) = build(model_class, config, TOPOLOGY, seed=1)
    train(model, MARKERS, steps=150, lr=3e-3)
    assert right(model, MARKERS) > 0.98
    return model.state_dict()


@pytest.fixture(scope="module")
def base():
    """A function: family → its class, config and learnt numbers; each is made once."""
    families = {
        "gpt": (GPT, ModelConfig(**SHAPE)),
        "t5": (EncoderDecoder, EncoderDecoderConfig(**SHAPE)),
    }
    made = {}

    def get(family):
        if family not in made:
            made[family] = (*families[family], pretrained(*families[family]))
        return made[family]

    return get


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt", SoftPrompts), ("t5", SoftPrompts), pytest.param("gpt", PTuning, marks=pytest.mark.slow),
     pytest.param("gpt", partial(PTuning, kind="mlp"), marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_tag_decides(base, family, method):
    model_class, config, weights = base(family)
    tuned = method([NewPrompt("first", PROMPT), NewPrompt("second", PROMPT)])
    (model,) = build(model_class, config, TOPOLOGY, seed=2, adapt=tuned.install)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("prompts.") for name in missing)
    ids = virtual_ids(config.vocab_size, tuned.tags)
    heads = torch.tensor([list(ids["first"]), list(ids["second"])])
    assert right(model.eval(), heads) < 0.7
    train(model, heads, steps=200, lr=3e-2, frozen=tuned.frozen)
    assert right(model, heads) >= 0.95
    assert right(model, heads.flip(0)) < 0.05  # each tag says the other word, not either
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
