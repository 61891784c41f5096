"""Does a layout compute what one process computes? Every number of three training steps, tensor by tensor.

    one process ─ record ─▶ reference.safetensors ─▶ each rank of the layout: record, slice the reference alike, compare

A record holds the initial weights, the targets, loss and norm of each step, every gradient of the first, every weight after
the last, the evaluation loss before and after, and greedily chosen tokens. Batches are made so that mistakes show:
micro-batches with different numbers of targets, one with none, clipping that bites, Adam with an epsilon that keeps its first
steps from being signs. What BERT or an encoder reads has padding, in every row another number of tokens.

Knows engines and layouts. Knows no configuration files.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.tensor import distribute_tensor

from megalith.adapt.method import Method, Tag
from megalith.adapt.prompts import virtual_ids
from megalith.checkpoint.tensor_files import open_tensors, write_tensors
from megalith.engine.batch import place, prepare
from megalith.engine.engine import Engine
from megalith.engine.objective import Batch, objective_of
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.family import class_of
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.parallel.context import chunks_of
from megalith.parallel.memory import Recompute
from megalith.testing.pool import RankPool
from megalith.topology.sharded import is_dtensor
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology

STEPS, PROMPT = 3, 3
KINDS = ("count", "initial", "loss", "gradient", "norm", "weight", "evaluation", "tokens")
TOLERANCE = 1e-10
"""In float64, of a tensor's largest element: far above rounding, far below any mistake."""


@dataclass(frozen=True)
class Case:
    """A model and how it is trained, all but the layout.

    `reset` gives samples several documents each: attention, or positions, or (True) both begin anew with each. `adapt` tunes the
    model, and nothing else of it: prompts of its tags stand before the rows, one after the other, and every so often none.
    """

    model: ModelConfig
    precision: str = "64"
    micro_batch: int = 2
    micro_batches: int = 8
    length: int = 8
    source: int = 16
    """Tokens that an encoder reads."""
    compile: bool = False
    recompute: Recompute | None = None
    frozen: tuple[str, ...] = ()
    adapt: Method | None = None
    reset: bool | Literal["documents", "positions"] = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-2, eps=1e-4, weight_decay=0.1))
    clip: float = 0.5
    loss_average: str = "tokens"
    seed: int = 7

    @property
    def samples(self) -> int:
        """Of a global batch."""
        return self.micro_batch * self.micro_batches


def make_engine(case: Case, topology: Topology) -> Engine:
    """The engine of a case on a layout."""
    stages = build(
        class_of(case.model),
        case.model,
        topology,
        seed=case.seed,
        precision=case.precision,
        compile=case.compile,
        recompute=case.recompute,
        adapt=case.adapt and case.adapt.install,
    )
    if case.adapt is not None:
        case.adapt.begin(stages, topology)
    schedule = make_schedule(case.optim, max_steps=20, global_batch=case.samples, sequence_length=case.length)
    return Engine(
        stages,
        topology,
        optim=case.optim,
        schedule=schedule,
        seed=case.seed,
        micro_batch_size=case.micro_batch,
        precision=case.precision,
        clip=case.clip,
        objective=objective_of(case.model),
        frozen=case.frozen if case.adapt is None else (*case.frozen, *case.adapt.frozen),
        loss_average=case.loss_average,  # type: ignore[arg-type]
    )


def make_batch(case: Case, step: int, samples: int | None = None) -> Batch:
    """A global batch: rows with different numbers of targets, and the second micro-batch without any."""
    samples = samples or case.samples
    generator = torch.Generator().manual_seed(1000 * case.seed + step)
    text = torch.randint(case.model.vocab_size, (samples, case.length + 1), generator=generator)
    targets = text[:, 1:].clone()
    targets[case.micro_batch : 2 * case.micro_batch] = -1
    for row in range(samples):
        targets[row, : (row + step) % max(case.length - 2, 1)] = -1
    batch = {"tokens": text[:, :-1], "targets": targets, "sample": torch.arange(samples) + step * samples}
    both = _documents(samples, case.length)
    batch |= {name: both[name] for name in both if case.reset in (True, name)}
    if isinstance(case.model, BertConfig):
        batch |= _halves(batch, case, case.model.token_types)
    if isinstance(case.model, EncoderDecoderConfig):
        batch |= _sources(case, samples, generator)
    return batch if case.adapt is None else _prompted(batch, case, case.adapt.tags)


