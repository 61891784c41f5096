"""`megalith pretrain`: from a checked configuration to a trained model and an exit code.

    pretrain_parts.prepare ─▶ folder, saver, loggers ─▶ training.trainer.fit ─▶ exit code

Knows the order of the steps, and what a person is told. The steps themselves live in the packages below.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from megalith.checkpoint.native import Checkpointer
from megalith.checkpoint.retention import Policy, Retention
from megalith.config.compose import Composed
from megalith.engine.flops import Sample
from megalith.engine.metrics import device_name
from megalith.errors import EXIT_STOPPED, EXIT_SUCCESS, ConfigError, Problem
from megalith.models.config import ModelConfig
from megalith.models.encdec_config import EncoderDecoderConfig
from megalith.models.family import describe
from megalith.tasks.alike import seen_by_all
from megalith.tasks.pretrain_config import PretrainConfig
from megalith.tasks.pretrain_parts import Parts, prepare
from megalith.tasks.processes import agreed, is_main
from megalith.topology.launch import Member
from megalith.topology.topology import Topology
from megalith.training.checkpointing import SaveTimes
from megalith.training.experiment import HELD, hold, holder, log_files, open_folder
from megalith.training.loggers import check_loggers, log_configuration, make_loggers
from megalith.training.module import Validation
from megalith.training.progress import ProgressDisplay, duration, say, terms_text, thousands
from megalith.training.saving import Saver
from megalith.training.stopping import Beat, StopRequest
from megalith.training.trainer import Batches, LoopSettings, Outcome, Run, fit

logger = logging.getLogger(__name__)
Prepare = Callable[[Composed[Any], Callable[[str], None]], Parts]


def run(
    composed: Composed[Any],
    *,
    console: Console | None = None,
    member: Member | None = None,
    prepare: Prepare = prepare,
) -> int:
    """Train as configured, or go on with what was begun. → exit code: 0 done, 3 stopped by a signal after saving.

    `prepare` makes the parts of a run of this kind. Of several processes each calls this as a `member` of the run; the main one speaks and writes the run's files.
    Errors: `MegalithError`s for everything that the user can mend.
    """
    console = (console or Console()) if is_main() else Console(quiet=True)
    config = composed.config
    stop = StopRequest(config.trainer.max_seconds)
    check_loggers(config.exp_manager)
    retention = Retention(policy(config))
    parts = prepare(composed, lambda text: _tell(console, text))
    if member is not None:
        member.watch(parts.machine.topology, parts.engine.stages)
    with ExitStack() as stack:
        if not config.trainer.fast_dev_run:
            open_run(parts, stack, console)
        for line in summary(parts):
            _tell(console, line)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megalith-")))
        saver = make_saver(parts, retention, scratch)
        outcome = _train(parts, saver, console, stop, [] if member is None else [Beat(member.beat)])
        if not outcome.stopped and not config.trainer.fast_dev_run:
            saver.wait()
            parts.end(saver, lambda text: _tell(console, text))
        return _finish(parts, outcome, console)


def open_run(parts: Parts, stack: ExitStack, console: Console) -> None:
    """Make the run's folder ready, and log into it."""
    folder, topology = parts.experiment.folder, parts.machine.topology
    agreed(topology, lambda: _hold(parts, stack, console))
    if mark := topology.agree(holder(folder) if topology.is_main else None):
        seen_by_all(folder / HELD, "exp_manager.explicit_log_dir, .exp_dir", content=mark)
    rank = topology.global_rank
    shown = (lambda text: say(console, text)) if topology.is_main else None
    stack.enter_context(log_files(folder, rank=rank, say=shown))


def _hold(parts: Parts, stack: ExitStack, console: Console) -> None:
    folder = parts.experiment.folder
    try:
        stack.enter_context(hold(folder))
    except OSError as error:
        where, fix = "exp_manager.explicit_log_dir, .exp_dir", "name a folder that you may write to"
        raise ConfigError([Problem(where, f"{folder} cannot be used: {error.strerror}", fix)]) from error
    notices = open_folder(
        parts.experiment,
        config_yaml=parts.composed.yaml(),
        files=parts.config.exp_manager.files_to_copy or (),
        step=parts.engine.step,
    )
    for notice in notices:
        _tell(console, notice)


