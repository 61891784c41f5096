"""Lightning as the loop only. The processes, the model, the update and the checkpoint belong to the engine.

    Trainer ─ training_step ─▶ engine.forward_backward
              LightningOptimizer.step ─▶ MegalithStrategy.optimizer_step ─▶ engine.optimizer_step
              save_checkpoint(path) ─▶ MegalithStrategy.save_checkpoint ─▶ saver

The base class is `Strategy`, not `ParallelStrategy`: no launcher, no process group, no sampler of Lightning's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only

from megalith.checkpoint.files import remove_tree
from megalith.checkpoint.foreign import find
from megalith.checkpoint.layout import step_of
from megalith.checkpoint.native import Checkpointer
from megalith.engine.engine import Engine
from megalith.errors import UnsupportedError
from megalith.topology.sizes import AXES
from megalith.topology.topology import Topology, started
from megalith.training.loop_state import checkpoint_dict
from megalith.training.module import MegalithModule
from megalith.training.saving import Saver


class MegalithStrategy(Strategy):
    """Runs an engine under `Trainer(strategy=MegalithStrategy(engine, saver), devices=1, …)`.

    Without an engine it takes the one of the module that the trainer is given; `given` are the trainer's keys, for those who
    build that module.
    """

    engine: Engine
    saver: Saver

    def __init__(
        self,
        engine: Engine | None = None,
        saver: Saver | None = None,
        *,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.given = dict(given or {})
        self.topology = Topology()
        self.global_rank, self.world_size = started()
        self.local_rank = self.node_rank = 0
        self._trainer: pl.Trainer | None = None
        if engine is not None and saver is not None:
            self._adopt(engine, saver)
        rank_zero_only.rank = self.global_rank  # Lightning's loggers and warnings ask this

    def _adopt(self, engine: Engine, saver: Saver) -> None:
        self.engine, self.saver, self.topology = engine, saver, engine.topology
        self.global_rank, self.world_size = self.topology.global_rank, self.topology.sizes.world

    def connect(self, model: pl.LightningModule) -> None:
        """Also take the engine of a module that brings its own saver."""
        super().connect(model)
        if isinstance(model, MegalithModule) and model.saver is not None:
            self._adopt(model.engine, model.saver)
        if not hasattr(self, "engine"):
            raise UnsupportedError(
                f"a {type(model).__name__} has no engine of Megalith's",
                where="trainer",
                fix="give it a model that megalith.GPTModel.restore_from (BertModel, T5Model, BARTModel) returned",
            )

    # -- where ---------------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """Where the engine computes."""
        return self.topology.device

    @property
    def is_global_zero(self) -> bool:
        """Is this the process that writes?"""
        return self.topology.is_main

    def model_to_device(self) -> None:
        """Nothing: the engine built the model in place."""

    def setup(self, trainer: pl.Trainer) -> None:
        """Also remember the trainer, whose loops `load_checkpoint` sets."""
        self._trainer = trainer
        if isinstance(module := self.lightning_module, MegalithModule) and module.saver is not None:
            self._adopt(module.engine, module.saver)
        super().setup(trainer)

    def teardown(self) -> None:
        """Never leave under a half-written checkpoint; the optimizer's state stays on its device."""
        self._reset_optimizers_and_schedulers()
        super().teardown()
        if hasattr(self, "saver"):
            self.saver.wait()

    # -- between processes ---------------------------------------------------------------------------------------

    def barrier(self, name: str | None = None) -> None:
        """Wait for every process."""
        self.topology.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The main process's, on all; `src` is always 0."""
        return self.topology.agree(obj)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Of metrics that differ by data rank. The engine's own losses are global already."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        total = self.topology.sum(tensor.clone(), "replicate", "shard")
        return total / self.topology.data_size if str(reduce_op).lower() in ("mean", "avg") else total

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Do all (or any) processes say yes?"""
        votes = self.topology.sum(torch.tensor(float(decision), device=self.root_device), *AXES)
        return bool(votes >= self.world_size) if all else bool(votes > 0)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """Every process's tensor, stacked."""
        return self.topology.all_gather(tensor)

    # -- the step ------------------------------------------------------------------------------------------------

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> bool:
        """The engine's; Lightning's wrapper around it advances `trainer.global_step`."""
        closure()
        return self.engine.optimizer_step()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Loading needs the trainer."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The engine restores it."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the module tree is empty."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the engine saves it."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save the engine natively: as `filepath` if that is called like a step folder, else as a step folder in it.

        Of Lightning's own dictionary only the states of other people's callbacks are kept.
        """
        path = Path(filepath).absolute()
        root = path.parent if step_of(path.name) is not None else path
        callbacks = {
            key: _plain(value, key) for key, value in checkpoint.get("callbacks", {}).items() if value
        }
        module, saver = self.lightning_module, self.saver
        metrics = module.metrics() if isinstance(module, MegalithModule) else {}
        if root != saver.root:
            tokenizer, extra = saver.tokenizer, saver.extra
            elsewhere = Checkpointer(root, self.topology)
            saver = Saver(
                self.engine, elsewhere, config_yaml=saver.config_yaml, tokenizer=tokenizer, extra=extra
            )
        saver.save(metrics, {"callbacks": callbacks} if callbacks else None)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the engine from a run, checkpoints or step folder, and tell Lightning where the loop stands."""
        assert self._trainer is not None, "Lightning calls setup first (restore_checkpoint_after_setup)"
        state = self.saver.load(find(checkpoint_path).folder)
        return checkpoint_dict(self._trainer, self.engine.step, state.get("loop", {}).get("callbacks", {}))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Done by `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Done by `load_checkpoint`."""

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a step folder."""
        if self.is_global_zero and step_of(Path(filepath).name) is not None:
            remove_tree(Path(filepath))


def _plain(value: Any, where: str) -> Any:
    """A callback's state as JSON. Errors: `UnsupportedError` for what only a pickle could hold."""
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, dict):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedError(
        f"the state of this callback holds a {type(value).__name__}, which JSON cannot",
        where=where,
        fix="let its state_dict return numbers, strings, lists and dictionaries",
    )
