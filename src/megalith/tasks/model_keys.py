"""Keys that NeMo's and Megatron's files write in `model` and that are not ours: what becomes of each, and why.

One table, for every pretraining task. Knows names alone.
"""

from __future__ import annotations

from typing import Any

from megalith.config.schema import ForeignKey, ignored, refused, renamed, translated

_ONE_KERNEL = "there is one implementation, and compilation fuses it"
_FP32_SUMS = "gradients are accumulated and reduced in fp32"
_COMMUNICATION = "how processes exchange data is not a setting"
_NO_FP8 = "8-bit floats are not built; use trainer.precision=bf16-mixed"
_NO_OFFLOAD = "offloading to the CPU is not built"


def _fusion(value: Any) -> dict[str, Any]:
    """Without this fusion the originals compute GELU by erf, with it by tanh: another function, not another speed."""
    return {"activation": "gelu_erf"} if value is False else {}


def _onnx(value: Any) -> dict[str, Any]:
    return {"activation": "gelu_erf"} if value else {}


def _openai(value: Any) -> dict[str, Any]:
    return {"activation": "gelu_tanh"} if value else {}


def _stretched(value: Any) -> dict[str, Any]:
    return {} if value is None else {"rotary_scaling": {"type": "linear", "factor": value}}


MODEL_KEYS: dict[str, ForeignKey] = {
    # means something else here
    "bias_gelu_fusion": translated(
        "says which GELU: true is the tanh form, false the erf form (model.activation: gelu_erf)",
        _fusion,
        weak=True,
    ),
    "onnx_safe": translated(
        "says which GELU: true is the erf form (model.activation: gelu_erf)", _onnx, weak=True
    ),
    "openai_gelu": translated(
        "says which GELU: true is the tanh form (model.activation: gelu_tanh)", _openai, weak=True
    ),
    "native_amp_init_scale": renamed("initial_loss_scale", "is called model.initial_loss_scale here"),
    "native_amp_growth_interval": renamed(
        "loss_scale_growth_interval", "is called model.loss_scale_growth_interval here"
    ),
    "seq_len_interpolation_factor": translated("is written model.rotary_scaling here", _stretched, weak=True),
    # without effect
    "apex_transformer_log_level": ignored("there is no Apex"),
    "apply_query_key_layer_scaling": ignored(
        "it cancels in exact arithmetic, and scores are computed in fp32"
    ),
    "async_grad_allreduce": ignored(_COMMUNICATION),
    "attention_softmax_in_fp32": ignored("softmax is always computed in fp32"),
    "attention_type": ignored("model.attention_core chooses how attention is computed"),
    "barrier_with_L1_time": ignored("timers do not stop other processes"),
    "batch_p2p_comm": ignored(_COMMUNICATION),
    "bias_activation_fusion": ignored(_ONE_KERNEL),
    "bias_dropout_add_fusion": ignored(_ONE_KERNEL),
    "deallocate_pipeline_outputs": ignored(_COMMUNICATION),
    "disable_parameter_transpose_cache": ignored(_ONE_KERNEL),
    "enable_megatron_timers": ignored("trainer.profiler measures where time goes"),
    "megatron_timer_kwargs": ignored("trainer.profiler measures where time goes"),
    "fp16_lm_cross_entropy": ignored("the loss is computed in fp32"),
    "fp32_residual_connection": ignored("the residual stream is fp32"),
    "get_attention_mask_from_fusion": ignored("the causal mask is never made"),
    "grad_allreduce_chunk_size_mb": ignored(_COMMUNICATION),
    "grad_div_ar_fusion": ignored(_COMMUNICATION),
    "gradient_accumulation_fusion": ignored(_FP32_SUMS),
    "gradient_as_bucket_view": ignored("gradients are not copied into buckets"),
    "masked_softmax_fusion": ignored("model.attention_core chooses how attention is computed"),
    "mcore_gpt": ignored("there is one GPT"),
    "megatron_amp_O2": ignored("layers cast by themselves; trainer.precision says to what"),
    "megatron_legacy": ignored("there is one GPT"),
    "overlap_p2p_comm": ignored(_COMMUNICATION),
    "persist_layer_norm": ignored("there is one layer norm"),
    "pipeline_model_parallel_split_rank": ignored("this model has no encoder to split off"),
    "post_process": ignored("a stage knows by itself whether it is the last"),
    "pre_process": ignored("a stage knows by itself whether it is the first"),
    "precision": ignored("trainer.precision decides"),
    "sync_batch_comm": ignored(_COMMUNICATION),
    "target": ignored("the command says what is trained"),
    "nemo_version": ignored("there is no NeMo"),
    "use_cpu_initialization": ignored("initial weights are the same wherever they are made"),
    "use_flash_attention": ignored("model.attention_core chooses; auto takes the fastest that is exact"),
    "use_emha": ignored("model.attention_core chooses how attention is computed"),
    "nsys_profile": ignored("trainer.profiler measures where time goes"),
    "ub_tp_comm_overlap": ignored(_COMMUNICATION),
    "use_te_rng_tracker": ignored("dropout masks are hashes; there is no generator to track"),
    "transformer_engine": ignored("there is one implementation of each layer"),
    "reduce_amax": ignored("there are no 8-bit floats"),
    "num_micro_batches_with_partial_activation_checkpoints": ignored("every micro-batch is treated alike"),
    "activations_checkpoint_layers_per_pipeline": ignored("every stage is treated alike"),
    # would silently be another model, or another run
    "fp8": refused(_NO_FP8),
    "fp8_e4m3": refused(_NO_FP8),
    "fp8_hybrid": refused(_NO_FP8),
    "cpu_offloading": refused(_NO_OFFLOAD),
    "megatron_amp_O3": refused("there is no such level"),
    "headscale": refused("heads are not scaled"),
    "ffn_dropout": refused("there is no dropout inside the feed-forward layer", harmless=(0, 0.0)),
    "moe_dropout": refused("mixtures of experts are not built", harmless=(0, 0.0)),
    "num_moe_experts": refused("mixtures of experts are not built", harmless=(0, 1)),
    "use_soft_prompts": refused("soft prompts are tuned on a trained model, not pretrained"),
    "language_model": refused(
        "was the encoder of NeMo's tasks: its lm_checkpoint, nemo_file and pretrained_model_name are model.init_from here (a path "
        "or a name of `megalith hub list`); sizes come with the checkpoint, and what config_file or config held are keys of model "
        "itself (model.hidden_size, …)"
    ),
    "multi_query": refused("is written model.num_query_groups=1 here"),
}

_ONE_KIND = "both sides are transformers; there is no other kind"

ENCODER_DECODER_KEYS: dict[str, ForeignKey] = {
    **{name: key for name, key in MODEL_KEYS.items() if name != "pipeline_model_parallel_split_rank"},
    "seq_length": renamed("encoder_seq_length", "is called model.encoder_seq_length here"),
    "encoder_arch": refused(_ONE_KIND, harmless=("transformer",)),
    "decoder_arch": refused(_ONE_KIND, harmless=("transformer",)),
}
"""The same for T5 and BART, some of which NeMo calls by other names."""
