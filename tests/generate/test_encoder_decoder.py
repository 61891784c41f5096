"""Greedy and beam search equal `transformers.generate`'s on tiny T5 and BART in float64; theirs one prompt at a time."""

import logging

import pytest
import torch

from megalith.errors import DataError
from megalith.generate.beam import search
from megalith.generate.engine import decode
from megalith.generate.reading import prepare_for_reading
from megalith.generate.sampling import Sampling
from megalith.models.encdec import EncoderDecoder
from tests.reference import test_encoder_decoder as reference
from tests.reference.common import random_model

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

VOCABULARY, POSITIONS, COUNT = 29, 24, 9
SOURCES = [[3, 1, 4, 1, 5, 9, 2, 6], [7], [5, 9, 2, 6, 5], [27, 18, 28, 18, 2, 8, 4, 5, 9, 0, 4, 5]]
BOS, PAD, EOS = 0, 1, 2


def t5(version):
    theirs_fields, fields = reference.T5[version]
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4,
            relative_attention_num_buckets=8, relative_attention_max_distance=6, decoder_start_token_id=PAD,
            pad_token_id=PAD, **theirs_fields,
        )
    )  # fmt: skip
    if version == "1.1":
        theirs.lm_head.weight = torch.nn.Parameter(theirs.shared.weight.detach().clone())
    for module in theirs.modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = reference.rms(module)
    config = reference.ours(
        vocab_size=VOCABULARY, kv_channels=6, position_embedding_type="relative", relative_attention_num_buckets=8,
        relative_attention_max_distance=6, normalization="rmsnorm", layernorm_epsilon=1e-6, bias=False,
        attention_scale=1.0, **fields,
    )  # fmt: skip
    return theirs, config, reference.from_t5, [PAD], (None, None)


def bart():
    theirs = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=POSITIONS,
            activation_function="gelu", forced_bos_token_id=BOS, forced_eos_token_id=EOS, decoder_start_token_id=EOS,
            pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        )
    )  # fmt: skip
    config = reference.ours(
        vocab_size=VOCABULARY, decoder_ffn_hidden_size=20, transformer_block_type="post_ln", output_bias=True,
        share_position_embeddings=False, activation="gelu_erf", max_position_embeddings=POSITIONS,
    )  # fmt: skip
    return theirs, config, reference.from_bart, [EOS], (BOS, EOS)


MODELS = {"t5": lambda: t5("1.0"), "t5_v1_1": lambda: t5("1.1"), "bart": bart}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """(our model, theirs, what the decoder begins with, forced ends), with the same float64 weights."""
    theirs, config, convert, start, forced = MODELS[request.param]()
    theirs = reference.randomised(theirs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(3)  # so that predictions differ
    model = random_model(config, model_class=EncoderDecoder)
    weights = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    model.load_state_dict(convert({name: tensor.detach() for name, tensor in weights.items()}, config))
    return prepare_for_reading(model, None), theirs, start, forced


def generate(theirs, source, forced, **options):
    """Their output for one prompt."""
    bos, eos = forced
    return theirs.generate(
        torch.tensor([source]),
        attention_mask=torch.ones(1, len(source), dtype=torch.int64),
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        forced_bos_token_id=bos,
        forced_eos_token_id=eos,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        use_cache=False,  # theirs takes the encoder's depth for its size
        max_new_tokens=COUNT,
        **options,
    )


def trimmed(tokens, start):
    """Without what fills a row up behind its end."""
    at = next((i for i, token in enumerate(tokens) if token == EOS and i >= len(start)), len(tokens))
    return tokens[: at + 1]


GREEDY = {
    "plain": ({}, {}),
    "penalty": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "ngrams": (
        {"no_repeat_ngram": 2, "min_tokens_to_generate": 7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 7},
    ),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy(pair, name):
    ours, theirs, start, forced = pair
    fields, options = GREEDY[name]
    sampling, known = Sampling(tokens_to_generate=COUNT, **fields), {"eod": EOS, "forced": forced}
    prompts = [start] * len(SOURCES)
    *_, rows = decode(ours, prompts, sampling, **known, sources=SOURCES, logprobs=True)
    *_, again = decode(ours, prompts, sampling, **known, sources=SOURCES, recompute=True)
    assert [row.tokens for row in again] == [row.tokens for row in rows]
    for source, row in zip(SOURCES, rows, strict=True):
        out = generate(theirs, source, forced, **options)
        assert row.tokens == trimmed(out.sequences[0].tolist(), start)
        logprobs = [
            float(x[0].log_softmax(-1)[t]) for x, t in zip(out.logits, row.continuation, strict=False)
        ]
        assert row.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert len({tuple(row.tokens) for row in rows}) > 1


BEAMS = {
    "plain": ({}, {}),
    "long": ({"length_penalty": 2.0, "early_stopping": "never"}, {"length_penalty": 2.0, "early_stopping": "never"}),
    "early": ({"early_stopping": "yes", "length_penalty": 0.5}, {"early_stopping": True, "length_penalty": 0.5}),
    "restricted": (
        {"no_repeat_ngram": 2, "repetition_penalty": 1.2, "min_tokens_to_generate": 5},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.2, "min_new_tokens": 5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEAMS)
def test_beams(pair, name):
    ours, theirs, start, forced = pair
    fields, options = BEAMS[name]
    sampling = Sampling(tokens_to_generate=COUNT, beams=4, num_samples=3, **fields)
    known = {"eod": EOS, "forced": forced, "sources": SOURCES}
    found = search(ours, [start] * len(SOURCES), sampling, **known)
    again = search(ours, [start] * len(SOURCES), sampling, **known, recompute=True)
    assert [[row.tokens for row in rows] for rows in again] == [
        [row.tokens for row in rows] for rows in found
    ]
    for source, rows in zip(SOURCES, found, strict=True):
        out = generate(theirs, source, forced, num_beams=4, num_return_sequences=3, **options)
        assert [row.tokens for row in rows] == [trimmed(t, start) for t in out.sequences.tolist()]
        assert [row.score for row in rows] == pytest.approx(out.sequences_scores.tolist(), abs=1e-5)
        assert all(len(row.logprobs) == row.made for row in rows)


def test_what_cannot_be_read(pair):
    ours, _, start, _ = pair
    for source, words in (([], "empty prompt"), ([5] * 40, "the encoder reads")):
        if ours.config.max_positions is None and source:
            continue
        with pytest.raises(DataError, match=words):
            next(decode(ours, [start], Sampling(), eod=EOS, sources=[source]))
