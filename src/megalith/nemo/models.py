"""`GPTModel`, `BertModel`, `T5Model`, `BARTModel`: models with NeMo's methods, for a trainer of `nemo.trainer` or Lightning's.

restore_from(path | name, trainer=…, override_config_path=…) ─▶ model ─ fit, validate, test (the trainer's)
                                                                     ├ generate ─▶ texts, or guesses of a BERT
                                                                     └ save_to("x.nemo") ─▶ one part a rank
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from megalith.errors import CheckpointError
from megalith.nemo.answering import answers
from megalith.nemo.archive import Archive, open_any
from megalith.nemo.configuration import Asked, Override, composed_of, configure, layer_of, plain
from megalith.nemo.fitting import Fitting
from megalith.nemo.published import PretrainedModelInfo, available, known
from megalith.nemo.restored import Restored, restore
from megalith.nemo.saving import save_nemo
from megalith.nemo.trainer import strategy_of
from megalith.tasks.pretrain_config import ROOTS
from megalith.tasks.pretrain_data import Data
from megalith.tasks.pretrain_model import PretrainModelConfig
from megalith.tokenizers.base import Tokenizer
from megalith.topology.topology import started
from megalith.training.module import MegalithModule, Validation
from megalith.training.starting import Start
from megalith.training.trainer import Batches

logger = logging.getLogger(__name__)


class NemoModel(MegalithModule):
    """What all four have in common. `cfg` is the section `model` of its configuration, `notices` what a person should know."""

    family: ClassVar[str]

    def __init__(self, restored: Restored) -> None:
        super().__init__(restored.engine)
        object.__setattr__(self, "restored", restored)
        self.saver = restored.saver
        self.notices = restored.notices
        self._config = restored.composed.config
        self._start: Start | None = None
        self._fitting: Fitting | None = None

    restored: Restored

    @property
    def cfg(self) -> PretrainModelConfig:
        """The archive's keys, with the user's on top."""
        return self._config.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The archive's, or the one that the configuration names."""
        return self.restored.tokenizer

    # -- from files and to files -----------------------------------------------------------------------------------

    @classmethod
    def restore_from(
        cls,
        restore_path: str | Path,
        override_config_path: Override = None,
        map_location: Any = None,
        strict: bool = True,
        *,
        return_config: bool = False,
        save_restore_connector: Any = None,
        trainer: Any = None,
    ) -> Self | PretrainModelConfig:
        """The model of a `.nemo`, or of a checkpoint of any other format, or of a published name, at any layout.

        `override_config_path`: a YAML file, a mapping or a composed configuration whose keys lie over the archive's. `trainer`:
        whose hardware and layout it gets; without one, this process's (`map_location`: cpu or cuda). Not `strict`: tensors that
        only one side has are left alone. `return_config`: the configuration alone, nothing is built.
        `save_restore_connector` has no effect: there is one reader.
        Errors: `CheckpointError` for archives that are not there, damaged, of another family, or (with both values) not like the
        override; `ConfigError` with every key that cannot be.
        """
        archive = open_any(restore_path)
        cls._refuse_other_families(archive)
        asked = Asked(_sections(trainer, map_location), override_config_path, started()[1])
        composed = configure(ROOTS[cls.family], archive, asked)
        if return_config:
            return composed.config.model
        restored = restore(composed, archive, strict=strict)
        if save_restore_connector is not None:
            logger.warning("save_restore_connector has no effect: there is one reader for every layout")
        for notice in restored.notices if restored.topology.is_main else ():
            logger.info(notice)
        return cls(restored)

    @classmethod
    def from_pretrained(cls, model_name: str, **arguments: Any) -> Self | PretrainModelConfig:
        """The published model of that name (`list_available_models`), fetched if need be; `arguments` as `restore_from`'s.

        Errors: `CheckpointError` with near names for one that is not published; those of `restore_from`.
        """
        arguments.pop("refresh_cache", None)
        return cls.restore_from(known(model_name, cls.family), **arguments)

    @classmethod
    def list_available_models(cls) -> list[PretrainedModelInfo]:
        """The published models of this family."""
        return available(cls)

    @classmethod
    def get_available_model_names(cls) -> list[str]:
        """Their names."""
        return [info.pretrained_model_name for info in cls.list_available_models()]

    def save_to(self, save_path: str | Path) -> Path:
        """Writes a `.nemo`: one part for each tensor and pipeline rank. Every process calls it.

        An archive of that name is replaced by one rename. Errors: `CheckpointError` for a name that is none of an archive, and
        for models that NeMo has nothing like; then nothing is written.
        """
        return save_nemo(self.restored, Path(save_path))

    @classmethod
    def _refuse_other_families(cls, archive: Archive) -> None:
        if archive.family != cls.family:
            other = next(each for each in MODELS if each.family == archive.family)
            raise CheckpointError(
                f"it holds a {archive.family.upper()}, not a {cls.family.upper()}",
                where=str(archive.folder),
                fix=f"megalith.{other.__name__}.restore_from",
            )

    # -- data ------------------------------------------------------------------------------------------------------

    def setup_training_data(self, train_data_config: Mapping[str, Any] | None = None) -> None:
        """Keys of `model.data` for what follows."""
        self._lay_over(train_data_config)

    def setup_validation_data(self, val_data_config: Mapping[str, Any] | None = None) -> None:
        """The same."""
        self._lay_over(val_data_config)

    def setup_test_data(self, test_data_config: Mapping[str, Any] | None = None) -> None:
        """The same."""
        self._lay_over(test_data_config)

    def _lay_over(self, keys: Mapping[str, Any] | None) -> None:
        """Keys of the section `data` over the configuration. Errors: `ConfigError`."""
        if keys is None:
            return
        root, tree = ROOTS[self.family], self._config.model_dump(exclude_unset=True)
        over = layer_of("data configuration", {"model": {"data": plain(keys)}})
        layers = [layer_of("configuration", tree), over]
        self._config = composed_of(root, layers, Path("data configuration")).config

    def _data(self, *splits: str, state: Mapping[str, Any] = MappingProxyType({})) -> Data:
        trainer = self._config.trainer.model_copy(update={"test_at_end": "test" in splits})
        return self.restored.data(self._config.model_copy(update={"trainer": trainer}), splits, state)

    def train_dataloader(self) -> Any:
        """This process's share of every global batch."""
        assert self._fitting is not None, "configure_callbacks comes first"
        data = self._fitting.parts.data
        return Batches(lambda: data.training(self.engine.consumed_samples))

    def val_dataloader(self) -> Any:
        """The validation split, from its first sample."""
        data = self._data("validation") if self._fitting is None else self._fitting.parts.data
        return _batches(data.validation())

    def test_dataloader(self) -> Any:
        """The test split, from its first sample."""
        return _batches(self._data("test").test())

    # -- what a trainer asks ---------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        """Was the experiment manager asked for?"""
        origins = self.restored.composed.origin.items()
        return any(key.startswith("exp_manager.") and origin != "default" for key, origin in origins)

    def resumes_from(self) -> Path | None:
        """The checkpoint that `trainer.fit` goes on from: the newest in the experiment manager's folder, if it says so."""
        self._start = self.restored.start(self._config) if self._writes else self.restored.fresh
        if self._start.kind != "resume":
            return None
        self.engine.load_state_dict(self._start.state)
        return self._start.folder

    def configure_callbacks(self) -> list[Any]:
        """Metrics, progress, checkpoints: those of `megalith pretrain`, when a trainer fits."""
        if self.trainer.state.fn != "fit":
            return []
        start = self._start or self.restored.fresh
        parts = self.restored.parts(self._data("train", "validation", state=start.state), start)
        self._fitting = Fitting.begin(parts, writes=self._writes)
        self.saver = self._fitting.saver or self.saver
        return self._fitting.callbacks

    def teardown(self, stage: str) -> None:
        """Leave the run's folder."""
        if self._fitting is not None:
            self._fitting.end()

    def _log(self, kind: str, found: Validation) -> None:
        """Also for what `trainer.test` and `trainer.validate` return."""
        self.log_dict(found.named(kind), logger=True, sync_dist=False)

    # -- answers ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: Sequence[str],
        length_params: Mapping[str, Any] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, list[Any]]:
        """Answers to texts with the weights as they are now: "sentences" (prompt and answer), "token_ids", "answers".

        `length_params`: max_length, min_length. `sampling_params`: use_greedy, temperature, top_k, top_p, repetition_penalty,
        compute_logprob. `settings`: those of `megalith generate` (tokens_to_generate, temperature, …). A BERT guesses its masked
        tokens. Errors: `ConfigError` for settings that cannot be, `UnsupportedError` where the model is in pieces (pipeline, ZeRO).
        """
        return answers(self.restored, inputs, length_params or {}, sampling_params or {}, settings)