def _train(
    parts: Parts, saver: Saver, console: Console, stop: StopRequest, callbacks: Sequence[Beat]
) -> Outcome:
    config, engine, experiment = parts.config, parts.engine, parts.experiment
    writes = parts.machine.topology.is_main and not config.trainer.fast_dev_run
    parts.fill(saver)
    loggers = make_loggers(
        config.exp_manager, experiment.folder, name=experiment.name, step=engine.step
    ) if writes else []  # fmt: skip
    log_configuration(loggers, parts.composed.resolved)
    settings = loop_settings(config, engine.step)
    display = ProgressDisplay(
        total=settings.max_steps, console=console, bar=config.trainer.enable_progress_bar
    ) if parts.machine.topology.is_main else None  # fmt: skip
    if display is None:
        stop.show = lambda text: True  # the main process says it
    validation, test = parts.data.validation(), parts.data.test()
    made = Run(
        engine=engine,
        saver=saver,
        meter=parts.meter,
        train=Batches(lambda: parts.data.training(engine.consumed_samples)),
        validation=Batches(validation) if validation else None,
        test=Batches(test) if test else None,
        folder=experiment.folder,
        loggers=loggers,
        callbacks=callbacks,
        sinks=[experiment.metrics.write] if writes else [],
        display=display,
        announce=(lambda text: _tell(console, text))
        if config.exp_manager.checkpoint_callback_params.verbose
        else None,
    )
    resume = parts.start.folder if parts.start.kind == "resume" else None
    return fit(made, settings, resume=resume, stop=stop)


def make_saver(parts: Parts, retention: Retention, scratch: Path) -> Saver:
    """Saves into the run's checkpoints folder; `scratch` holds the tokenizer's files meanwhile."""
    params = parts.config.exp_manager.checkpoint_callback_params
    parts.tokenizer.save(scratch)
    checkpointer = Checkpointer(
        parts.experiment.checkpoints,
        parts.machine.topology,
        asynchronous=params.asynchronous,
        retention=retention,
    )
    extra = {
        **describe(parts.config.model.family, parts.architecture),
        "tokenizer": {"type": parts.tokenizer.type, "hash": parts.tokenizer.hash()},
        "data_plan": parts.data.streams.state(),
        "origin": parts.start.origin,
        **parts.kept,
    }
    saver = Saver(
        parts.engine, checkpointer, config_yaml=parts.composed.yaml(), tokenizer=scratch, extra=extra
    )
    saver.verified = parts.start.folder
    return saver


def policy(config: PretrainConfig) -> Policy:
    """Which checkpoints stay, and their names. Errors: `ConfigError` for a template that cannot be one."""
    params = config.exp_manager.checkpoint_callback_params
    monitor = params.monitor if _validates(config) or params.monitor != "val_loss" else None
    field = f"{{{monitor}:.4f}}-" if monitor else ""
    try:
        return Policy(
            monitor=monitor,
            mode=params.mode,
            save_top_k=params.save_top_k,
            save_last=params.save_last,
            keep_every_n_steps=params.keep_every_n_steps,
            filename=params.filename or f"{config.exp_manager.name or 'default'}--{field}{{step}}",
            drop_optimizer=params.drop_optimizer,
        )
    except ValueError as error:
        where = "exp_manager.checkpoint_callback_params"
        raise ConfigError([Problem(where, str(error), "as megatron_gpt--{val_loss:.2f}-{step}")]) from error


def _validates(config: PretrainConfig) -> bool:
    trainer = config.trainer
    return bool(trainer.limit_val_batches) and 0 < (trainer.val_check_interval or 0) <= trainer.max_steps


def save_times(config: PretrainConfig) -> SaveTimes:
    """When the run saves. Where nobody says and there is no validation to save after: every half an hour."""
    params = config.exp_manager.checkpoint_callback_params
    times = SaveTimes(steps=params.every_n_train_steps or None, seconds=params.interval_seconds)
    return SaveTimes(seconds=1800.0) if times.after_validation and not _validates(config) else times


def loop_settings(config: PretrainConfig, step: int = 0) -> LoopSettings:
    """When things happen in this run. `fast_dev_run`: a few steps and no files."""
    trainer, trial = config.trainer, int(config.trainer.fast_dev_run)
    validate = trainer.val_check_interval if trainer.limit_val_batches else None
    last = min(step + trial, trainer.max_steps) if trial else trainer.max_steps
    return LoopSettings(
        max_steps=last,
        log_every=1 if trial else trainer.log_every_n_steps,
        validate_every=last if trial and validate else validate,
        save=save_times(config) if config.exp_manager.create_checkpoint_callback and not trial else None,
        max_seconds=trainer.max_seconds,
        profiler=trainer.profiler,
        lightning={"detect_anomaly": trainer.detect_anomaly, "benchmark": trainer.benchmark},
    )


