"""Jobs of many rows: in order, the same for every batch size, samples all different."""

import pytest

from megalith.errors import ConfigError, DataError
from megalith.generate.jobs import WINDOW, Options, continue_all, sample_all, unconditional_json
from megalith.generate.sampling import Sampling
from megalith.generate.text import Completion, complete
from tests.generate.tiny import tiny_loaded

PROMPTS = [
    "the cat",
    "",
    "a dog sat on the mat, the cat sat on the dog",
    "x",
    "naïve 中文",
    "the",
    "cat " * 9,
] * 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), positions=100)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(tokens_to_generate=6), Sampling(temperature=1.1, top_k=20, tokens_to_generate=6, stop=("t",))],
    ids=["greedy", "drawn"],
)
def test_every_batch_size_gives_the_same_rows_in_order(loaded, sampling):
    expected = [complete(loaded, [prompt], sampling, numbers=[i])[0] for i, prompt in enumerate(PROMPTS)]
    assert len(PROMPTS) > 2 * WINDOW
    for size in (1, 2, 7, 100):
        assert list(continue_all(loaded, PROMPTS, sampling, Options(size))) == expected


def test_rows_come_as_soon_as_their_window_is_done(loaded):
    rows = continue_all(loaded, ["a"] * (WINDOW + 1), Sampling(tokens_to_generate=1), Options(batch_size=1))
    assert next(rows).prompt == "a"
    assert len(list(rows)) == WINDOW


def test_options_reach_the_rows(loaded):
    (row,) = continue_all(
        loaded, ["a"], Sampling(tokens_to_generate=3), Options(recompute=True, logprobs=True)
    )
    (other,) = continue_all(loaded, ["a"], Sampling(tokens_to_generate=3), Options(logprobs=True))
    assert row.tokens == other.tokens
    assert row.logprobs == pytest.approx(other.logprobs)


def test_samples_are_never_equal_and_do_not_follow_the_batch(loaded):
    """Two tokens out of few: many draws come twice."""
    sampling = Sampling(top_k=8, tokens_to_generate=2, temperature=0.7)
    rows = {size: list(sample_all(loaded, 12, sampling, Options(size))) for size in (1, 3, 8)}
    assert len({row.text for row in rows[1]}) == 12
    assert rows[1] == rows[3] == rows[8]
    plain = list(continue_all(loaded, [""] * 12, sampling, Options(8)))
    assert len({row.text for row in plain}) < 12  # without the redraw some would be equal
    assert rows[8][0] == plain[0]


def test_more_samples_than_there_are(loaded):
    rows = sample_all(loaded, 10, Sampling(top_k=2, tokens_to_generate=1), Options())
    with pytest.raises(DataError, match="always equalled an earlier one"):
        list(rows)


@pytest.mark.parametrize("options", [{"greedy": True}, {"temperature": 0.0}])
def test_greedy_samples_are_refused(loaded, options):
    with pytest.raises(ConfigError, match="3 times the same text"):
        list(sample_all(loaded, 3, Sampling(tokens_to_generate=2, **options), Options()))


def test_one_sample_is_greedy_and_more_are_drawn(loaded):
    (one,) = sample_all(loaded, 1, Sampling(tokens_to_generate=9), Options())
    (greedy,) = complete(loaded, [""], Sampling(tokens_to_generate=9, greedy=True))
    assert one == greedy
    assert next(iter(sample_all(loaded, 2, Sampling(tokens_to_generate=9), Options()))) != greedy


@pytest.mark.parametrize(
    ("reason", "length", "finished"), [("eod", 2, True), ("stop", 3, True), ("length", 3, False)]
)
def test_the_references_line(reason, length, finished):
    row = Completion("", "abc", [1, 2, 3], reason)
    assert unconditional_json(row) == {"text": "abc", "length": length, "finished": finished}
