"""A training step of one rank on tensors without numbers, among processes that do not answer.

    meta model ─ the real passes ─▶ fake weights ─ the real micro-batches, schedules, collectives ─▶ Rehearsal
                                                    └ Ledger: memory      └ Traffic: bytes sent

Nothing is estimated: the code that trains runs, shapes and all, for as many micro-batches as it takes until they repeat.
Numbers do not exist, so it takes neither the memory nor the time of the real thing. Blocks run uncompiled, and samples are
one document each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megalith.engine.batch import Share, place
from megalith.engine.flops import Sample
from megalith.engine.local import local_parameter
from megalith.engine.objective import Batch, objective_of
from megalith.engine.step import Forward, accumulate, finish_gradients, run_pipeline
from megalith.models.bert_config import BertConfig
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.heads import MaskedHead
from megalith.models.stack import named_blocks
from megalith.nn.loss import CHUNK, CrossEntropy
from megalith.optim.adamw import make_optimizer
from megalith.optim.config import OptimConfig
from megalith.optim.groups import parameter_groups
from megalith.parallel.apply import build
from megalith.parallel.memory import Recompute
from megalith.tools.plan.ledger import BATCH, EXCHANGE, P2P, WORKING, Ledger, local_tensor
from megalith.tools.plan.shapes import count_targets, pretend, shapes_of
from megalith.topology.launch import fake
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from megalith.topology.traffic import Sent, Traffic

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
GATHERED, ACTIVATIONS, LOSS = "gathered weights", "activations", "logits and loss"
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, GATHERED, EXCHANGE, ACTIVATIONS, P2P, LOSS, BATCH, WORKING)
FORWARD, BACKWARD, END = "forward", "backward", "end of the backward"
"""Phases whose peaks are kept apart, for each is a linear function of the number of layers, and their largest is not."""


@dataclass(frozen=True)
class Case:
    """What is rehearsed: a model, how a step of it is computed, and the layout.

    `length`: of an encoder-decoder the encoder's; `targets`: how many tokens of a row are predicted (None: all).
    """

    model: ModelConfig
    sizes: Sizes
    micro_batch: int
    micro_batches: int
    length: int
    decoder_length: int = 0
    targets: float | None = None
    precision: str = "32"
    recompute: Recompute | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    on_gpu: bool = False
    """Logits are made in larger chunks there."""
    seed: int = 1

    @property
    def sample(self) -> Sample:
        """What one sample holds."""
        return Sample(self.length, self.decoder_length, self.targets)


@dataclass(frozen=True)
class Rehearsal:
    """What one rank holds and sends. Bytes.

    `rest`: what it keeps from step to step; `peaks`: everything at the moment of each phase when it is most, by part;
    `kept`: activations that one micro-batch leaves behind the forward of one stage; `sent`: of a whole step, by
    (axis, operation). `count`: micro-batches that were rehearsed.
    """

    rest: Counter[str]
    peaks: dict[str, Counter[str]]
    kept: int
    sent: Sent
    count: int


def rehearse(case: Case, stage: int = 0) -> Rehearsal:
    """The step of the first process of a pipeline rank. Errors: those of `parallel.build` for a layout that cannot be."""
    sizes = case.sizes
    rank = stage * (sizes.world // sizes.pipeline)
    with fake(sizes.world, rank=rank):
        topology = Topology.of(sizes, "cpu")
        stages = build(
            shapes_of(case.model), case.model, topology,
            seed=case.seed, precision=case.precision, recompute=case.recompute, device=torch.device("meta"),
        )  # fmt: skip
        forward = Forward(stages, objective_of(case.model), topology)
        with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger, Traffic(topology) as traffic:
            return Run(case, forward, ledger, traffic).result()


class Run:
    """One rehearsal under way."""

    def __init__(self, case: Case, forward: Forward, ledger: Ledger, traffic: Traffic) -> None:
        self.case, self.forward, self.ledger, self.traffic = case, forward, ledger, traffic
        self.count = rehearsed(case.sizes, case.micro_batches)
        self.kept = 0
        self.marks: list[Sent] = []
        self.watched: dict[int, nn.Parameter] = {}

    def result(self) -> Rehearsal:
        """Hold everything, run the micro-batches, and look."""
        optimizer = self._hold()
        self._listen()
        case, share = self.case, self._share()
        run = run_pipeline if self.forward.pipeline else accumulate
        if self.forward.pipeline is not None:
            self.ledger.context = BATCH
            if case.sizes.schedule != "1f1b":
                self.ledger.sent = []  # these schedules wait for all their sends at the end
        run(self.forward, share, seed=case.seed, step=0)
        self.ledger.sent = None
        self.marks.append(self.traffic.sent.copy())
        parameters = {name: p for part in self.forward.stages for name, p in part.named_parameters()}
        finish_gradients(self.forward, parameters)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        self.ledger.assign(GRADIENTS, *gradients)
        peaks, sent = self.ledger.peaks(), self._sent()
        state = [t for held in optimizer.state.values() for t in held.values()]
        rest = {WEIGHTS: list(parameters.values()), GRADIENTS: gradients, OPTIMIZER: state}
        sizes = Counter({part: self._size(tensors) for part, tensors in rest.items()})
        return Rehearsal(sizes, peaks, self.kept, sent, self.count)

    def _size(self, tensors: list[torch.Tensor]) -> int:
        pieces = {id(p): p.size for p in map(self.ledger.piece, map(local_tensor, tensors)) if p is not None}
        return sum(pieces.values())

    # -- before --------------------------------------------------------------------------------------------------

    def _hold(self) -> torch.optim.Optimizer:
        """Fake memory for the weights, and an optimizer over them."""
        for stage in self.forward.stages:
            for module in stage.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    module.register_parameter(name, pretend(parameter))
                if isinstance(module, CrossEntropy) and self.case.on_gpu:
                    module.chunk = CHUNK["cuda"]
                if isinstance(module, MaskedHead):
                    count_targets(module, self.case.targets or self.case.length)
            stage.train()
        parameters = {name: p for stage in self.forward.stages for name, p in stage.named_parameters()}
        local = {name: local_parameter(p) for name, p in parameters.items()}
        optimizer = make_optimizer(
            parameter_groups(local.items(), self.case.optim.weight_decay), self.case.optim
        )
        self.ledger.assign(WEIGHTS, *local.values())
        self.ledger.assign(OPTIMIZER, *(t for state in optimizer.state.values() for t in state.values()))
        return optimizer

    def _listen(self) -> None:
        """Hooks that tell the ledger what tensors are for, and when a micro-batch begins."""
        for stage in self.forward.stages:
            stage.register_forward_pre_hook(self._begin)
            blocks = list(named_blocks(stage).values())
            for module in (stage, *blocks):
                module.register_forward_pre_hook(self._watch)
            stage.register_forward_hook(self._end)
            blocks[0].register_forward_hook(self._first_block)
            for module in stage.modules():
                if isinstance(module, CrossEntropy):
                    module.register_forward_pre_hook(lambda *_: self._context(LOSS))
                    module.register_forward_hook(lambda *_: self._after_loss())

    def _begin(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.marks.append(self.traffic.sent.copy())
        for piece in map(self.ledger.piece, inputs):
            if piece is not None and not module.first:  # asked for before the first forward
                piece.context = WORKING
        self.ledger.context = WORKING
        self.ledger.enter_phase(FORWARD)

    def _end(self, *_: Any) -> None:
        self.ledger.assign_rest(ACTIVATIONS)
        self.kept = self.kept or self.ledger.alive(ACTIVATIONS)
        if self.forward.stages[-1].last:
            return  # the loss follows
        self.ledger.enter_phase(BACKWARD)

    def _first_block(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Its backward is the last of the blocks'."""
        output.register_hook(lambda gradient: self.ledger.enter_phase(END))

    def _context(self, part: str) -> None:
        self.ledger.context = part

    def _after_loss(self) -> None:
        self.ledger.context = WORKING
        self.ledger.enter_phase(BACKWARD)

    def _watch(self, module: nn.Module, *_: Any) -> None:
        """Parameters as they are in a forward: FSDP2 has put gathered ones in place of what this rank keeps."""
        for parameter in module.parameters():
            if id(parameter) in self.watched:
                continue
            self.watched[id(parameter)] = parameter
            piece = self.ledger.piece(local_tensor(parameter))
            if piece is not None and piece.part != WEIGHTS:
                piece.part = GATHERED
            parameter.register_post_accumulate_grad_hook(lambda p: self.ledger.assign(GRADIENTS, p.grad))

    def _share(self) -> Share:
        """Micro-batches of full samples."""
        case, count = self.case, self.count
        micro = empty_batch(case)
        tokens = case.micro_batch * case.sample.tokens * count
        terms = list(self.forward.objective.counts(micro))
        return Share(
            [place(micro, self.forward.topology)] * count,
            [dict.fromkeys(terms, 1.0)] * count,
            dict.fromkeys(terms, tokens),
            case.micro_batch * count,
            tokens,
        )

    # -- after ---------------------------------------------------------------------------------------------------

    def _sent(self) -> Sent:
        """Of a whole step: micro-batches repeat."""
        count, marks = self.count, self.marks
        once = self.traffic.sent - marks[-1]
        more = self.case.micro_batches - count
        if self.forward.pipeline is None:
            each = [after - before for before, after in pairwise(marks)]
            return once + marks[-1] + _times(each[count // 2], more)
        alike = {key: size for key, size in marks[-1].items() if key[0] in ("tensor", "context", "pipeline")}
        # Data-parallel ranks exchange once, or, where weights are shared, with the forward and backward of each stage.
        steady = (marks[-2] - marks[-3]) - Counter(alike) if more else Counter()
        shared = (
            _times(steady, more * len(self.forward.stages)) if self.case.sizes.zero_stage == 3 else Counter()
        )
        return once + marks[-1] + _times(Counter(alike), more / count) + shared


def empty_batch(case: Case) -> Batch:
    """A micro-batch of zeros with everything that the family's has but lengths, for no row is padded."""
    rows = case.micro_batch
    read = torch.zeros(rows, case.length, dtype=torch.long)
    written = torch.zeros(rows, case.decoder_length, dtype=torch.long) if case.decoder_length else read
    batch: Batch = {
        "tokens": written,
        "targets": written.clone(),
        "sample": torch.zeros(rows, dtype=torch.long),
    }
    if isinstance(case.model, EncoderDecoderConfig):
        batch["encoder_tokens"] = read
    if isinstance(case.model, BertConfig):
        batch |= {"types": torch.zeros_like(read), "order": torch.zeros(rows, dtype=torch.long)}
    return batch


def _times(sent: Sent, factor: float) -> Sent:
    return Counter({key: round(size * factor) for key, size in sent.items()})


def rehearsed(sizes: Sizes, count: int) -> int:
    """After how many micro-batches nothing new happens: all stages are full, and one or two have left."""
    if sizes.pipeline == 1:
        return min(count, 3 if sizes.copies > 1 else 2)
    if sizes.schedule != "1f1b":
        return min(count, 2 * sizes.pipeline)
    return min(count, sizes.pipeline + (2 if sizes.zero_stage == 3 else 1))
