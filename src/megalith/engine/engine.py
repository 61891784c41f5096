"""One optimizer step on any layout: micro-batches, division, clipping, skipping, update, and what must be saved of it.

Knows counters, precision and the optimizer. Knows no loop, no files and no Lightning. All of its tensors share memory
with the live ones, and all the rest of its state is JSON.

    batch ─ prepare ─ accumulate ─▶ .grad ─ norm ─ finite? ─ clip ─ rates ─ update
                                                └ no: skip, count, lower the loss scale
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from megalith.engine.batch import LossAverage, Share, place, prepare, split
from megalith.engine.local import counted_here, like, local_parameter, place_gradient
from megalith.engine.objective import Batch, CausalLanguageModel, Objective
from megalith.engine.step import Forward, accumulate, finish_gradients, require_gradients, run_pipeline
from megalith.errors import CheckpointError, ConfigError, Problem, TrainingStopped
from megalith.optim.adamw import make_optimizer, moment_names, set_updates
from megalith.optim.clip import clip_, gradient_norm
from megalith.optim.config import OptimConfig
from megalith.optim.groups import parameter_groups, set_rates
from megalith.optim.scaler import DynamicScaler, Scaler, make_scaler
from megalith.optim.schedule import Counters, Schedule
from megalith.parallel.data import reshard
from megalith.topology.precision import precision as precision_of
from megalith.topology.topology import Topology

logger = logging.getLogger(__name__)
COUNTERS = ("step", "consumed_samples", "consumed_tokens", "skipped", "skipped_in_a_row")


@dataclass(frozen=True)
class StepResult:
    """What one step did. Losses are means over the global batch's targets; the norm is before clipping."""

    loss: float
    terms: dict[str, float]
    grad_norm: float
    lr: float
    skipped: bool
    tokens: int
    samples: int
    loss_scale: float


