"""Weights & Biases for real, offline: what a run wrote is read back from the file that would be sent."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator

import pytest

from megalith.errors import EXIT_SUCCESS

from .nano import losses, make_corpus, pretrain

BLOCK, HEADER = 32768, 7
"""A .wandb file is LevelDB's log behind seven bytes: blocks of pieces, each behind check sum, length and kind."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install megalith[wandb])"
)


def journal(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file."""
    at, record = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little for a piece: the block ends
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A function: folder of a run → (its history rows, its configuration). Nothing leaves the machine."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def read(folder):
        wandb.finish()
        (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
        rows, config = [], {}
        for record in map(Record.FromString, journal(file.read_bytes())):
            pairs = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows += [pairs] if pairs else []
            config |= {i.key: json.loads(i.value_json) for i in record.config.update if i.key}
        return rows, config

    yield read
    wandb.teardown()


def test_rows_and_configuration_reach_wandb(records, tmp_path):
    folder = tmp_path / "run"
    code, _ = pretrain(
        make_corpus(tmp_path), folder,
        "exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs={name: nano, project: megalith}",
        steps=4,
    )  # fmt: skip
    assert code == EXIT_SUCCESS
    rows, config = records(folder)
    assert [row["train_loss"] for row in rows if "train_loss" in row] == list(losses(folder).values())
    assert [row["val_loss"] for row in rows if "val_loss" in row] == list(losses(folder, "val_loss").values())
    assert config["model"]["hidden_size"] == 16
