"""NeMo's way to a trainer: `Trainer(plugins=[NLPDDPPlugin()], **cfg.trainer)`, then a model, then `fit`, `validate` or `test`.

    Trainer(devices=…, max_steps=…) ─ judged as the section `trainer` ─▶ Lightning's Trainer with our strategy, no engine yet
    restore_from(…, trainer=trainer) ─▶ a model whose engine the strategy takes when the trainer is given it

Under torchrun it joins its process with the others. Knows keys and processes; no model.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megalith.config.compose import Composed
from megalith.errors import TopologyError
from megalith.nemo.configuration import composed_of, layer_of, plain
from megalith.tasks.pretrain import loop_settings
from megalith.tasks.pretrain_config import PretrainConfig, PretrainGPTConfig
from megalith.tasks.processes import device_of, joined, processes_wanted
from megalith.topology.environment import environment
from megalith.topology.sizes import Sizes
from megalith.topology.topology import started
from megalith.training.config import TrainerConfig
from megalith.training.quiet import quiet
from megalith.training.strategy import MegalithStrategy
from megalith.training.trainer import lightning_trainer, silent_logger


class NLPDDPPlugin:
    """What NeMo's users gave their trainers to make it model parallel: here every trainer is, and this changes nothing."""

    def __init__(self, **arguments: Any) -> None:
        del arguments


NLPDDPStrategy = NLPDDPPlugin
"""Its name from NeMo 1.9 on."""


def Trainer(
    *, plugins: Sequence[Any] = (), strategy: Any = None, callbacks: Sequence[Any] = (), **keys: Any
) -> Any:
    """A `lightning.pytorch.Trainer` for models of `restore_from`; `keys` are those of the section `trainer`.

    `plugins` and `strategy` may be NeMo's NLPDDPPlugin and NLPDDPStrategy; `callbacks` are Lightning's.
    Errors: `ConfigError` for keys and values that cannot be, as on the command line; `TopologyError` for `devices` above one
    without torchrun.
    """
    given = {name: plain(value) for name, value in keys.items()}
    others = [each for each in plugins or () if not isinstance(each, NLPDDPPlugin)]
    given |= {"plugins": others} if others else {}
    given |= {} if strategy is None or isinstance(strategy, NLPDDPPlugin) else {"strategy": strategy}
    composed = trainer_of(given)
    config = composed.config.trainer
    _join(config)
    made = MegalithStrategy(given={"trainer": given})
    on_gpu = device_of(config, environment()).type == "cuda"
    settings = loop_settings(composed.config)
    with quiet():
        return lightning_trainer(
            made,
            settings,
            on_gpu=on_gpu,
            loggers=[silent_logger()],
            callbacks=list(callbacks or ()),
            saves=False,
        )


def trainer_of(given: Mapping[str, Any]) -> Composed[PretrainConfig]:
    """The section `trainer` of these keys, judged. Errors: `ConfigError`."""
    return composed_of(PretrainGPTConfig, [layer_of("Trainer", {"trainer": given})], Path("Trainer"))


def exp_manager(trainer: Any, cfg: Mapping[str, Any] | None = None) -> None:
    """NeMo's `exp_manager(trainer, cfg.exp_manager)`: `trainer.fit` writes the run's folder, metrics and checkpoints as it says.

    Without this call `fit` writes nothing; a model restored before it does not know of it.
    """
    if cfg is not None:
        strategy_of(trainer).given["exp_manager"] = plain(cfg)


def strategy_of(trainer: Any) -> MegalithStrategy:
    """The strategy of a trainer. Errors: `TopologyError` for a trainer of another kind."""
    strategy = getattr(trainer, "strategy", None)
    if isinstance(strategy, MegalithStrategy):
        return strategy
    raise TopologyError(
        f"it has Lightning's own strategy ({type(strategy).__name__}), which does not know model parallelism",
        where="trainer",
        fix="megalith.Trainer(**cfg.trainer), or lightning.pytorch.Trainer(strategy=MegalithStrategy(), …)",
    )


def _join(config: TrainerConfig) -> None:
    """Become one of the started processes, until this one ends. Errors: `TopologyError` for processes that nobody started."""
    if environment() is None:
        wanted = 1 if config.num_devices is None else processes_wanted(config, Sizes())
        if wanted > started()[1]:
            raise TopologyError(
                f"{wanted} devices, and this is one process",
                where="trainer.devices",
                fix=f"start the script with torchrun --nproc-per-node {wanted} {Path(sys.argv[0]).name or 'script.py'}",
            )
        return
    if started()[1] > 1:
        return
    around = ExitStack()
    around.enter_context(joined(config))

    def leave() -> None:
        error = getattr(sys, "last_exc", None)
        around.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)

    atexit.register(leave)