class Engine:
    """A model with its optimizer, and the one way to move both.

    `clip`: largest gradient norm, 0 for none; `max_skipped`: skipped steps in a row that stop the run;
    `loss_average`: see `batch.prepare`; `frozen`: patterns of parameter names that stay as they are; `keep`: what of the model a
    checkpoint holds, all of it or what trains.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        topology: Topology,
        *,
        optim: OptimConfig,
        schedule: Schedule,
        seed: int,
        micro_batch_size: int,
        precision: str = "32",
        clip: float = 1.0,
        max_skipped: int = 100,
        loss_average: LossAverage = "tokens",
        scaler: Scaler | None = None,
        objective: Objective | None = None,
        frozen: Sequence[str] = (),
        keep: Literal["all", "trainable"] = "all",
    ) -> None:
        self.stages, self.topology, self.schedule, self.seed = list(stages), topology, schedule, seed
        self.micro_batch_size, self.clip, self.max_skipped = micro_batch_size, clip, max_skipped
        self.loss_average: LossAverage = loss_average
        self.objective, self.keep = objective or CausalLanguageModel(), keep
        self.scaler = scaler or make_scaler(precision_of(precision).name)
        self.parameters = {name: p for stage in self.stages for name, p in stage.named_parameters()}
        freeze(self.parameters, frozen, lambda counts: topology.sum(counts.to(topology.device), "pipeline"))
        self.forward = Forward(self.stages, self.objective, topology)
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.local = {name: local_parameter(p) for name, p in self.trainable.items()}
        """Plain tensors that share memory with the trainable parameters: what the optimizer moves."""
        counts = self.forward.pipeline.counts if self.forward.pipeline else lambda name: True
        self._counted = {
            name for name, p in self.trainable.items() if counts(name) and counted_here(p, topology)
        }
        groups = parameter_groups(self.local.items(), optim.weight_decay)
        self.optimizer, self._moments = make_optimizer(groups, optim), moment_names(optim)
        self.step = self.consumed_samples = self.consumed_tokens = 0
        self.skipped = self.skipped_in_a_row = 0
        self.done = Counters()
        """Successful updates and what they consumed; the schedule's argument."""
        self.lr = self.grad_norm = 0.0
        self._share: Share | None = None
        self._checked = False

    @property
    def model(self) -> nn.Module:
        """The model, when this process holds all of it in one stage."""
        (stage,) = self.stages
        return stage

    # -- one step ------------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, update: Callable[[], Any] | None = None) -> StepResult:
        """Forward, backward and update on this data rank's share of a global batch.

        `update` stands for `optimizer_step` where a trainer wants to be asked: it must call it and return what it returns.
        """
        scale = self.scaler.scale
        terms = self.forward_backward(batch)
        assert self._share is not None
        share = self._share
        # Read before the update, as the norm is: a GPU then works on the update while the next batch is being made.
        values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
        updated = (update or self.optimizer_step)()
        return StepResult(
            loss=values.pop("loss"),
            terms=values,
            grad_norm=self.grad_norm,
            lr=self.lr,
            skipped=not updated,
            tokens=share.tokens,
            samples=share.samples,
            loss_scale=scale,
        )

    def forward_backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Gradients of the mean loss into `.grad`. → that mean, "loss", and each term's. `optimizer_step` must follow.

        A batch without any target has no mean: nothing runs, the loss is 0 and the step will be skipped.
        """
        self.zero_gradients()
        for stage in self.stages:
            stage.train()
        share = self._share = prepare(
            batch,
            self.objective,
            self.topology,
            micro_batch_size=self.micro_batch_size,
            average=self.loss_average,
        )
        zero = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        if share.empty:
            return {**dict.fromkeys(share.counts, zero), "loss": zero}
        run = run_pipeline if self.forward.pipeline else accumulate
        terms = run(self.forward, share, seed=self.seed, step=self.step, scale=self.scaler.scale)
        if not self._checked:
            require_gradients(self.trainable)
            self._checked = True
        finish_gradients(self.forward, self.parameters)
        found = torch.stack([terms.get(name, zero).double() for name in (*share.counts, "loss")])
        found = self.topology.sum(found, "pipeline", "replicate", "shard", "context")
        return dict(zip((*share.counts, "loss"), found, strict=True))

    def optimizer_step(self) -> bool:
        """Clip and update, or skip: without targets or with a gradient that is not finite nothing moves but the counters.

        → whether the update happened. Errors: `TrainingStopped` after `max_skipped` skips in a row.
        """
        share, self._share = self._share, None
        if share is None:
            raise RuntimeError("optimizer_step needs a forward_backward before it")
        this = Counters(1, share.samples, share.tokens)
        self.lr = self.schedule.lr(self.done, this)
        for name, parameter in self.trainable.items():
            place_gradient(parameter, self.local[name])
        gradients = {name: p.grad for name, p in self.local.items() if p.grad is not None}
        counted = [gradient for name, gradient in gradients.items() if name in self._counted]
        scale = self.scaler.scale
        norm = gradient_norm(counted, reduce=self._sum_over_model).item() / scale
        self.grad_norm = norm
        usable = math.isfinite(norm) and not share.empty
        if not share.empty:
            self.scaler.update(not usable)
        if usable:
            self._update(list(gradients.values()), norm, scale, this)
        else:
            self._count_skip(share)
        self.step += 1
        self.consumed_samples += share.samples
        self.consumed_tokens += share.tokens
        if self.skipped_in_a_row >= self.max_skipped:
            raise self._stopped()
        return usable

    def _update(self, gradients: list[torch.Tensor], norm: float, scale: float, this: Counters) -> None:
        if scale != 1.0:
            for gradient in gradients:
                gradient.div_(scale)
        clip_(gradients, norm, self.clip)
        set_rates(self.optimizer, self.lr, self.schedule.weight_decay(self.done, this))
        self.optimizer.step()
        self.done = self.done + this
        self.skipped_in_a_row = 0

    def _count_skip(self, share: Share) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        why = "no target in the whole batch" if share.empty else f"the gradient norm is {self.grad_norm}"
        # A dynamic scale finds its level by overflowing: that is its work, not an alarm.
        normal = isinstance(self.scaler, DynamicScaler) and not share.empty
        level = logging.INFO if normal else logging.WARNING
        logger.log(level, "step %d skipped: %s (loss scale %g)", self.step, why, self.scaler.scale)

    def _stopped(self) -> TrainingStopped:
        return TrainingStopped(
            f"{self.skipped_in_a_row} steps in a row were skipped; the last gradient norm was {self.grad_norm}, "
            f"the loss scale is {self.scaler.scale:g}, {self.consumed_samples} samples are consumed",
            where=f"step {self.step}",
            fix="lower the learning rate or lengthen its warm-up; use bf16-mixed instead of 16-mixed; look at the "
            "batches with --show-batch; resume from an earlier checkpoint",
        )

    def _sum_over_model(self, total: torch.Tensor) -> torch.Tensor:
        sizes = self.topology.sizes
        context = ("context",) if sizes.sharing > sizes.shard else ()
        return self.topology.sum(total.to(self.topology.device), "pipeline", "shard", *context, "tensor")

    def zero_gradients(self) -> None:
        """Forget all gradients and give their memory back."""
        for parameter in (*self.parameters.values(), *self.local.values()):
            parameter.grad = None

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, tuple[float, int]]:
        """Exact sum and count of each term over batches (this data rank's shares); mean = sum / count. No dropout."""
        totals: dict[str, tuple[float, int]] = {}
        for stage in self.stages:
            stage.eval()
        for batch in batches:
            for micro in split(batch, self.micro_batch_size):
                for name, (value, count) in self.forward.evaluate(place(micro, self.topology)).items():
                    before, number = totals.get(name, (0.0, 0))
                    totals[name] = before + value.item(), number + int(count)
        for stage in self.stages:
            reshard(stage)
            stage.train()
        return totals

    # -- what a checkpoint holds ---------------------------------------------------------------------------------

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight of the model by its name behind "model.", frozen or not, sharing memory with the live one.

        What is shared between processes is a DTensor, of which this process holds a part.
        """
        for stage in self.stages:
            reshard(stage)
        return {f"model.{name}": p.detach() for name, p in self.parameters.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor to save, by name, as `weights` are: loading into them loads the engine.

        Where only what trains is kept, frozen weights come from where they came from at first.
        """
        found = self.weights()
        if self.keep == "trainable":
            found = {name: found[name] for name in (f"model.{n}" for n in self.trainable)}
        for name, parameter in self.trainable.items():
            state = self.optimizer.state[self.local[name]]
            found |= {f"optim.{name}.{moment}": like(parameter, state[moment]) for moment in self._moments}
        return found

    def state_dict(self) -> dict[str, Any]:
        """All the rest, as JSON."""
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "updates": asdict(self.done),
            "scaler": self.scaler.state_dict(),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; load `tensors()` besides. The seed is the saved run's: masks depend on it."""
        missing = {*COUNTERS, "updates", "scaler", "seed"} - state.keys()
        if missing:
            raise CheckpointError(f"no {', '.join(sorted(missing))}", where="engine state")
        for name in COUNTERS:
            setattr(self, name, int(state[name]))
        self.done = Counters(**state["updates"])
        self.scaler.load_state_dict(state["scaler"])
        self.seed = int(state["seed"])
        set_updates(self.optimizer, self.done.step)
        self.zero_gradients()


def freeze(
    parameters: dict[str, nn.Parameter],
    patterns: Sequence[str],
    everywhere: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Switch gradients off where a pattern matches. Errors: `ConfigError` for a pattern that matches nothing.

    `everywhere` adds up how many parameters of each stage match, for one stage need not have any.
    """
    if not patterns:
        return
    matched = {pattern: [n for n in parameters if re.search(pattern, n)] for pattern in patterns}
    counts = everywhere(torch.tensor([len(names) for names in matched.values()])).tolist()
    problems = [
        Problem("frozen", f"no parameter matches {pattern!r}", f"names look like {next(iter(parameters))}")
        for pattern, count in zip(matched, counts, strict=True)
        if not count
    ]
    if problems:
        raise ConfigError(problems)
    for names in matched.values():
        for name in names:
            parameters[name].requires_grad_(False)
