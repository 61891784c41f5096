"""LAMBADA against one passage at a time, one token at a time; labels of words, of tokens; real passages where there are some."""

import json
import math

import pytest
import torch

from megalith.errors import ConfigError, DataError
from megalith.evaluate.lambada import Example, Request, evaluate, passages, score, split
from tests.evaluate.test_wikitext import real_loaded
from tests.generate.tiny import tiny_loaded

WORDS = ["the", "cat", "sat", "on", "the", "mat,", "a", "dog", "sat", "on", "the", "cat"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), positions=64)


def guess(model, context):
    """The most probable next token, and the log-probabilities of all."""
    with torch.inference_mode():
        logs = model.logits(model(torch.tensor([context])))[0, -1].log_softmax(-1)
    return int(logs.argmax()), logs


def obvious(model, example):
    """Teacher forcing, a forward a token → (whole label guessed, nats of the label)."""
    context, right, nats = list(example.context), True, 0.0
    for token in example.label:
        best, logs = guess(model, context)
        right &= best == token
        nats -= float(logs[token])
        context.append(token)
    return right, nats


def examples(model):
    """Ragged, with labels of one to four tokens: some wholly right, some right but for one token, most wrong."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(40):
        length = int(torch.randint(1, 30, (), generator=generator))
        context = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        label, size = [], 1 + i % 4
        for _ in range(size):
            label.append(guess(model, context + label)[0])
        if i % 3 == 1:
            label[i % size] = (label[i % size] + 1) % model.config.vocab_size
        found.append(Example(context, label))
    return found


def test_equals_the_obvious_loop_for_any_batch(loaded):
    given = examples(loaded.model)
    expected = [obvious(loaded.model, example) for example in given]
    assert 10 < sum(right for right, _ in expected) < 35
    for batch_size in (1, 3, 7, 64):
        outcomes = score(loaded.model, given, batch_size)
        assert [outcome.right for outcome in outcomes] == [right for right, _ in expected]
        assert [outcome.loss for outcome in outcomes] == pytest.approx(
            [nats for _, nats in expected], abs=1e-9
        )


def write(tmp_path, texts):
    file = tmp_path / "lambada.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(file)


def texts_with_answers(loaded):
    """Sentences, some of whose last word is made the model's own guess."""
    texts = []
    for i in range(2, len(WORDS)):
        texts += [" ".join(WORDS[:i]), "  " + " ".join(WORDS[i - 2 : i]) + "\n"]
    tokens = loaded.tokenizer.encode("the cat sat on the mat, a dog")
    for _ in range(30):
        word = loaded.tokenizer.decode([guess(loaded.model, tokens)[0]])
        if word.startswith(" ") and word.strip().isalnum():
            texts.append(loaded.tokenizer.decode(tokens) + word)
        tokens = tokens[1:] + tokens[:1]
    return texts


@pytest.mark.parametrize("strict", [False, True])
def test_the_report(loaded, tmp_path, strict):
    texts = texts_with_answers(loaded)
    expected = [
        obvious(loaded.model, split(text, loaded.tokenizer, strict=strict, where="")) for text in texts
    ]
    for batch_size in (1, 4, 100):
        report = evaluate(loaded, Request(write(tmp_path, texts), strict, batch_size=batch_size))
        assert report.examples == len(texts)  # each once, whatever the batch
        assert report.correct == sum(right for right, _ in expected)
        assert report.accuracy == report.correct / report.examples
        mean = sum(nats for _, nats in expected) / len(texts)
        assert report.perplexity == pytest.approx(math.exp(min(20, mean)))
        assert report.cut == 0
    assert report.line == (
        f" validation results on LAMBADA | number correct: {report.correct:.4E} | "
        f"total examples: {len(texts):.4E} | avg accuracy: {report.accuracy:.4E}"
    )


class Letters:
    """A tokenizer of characters."""

    def encode(self, text):
        return [ord(c) for c in text]


def test_loose_and_strict_labels():
    text = "a cat on a cat\n"
    loose = split(text, Letters(), strict=False, where="")
    assert ("".join(map(chr, loose.context)), "".join(map(chr, loose.label))) == ("a cat on a cat", "\n")
    strict = split(text, Letters(), strict=True, where="")
    assert ("".join(map(chr, strict.context)), "".join(map(chr, strict.label))) == ("a cat on a", " cat")


def test_passages_too_long_are_cut_at_their_beginning_and_counted(loaded, tmp_path):
    texts = ["the cat sat", " ".join(WORDS * 9)]
    report = evaluate(loaded, Request(write(tmp_path, texts), seq_length=10))
    assert report.cut == 1
    whole = split(texts[1], loaded.tokenizer, strict=False, where="")
    short = [
        obvious(loaded.model, Example(whole.context[-10:], whole.label)),
        obvious(loaded.model, split(texts[0], loaded.tokenizer, strict=False, where="")),
    ]
    assert report.perplexity == pytest.approx(math.exp(min(20, sum(nats for _, nats in short) / 2)))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ('{"text": "a b"}\n{"text": 3}\n', "line 2: is not a JSON object"),
        ('{"text": "a b"}\n\n[1]\n', "line 3: is not a JSON object"),
        ("not json", "line 1: is not a JSON object"),
        ('{"text": " "}', "line 1: is not a JSON object"),
        ("\n \n", "holds no passage"),
    ],
)
def test_bad_lines_are_named(tmp_path, data, what):
    file = tmp_path / "lambada.jsonl"
    file.write_text(data, "utf-8")
    with pytest.raises(DataError, match=what):
        passages(str(file))


def test_a_passage_needs_a_context_and_room(loaded, tmp_path):
    with pytest.raises(DataError, match="line 1: has nothing before its last word"):
        evaluate(loaded, Request(write(tmp_path, ["word"]), strict=True))
    with pytest.raises(DataError, match="its last word has 5 tokens, the model reads 4"):
        evaluate(loaded, Request(write(tmp_path, ["the bbbb"]), strict=True, seq_length=4))
    with pytest.raises(ConfigError, match="65 is longer than the 64 positions"):
        evaluate(loaded, Request(write(tmp_path, ["a b"]), seq_length=65))


@pytest.mark.parametrize("strict", [False, True])
def test_real_passages(real_data, tmp_path, strict):
    """The first sixty: the same passages right, and the same nats, for batches of 1 and 16."""
    (source,) = real_data("lambada").glob("*.jsonl")
    part = tmp_path / "lambada.jsonl"
    part.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:60]))
    loaded = real_loaded(real_data, tmp_path, torch.float64)
    one, many = (evaluate(loaded, Request(str(part), strict, batch_size=size)) for size in (1, 16))
    assert one.examples == many.examples == 60
    assert one.correct == many.correct
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-10)
    assert one.cut == 0