# -- words ------------------------------------------------------------------------------------------------------------


def _tell(console: Console, text: str) -> None:
    say(console, text)
    logger.info(text)


def summary(parts: Parts) -> list[str]:
    """What this run is, in a few lines."""
    config, engine, machine, flops = parts.config, parts.engine, parts.machine, parts.flops
    model, steps, length = config.model, config.trainer.max_steps, parts.sample.tokens
    known = parts.meter.peak
    begin = {
        "fresh": "from new weights",
        "weights": f"from the weights of {parts.start.folder}",
        "resume": f"going on from step {engine.step}: {parts.start.folder}",
    }[parts.start.kind]
    return [
        f"model      {_shape(parts.architecture)}: {parts.parameters:,} parameters",
        f"machine    {device_name(machine.topology.device)}; precision {machine.precision}; compile {machine.compile}; "
        f"allocator {machine.allocator}",
        *layout(machine.topology),
        *parts.said,
        *(f"{line}" for line in parts.data.streams.summary()),
        f"steps      {steps:,} of {model.global_batch_size} samples of {_lengths(parts.sample)} tokens "
        f"({thousands(model.batch_schedule.consumed_at(steps) * length)} tokens)",
        f"speed      {flops.per_token:.3g} FLOPs a token: {flops.formula.replace(', a token', '')}; "
        + (
            f"MFU against {known.tflops:g} TFLOP/s ({known.source})"
            if known
            else "no MFU: the peak is not known"
        ),
        f"saves      {_words(config)}",
        f"folder     {parts.experiment.folder}",
        f"start      {begin}",
    ]


def _shape(model: ModelConfig) -> str:
    two = isinstance(model, EncoderDecoderConfig)
    layers = f"{model.encoder_layers} + {model.decoder_layers}" if two else str(model.num_layers)
    return (
        f"{layers} layers, width {model.hidden_size}, {model.num_attention_heads} heads, "
        f"vocabulary {model.vocab_size:,}"
    )


def _lengths(sample: Sample) -> str:
    return f"{sample.length} + {sample.decoder_length}" if sample.decoder_length else str(sample.length)


def layout(topology: Topology) -> list[str]:
    """The line about processes; none where there is one."""
    sizes = topology.sizes
    return [f"processes  {sizes.world}: {sizes.describe()}"] if sizes.world > 1 else []


def _words(config: PretrainConfig) -> str:
    """When it saves, in words."""
    if not config.exp_manager.create_checkpoint_callback or config.trainer.fast_dev_run:
        return "never"
    times = save_times(config)
    said = [f"every {times.steps:,} steps" if times.steps > 1 else "after every step"] if times.steps else []
    said += [f"every {duration(times.seconds)} (h:mm:ss)"] if times.seconds else []
    return " and ".join(said or ["after each validation"]) + ", and at the end"


def _finish(parts: Parts, outcome: Outcome, console: Console) -> int:
    steps, found = parts.config.trainer.max_steps, outcome.validation
    where = f"step {outcome.step} of {steps}"
    if outcome.stopped and outcome.step < steps:
        _tell(
            console,
            f"{outcome.stopped}: stopped after saving at {where}; the same command goes on from there",
        )
        return EXIT_STOPPED
    if outcome.out_of_time:
        _tell(console, f"trainer.max_time is over: saved at {where}; the same command goes on from there")
    elif parts.start.kind == "resume" and parts.start.state.get("step") == outcome.step:
        _tell(console, f"nothing to do: the run is at {where} already; a larger trainer.max_steps goes on")
    else:
        measured = f", validation {_measured(found)}" if found else ""
        _tell(console, f"done: {where}{measured}")
        if outcome.test:
            _tell(console, f"test {_measured(outcome.test)}")
    return EXIT_SUCCESS


def _measured(found: Validation) -> str:
    return f"loss {found.loss:.4f}{terms_text(found.terms, '.4f')}, perplexity {found.perplexity:.2f}"
