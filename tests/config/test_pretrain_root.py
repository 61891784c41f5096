"""The root configuration of `pretrain gpt`: NeMo's own files, presets, rules across sections, derived numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalith.config.compose import Composed, compose
from megalith.config.tree import fields_of, section_of
from megalith.engine.flops import matrix_parameters
from megalith.errors import ConfigError
from megalith.models import presets
from megalith.models.config import ModelConfig, num_parameters
from megalith.tasks.derived import derived
from megalith.tasks.pretrain_config import PretrainGPTConfig

FIXTURES = Path(__file__).parent / "fixtures"


def run(
    *overrides: str, file: Path | None = None, prefix: str = "model.data.data_prefix=x"
) -> Composed[PretrainGPTConfig]:
    return compose(PretrainGPTConfig, config_file=file, overrides=[prefix, *overrides])


def problems(*overrides: str) -> dict[str, tuple[str, str]]:
    with pytest.raises(ConfigError) as caught:
        run(*overrides)
    return {p.where.partition(" (")[0]: (p.what, p.fix) for p in caught.value.problems}


# ---- NeMo's files ----

DEAD = [
    "logger",
    "enable_checkpointing",
    "max_epochs",
    "replace_sampler_ddp",
    "always_save_nemo",
    "save_nemo_on_train_end",
    "model_parallel_size",
    "apply_query_key_layer_scaling",
    "pre_process",
    "post_process",
    "persist_layer_norm",
    "gradient_as_bucket_view",
    "masked_softmax_fusion",
    "fp32_residual_connection",
    "fp16_lm_cross_entropy",
    "megatron_amp_O2",
    "use_cpu_initialization",
    "apex_transformer_log_level",
    "hydra",
]


def test_a_nemo_1_8_file_loads_with_one_notice_a_dead_key():
    result = compose(PretrainGPTConfig, config_file=FIXTURES / "nemo_gpt_1_8.yaml")
    for name in DEAD:
        assert sum(n.split(" ")[0].split(".")[-1] == name for n in result.notices) == 1, name
    model = result.config.model
    assert model.num_layers == 12
    assert model.max_position_embeddings == 512
    assert model.data.data_prefix == [0.3, "/data/books_text_document", 0.7, "/data/web_text_document"]
    assert model.optim.betas == (0.9, 0.98)
    assert model.activation == "gelu_tanh"
    assert model.initial_loss_scale == 2.0**32
    assert result.config.trainer.precision == "16-mixed"
    assert result.config.trainer.accelerator == "gpu"
    assert result.origin["model.optim.lr"].endswith("nemo_gpt_1_8.yaml:104")


def test_a_nemo_1_7_file_loads_and_its_unfused_gelu_is_the_erf_form():
    result = compose(PretrainGPTConfig, config_file=FIXTURES / "nemo_gpt_1_7.yaml")
    assert result.config.trainer.devices == 1
    assert result.config.trainer.accelerator == "auto"
    assert result.config.model.activation == "gelu_erf"
    assert sum("checkpoint_callback has no effect" in n for n in result.notices) == 1
    assert sum("trainer.gpus is called" in n for n in result.notices) == 1


def test_nemo_files_survive_printing(tmp_path):
    first = compose(PretrainGPTConfig, config_file=FIXTURES / "nemo_gpt_1_8.yaml")
    printed = tmp_path / "printed.yaml"
    printed.write_text(first.yaml(), encoding="utf-8")
    again = compose(PretrainGPTConfig, config_file=printed)
    assert again.config == first.config
    assert again.notices == []


def test_nemo_overrides_as_documented():
    result = run(
        "trainer.precision=bf16", "trainer.max_steps=1000", "model.micro_batch_size=6", "model.global_batch_size=192",
        "model.tensor_model_parallel_size=1", "model.encoder_seq_length=1024", "model.max_position_embeddings=1024",
        "model.num_layers=24", "model.hidden_size=1024", "model.num_attention_heads=16", "model.ffn_hidden_size=4096",
        "+model.data.order=megatron", "model.data.splits_string='980,10,10'", "model.optim.sched.warmup_steps=10",
        "model.optim.sched.constant_steps=0", "exp_manager.exp_dir=/results/lr=1e-4",
    )  # fmt: skip
    assert result.notices == []
    assert result.config.exp_manager.exp_dir == "/results/lr=1e-4"
    assert result.config.model.data.seq_length == 1024


# ---- architecture and presets ----


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_that_architecture(name):
    model = run(f"model.preset={name.replace('-', '_')}").config.model
    assert model.architecture(presets.get(name).vocab_size) == presets.get(name)
    assert model.encoder_seq_length == presets.get(name).max_position_embeddings


def test_keys_beside_a_preset_change_it():
    model = run(
        "model.preset=gpt2-124m",
        "model.num_layers=2",
        "model.encoder_seq_length=256",
        "model.hidden_dropout=0",
    ).config.model
    assert (model.num_layers, model.hidden_size, model.encoder_seq_length) == (2, 768, 256)
    assert model.max_position_embeddings == 1024
    assert model.hidden_dropout == 0


def test_a_preset_leaves_training_keys_of_the_file_alone(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {hidden_dropout: 0.0, init_method_std: 0.01, activation: swiglu, bias: false}",
        encoding="utf-8",
    )
    model = run("model.preset=gpt2-124m", file=file).config.model
    assert (model.hidden_dropout, model.init_method_std) == (0.0, 0.01)
    assert (model.activation, model.bias) == ("gelu_tanh", True)


def test_an_unknown_preset_names_the_nearest():
    assert "gpt2-124m" in problems("model.preset=gpt2-124")["model.preset"][1]


def test_the_vocabulary_is_the_tokenizers_unless_larger():
    assert run().config.model.architecture(50257).vocab_size == 50257
    assert run("model.vocab_size=60000").config.model.architecture(50257).vocab_size == 60000
    with pytest.raises(ConfigError, match="smaller than the tokenizer's"):
        run("model.vocab_size=100").config.model.architecture(50257)


def test_every_field_of_the_architecture_is_a_key():
    assert set(ModelConfig.model_fields) <= set(
        run().config.model.model_fields_set | set(type(run().config.model).model_fields)
    )
    architecture = run(
        "model.kv_channels=32", "model.rotary_base=500", "model.position_embedding_type=rope"
    ).config.model.architecture(100)
    assert (architecture.kv_channels, architecture.rotary_base) == (32, 500.0)


# ---- rules ----


def test_every_impossible_combination_at_once():
    found = problems(
        "model.hidden_size=100", "model.num_query_groups=5", "model.encoder_seq_length=600", "model.max_position_embeddings=512",
        "model.global_batch_size=10", "model.init_from=a", "model.resume_from_checkpoint=b", "trainer.accelerator=cpu", "trainer.devices=[1]",
        "model.data.dataloader_type=cyclic", "model.data.seq_length=5",
        "model.data.splits_string=-1,2,3",
    )  # fmt: skip
    assert set(found) == {
        "model.hidden_size", "model.num_query_groups", "model.encoder_seq_length", "model.global_batch_size",
        "model.init_from", "trainer.devices", "model.data.dataloader_type",
        "model.data.seq_length", "model.data.splits_string",
    }  # fmt: skip
    assert found["model.hidden_size"][1].startswith("num_attention_heads ∈ [1, 2, 4, 5, 10, 20, 25, 50, 100]")
    assert found["model.num_query_groups"] == (
        "5 does not divide num_attention_heads 12",
        "num_query_groups ∈ [1, 2, 3, 4, 6, 12]",
    )
    assert "8 or 12" in found["model.global_batch_size"][1]


def test_what_two_sections_find_is_told_once():
    with pytest.raises(ConfigError) as caught:
        run(
            "model.optim.lr=1e-6",
            "model.optim.sched.warmup_samples=5",
            "model.optim.sched.warmup_ratio=0.1",
            "model.rampup_batch_size=[1,2]",
        )
    said = [problem.where.partition(" (")[0] for problem in caught.value.problems]
    assert sorted(said) == sorted(set(said))
    assert {"model.optim.sched.min_lr", "model.optim.sched.warmup_ratio", "model.rampup_batch_size"} <= set(
        said
    )


def test_a_warm_up_of_the_packaged_file_gives_way_to_ones_own(tmp_path):
    ratio = run("model.optim.sched.warmup_ratio=0.25", "trainer.max_steps=1000")
    sched = ratio.config.model.optim.sched
    assert (sched.warmup_steps, sched.warmup_ratio) == (None, 0.25)
    assert any("warmup_steps: 500" in n and "gives way to" in n for n in ratio.notices)
    assert not any("gives way" in n for n in run("model.optim.sched.warmup_steps=3").notices)
    assert run("model.optim.sched.warmup_ratio=null").config.model.optim.sched.warmup_steps == 500
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {optim: {sched: {warmup_ratio: 0.1}}}\n")
    with pytest.raises(ConfigError, match="both given"):
        run("model.optim.sched.warmup_steps=5", file=mine)
    mine.write_text("defaults: [megatron_gpt_config]\nmodel: {optim: {sched: {warmup_ratio: 0.1}}}\n")
    assert run(file=mine).config.model.optim.sched.warmup_steps is None


def test_expert_parallelism_is_refused_by_name():
    found = problems("model.expert_model_parallel_size=2")
    assert "model.expert_model_parallel_size" in found
    assert "not built yet" in str(found)


def test_context_parallelism_needs_chunks_of_one_length():
    assert run("model.context_parallel_size=2", "model.encoder_seq_length=64").config
    found = problems("model.context_parallel_size=3", "model.encoder_seq_length=64")
    assert "context ∈ {1, 2, 4, 8, 16, 32}" in found["model.context_parallel_size"][1]


def test_the_whole_ramp_is_checked_before_the_first_step():
    assert run("model.rampup_batch_size=[4,4,100]", "model.global_batch_size=16").config
    assert "model.rampup_batch_size" in problems(
        "model.rampup_batch_size=[4,5,100]", "model.global_batch_size=16"
    )
    found = problems(
        "model.rampup_batch_size=[2,2,100]", "model.global_batch_size=16", "model.micro_batch_size=4"
    )
    assert "does not divide the batch sizes 2, 6, 10, 14" in found["model.rampup_batch_size"][0]
    assert "model.rampup_batch_size" in problems("model.rampup_batch_size=[2,2]")


def test_learned_positions_bound_the_length_others_do_not():
    assert "model.encoder_seq_length" in problems(
        "model.encoder_seq_length=600", "model.max_position_embeddings=512"
    )
    run(
        "model.encoder_seq_length=600",
        "model.max_position_embeddings=512",
        "model.position_embedding_type=rope",
    )


def test_a_schedule_without_decay_is_a_notice_with_a_cure():
    (notice,) = run("trainer.max_steps=1000").notices
    assert "no decay phase" in notice
    assert "model.optim.sched.warmup_steps=50 model.optim.sched.constant_steps=0" in notice
    cured = run(
        "trainer.max_steps=1000", "model.optim.sched.warmup_steps=50", "model.optim.sched.constant_steps=0"
    )
    assert cured.notices == []


def test_ranking_by_a_validation_that_there_is_not_is_a_notice():
    assert any("there is no validation" in n for n in run("trainer.limit_val_batches=0").notices)
    assert not run(
        "trainer.limit_val_batches=0", "exp_manager.checkpoint_callback_params.monitor=null"
    ).notices


def test_switches_without_effect_are_notices():
    assert len(run("model.zero_shard_size=2", "model.sequence_parallel=true").notices) == 2
    assert not run("model.zero_stage=1").notices


def test_the_layout_is_made_of_the_keys_and_the_processes():
    config = run(
        "model.tensor_model_parallel_size=2", "model.sequence_parallel=true", "model.zero_stage=2",
        "model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2",
        "model.zero_shard_size=2", "model.overlap_grad_reduce=false",
    ).config  # fmt: skip
    sizes = config.model.layout(16)
    assert (sizes.tensor, sizes.pipeline, sizes.shard, sizes.replicate, sizes.world) == (2, 2, 2, 2, 16)
    assert (sizes.schedule, sizes.sequence_parallel, sizes.overlap) == ("interleaved", True, False)
    assert run("model.pipeline_model_parallel_size=2").config.model.sizes.schedule == "1f1b"


def test_layouts_that_cannot_be_name_their_keys():
    found = problems(
        "model.tensor_model_parallel_size=5",
        "model.pipeline_model_parallel_size=2",
        "model.pipeline_layers=[1,2]",
        "model.zero_cpu_offload=true",
    )
    assert {"model.tensor_model_parallel_size", "model.pipeline_layers", "model.zero_cpu_offload"} <= set(
        found
    )


def test_two_ways_to_begin_contradict_each_other():
    assert "restore_from_path" in problems("restore_from_path=a", "model.init_from=b")
    assert run("restore_from_path=a").config.init_from == "a"


def test_absurdly_large_numbers_are_refused_quickly():
    found = problems(
        "model.hidden_size=12345678901234567890",
        "model.global_batch_size=99999999999",
        "model.encoder_seq_length=99999999999",
    )
    assert len(found) == 3


def test_every_key_has_a_meaning():
    silent = [".".join(p) for p, info in fields_of(PretrainGPTConfig) if not (info.description or "").strip()]
    assert silent == []
    assert len([p for p, i in fields_of(PretrainGPTConfig) if not section_of(i.annotation)]) > 120


# ---- derived numbers ----


def test_derived_numbers():
    config = run(
        "model.preset=gpt2-124m",
        "model.vocab_size=50257",
        "trainer.max_steps=100",
        "model.global_batch_size=16",
    ).config
    rows = {row.name: row.value for row in derived(config)}
    assert rows["micro-batches a step"] == 4
    assert rows["tokens a step"] == 16 * 1024
    assert rows["tokens of the run"] == 100 * 16 * 1024
    assert rows["padded vocabulary"] == 50304
    assert rows["parameters"] == 124439808
    assert rows["validations"] == 1


def test_derived_numbers_without_a_tokenizer_say_what_is_missing():
    rows = {row.name: (row.value, row.because) for row in derived(run().config)}
    assert rows["vocabulary"][0] == "unknown"
    assert "tokenizer" in rows["vocabulary"][1]
    assert "parameters" not in rows


def test_a_ramp_counts_its_samples():
    config = run(
        "model.rampup_batch_size=[4,4,100]", "model.global_batch_size=16", "trainer.max_steps=10"
    ).config
    rows = {row.name: row.value for row in derived(config)}
    assert rows["samples of the run"] == config.model.batch_schedule.consumed_at(10)
    assert rows["samples of the run"] < 160


@pytest.mark.parametrize("name", ["gpt2-124m", "llama3-8b", "gpt-nano"])
def test_matrix_parameters_are_all_but_tables_norms_and_biases(name):
    config = presets.get(name, num_layers=2)
    tables = config.vocab_size * config.hidden_size * (1 if config.share_embeddings_and_output_weights else 2)
    positions = (
        config.max_position_embeddings
        * config.hidden_size
        * (config.position_embedding_type == "learned_absolute")
    )
    width, inner, groups = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.kv_heads * config.head_dim,
    )
    norm = width * (2 if config.normalization == "layernorm" else 1)
    biases = config.num_layers * (inner + 2 * groups + width + config.ffn_size + width) if config.bias else 0
    matrices = (
        num_parameters(config, padded=False)
        - tables
        - positions
        - biases
        - (2 * config.num_layers + 1) * norm
    )
    assert matrix_parameters(config) == matrices + config.vocab_size * width
