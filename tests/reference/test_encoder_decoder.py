"""The same numbers as the encoder-decoders of `transformers`: logits, loss and every gradient in float64, under padding.

T5 1.0 and 1.1, BART, and Pegasus, which has the wiring of Megatron's T5 (norm before, biases everywhere, one table of positions
for both sides, a bias of the logits), of which `transformers` has no class. Weights are mapped by straight-line code; as the map
is linear, gradients are compared through it too.
"""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from megalith.models.encdec import EncoderDecoder
from megalith.models.encdec_config import EncoderDecoderConfig
from tests.reference.common import assert_close, random_model
from tests.reference.test_bert import pad
from tests.reference.test_transformers import group_qkv

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY, SOURCE, TARGET = 13, 9, 7


def ours(**fields):
    shape = {
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 8,
        "encoder_num_layers": 2,
        "decoder_num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "ffn_hidden_size": 24,
        "max_position_embeddings": 12,
    }
    return EncoderDecoderConfig(**{**shape, **fields})


def stacks(config):
    return (("encoder", config.encoder_layers), ("decoder", config.decoder_layers))


def group_kv(k, v, heads):
    """Separate k and v rows → (head, key + value) rows."""
    k, v = (x.unflatten(0, (heads, -1)) for x in (k, v))
    return torch.stack((k, v), 1).flatten(0, 2)


def from_t5(w, config):
    new, heads = {"token_embedding.weight": pad(w["shared.weight"])}, config.num_attention_heads
    if not config.share_embeddings_and_output_weights:
        new["head.weight"] = pad(w["lm_head.weight"])
    for side, layers in stacks(config):
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        new[f"{side}.relative_bias.weight"] = w[first]
        new[f"{side}.final_norm.weight"] = w[f"{side}.final_layer_norm.weight"]
        for i in range(layers):
            old, block, last = f"{side}.block.{i}.layer", f"{side}.blocks.{i}", 1 if side == "encoder" else 2
            new[f"{block}.norm_attention.weight"] = w[f"{old}.0.layer_norm.weight"]
            new[f"{block}.norm_mlp.weight"] = w[f"{old}.{last}.layer_norm.weight"]
            q, k, v = (w[f"{old}.0.SelfAttention.{x}.weight"] for x in "qkv")
            new[f"{block}.attention.qkv.weight"] = group_qkv(q, k, v, heads, heads)
            new[f"{block}.attention.out.weight"] = w[f"{old}.0.SelfAttention.o.weight"]
            if side == "decoder":
                new[f"{block}.norm_cross.weight"] = w[f"{old}.1.layer_norm.weight"]
                q, k, v = (w[f"{old}.1.EncDecAttention.{x}.weight"] for x in "qkv")
                new[f"{block}.cross.q.weight"], new[f"{block}.cross.kv.weight"] = q, group_kv(k, v, heads)
                new[f"{block}.cross.out.weight"] = w[f"{old}.1.EncDecAttention.o.weight"]
            dense = f"{old}.{last}.DenseReluDense"
            new[f"{block}.mlp.down.weight"] = w[f"{dense}.wo.weight"]
            if f"{dense}.wi.weight" in w:
                new[f"{block}.mlp.up.weight"] = w[f"{dense}.wi.weight"]
            else:
                new[f"{block}.mlp.gate.weight"] = w[f"{dense}.wi_0.weight"]
                new[f"{block}.mlp.up.weight"] = w[f"{dense}.wi_1.weight"]
    return new