def _batches(start: Any) -> Any:
    return [] if start is None else Batches(start)


def _sections(trainer: Any, map_location: Any) -> dict[str, Mapping[str, Any]]:
    """What the trainer was told, in sections."""
    if trainer is None:
        return {} if map_location is None else {"trainer": {"accelerator": _accelerator(map_location)}}
    given = strategy_of(trainer).given
    if "trainer" in given:
        return dict(given)
    return {"trainer": {"max_steps": trainer.max_steps}} if trainer.max_steps > 0 else {}


def _accelerator(location: Any) -> str:
    return "gpu" if str(location).startswith("cuda") else "cpu"


class GPTModel(NemoModel):
    """A GPT; NeMo's MegatronGPTModel."""

    family = "gpt"


class BertModel(NemoModel):
    """A BERT; NeMo's MegatronBertModel. Of a task's archive, its encoder."""

    family = "bert"


class T5Model(NemoModel):
    """A T5; NeMo's MegatronT5Model."""

    family = "t5"


class BARTModel(NemoModel):
    """A BART; NeMo's MegatronBARTModel."""

    family = "bart"


MODELS = (GPTModel, BertModel, T5Model, BARTModel)
MegatronGPTModel, MegatronBertModel, MegatronT5Model, MegatronBARTModel = MODELS
"""NeMo's names of them."""
