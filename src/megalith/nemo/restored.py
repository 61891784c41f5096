"""From a configuration and an archive to an engine with the archive's weights, on the layout that this process belongs to.

    tokenizer ─ architecture ─ same model? ─ topology ─ engine ─ weights ─▶ Restored ─ data, when somebody asks for it

The parts are those of `megalith pretrain`. Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalith.checkpoint.native import Checkpointer
from megalith.config.compose import Composed
from megalith.engine.engine import Engine
from megalith.errors import ConfigError, Problem
from megalith.models.config import ModelConfig
from megalith.models.family import describe
from megalith.nemo.archive import Archive
from megalith.nemo.configuration import NO_FILES
from megalith.tasks.alike import same_configuration
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_data import Data, open_data
from megalith.tasks.pretrain_parts import (
    Machine,
    Parts,
    check_same_model,
    make_engine,
    make_machine,
    settle_process,
)
from megalith.tasks.processes import agreed, in_turn, make_topology
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.topology import Topology
from megalith.training.experiment import Experiment, choose_folder
from megalith.training.metrics import Meter
from megalith.training.saving import Saver
from megalith.training.starting import Start, choose_start


@dataclass(frozen=True)
class Restored:
    """Everything of a restored model; `notices`: what a person should know."""

    composed: Composed[PretrainConfig]
    archive: Archive
    tokenizer: Tokenizer | None
    architecture: ModelConfig
    experiment: Experiment
    machine: Machine
    meter: Meter
    engine: Engine
    saver: Saver
    notices: tuple[str, ...]

    @property
    def topology(self) -> Topology:
        """Who this process is among the model's."""
        return self.machine.topology

    def needs_tokenizer(self) -> Tokenizer:
        """Errors: `ConfigError` where neither the archive nor the configuration has one."""
        if self.tokenizer is None:
            what = f"{self.archive.folder} holds no tokenizer that can be read"
            raise ConfigError([Problem("model.tokenizer", what, "override it: tokenizer: {file: FOLDER}")])
        return self.tokenizer

    def start(self, config: PretrainConfig) -> Start:
        """From where a run of this configuration goes on: its folder's newest checkpoint, or these weights.

        Errors: those of `choose_start`, and `CheckpointError` where the folder's checkpoints are another model's.
        """
        manager = config.exp_manager
        found = agreed(
            self.topology,
            lambda: choose_start(
                self.experiment.checkpoints,
                resume_if_exists=manager.resume_if_exists,
                ignore_no_checkpoint=manager.resume_ignore_no_checkpoint,
                resume_from=config.model.resume_from_checkpoint,
            ),
        )
        if found.kind != "resume" or found.folder is None:
            return self.fresh
        check_same_model(found.folder, config, self.architecture, self.tokenizer)
        return found

    @property
    def fresh(self) -> Start:
        """These weights, at step 0."""
        return Start("weights", self.archive.folder, {"init_from": str(self.archive.folder)})

    def data(
        self, config: PretrainConfig, splits: Sequence[str], state: Mapping[str, Any] = MappingProxyType({})
    ) -> Data:
        """Token files of these splits, of a run whose checkpoint's `state` says what it has read. Errors: those of `open_data`."""
        data = config.model.data
        if data.data_prefix == NO_FILES or (data.train_data_path == NO_FILES and "train" in splits):
            fix = "model.setup_test_data({'data_prefix': [...]}), or data_prefix in override_config_path"
            raise ConfigError([Problem("model.data.data_prefix", "names no files", fix)])
        tokenizer, notices = self.needs_tokenizer(), list[str]()
        return in_turn(
            self.topology,
            lambda: open_data(
                config, tokenizer, self.topology, vocab_size=self.architecture.vocab_size, splits=splits,
                stored=state.get("data_plan"), step=int(state.get("step", 0)),
                consumed=int(state.get("consumed_samples", 0)), notice=notices.append,
            ),
        )  # fmt: skip

    def parts(self, data: Data, start: Start) -> Parts:
        """As a run that begins there."""
        return Parts(
            self.composed, self.needs_tokenizer(), self.architecture, self.experiment, start, self.machine,
            self.meter, data, self.engine,
        )  # fmt: skip


def restore(composed: Composed[PretrainConfig], archive: Archive, *, strict: bool = True) -> Restored:
    """Build and fill. Every process of the run calls it alike.

    Not `strict`: tensors that only the model or only the archive has begin anew or are left out, and are told.
    Errors: `CheckpointError` with both values for an override that makes another model; those of the parts.
    """
    config = composed.config
    settle_process(config)
    same_configuration(composed.yaml())
    tokenizer = _tokenizer(config, archive)
    architecture = config.model.architecture(
        archive.architecture.vocab_size if tokenizer is None else tokenizer.vocab_size
    )
    topology = make_topology(config, architecture)
    if strict:
        check_same_model(archive.folder, config, architecture, tokenizer)
    experiment = agreed(topology, lambda: choose_folder(config.exp_manager))
    machine, meter = make_machine(config, architecture, topology)
    engine = make_engine(config, architecture, machine)
    extra = describe(config.model.family, architecture)
    saver = Saver(
        engine, Checkpointer(experiment.checkpoints, topology), config_yaml=composed.yaml(), extra=extra
    )
    left = saver.load_weights(archive.folder, strict=strict)
    notices = (*archive.notices, *composed.notices, *left)
    return Restored(
        composed, archive, tokenizer, architecture, experiment, machine, meter, engine, saver, notices
    )


def _tokenizer(config: PretrainConfig, archive: Archive) -> Tokenizer | None:
    """The one that was typed, else the archive's own."""
    if config.model.tokenizer.model_fields_set:
        return load_tokenizer(config.model.tokenizer)
    return None if archive.tokens is None else load_tokenizer(Path(archive.tokens))