def _documents(samples: int, length: int) -> Batch:
    """Two documents a sample, cut at another place in each."""
    cut = 1 + torch.arange(samples)[:, None] % (length - 1)
    place = torch.arange(length)[None]
    second = place >= cut
    return {
        "documents": second.to(torch.int32),
        "positions": torch.where(second, place - cut, place),
    }


def _halves(batch: Batch, case: Case, types: int) -> Batch:
    """Two halves of a text, cut at another place in each row, and padding without targets; an order is not told to all."""
    row, place = torch.arange(len(batch["tokens"]))[:, None], torch.arange(case.length)[None]
    lengths = case.length - row % (case.length // 2)
    order = torch.where(row % 3 == 2, -1, row % 2)
    most = max(types - 1, 0)
    order[case.micro_batch : 2 * case.micro_batch] = -1
    return {
        "types": (place >= 1 + row % (case.length - 1)).long().clamp(max=most),
        "lengths": lengths[:, 0],
        "targets": batch["targets"].masked_fill(place >= lengths, -1),
        "order": order[:, 0],
    }


def _sources(case: Case, samples: int, generator: torch.Generator) -> Batch:
    """What the encoder reads, of every row another number of tokens."""
    return {
        "encoder_tokens": torch.randint(case.model.vocab_size, (samples, case.source), generator=generator),
        "encoder_lengths": case.source - torch.arange(samples) % (case.source - 1),
    }


def _prompted(batch: Batch, case: Case, tags: Sequence[Tag]) -> Batch:
    """Row by row the virtual tokens of the next tag in place of the first ones that the model reads, then of none."""
    read, lengths = (
        ("encoder_tokens" if "encoder_tokens" in batch else "tokens"),
        batch.get("encoder_lengths"),
    )
    tokens, targets = batch[read].clone(), batch["targets"].clone()
    for number, ids in enumerate(virtual_ids(case.model.vocab_size, tags).values()):
        rows = slice(number, None, len(tags) + 1)
        tokens[rows, : len(ids)] = torch.tensor(ids)
        if lengths is not None:
            lengths[rows].clamp_(min=len(ids) + 1)
        else:
            targets[rows, : len(ids) - 1] = -1
    return {**batch, read: tokens, "targets": targets}


def share(batch: Batch, topology: Topology) -> Batch:
    """This data rank's rows: contiguous, so that no layout changes which samples a step has."""
    size = len(batch["tokens"]) // topology.data_size
    first = topology.data_rank * size
    return {name: tensor[first : first + size] for name, tensor in batch.items()}


def record(case: Case, topology: Topology) -> dict[str, torch.Tensor]:
    """Everything that must not depend on the layout, by "kind name"; tensors that are shared stay DTensors."""
    engine = make_engine(case, topology)
    found = {**_weights(engine, "initial"), **_evaluation(engine, case, "before")}
    for step in range(STEPS):
        batch = share(make_batch(case, step), topology)
        found |= _counts(engine, batch, step)
        terms = engine.forward_backward(batch)
        found |= {f"loss {name} {step}": value.clone() for name, value in terms.items()}
        if step == 0:
            found |= {
                f"gradient {n}": clone(p.grad) for n, p in engine.trainable.items() if p.grad is not None
            }
        engine.optimizer_step()
        found[f"norm {step}"] = torch.tensor(engine.grad_norm, dtype=torch.float64)
    found |= {**_weights(engine, "weight"), **_evaluation(engine, case, "after")}
    found["tokens greedy"] = greedy(engine, case)
    return found


def _weights(engine: Engine, kind: str) -> dict[str, torch.Tensor]:
    return {
        f"{kind} {name.removeprefix('model.')}": clone(tensor)
        for name, tensor in engine.tensors().items()
        if name.startswith("model.")
    }


def _counts(engine: Engine, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    """Targets of the global batch: what losses are divided by."""
    size, average = engine.micro_batch_size, engine.loss_average
    counts = prepare(batch, engine.objective, engine.topology, micro_batch_size=size, average=average).counts
    return {f"count {name} {step}": torch.tensor(count) for name, count in counts.items()}


def _evaluation(engine: Engine, case: Case, when: str) -> dict[str, torch.Tensor]:
    found = engine.evaluate([share(make_batch(case, 99), engine.topology)])
    return {
        f"evaluation {name} {when}": torch.tensor(both, dtype=torch.float64) for name, both in found.items()
    }


def clone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that shares nothing; a DTensor stays one."""
    return tensor.detach().clone()


@torch.no_grad()
def greedy(engine: Engine, case: Case) -> torch.Tensor:
    """Two rows of tokens, each continued by its most likely next one until the sequence is full, without a cache.

    BERT's rows, too, where it means nothing, but every number of the forward pass decides.
    """
    told = ("tokens", "types", "lengths", "encoder_tokens", "encoder_lengths")
    batch = {n: rows[: case.micro_batch] for n, rows in make_batch(case, 77).items() if n in told}
    tokens = batch["tokens"] = batch["tokens"].clone()
    forward, topology = engine.forward, engine.topology
    device = topology.device
    places = chunks_of(topology).places(case.length // topology.size("context"), device)
    for stage in engine.stages:
        stage.eval()
    for end in range(PROMPT, case.length):
        x, kwargs = forward.inputs(place(batch, topology))
        pipeline = forward.pipeline
        hidden = pipeline.forward(x, kwargs) if pipeline else engine.stages[0](x, **kwargs)
        chosen = torch.zeros(tokens.shape, dtype=torch.long, device=device)
        if hidden is not None:
            chosen[:, places] = engine.stages[-1].logits(hidden).argmax(-1)
        tokens[:, end] = topology.sum(chosen, "pipeline", "context")[:, end - 1].cpu()
    return tokens


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The largest difference of one tensor, relative to its largest element in the reference.

    `factor`: the tensor is this multiple of the reference; None: of none; NaN: nothing is known (all zeros).
    """

    name: str
    relative: float
    factor: float | None = math.nan

    @property
    def kind(self) -> str:
        """Which of `KINDS`."""
        return self.name.split(" ", 1)[0]


def write_reference(case: Case, path: Path) -> None:
    """Records one process into a file."""
    found = record(case, Topology.single("cpu"))
    write_tensors(path, {name: tensor.contiguous() for name, tensor in found.items()})


def compare_rank(case: Case, sizes: Sizes, path: str) -> list[Difference]:
    """On one rank of the layout: the differences of the tensors that it holds."""
    found = record(case, Topology.of(sizes, "cpu"))
    reference = {tensor.name: tensor.read() for tensor in open_tensors(Path(path))}
    return [_difference(name, value, reference[name]) for name, value in found.items()]


def _difference(name: str, value: torch.Tensor, whole: torch.Tensor) -> Difference:
    scale = whole.double().abs().max().item() if whole.numel() else 0.0
    if is_dtensor(value):  # the same slice of the reference; nothing is sent
        mesh, placements = value.device_mesh, value.placements
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
        value = value.to_local()
    if value.shape != whole.shape:
        return Difference(name, math.inf, None)
    if not value.numel():
        return Difference(name, 0.0)
    value, whole = value.double(), whole.double()
    gap, unit = _largest(value - whole), scale or 1.0
    square = (whole * whole).sum().item()
    if not square:
        return Difference(name, gap / unit, math.nan if gap == 0 else None)
    factor = (value * whole).sum().item() / square
    exact = _largest(value - factor * whole) <= 1e-8 * unit
    return Difference(name, gap / unit, factor if exact else None)


def _largest(x: torch.Tensor) -> float:
    """Of the absolute values; infinite when one is not a number."""
    return torch.nan_to_num(x.abs(), nan=math.inf, posinf=math.inf).max().item()


def compare(
    pool: RankPool, case: Case, sizes: Sizes, reference: Path, *, timeout: float | None = None
) -> list[Difference]:
    """The largest difference of each tensor over the ranks of a layout: causes before effects, then as the model has them.

    A tensor of the reference that no rank holds differs infinitely. Errors: `RankFailure`.
    """
    ranks = pool.run(compare_rank, sizes.world, case, sizes, str(reference), timeout=timeout)
    return collect(case, [tensor.name for tensor in open_tensors(reference)], ranks)


def collect(case: Case, names: Sequence[str], ranks: Sequence[Sequence[Difference]]) -> list[Difference]:
    """What several ranks found, as one list. `names` are those of the reference."""
    with torch.device("meta"):
        parameters = [name for name, _ in class_of(case.model)(case.model).named_parameters()]
    found: dict[str, list[Difference]] = {name: [] for name in names}
    for each in (difference for rank in ranks for difference in rank):
        found[each.name].append(each)
    ordered = sorted(names, key=lambda name: _order(name, parameters))
    return [_worst(name, found[name]) for name in ordered]


def _worst(name: str, ranks: Sequence[Difference]) -> Difference:
    if not ranks:
        return Difference(name, math.inf, None)
    factors = [d.factor for d in ranks if d.factor is None or not math.isnan(d.factor)]
    known = [factor for factor in factors if factor is not None]
    same = len(known) == len(factors) and all(math.isclose(f, known[0], rel_tol=1e-8) for f in known)
    factor = (known[0] if known else math.nan) if same else None
    return Difference(name, max(d.relative for d in ranks), factor)


def _order(name: str, parameters: Sequence[str]) -> tuple[int, int, int]:
    """Causes before effects: what the first step needs, the first step, the weights, and what follows from them."""
    kind, _, rest = name.partition(" ")
    last = rest.rpartition(" ")[2]
    early = ("count", "initial", "evaluation", "loss", "gradient", "norm", "weight")
    first_step = kind not in ("loss", "norm", "evaluation") or last in ("0", "before")
    place = parameters.index(rest) if rest in parameters else 0
    if first_step and kind in early:
        return early.index(kind), place, 0
    return len(early), int(last) if last.isdecimal() else STEPS, KINDS.index(kind)


def by_kind(differences: Sequence[Difference]) -> dict[str, float]:
    """The largest difference of each kind."""
    return {kind: max((d.relative for d in differences if d.kind == kind), default=0.0) for kind in KINDS}


def assert_parity(
    pool: RankPool, case: Case, sizes: Sizes, *, tolerance: float = TOLERANCE, reference: Path | None = None
) -> dict[str, float]:
    """Fails with the first tensors that differ by more than `tolerance`. → the largest difference of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        if reference is None:
            reference = Path(folder) / "reference.safetensors"
            write_reference(case, reference)
        differences = compare(pool, case, sizes, reference)
    wrong = [d for d in differences if not d.relative <= tolerance]
    text = ", ".join(f"{d.name} by {d.relative:.1e}" for d in wrong[:5])
    assert not wrong, f"{sizes.describe()}: {len(wrong)} tensors differ, first {text}"
    return by_kind(differences)


def layouts() -> dict[str, Sizes]:
    """The layouts that the suites know, by name."""
    tp2, tp2_sp = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
    pp2 = {"pipeline": 2}
    interleaved = {"pipeline": 2, "virtual_pipeline": 2, "schedule": "interleaved"}
    zero_bubble = {"pipeline": 2, "virtual_pipeline": 2, "schedule": "zero_bubble"}
    policies: dict[str, dict[str, Any]] = {
        "replicate2": {"replicate": 2},
        "shard_optimizer2": {"shard": 2, "zero_stage": 1},
        "shard_grads2": {"shard": 2, "zero_stage": 2},
        "shard_all2": {"shard": 2, "zero_stage": 3},
    }
    models: dict[str, dict[str, Any]] = {
        "tp2": tp2,
        "tp2+sp": tp2_sp,
        "pp2": pp2,
        "pp2-interleaved": interleaved,
        "pp2-zero-bubble": zero_bubble,
    }
    found = {name: Sizes(**value) for name, value in {**models, **policies}.items()}
    found["tp4"] = Sizes(tensor=4)
    found["tp4+sp"] = Sizes(tensor=4, sequence_parallel=True)
    found["pp4"] = Sizes(pipeline=4)
    for left in ("tp2", "tp2+sp"):
        for right in ("pp2", "pp2-interleaved", "pp2-zero-bubble"):
            found[f"{left}×{right}"] = Sizes(**{**models[left], **models[right]})
    for name, value in models.items():
        for policy, data in policies.items():
            if not (name == "pp2-zero-bubble" and policy == "shard_all2"):
                found[f"{name}×{policy}"] = Sizes(**{**value, **data})
    for policy in ("shard_optimizer2", "shard_grads2", "shard_all2"):
        found[f"replicate2×{policy}"] = Sizes(**{**policies[policy], "replicate": 2})
    found["shard_all4"] = Sizes(shard=4, zero_stage=3)
    for name, value in {
        "tp2": tp2,
        "tp2+sp": tp2_sp,
        "pp2": pp2,
        "pp2-interleaved": interleaved,
        **policies,
    }.items():
        found[f"cp2×{name}"] = Sizes(context=2, **value)
    for stage in (0, 1, 2, 3):
        found["cp2" + f"-zero{stage}" * (stage > 0)] = Sizes(context=2, zero_stage=stage)
    found["cp4"], found["cp4-zero3"] = Sizes(context=4), Sizes(context=4, zero_stage=3)
    return found
