"""Rows become samples: virtual tokens, where the answer begins, lengths, templates."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megalith.data.tuning_samples import Maker, Rules
from megalith.data.tuning_tasks import (
    TASK,
    Field,
    Task,
    Virtual,
    parse_template,
    plain,
    tagged,
    template_problems,
)
from megalith.errors import DataError
from megalith.tokenizers.train import TrainingOptions, train_bpe

TEXT = "The trophy does not fit because it is too big. Answer:"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([f"{TEXT} trophy suitcase " * 30], TrainingOptions(vocab_size=330))


def made(tokenizer, task, rules, **fields):
    return Maker(tokenizer, [task], rules).sample(task, {"text": TEXT, "answer": " trophy", **fields})


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(path)]


def test_virtual_tokens_stand_first_and_only_the_answer_counts(tokenizer):
    task = tagged("W", 3, answer_only=True).at(1000)
    sample = made(tokenizer, task, Rules(100, eos=tokenizer.eod, before=(7,)))
    text, answer = tokenizer.encode(TEXT), tokenizer.encode(" trophy")
    assert sample.tokens.tolist() == [1000, 1001, 1002, 7, *text, *answer, tokenizer.eod]
    assert sample.scored.tolist() == [False] * (4 + len(text)) + [True] * (len(answer) + 1)


def test_the_whole_text_counts_the_first_token_too_but_no_virtual_one(tokenizer):
    sample = made(tokenizer, tagged("W", 3, answer_only=False).at(1000), Rules(100))
    assert sample.scored.tolist() == [False] * 3 + [True] * (len(sample.tokens) - 3)


def test_the_answer_begins_where_the_offsets_say(tokenizer):
    # Tokenised alone the answer has other tokens than in its place: NeMo would count from the end and be off.
    task = plain("text", "answer", answer_only=True)
    sample = made(tokenizer, task, Rules(100), text="The ", answer="trophy")
    assert sample.tokens.tolist() == tokenizer.encode("The trophy")
    assert tokenizer.decode(sample.tokens[sample.scored]).strip() == "trophy"
    assert len(tokenizer.encode("trophy")) != sample.scored.sum()


def test_of_two_sides_the_encoder_reads_the_text_and_the_decoder_says_the_answer(tokenizer):
    rules = Rules(100, before=(5,), behind=(6,), eos=2, start=(1, 9))
    sample = made(tokenizer, tagged("W", 2, answer_only=False).at(1000), rules)
    assert sample.encoder.tolist() == [1000, 1001, 5, *tokenizer.encode(TEXT), 6]
    answer = tokenizer.encode(" trophy")
    assert sample.tokens.tolist() == [1, 9, *answer, 2]
    assert sample.scored.tolist() == [False, False, *[True] * len(answer), True]


def test_samples_cannot_be_changed(tokenizer):
    sample = made(tokenizer, tagged("W", 3, answer_only=True), Rules(100))
    with pytest.raises(ValueError, match="read-only"):
        sample.tokens[0] = 1


def test_too_long_samples_are_counted_or_cut(tokenizer, tmp_path):
    row = {"prompt_tag": "W", "text": TEXT, "answer": " trophy"}
    files = write(tmp_path, row, {**row, "text": TEXT * 3}, {**row, "text": ""})
    task = tagged("W", 3, answer_only=True).at(1000)
    whole = len(made(tokenizer, task, Rules(1000)).tokens)
    found = Maker(tokenizer, [task], Rules(whole, min_length=3)).read(files, training=True)
    assert (len(found), found.too_long, found.too_short, found.cut) == (1, 1, 1, 0)
    assert found.tasks == {"W": 1}
    cutting = tagged("W", 3, answer_only=True, truncate="text").at(1000)
    found = Maker(tokenizer, [cutting], Rules(whole)).read(files, training=True)
    assert (len(found), found.too_long, found.cut) == (3, 0, 1)
    cut = found.samples[1]
    assert whole - 1 <= len(cut.tokens) <= whole
    assert tokenizer.decode(cut.tokens[cut.scored]) == " trophy"
    assert cut.origin.endswith("rows.jsonl:2")
    with pytest.raises(DataError, match=r"no sample is left: 3 rows are longer than 3 tokens"):
        Maker(tokenizer, [cutting], Rules(3)).read(files, training=True)


def test_rows_of_which_nothing_counts_are_left_out(tokenizer, tmp_path):
    row = {"prompt_tag": "W", "text": TEXT, "answer": ""}
    task = tagged("W", 3, answer_only=True).at(1000)
    files = write(tmp_path, row, {**row, "answer": " trophy"})
    found = Maker(tokenizer, [task], Rules(100)).read(files, training=True)
    assert (len(found), found.too_short) == (1, 1)
    assert len(Maker(tokenizer, [task], Rules(100, eos=2)).read(files, training=True)) == 2, "they end"
    with pytest.raises(DataError, match="1 shorter than 1, or without a token that counts"):
        Maker(tokenizer, [task], Rules(100)).read(write(tmp_path, row), training=True)


def test_tags_that_are_not_known_or_done_are_told_by_line(tokenizer, tmp_path):
    row = {"prompt_tag": "W", "text": "a", "answer": "b"}
    files = write(tmp_path, row, {**row, "prompt_tag": "X"}, {**row, "prompt_tag": "old"})
    tasks = [tagged("old", 2, answer_only=True).at(9, frozen=True), tagged("W", 2, answer_only=True).at(11)]
    with pytest.raises(DataError) as caught:
        Maker(tokenizer, tasks, Rules(50)).read(files, training=True)
    assert 'line 2: prompt_tag "X" is none of old, W' in str(caught.value)
    assert 'line 3: prompt_tag "old" is tuned already' in str(caught.value)
    found = Maker(tokenizer, tasks, Rules(50)).read(
        write(tmp_path, row, {**row, "prompt_tag": "old"}), training=False
    )
    assert [sample.tokens[0] for sample in found.samples] == [11, 9]


def test_an_empty_file_has_no_sample(tokenizer, tmp_path):
    with pytest.raises(DataError, match="there is no row in it"):
        Maker(tokenizer, [tagged("W", 2, answer_only=True)], Rules(50)).read(write(tmp_path), training=False)


def test_rows_without_a_tag_are_spelled_in_two_ways(tokenizer, tmp_path):
    tasks = [plain("input", "output", answer_only=True), plain("text", "answer", answer_only=True)]
    maker = Maker(tokenizer, tasks, Rules(50))
    one = maker.read(write(tmp_path, {"input": "The ", "output": "trophy", "id": 1}), training=True)
    two = maker.read(write(tmp_path, {"prompt_tag": "x", "text": "The ", "answer": "trophy"}), training=True)
    assert one.samples[0].tokens.tolist() == two.samples[0].tokens.tolist()


def test_a_template_has_virtual_tokens_where_it_says(tokenizer):
    parts = parse_template("<|VIRTUAL_PROMPT_0|>{a} and<|VIRTUAL_PROMPT_1|> so{b}", [2, 3])
    assert parts == (Virtual(0, 2), Field("a"), " and", Virtual(2, 3), " so", Field("b"))
    task = Task("t", parts, "b", answer_only=True, key=TASK).at(500)
    assert (task.virtual, task.fields) == (5, ("a", "b"))
    sample = Maker(tokenizer, [task], Rules(50)).sample(task, {"a": "The trophy", "b": " suitcase"})
    first, second = tokenizer.encode("The trophy and"), tokenizer.encode(" so suitcase")
    assert sample.tokens.tolist() == [500, 501, *first, 502, 503, 504, *second]
    assert tokenizer.decode(sample.tokens[sample.scored]) == " suitcase"


@pytest.mark.parametrize(
    ("template", "splits", "total", "answer", "truncate", "key"),
    [
        ("<|VIRTUAL_PROMPT_0|>{a}{b}", [2], 3, "b", None, "virtual_token_splits"),
        ("<|VIRTUAL_PROMPT_0|>{a}{b}", [2, 1], 3, "b", None, "prompt_template"),
        ("<|VIRTUAL_PROMPT_1|>{a}{b}", [3], 3, "b", None, "prompt_template"),
        ("<|VIRTUAL_PROMPT_0|>", [3], 3, None, None, "prompt_template"),
        ("<|VIRTUAL_PROMPT_0|>{a}{b}.", [3], 3, "b", None, "answer_field"),
        ("<|VIRTUAL_PROMPT_0|>{a}{b}{a}", [3], 3, None, None, "answer_field"),
        ("<|VIRTUAL_PROMPT_0|>{a}{b}", [3], 3, "c", None, "answer_field"),
        ("<|VIRTUAL_PROMPT_0|>{a}{b}", [3], 3, "b", "b", "truncate_field"),
        ("<|VIRTUAL_PROMPT_0|>{a}{b}", [3], 3, "b", "d", "truncate_field"),
    ],
)
def test_a_template_that_cannot_be(template, splits, total, answer, truncate, key):
    assert key in {found[0] for found in template_problems(template, splits, total, answer, truncate)}
    assert not list(template_problems("<|VIRTUAL_PROMPT_0|>{a}{b}", [3], 3, "b", "a"))


def test_ids_are_whole_numbers(tokenizer):
    assert made(tokenizer, tagged("W", 3, answer_only=True), Rules(100)).tokens.dtype == np.int64
