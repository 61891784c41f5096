"""A conversation: prompts until the end, a text stopped in its middle, a prompt that cannot be."""

import pytest

from megalith.generate.interactive import converse
from megalith.generate.jobs import Options
from megalith.generate.sampling import Sampling
from megalith.generate.text import complete
from tests.generate.tiny import tiny_loaded


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_loaded(tmp_path_factory.mktemp("tiny"))


def talk(loaded, prompts, sampling, write=None, end=EOFError):
    """→ number of prompts continued, what was written, complaints."""
    waiting, written, complaints = iter(prompts), [], []

    def ask():
        try:
            return next(waiting)
        except StopIteration:
            raise end from None

    number = converse(
        loaded, sampling, Options(), ask=ask, write=write or written.append, complain=complaints.append
    )
    return number, "".join(written), complaints


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_each_prompt_is_continued_as_a_row_of_its_own(loaded, end):
    sampling = Sampling(temperature=1.0, tokens_to_generate=6)
    prompts = ["the cat", "", "stop", "the cat"]
    number, written, _ = talk(loaded, prompts, sampling, end=end)
    rows = [
        complete(loaded, [p], sampling, numbers=[i])[0] for i, p in enumerate(["the cat", "stop", "the cat"])
    ]
    assert number == 3
    assert written == "".join(row.prompt + row.text + "\n" for row in rows)
    assert rows[0].text != rows[2].text


def test_a_text_can_be_stopped(loaded):
    written = []

    def write(piece):
        written.append(piece)
        if len(written) == 2:
            raise KeyboardInterrupt

    number, _, _ = talk(loaded, ["the cat", "a dog"], Sampling(tokens_to_generate=40), write)
    (second,) = complete(loaded, ["a dog"], Sampling(tokens_to_generate=40))
    assert number == 2
    assert written[2] == "\n"
    assert "".join(written[3:]) == "a dog" + second.text + "\n"


def test_a_prompt_too_long_is_complained_about(loaded):
    number, written, complaints = talk(loaded, ["b" * 60, "a"], Sampling(tokens_to_generate=2))
    assert number == 2
    assert "60 tokens" in str(complaints[0])
    assert written.startswith("a")
    assert written.endswith("\n")
