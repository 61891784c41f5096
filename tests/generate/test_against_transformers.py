"""Greedy tokens equal `transformers.generate`'s on tiny GPT-2 and Llama in float64; ours batched and ragged, theirs alone."""

import logging

import pytest
import torch

from megalith.generate.beam import search
from megalith.generate.engine import decode
from megalith.generate.reading import prepare_for_reading
from megalith.generate.sampling import Sampling
from megalith.models.config import ModelConfig
from megalith.models.gpt import GPT

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)
from tests.reference.test_transformers import from_gpt2, from_llama  # noqa: E402

VOCABULARY, POSITIONS = 40, 40
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [27, 18, 28, 18], [2] * 20]
SHAPE = {
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 8,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}


def gpt2():
    theirs = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel, theirs, ModelConfig(**SHAPE), from_gpt2


def llama():
    theirs = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
    )
    config = ModelConfig(
        **SHAPE,
        num_query_groups=2,
        ffn_hidden_size=48,
        position_embedding_type="rope",
        normalization="rmsnorm",
        activation="swiglu",
        bias=False,
        share_embeddings_and_output_weights=False,
    )
    return transformers.LlamaForCausalLM, theirs, config, from_llama


@pytest.fixture(scope="module", params=[gpt2, llama], ids=lambda make: make.__name__)
def pair(request):
    """(our model, their model) with the same float64 weights."""
    model_class, theirs_config, config, convert = request.param()
    torch.manual_seed(1)
    theirs = model_class(theirs_config).double().eval()
    ours = GPT(config).double()
    ours.load_state_dict(convert(dict(theirs.state_dict()), config))
    return prepare_for_reading(ours, None), theirs


def generate(theirs, prompt, count, **options):
    """Their greedy tokens, prompt included, and the log-probability of each new one."""
    out = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    tokens = out.sequences[0].tolist()
    logprobs = [
        float(logits[0].log_softmax(-1)[token])
        for logits, token in zip(out.logits, tokens[len(prompt) :], strict=True)
    ]
    return tokens, logprobs


@pytest.mark.parametrize("recompute", [False, True], ids=["cache", "recompute"])
def test_greedy(pair, recompute):
    ours, theirs = pair
    *_, rows = decode(
        ours, PROMPTS, Sampling(tokens_to_generate=18), eod=None, recompute=recompute, logprobs=True
    )
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens, logprobs = generate(theirs, prompt, 18, eos_token_id=None)
        assert row.tokens == tokens
        assert row.logprobs == pytest.approx(logprobs, abs=1e-5)  # their norms are in fp32
    assert len({row.tokens[-1] for row in rows}) > 1


def test_end_of_text_least_tokens_and_penalty(pair):
    ours, theirs = pair
    eod = generate(theirs, PROMPTS[0], 3, eos_token_id=None)[0][-1]
    sampling = Sampling(tokens_to_generate=15, min_tokens_to_generate=4, repetition_penalty=1.3)
    *_, rows = decode(ours, PROMPTS, sampling, eod=eod)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        options = {"min_new_tokens": 4, "repetition_penalty": 1.3, "eos_token_id": eod}
        assert row.tokens == generate(theirs, prompt, 15, **options)[0]


def test_beams(pair):
    ours, theirs = pair
    eod = generate(theirs, PROMPTS[0], 3, eos_token_id=None)[0][-1]
    found = search(ours, PROMPTS, Sampling(tokens_to_generate=10, beams=3, num_samples=2), eod=eod)
    lengths = set()
    for prompt, rows in zip(PROMPTS, found, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=10,
            num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=eod, eos_token_id=eod,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for row, tokens in zip(rows, out.sequences.tolist(), strict=True):
            assert row.tokens == tokens[: len(row.tokens)]
            assert set(tokens[len(row.tokens) :]) <= {eod}
            lengths.add(row.made)
        assert [row.score for row in rows] == pytest.approx(out.sequences_scores.tolist(), abs=1e-5)
    assert len(lengths) > 1
