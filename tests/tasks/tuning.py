"""Nano models of each family that can be tuned, rows of two tasks, and the smallest tuning runs on them."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from megalith.config.compose import Composed, settle
from megalith.tasks.pretrain import run
from megalith.tasks.tuning import prepare_tuning
from megalith.tasks.tuning_base import gather_tuning
from megalith.tasks.tuning_config import TuneConfig

from .nano import make_corpus, pretrain

P = 4
"""Virtual tokens of a prompt."""


def make_base(folder: Path, family: str = "gpt") -> Path:
    """A corpus, a model of a few steps in `base/`, and rows: `a.jsonl` (tag A), `b.jsonl` (tag B), `valid.jsonl` (both)."""
    corpus = make_corpus(folder, family)
    more = ["model.encoder_seq_length=32"] + (["model.data.seq_length_dec=16"] if family == "t5" else [])
    code, text = pretrain(corpus, folder / "base", *more, "trainer.limit_val_batches=0", steps=3)
    assert code == 0, text
    for name, tags, count in (
        ("a", "A", 13),
        ("b", "B", 13),
        ("valid_a", "A", 5),
        ("valid_b", "B", 5),
        ("mixed", "AB", 12),
    ):
        write_rows(folder / f"{name}.jsonl", tags, count)
    return folder


def write_rows(path: Path, tags: str, count: int) -> None:
    rows = []
    for i in range(count):
        text = " ".join(f"w{(i + k + 5 * (tags == 'B')) % 23:02d}" for k in range(1 + i % 4))
        rows.append({"prompt_tag": tags[i % len(tags)], "text": text, "answer": f" w{(i * 3) % 23:02d}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def overrides(base: Path, folder: Path, *more: str, steps: int = 4) -> tuple[str, ...]:
    return (
        f"restore_from_path={base}/base", f"model.data.train_ds={base}/a.jsonl", f"model.data.valid_ds={base}/valid_a.jsonl",
        "model.global_batch_size=4", "model.micro_batch_size=2", "model.optim.lr=1e-2", "model.optim.sched.warmup_steps=1",
        "model.optim.sched.constant_steps=0", "trainer.accelerator=cpu", "trainer.precision=32", f"trainer.max_steps={steps}",
        "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "exp_manager.create_tensorboard_logger=false",
        f"exp_manager.explicit_log_dir={folder}", f"exp_manager.name={folder.name}", *more,
    )  # fmt: skip


def prompts(tag: str, *more: str) -> tuple[str, ...]:
    """What prompts are tuned."""
    return (
        f"model.new_prompt_tags=[{tag}]",
        f"model.num_prompt_tokens={P}",
        "model.new_prompt_init_text=[w01 w02]",
        *more,
    )


def settled(method: str, base: Path, folder: Path, *more: str, steps: int = 4) -> Composed[TuneConfig]:
    """The configuration of a run, judged."""
    return settle(*gather_tuning(method, overrides=overrides(base, folder, *more, steps=steps)))  # type: ignore[arg-type]


def tune(method: str, base: Path, folder: Path, *more: str, steps: int = 4) -> tuple[int, str]:
    """Exit code and what was printed."""
    text = io.StringIO()
    composed = settled(method, base, folder, *more, steps=steps)
    code = run(composed, console=Console(file=text, width=300), prepare=prepare_tuning)
    return code, text.getvalue()
