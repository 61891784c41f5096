"""What a tuning begins from: a model of any format, and the prompts of an earlier tuning, where it has some.

    a checkpoint of any format          the model
    a .nemo with soft prompts           the model, and earlier tags
    an artefact, or a tuning run        earlier tags; the model is the one that the artefact names, and must still be that
    NAME.nemo, which is not here        the one that the run NAME wrote at its end

Then the configuration: the architecture is the checkpoint's, and a key that says otherwise is refused with both values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalith.adapt.adapter import TUNING, Adapter, check_base
from megalith.adapt.adapter import Base as Fingerprint
from megalith.adapt.artefact import JSON, RUN, open_adapter
from megalith.adapt.fingerprint import fingerprint_of
from megalith.checkpoint.foreign import find, open_foreign
from megalith.checkpoint.formats.foreign import Foreign
from megalith.checkpoint.formats.nemo import KIND as NEMO
from megalith.checkpoint.formats.nemo_prompts import prompts_of
from megalith.checkpoint.manifest import TOKENIZER
from megalith.checkpoint.reading import read_state
from megalith.config.compose import Gathered, gather
from megalith.config.layers import Merged
from megalith.config.sources import Value
from megalith.config.tree import get
from megalith.errors import CheckpointError, Problem
from megalith.hub.obtain import resolve as published
from megalith.models.config import ModelConfig, effective
from megalith.models.family import ARCHITECTURE, understand
from megalith.tasks.tuning_config import PACKAGED, TUNE_ROOTS, TWO_SIDES, MethodName, TuneConfig
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.load import load_tokenizer
from megalith.training.experiment import DEFAULT_FOLDER

FREE = {
    "attention_core", "attention_dropout", "hidden_dropout", "init_method_std", "use_scaled_init_method",
}  # fmt: skip
"""Fields of a model's configuration that change no tensor and no answer: how it is computed and trained."""


@dataclass(frozen=True)
class Base:
    """`folder`: where the weights are; `tokens`: what `load_tokenizer` opens; `state`: what the checkpoint says of itself."""

    folder: Path
    family: str
    architecture: ModelConfig
    state: Mapping[str, Any]
    tokens: Path | None
    adapter: Adapter | None = None
    notices: tuple[str, ...] = ()
    opened: Foreign | None = None
    """Keeps the temporary files of an archive as long as this is there."""

    def fingerprint(self, tokenizer: Tokenizer) -> Fingerprint:
        """What an artefact says of the model that it was made for."""
        return Fingerprint(fingerprint_of(self.folder), str(self.folder), tokenizer.hash())


def open_base(path: str | Path, exp_dir: str | None = None) -> Base:
    """Errors: `CheckpointError` for what is not there, is damaged, or is no model that can be tuned."""
    place, said = _place(path, exp_dir)
    if _is_artefact(place):
        adapter = open_adapter(place)
        return _beneath(adapter, said)
    base = _model(place)
    if base.family not in TUNE_ROOTS:
        raise CheckpointError(
            f"it holds a {base.family.upper()}, which writes nothing",
            where=str(place),
            fix="tune a GPT, a T5 or a BART",
        )
    adapter = (
        open_adapter(base.folder)
        if base.opened and base.opened.kind == NEMO and prompts_of(base.folder)
        else None
    )
    return replace(base, adapter=adapter, notices=(*said, *base.notices))


def _place(path: str | Path, exp_dir: str | None) -> tuple[Path, tuple[str, ...]]:
    """Where it is, and what to say of that."""
    given = Path(published(path)).expanduser()
    if given.exists() or given.suffix != ".nemo" or given.parent != Path():
        return given, ()
    written = Path(exp_dir or DEFAULT_FOLDER).expanduser() / given.stem / "checkpoints" / given.name
    if not written.is_file():
        return given, ()
    return written, (
        f"restore_from_path: {given} is not here; the one that the run {given.stem} wrote is: {written}",
    )


def _is_artefact(place: Path) -> bool:
    folder = place.parent if place.name == JSON else place
    return any((each / JSON).is_file() for each in (folder, folder / RUN))


def _beneath(adapter: Adapter, said: tuple[str, ...]) -> Base:
    """The model of an artefact."""
    if not adapter.tags:
        raise CheckpointError(
            "LoRA changes every row: nothing can be tuned on top of it",
            where=adapter.path,
            fix=f"give the model that it was tuned on{f': {adapter.base.name}' if adapter.base.name else ''}",
        )
    if not adapter.base.name or not Path(adapter.base.name).exists():
        raise CheckpointError(
            f"the model that it was tuned on is not there: {adapter.base.name or 'it names none'}",
            where=adapter.path,
            fix="put the model back to that place; or begin from the model itself",
        )
    base = open_base(adapter.base.name)
    check_base(adapter, base.family, Fingerprint(fingerprint_of(base.folder)))
    return replace(base, adapter=adapter, notices=(*said, *base.notices))


def _model(place: Path) -> Base:
    found = find(place)
    if not found.is_native:
        foreign = open_foreign(found.folder)
        return Base(
            found.folder, foreign.family, foreign.config, foreign.described(), foreign.tokenizer, None,
            tuple(n for n in foreign.notices if "soft prompts" not in n), foreign,
        )  # fmt: skip
    state = read_state(found.folder)
    if TUNING in state and state[TUNING]["method"] != "full":
        raise CheckpointError(
            "it holds what a tuning trains, not the model",
            where=str(found.folder),
            fix="give the tuning run's folder once the run is complete; or the model",
        )
    _, architecture = understand(state, where=str(found.folder))
    tokens = found.folder / TOKENIZER
    return Base(
        found.folder, state[ARCHITECTURE]["family"], architecture, state, tokens if tokens.is_dir() else None
    )


