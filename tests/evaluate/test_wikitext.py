"""WikiText's numbers against the reference's recipe written out straight, for any batch size; real text where there is some."""

import math

import pytest
import torch

from megalith.errors import ConfigError, DataError
from megalith.evaluate.detokenize import detokenize
from megalith.evaluate.wikitext import Request, evaluate
from megalith.generate.loading import Loaded
from megalith.models.config import ModelConfig
from megalith.models.family import describe
from megalith.models.gpt import GPT
from megalith.parallel.apply import build
from megalith.tokenizers.load import load_tokenizer
from megalith.topology.topology import Topology
from tests.generate.tiny import tiny_loaded

TEXT = (
    ' \n = The cat = \n \n The cat \'s mat , a 1 @,@ 000 dog ( sat ) on the " cat " . \n = = naïve = = \n' * 2
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), positions=16)


def recipe(model, tokens, words, length, overlap):
    """Megatron-LM's: every window, idle ones too, padded with 0 and masked; → (loss, ratio)."""
    targets = len(tokens) - 1
    count = max(math.ceil(max(targets - overlap, 0) / overlap) + 1, 1)
    total = counted = 0
    for window in range(count):
        part = tokens[window * overlap : window * overlap + length + 1]
        mask = [1] * (len(part) - 1) + [0] * (length + 1 - len(part))
        part = part + [0] * (length + 1 - len(part))
        if window > 0:
            mask[: length - overlap] = [0] * (length - overlap)
        with torch.inference_mode():
            logs = model.logits(model(torch.tensor([part[:-1]])))[0].log_softmax(-1)
        for place, counts in enumerate(mask[:length]):
            total -= counts * float(logs[place, part[place + 1]])
            counted += counts
    assert counted == targets
    return total / targets, targets / (words - 1)


@pytest.mark.parametrize(("length", "overlap"), [(16, None), (16, 5), (9, 9), (7, 1)])
@pytest.mark.parametrize("detokenizer", ["wiki", "none"])
def test_equals_the_recipe(loaded, tmp_path, length, overlap, detokenizer):
    file = tmp_path / "text"
    file.write_text(TEXT, "utf-8")
    clean = (
        TEXT
        if detokenizer == "none"
        else ('\n= The cat =\n\nThe cat\'s mat, a 1,000 dog (sat) on the "cat".\n== naïve ==\n' * 2)
    )
    tokens = loaded.tokenizer.encode(clean)
    words = TEXT.strip().count(" ") + 1
    loss, ratio = recipe(loaded.model, tokens, words, length, overlap or length)
    reports = [
        evaluate(loaded, Request(str(file), detokenizer, length, overlap, batch_size))
        for batch_size in (1, 3, 50)
    ]
    for report in reports:
        assert report.loss == pytest.approx(loss, rel=1e-12)
        assert report.perplexity == pytest.approx(math.exp(loss))
        assert (
            report.token_ratio == ratio == pytest.approx((report.tokens - 1) / (report.original_tokens - 1))
        )
        assert report.adjusted_perplexity == pytest.approx(math.exp(min(20, loss * ratio)))
        spelled = loaded.tokenizer.decode(tokens[1:])
        assert report.bits_per_byte == pytest.approx(
            loss * (len(tokens) - 1) / math.log(2) / len(spelled.encode())
        )
        assert report.overlapping_eval == (overlap or length)


def test_words_are_pieces_between_single_spaces(loaded, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text("  one two\nthree  four \n", "utf-8")
    assert evaluate(loaded, Request(str(file))).original_tokens == 4  # "two\nthree" is one, "" another


def test_the_default_overlap_is_the_references(loaded, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(TEXT, "utf-8")
    wide = tiny_loaded(tmp_path, positions=80)
    assert evaluate(wide, Request(str(file))).overlapping_eval == 32
    assert evaluate(loaded, Request(str(file))).overlapping_eval == 16  # a window of 16 has no 32


def test_the_references_line(loaded, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(TEXT, "utf-8")
    report = evaluate(loaded, Request(str(file)))
    assert report.line == (
        f" validation results on WIKITEXT103 | avg loss: {report.loss:.4E} | ppl: {report.perplexity:.4E} | "
        f"adjusted ppl: {report.adjusted_perplexity:.4E} | token ratio: {report.token_ratio} |"
    )
    assert report.to_json()["task"] == "wikitext"


def test_wrong_requests_are_told(loaded, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text("word", "utf-8")
    with pytest.raises(DataError, match="no two words"):
        evaluate(loaded, Request(str(file)))
    file.write_text(TEXT, "utf-8")
    with pytest.raises(ConfigError, match="17 is longer than the 16 positions"):
        evaluate(loaded, Request(str(file), seq_length=17))
    with pytest.raises(ConfigError, match="not between 1 and the window length"):
        evaluate(loaded, Request(str(file), overlapping_eval=17))
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        evaluate(loaded, Request(str(file)))


def real_loaded(real_data, folder, dtype):
    """A tiny random GPT with GPT-2's vocabulary: no trained weights are at hand, exactness needs none."""
    tokenizer = load_tokenizer(real_data("gpt2-vocab"))
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    (model,) = build(
        GPT, config, Topology.single(), seed=1, precision="64" if dtype == torch.float64 else "32"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return Loaded(model.eval(), tokenizer, folder, {"step": 0, "seed": 1, **describe("gpt", config)})


def test_real_text(real_data, tmp_path):
    """The beginning of WikiText-103's validation text: the recipe's loss, for batches of 1 and 8, and in fp32."""
    source = real_data("wikitext") / "wikitext-103" / "wiki.valid.tokens"
    part = tmp_path / "wiki.valid.tokens"
    part.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:9]))
    loaded = real_loaded(real_data, tmp_path, torch.float64)
    one, eight = (
        evaluate(loaded, Request(str(part), seq_length=128, batch_size=batch_size)) for batch_size in (1, 8)
    )
    assert one.detokenizer == "wiki"
    text = part.read_text("utf-8")
    tokens = loaded.tokenizer.encode(detokenize(text, "wiki"))
    assert one.tokens == len(tokens) > 300
    loss, ratio = recipe(loaded.model, tokens, text.strip().count(" ") + 1, 128, 32)
    assert one.loss == pytest.approx(loss, rel=1e-12)
    assert eight.loss == pytest.approx(loss, rel=1e-12)
    assert one.token_ratio == ratio
    single = evaluate(real_loaded(real_data, tmp_path, torch.float32), Request(str(part), seq_length=128))
    assert single.loss == pytest.approx(loss, rel=1e-6)


def test_the_token_ratio_of_real_text(real_data):
    """WikiText-103's whole validation text under GPT-2's tokenizer: about 1.1 tokens a word, as published of the test text."""
    raw = (real_data("wikitext") / "wikitext-103" / "wiki.valid.tokens").read_text("utf-8")
    clean = detokenize(raw, "wiki")
    assert len(raw.split()) == 217646 - 3760  # the published count has an end of line each
    assert " @-@ " in raw
    assert " @-@ " not in clean
    tokens = len(load_tokenizer(real_data("gpt2-vocab")).encode(clean))
    assert 1.05 < (tokens - 1) / (raw.strip().count(" ")) < 1.15
