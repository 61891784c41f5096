"""Prompts that were tuned for a few steps on a tiny model, and what that model itself says while it is in training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megalith.adapt.artefact import Adapter, Base, open_adapter, save
from megalith.adapt.fingerprint import fingerprint_of
from megalith.adapt.prompts import NewPrompt, virtual_ids
from megalith.adapt.soft_prompt import SoftPrompts
from megalith.checkpoint.open import resolve
from megalith.checkpoint.reading import load, read_state
from megalith.engine.engine import Engine
from megalith.engine.objective import objective_of
from megalith.generate.adapting import load_adapted
from megalith.generate.jobs import Options, answer_all
from megalith.generate.prompting import Tagged
from megalith.generate.sampling import Sampling
from megalith.models.encdec import EncoderDecoder
from megalith.models.family import understand
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from tests.generate.ranks import ONE, crew_of

TOPOLOGY = Topology.single("cpu")
ROWS = [
    Tagged("a", {"text": "the cat"}),
    Tagged(None, {"text": "the cat"}),
    Tagged("b", {"text": "the cat"}),
    Tagged("b", {"text": "a dog sat on the mat"}),
    Tagged(None, {"text": "a dog"}),
    Tagged("a", {"text": "on the mat and the dog ran home"}),
]


def tune(run: Path, tags: dict[str, int], earlier: Adapter | None = None, steps: int = 3):
    """(model in training, adapter): new prompts of these lengths behind the earlier ones."""
    folder = resolve(run)
    model_class, config = understand(read_state(folder), where=str(folder))
    config = config.model_copy(update={"hidden_dropout": 0.0})
    new = [NewPrompt(name, length) for name, length in tags.items()]
    method = SoftPrompts(new, earlier=() if earlier is None else earlier.tags)
    stages = build(model_class, config, TOPOLOGY, seed=2, precision="64", adapt=method.install)
    named = {
        f"model.{name}": p.detach() for name, p in stages[0].named_parameters() if "prompts." not in name
    }
    load(folder, named)
    method.begin(stages, TOPOLOGY)
    if earlier is not None:
        method.fill(stages, earlier.tensors)
    optim = OptimConfig(lr=0.3, weight_decay=0.0)
    engine = Engine(
        stages, TOPOLOGY, optim=optim, schedule=make_schedule(optim, max_steps=steps, global_batch=4, sequence_length=12),
        seed=1, precision="64", micro_batch_size=2, frozen=method.frozen, keep="trainable",
        objective=objective_of(config),
    )  # fmt: skip
    ids = virtual_ids(config.vocab_size, method.tags)
    for step in range(steps):
        engine.train_step(_batch(stages[0], [ids[name] for name in tags], step))
    family = read_state(folder)["architecture"]["family"]
    base = Base(fingerprint_of(run), str(run), load_tokenizer(folder / "tokenizer").hash())
    tensors = method.tensors(stages, TOPOLOGY)
    adapter = Adapter(method.name, family, tensors, method.tags, method.describe(), base)
    return stages[0].eval(), adapter


def _batch(model, prompts: list[range], step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    text = torch.randint(model.config.vocab_size, (4, 8), generator=draw)
    shortest = min(map(len, prompts))
    heads = torch.tensor([list(prompts[row % len(prompts)])[:shortest] for row in range(4)])
    tokens = torch.cat([heads, text], 1)
    sample = torch.arange(4) + 4 * step
    if isinstance(model, EncoderDecoder):
        lengths = torch.full((4,), tokens.shape[1])
        targets = text[:, 1:]
        return {
            "encoder_tokens": tokens, "encoder_lengths": lengths, "tokens": text[:, :-1], "targets": targets,
            "sample": sample,
        }  # fmt: skip
    targets = torch.cat([tokens[:, 1:], torch.full((4, 1), -1)], 1)
    targets[:, : shortest - 1] = -1
    return {"tokens": tokens, "targets": targets, "sample": sample}


@torch.no_grad()
def said_in_training(model, adapter: Adapter, row: Tagged, loaded, count: int) -> list[int]:
    """The greedy continuation, the whole row read anew for each token: straight from the model that is tuned."""
    ids = [] if row.tag is None else list(virtual_ids(model.config.vocab_size, adapter.tags)[row.tag])
    read = [*ids, *loaded.tokenizer.encode(row.text)]
    written = list(loaded.manner.start) if isinstance(model, EncoderDecoder) else read
    begun = len(written)
    while len(written) < begun + count:
        if isinstance(model, EncoderDecoder):
            hidden = model(torch.tensor([read]), tokens=torch.tensor([written]))
        else:
            hidden = model(torch.tensor([written]))
        written.append(int(model.logits(hidden)[0, -1].argmax()))
        if written[-1] == loaded.manner.eod:
            break
    return written[begun:]


def lines(loaded, rows=ROWS, *, batch_size: int = 16, recompute: bool = False, **sampling) -> list[str]:
    """What the command writes of these rows."""
    options = Options(batch_size, recompute, logprobs=True)
    found = answer_all(loaded, rows, Sampling(**{"tokens_to_generate": 7, **sampling}), options)
    return [json.dumps(row.to_json()) for row in found]


def completions(run: str, adapters: list[str], sizes: Sizes = ONE) -> list[str]:
    """The same, of processes that share the model."""
    loaded = load_adapted(run, adapters, precision="64", crew=crew_of(sizes))
    return lines(loaded)


def saved(adapter: Adapter, folder: Path) -> Adapter:
    """As it comes back from a file."""
    return open_adapter(save(adapter, folder))