def from_bart(w, config):
    """BART's names, and Pegasus': both sides' tables are read as one where the config shares them."""
    new, heads = {"token_embedding.weight": pad(w["model.shared.weight"])}, config.num_attention_heads
    if config.output_bias:
        new["output_bias.bias"] = pad(w["final_logits_bias"][0])
    if config.share_position_embeddings:
        new["position_embedding.weight"] = w["positions"]
    names = {
        "norm_attention": "self_attn_layer_norm",
        "attention.out": "self_attn.out_proj",
        "norm_mlp": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    }
    across = {
        "norm_cross": "encoder_attn_layer_norm",
        "cross.q": "encoder_attn.q_proj",
        "cross.out": "encoder_attn.out_proj",
    }
    ends = {"norm_embedding": "layernorm_embedding", "final_norm": "layer_norm"}
    for side, layers in stacks(config):
        if not config.share_position_embeddings:
            new[f"{side}.position_embedding.weight"] = w[f"model.{side}.embed_positions.weight"][2:]
        for kind in ("weight", "bias"):
            for mine, theirs in ends.items():
                if f"model.{side}.{theirs}.{kind}" in w:
                    new[f"{side}.{mine}.{kind}"] = w[f"model.{side}.{theirs}.{kind}"]
            for i in range(layers):
                old, block = f"model.{side}.layers.{i}", f"{side}.blocks.{i}"
                table = names | across if side == "decoder" else names
                new |= {
                    f"{block}.{mine}.{kind}": w[f"{old}.{theirs}.{kind}"] for mine, theirs in table.items()
                }
                q, k, v = (w[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv")
                new[f"{block}.attention.qkv.{kind}"] = group_qkv(q, k, v, heads, heads)
                if side == "decoder":
                    k, v = (w[f"{old}.encoder_attn.{x}_proj.{kind}"] for x in "kv")
                    new[f"{block}.cross.kv.{kind}"] = group_kv(k, v, heads)
    return new


def randomised(theirs):
    torch.manual_seed(0)
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return theirs


def compare(theirs, config, convert, learnt):
    """`learnt` (theirs) → named tensors, or by `grad` their gradients."""
    model = random_model(config, model_class=EncoderDecoder)
    model.load_state_dict(convert({n: t.detach() for n, t in learnt(theirs).items()}, config))
    generator = torch.Generator().manual_seed(0)
    source, tokens, targets = (
        torch.randint(VOCABULARY, (3, length), generator=generator) for length in (SOURCE, TARGET, TARGET)
    )
    lengths = torch.tensor([SOURCE, 5, 1])
    targets[0, 4:] = targets[2, 0] = -1
    real = torch.arange(SOURCE) < lengths[:, None]
    logits = theirs(source, attention_mask=real.long(), decoder_input_ids=tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    loss.backward()
    hidden = model(source, tokens=tokens, encoder_lengths=lengths)
    assert_close("logits", model.logits(hidden), logits)
    term = model.loss(hidden, targets)["lm"]
    assert term.count == (targets >= 0).sum()
    assert_close("loss", term.sum / term.count, loss)
    (term.sum / term.count).backward()
    gradients = convert({n: t.grad for n, t in learnt(theirs).items()}, config)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, gradients[name])


def own(theirs):
    return dict(theirs.named_parameters())


T5 = {
    "1.0": ({"feed_forward_proj": "relu"}, {"activation": "relu", "scale_decoder_output": True}),
    "1.1": (
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"activation": "geglu", "share_embeddings_and_output_weights": False},
    ),
}


@pytest.mark.parametrize("version", T5)
def test_t5(version):
    theirs_fields, fields = T5[version]
    theirs_config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, layer_norm_epsilon=1e-3, **theirs_fields,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration._from_config(theirs_config, attn_implementation="eager")
    if version == "1.1":  # their constructor ties all tables
        theirs.lm_head.weight = torch.nn.Parameter(theirs.shared.weight.detach().clone())
    theirs = randomised(theirs)
    config = ours(
        kv_channels=6,
        position_embedding_type="relative",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=6,
        normalization="rmsnorm",
        layernorm_epsilon=1e-3,
        bias=False,
        attention_scale=1.0,
        **fields,
    )
    for module in theirs.modules():  # theirs takes the mean square in fp32
        if type(module).__name__ == "T5LayerNorm":
            module.forward = rms(module)
    compare(theirs, config, from_t5, own)


def rms(module):
    return lambda x: (
        module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))
    )


def with_bias(theirs):
    """Their bias of the logits is a buffer: here it learns."""
    theirs.final_logits_bias = torch.randn_like(theirs.final_logits_bias).requires_grad_()
    return theirs


def bart_like(kind, activation):
    shape = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 20,
        "max_position_embeddings": 12,
        "activation_function": activation,
        "pad_token_id": None,  # else its row of the table does not learn
    }
    theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**shape)
    )
    return with_bias(randomised(theirs))


@pytest.mark.parametrize("bias", [True, False])
def test_bart(bias):
    theirs = bart_like("Bart", "gelu")
    if not bias:
        theirs.final_logits_bias = torch.zeros_like(theirs.final_logits_bias)
    config = ours(
        decoder_ffn_hidden_size=20,
        transformer_block_type="post_ln",
        share_position_embeddings=False,
        activation="gelu_erf",
        output_bias=bias,
    )
    compare(
        theirs,
        config,
        from_bart,
        lambda m: {**own(m), "final_logits_bias": m.final_logits_bias} if bias else own(m),
    )


def test_megatron_t5_wiring():
    theirs = bart_like("Pegasus", "gelu_new")
    table = torch.nn.Parameter(
        torch.randn(12, 16, dtype=torch.float64)
    )  # theirs are sines, which do not learn
    for side in (theirs.model.encoder, theirs.model.decoder):
        side.embed_positions.forward = lambda shape, *_, **__: table[: shape[1]]

    def learnt(model):
        return {**own(model), "positions": table, "final_logits_bias": model.final_logits_bias}

    compare(theirs, ours(decoder_ffn_hidden_size=20, output_bias=True), from_bart, learnt)
