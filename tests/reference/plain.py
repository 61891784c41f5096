"""A slow, obvious GPT: one sequence, one head, one query at a time, from a dictionary of weights. Shares no code with src.

Covers every option that `ModelConfig` has, including those that no public library combines.
"""

from __future__ import annotations

import math

import torch


def logits_of(weights: dict, config, tokens, positions=None, documents=None):
    """(B, T) lists or tensors → (B, T, V)."""
    rows = []
    for b, row in enumerate(tokens):
        where = torch.arange(len(row)) if positions is None else positions[b]
        which = torch.zeros(len(row)) if documents is None else documents[b]
        rows.append(one_sequence(weights, config, row, where, which))
    return torch.stack(rows)


def loss_of(logits, targets):
    """Mean over counted targets, by the definition."""
    terms = []
    for row, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target != -1:
            terms.append(-torch.log(torch.exp(row[target]) / torch.exp(row).sum()))
    return torch.stack(terms).sum() / len(terms)


def one_sequence(w, c, tokens, positions, documents):
    x = torch.stack([w["token_embedding.weight"][int(t)] for t in tokens])
    if c.position_embedding_type == "learned_absolute":
        x = x + torch.stack([w["position_embedding.weight"][int(p)] for p in positions])
    for layer in range(c.num_layers):
        lw = {k[len(f"blocks.{layer}.") :]: v for k, v in w.items() if k.startswith(f"blocks.{layer}.")}
        if c.transformer_block_type == "post_ln":
            x = norm(x + attention(x, lw, w, c, positions, documents), lw, "norm_attention", c)
            x = norm(x + feed_forward(x, lw, c), lw, "norm_mlp", c)
        else:
            y = norm(x, lw, "norm_attention", c)
            x = (y if c.apply_residual_connection_post_layernorm else x) + attention(
                y, lw, w, c, positions, documents
            )
            z = norm(x, lw, "norm_mlp", c)
            x = (z if c.apply_residual_connection_post_layernorm else x) + feed_forward(z, lw, c)
    if c.transformer_block_type == "pre_ln":
        x = norm(x, w, "final_norm", c)
    head = w["token_embedding.weight"] if c.share_embeddings_and_output_weights else w["head.weight"]
    return x @ head[: c.vocab_size].T


def norm(x, w, name, c):
    weight = w[f"{name}.weight"]
    if c.normalization == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.layernorm_epsilon) * weight
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + c.layernorm_epsilon) * weight + w[f"{name}.bias"]


def linear(x, w, name):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def feed_forward(x, w, c):
    root2 = math.sqrt(2.0)
    bends = {
        "gelu_tanh": lambda u: (
            0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u * u * u)))
        ),
        "gelu_erf": lambda u: 0.5 * u * (1 + torch.erf(u / root2)),
        "relu": lambda u: torch.where(u > 0, u, torch.zeros_like(u)),
        "silu": lambda u: u / (1 + torch.exp(-u)),
        "squared_relu": lambda u: torch.where(u > 0, u * u, torch.zeros_like(u)),
    }
    gates = {"geglu": "gelu_tanh", "geglu_erf": "gelu_erf", "swiglu": "silu", "reglu": "relu"}
    if c.activation in gates:
        inner = bends[gates[c.activation]](linear(x, w, "mlp.gate")) * linear(x, w, "mlp.up")
    else:
        inner = bends[c.activation](linear(x, w, "mlp.up"))
    return linear(inner, w, "mlp.down")


def attention(x, w, whole, c, positions, documents):
    heads = c.num_attention_heads
    groups = c.num_query_groups or heads
    size = c.kv_channels or c.hidden_size // heads
    each = heads // groups
    scale = c.attention_scale if c.attention_scale is not None else 1 / math.sqrt(size)
    fused = linear(x, w, "attention.qkv")
    outputs = []
    for head in range(heads):
        group = head // each
        base = group * (each + 2) * size
        inside = head % each
        q = fused[:, base + inside * size : base + (inside + 1) * size]
        k = fused[:, base + each * size : base + (each + 1) * size]
        v = fused[:, base + (each + 1) * size : base + (each + 2) * size]
        if c.position_embedding_type == "rope":
            q, k = rotate(q, positions, c), rotate(k, positions, c)
        rows = []
        for i in range(len(x)):
            seen = [j for j in range(i + 1) if documents[j] == documents[i]]
            scores = torch.stack([(q[i] * k[j]).sum() * scale for j in seen])
            if c.position_embedding_type == "relative":
                scores = scores + torch.stack(
                    [whole["relative_bias.weight"][bucket_looking_back(i - j, c), head] for j in seen]
                )
            weight = torch.exp(scores) / torch.exp(scores).sum()
            rows.append(sum(weight[n] * v[j] for n, j in enumerate(seen)))
        outputs.append(torch.stack(rows))
    return linear(torch.cat(outputs, -1), w, "attention.out")


def frequency(i, channels, c):
    """Radians per position of pair i of channels / 2."""
    plain = 1.0 / c.rotary_base ** (2 * i / channels)
    scaling = c.rotary_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    wavelength = 2 * math.pi / plain
    original = scaling.original_max_position_embeddings
    if wavelength < original / scaling.high_freq_factor:
        return plain
    if wavelength > original / scaling.low_freq_factor:
        return plain / scaling.factor
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * plain / scaling.factor + smooth * plain


def rotate(x, positions, c):
    size = x.shape[-1]
    channels = int(size * c.rotary_percentage)
    rows = []
    for row, position in zip(x, positions, strict=True):
        new = list(row)
        for i in range(channels // 2):
            a, b = (2 * i, 2 * i + 1) if c.rotary_interleaved else (i, i + channels // 2)
            angle = float(position) * frequency(i, channels, c)
            new[a] = row[a] * math.cos(angle) - row[b] * math.sin(angle)
            new[b] = row[b] * math.cos(angle) + row[a] * math.sin(angle)
        rows.append(torch.stack(new))
    return torch.stack(rows)


def bucket_looking_back(distance, c):
    """T5's causal bucket of a distance ≥ 0."""
    buckets, longest = c.relative_attention_num_buckets, c.relative_attention_max_distance
    exact = buckets // 2
    if distance < exact:
        return distance
    far = exact + int(math.log(distance / exact) / math.log(longest / exact) * (buckets - exact))
    return min(far, buckets - 1)