def tokenizer_of(config: TuneConfig, base: Base) -> Tokenizer:
    """The checkpoint's; the configuration's where it has none. Errors: `CheckpointError` where they are two different ones."""
    typed = config.model.tokenizer
    named = typed.model_fields_set & {"file", "model", "vocab_file"} and any(
        getattr(typed, key, None) for key in ("file", "model", "vocab_file")
    )
    if base.tokens is None:
        found = load_tokenizer(typed)
        tuned = base.adapter.base.tokenizer if base.adapter else ""
        if tuned and found.hash() != tuned:
            raise CheckpointError(
                f"model.tokenizer: another one than its prompts were tuned with ({tuned[:12]} there, {found.hash()[:12]} here)",
                where=base.adapter.path if base.adapter else "",
                fix="give that one",
            )
        return found
    own = load_tokenizer(base.tokens)
    if named and (other := load_tokenizer(typed)).hash() != own.hash():
        raise CheckpointError(
            f"model.tokenizer: another one ({own.hash()[:12]} in the checkpoint, {other.hash()[:12]} here)",
            where=str(base.folder),
            fix="leave model.tokenizer out: the model comes with its own",
        )
    return own


# -- the configuration -------------------------------------------------------------------------------------------------


def gather_tuning(
    method: MethodName,
    *,
    config_name: str | None = None,
    config_path: str | Path | None = None,
    config_file: str | Path | None = None,
    overrides: tuple[str, ...] = (),
) -> tuple[type[TuneConfig], Gathered]:
    """Root and values of a tuning: those of the family of the model in `restore_from_path`, which gives its architecture.

    Without that key the values are those of a GPT, and judging them says that it is missing. Errors: those of `gather` and of
    `open_base`.
    """
    unnamed = config_file is None and config_name is None
    config_name = PACKAGED[method] if unnamed else config_name
    typed = [f"++model.tuning_method={method}", *overrides]

    def gathered(root: type[TuneConfig]) -> Gathered:
        return gather(
            root, config_name=config_name, config_path=config_path, config_file=config_file, overrides=typed
        )

    root = TUNE_ROOTS["gpt"]
    found = gathered(root)
    path = get(found.merged.tree, ("restore_from_path",))
    if not isinstance(path, str) or path in ("", "???"):
        return root, found
    exp_dir = get(found.merged.tree, ("exp_manager", "exp_dir"))
    base = open_base(path, exp_dir if isinstance(exp_dir, str) else None)
    if method == "full" and base.family != "gpt":
        what = f"it holds a {base.family.upper()}; of a GPT alone all can be tuned"
        raise CheckpointError(
            what, where=path, fix="megalith tune soft-prompt, p-tuning or lora; or give a GPT"
        )
    if base.family != "gpt":
        root = TUNE_ROOTS[base.family]
        if unnamed and method == "soft-prompt":
            config_name = TWO_SIDES
        found = gathered(root)
    found.merged.problems += list(lay_architecture(root, found.merged, base))
    return root, found


def lay_architecture(root: type[TuneConfig], merged: Merged, base: Base) -> Iterator[Problem]:
    """Puts the checkpoint's architecture in place of packaged values. → a problem for each typed key that says otherwise."""
    section = root.model_fields["model"].annotation
    fields = section.architecture_class.model_fields  # type: ignore[union-attr]
    own, name = base.architecture.model_dump(mode="json"), base.folder.name
    for key, value in own.items():
        path = ("model", key)
        if key not in fields:
            continue
        typed = path in merged.origin and path not in merged.packaged
        if typed and key in FREE:
            continue
        if (
            typed
            and key != "make_vocab_size_divisible_by"
            and (other := _other(base.architecture, key, merged))
        ):
            what = f"{other[0]}, and the model in {name} has {other[1]}: it comes with its own architecture"
            yield Problem(merged.where(path), what, f"~model.{key}")
        merged.set(Value(path, value, name))
    yield from _length(merged, base)
    tags = base.adapter.tags if base.adapter else ()
    path = ("model", "num_prompt_tokens")
    if tags and (path in merged.packaged or path not in merged.origin):
        merged.set(Value(path, tags[-1].length, name))


def _length(merged: Merged, base: Base) -> Iterator[Problem]:
    """Samples are as long as the model's positions reach, unless somebody says less."""
    path, positions = ("model", "encoder_seq_length"), base.architecture.max_position_embeddings
    given = get(merged.tree, path)
    typed = path in merged.origin and path not in merged.packaged
    if typed and isinstance(given, int) and given > positions:
        what = f"{given} is beyond the {positions} positions of the model in {base.folder.name}"
        yield Problem(merged.where(path), what, f"model.encoder_seq_length={positions}")
    if not typed or (isinstance(given, int) and given > positions):
        merged.set(Value(path, positions, base.folder.name))


def _other(architecture: ModelConfig, key: str, merged: Merged) -> tuple[Any, Any] | None:
    """(what was typed, the model's) where they differ; None for what cannot be such a value, which its judge will say."""
    given = get(merged.tree, ("model", key))
    try:
        asked = type(architecture)(**{**architecture.model_dump(), key: given})
    except (ValidationError, ValueError, TypeError):
        return (given, getattr(architecture, key)) if given != getattr(architecture, key) else None
    mine, theirs = effective(architecture).get(key), effective(asked).get(key)
    return (given, mine) if mine != theirs else None
