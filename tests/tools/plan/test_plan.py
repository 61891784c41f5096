"""Plans of configurations: the 175B run, extrapolation against whole rehearsals, what fits, remedies, and what cannot be."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace

import pytest
from rich.console import Console

from megalith.config.compose import compose
from megalith.errors import ConfigError, TopologyError
from megalith.models import presets
from megalith.parallel.memory import Recompute
from megalith.tasks.pretrain_config import PretrainGPTConfig
from megalith.tools.plan import estimate as estimate_module
from megalith.tools.plan.as_json import as_json
from megalith.tools.plan.devices import DEVICES, find
from megalith.tools.plan.estimate import estimate
from megalith.tools.plan.plan import make_plan
from megalith.tools.plan.rehearsal import Case
from megalith.tools.plan.remedies import remedies
from megalith.tools.plan.show import show
from megalith.topology.launch import fake
from megalith.topology.sizes import Sizes

BIG = [
    "model.preset=gpt3-175b", "model.vocab_size=51200", "model.tensor_model_parallel_size=8",
    "model.pipeline_model_parallel_size=16", "trainer.devices=8", "trainer.num_nodes=128", "model.global_batch_size=1536",
    "model.micro_batch_size=1", "model.activations_checkpoint_granularity=full", "trainer.precision=16-mixed",
    "trainer.max_steps=95367",
]  # fmt: skip
SMALL = [
    "model.preset=gpt-nano",
    "model.encoder_seq_length=64",
    "model.vocab_size=512",
    "model.micro_batch_size=2",
]


def plan(*overrides: str, device: str | None = None, **options):
    config = compose(PretrainGPTConfig, overrides=["model.data.data_prefix=x", *overrides]).config
    return make_plan(config, find(device) if device else None, **options)


def text(made, offered=(), width: int = 100) -> str:
    out = io.StringIO()
    show(made, offered, Console(file=out, width=width))
    return out.getvalue()


@pytest.fixture(scope="module")
def big():
    begun = time.process_time()
    made = plan(*BIG, device="A100", step_time=32.0)
    assert time.process_time() - begun < 60  # about 10 on a machine that does nothing else
    return made


def test_the_175b_run(big):
    done = big.achieved(32.0)
    assert done.hardware / 1e12 == pytest.approx(137.7, abs=0.5)
    assert done.model / 1e12 == pytest.approx(103.3, abs=0.5)
    assert big.batch.run_tokens == pytest.approx(300e9, rel=1e-3)
    assert big.run_seconds(32.0) / 86400 == pytest.approx(35.3, abs=0.1)
    assert big.seconds == pytest.approx(32, rel=0.05)
    shown = text(big, width=140)
    assert "137.7 hardware TFLOP/s a device, 44.1% HFU" in shown
    assert "103.3 model TFLOP/s a device, 33.1% MFU" in shown
    assert "hardware FLOPs ÷ (devices × peak × efficiency) × (1 + bubble)" in shown
    assert [found.stage for found in big.estimates] == [0, 1, 15]
    assert [found.in_flight for found in big.estimates] == [16, 15, 1]
    assert big.worst.stage == 0  # most micro-batches in flight
    assert "pipeline rank 0 of 16" in shown


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_cut_off(big, width):
    shown = text(big, width=width)
    assert "…" not in shown
    assert all(len(line) <= width for line in shown.splitlines())


def test_json_holds_everything(big):
    found = json.loads(json.dumps(as_json(big, []), allow_nan=False))
    assert found["processes"] == 1024
    assert found["tflops_per_device"]["hardware"] == pytest.approx(137.7, abs=0.5)
    assert found["ranks"][0]["peak"]["weights"] == found["ranks"][0]["between_steps"]["weights"]
    assert found["need"] == sum(found["ranks"][0]["peak"].values())


@pytest.mark.parametrize(
    ("changes", "stage"),
    [
        ({"model": presets.get("gpt-nano", num_layers=13)}, 0),
        ({"model": presets.get("gpt-nano", num_layers=12), "sizes": Sizes(shard=4, zero_stage=3)}, 0),
        ({"model": presets.get("gpt-nano", num_layers=12), "recompute": Recompute(layers=2)}, 0),
        ({"model": presets.get("gpt-nano", num_layers=5), "sizes": Sizes(pipeline=5)}, 0),
        ({"model": presets.get("gpt-nano", num_layers=5), "sizes": Sizes(pipeline=5)}, 3),
        ({"model": presets.get("llama-nano", num_layers=5), "sizes": Sizes(pipeline=5)}, 4),
    ],
)
def test_what_is_extrapolated_is_what_a_whole_rehearsal_says(monkeypatch, changes, stage):
    case = replace(Case(presets.get("gpt-nano"), Sizes(), 2, 12, 32), **changes)
    short = estimate(case, stage)
    monkeypatch.setattr(estimate_module, "DEEP", 10**9)
    monkeypatch.setattr(estimate_module, "RANKS", 10**9)
    whole = estimate(case, stage)
    assert short.rest == whole.rest
    assert short.total == pytest.approx(whole.total, rel=0.002)
    assert short.sent == pytest.approx(whole.sent, rel=0.002)


def test_interleaved_pipelines_are_extrapolated_closely(monkeypatch):
    sizes = Sizes(pipeline=4, virtual_pipeline=2, schedule="interleaved")
    case = Case(presets.get("gpt-nano", num_layers=8), sizes, 2, 12, 32)
    short = estimate(case, 1)
    monkeypatch.setattr(estimate_module, "RANKS", 10**9)
    whole = estimate(case, 1)
    assert short.rest == whole.rest
    assert short.total == pytest.approx(whole.total, rel=0.03)
    assert short.sent == pytest.approx(whole.sent, rel=0.01)


def test_a_plan_that_does_not_fit_gets_remedies_that_do():
    made = plan(
        "model.preset=llama2-7b", "trainer.devices=8", "model.zero_stage=1", "model.global_batch_size=64",
        "model.micro_batch_size=8", "model.num_layers=4", device="A100-40",
    )  # fmt: skip
    assert made.verdict == "does not fit"
    offered = remedies(made)
    assert offered
    assert all(remedy.fits and remedy.need <= 40e9 for remedy in offered)
    again = plan(
        "model.preset=llama2-7b", "trainer.devices=8", "model.zero_stage=1", "model.global_batch_size=64",
        "model.micro_batch_size=8", "model.num_layers=4", *offered[0].keys, device="A100-40",
    )  # fmt: skip
    assert again.need == offered[0].need
    assert again.verdict == "fits"
    shown = text(made, offered)
    assert "Does not fit" in shown
    assert offered[0].keys[0] in shown.replace("\n", " ")


def test_what_nothing_helps_says_so():
    made = plan(*SMALL, "model.num_layers=2", device="V100-16")
    hopeless = replace(made, device=replace(made.device, memory=1000))
    offered = remedies(hopeless)
    assert not any(remedy.fits for remedy in offered)
    assert "more devices, or larger ones" in text(hopeless, offered)


def test_without_a_device_it_is_this_machine():
    made = plan(*SMALL)
    assert made.verdict == "fits"
    assert "this machine" in text(made)
    assert "--device" in text(made)


def test_devices_have_peaks_and_sources():
    for device in DEVICES:
        assert device.source
        assert device.peak("16-mixed") is not None
        assert device.memory > 10e9
    assert find("a100").memory == 80 * 10**9
    assert find("V100").peak("bf16-mixed") is None
    assert plan(*SMALL, device="V100").case.precision == "32"
    assert plan(*SMALL, device="H100").case.precision == "bf16-mixed"


def test_the_vocabulary_of_a_preset_stands_in_for_a_tokenizer():
    made = plan("model.preset=gpt-nano", "model.encoder_seq_length=64")
    assert made.model.vocab_size == 50257
    assert "gpt-nano" in made.vocabulary


def refused(*overrides: str, **options) -> str:
    with pytest.raises(ConfigError) as problem:
        plan(*overrides, **options)
    return str(problem.value)


def test_what_cannot_be_is_said_with_what_can():
    assert "--vocab-size" in refused("model.num_layers=2")
    found = refused(*SMALL, "model.tensor_model_parallel_size=3", "trainer.devices=4")
    assert "4 processes, but this layout needs 3" in found
    assert "3 does not divide the padded vocabulary 512: tensor ∈ {1, 2, 4" in found.replace("\n    fix", "")
    found = refused(*SMALL, "trainer.devices=3")
    assert "8 is not a multiple of micro_batch_size 2 × data-parallel size 3" in found
    with pytest.raises(ConfigError, match="A100-80"):
        find("A100-81")
    with pytest.raises(ConfigError, match="no device is called"):
        find("abacus")


def test_no_fake_group_inside_another():
    with fake(4), pytest.raises(TopologyError, match="inside a real one"), fake(2):
        pass
    with fake(1024, rank=1023) as member:
        assert (member.rank, member.world) == (1023, 1024)
