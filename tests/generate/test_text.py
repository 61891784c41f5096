"""Text of rows: whole characters only, stop strings wherever they begin and end, the same streamed as at once."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.errors import CheckpointError
from megalith.generate.loading import Loaded
from megalith.generate.sampling import Sampling
from megalith.generate.text import UNFINISHED, Completion, Speller, complete, stream
from tests.generate.tiny import tiny_loaded, tiny_tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return tiny_loaded(tmp_path_factory.mktemp("tiny"), positions=200)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Scripted:
    """A tokenizer whose pieces are given: id i spells pieces[i]; like SentencePiece it drops a leading space."""

    eod = None

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace").removeprefix(" ")


def spell(tokenizer, ids, stop=(), prompt=()):
    """Every state of a speller: (certain text, stopped), and the final text."""
    speller, states = Speller(tokenizer, prompt, stop), []
    for id in ids:
        stopped = speller.push(id)
        states.append(speller.certain)
        if stopped:
            break
    return states, speller.finish()


def test_no_half_characters_are_shown(tokenizer):
    text = "the 日本 naïve 🙂 dog"
    states, final = spell(tokenizer, tokenizer.encode(text))
    assert final == text
    assert len(states) > len(text.split())  # the rare characters are bytes
    for state in states:
        assert UNFINISHED not in state
        assert text.startswith(state)


def test_half_a_character_at_the_end_is_dropped(tokenizer):
    ids = tokenizer.encode("the 🙂")
    assert spell(tokenizer, ids[:-1])[1] == "the "
    assert spell(tokenizer, tokenizer.encode("a" + UNFINISHED + "b"))[1] == "a" + UNFINISHED + "b"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=9), text=st.text(max_size=40))
def test_token_by_token_is_all_at_once(tokenizer, prompt, text):
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    states, final = spell(tokenizer, ids, prompt=before)
    whole = Speller(tokenizer, before, ())
    whole.extend(ids)
    assert final == whole.finish() == text.rstrip(UNFINISHED)
    for earlier, later in itertools.pairwise([*states, final]):
        assert later.startswith(earlier)


def test_a_space_between_prompt_and_continuation_is_kept():
    tokenizer = Scripted([b" Once", b" upon", b" a"])
    assert spell(tokenizer, [1, 2], prompt=[0])[1] == " upon a"
    assert spell(tokenizer, [0, 1])[1] == "Once upon"


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["a", "b", "\n", "\n", "c"], ("\n\n",), "ab"),
        (["one", " st", "op", "!"], ("stop",), "one "),
        (["x", "END", "y"], ("END",), "x"),
        (["xEN", "Dy END"], ("END",), "x"),
        (["a b", " c d"], ("d", "b"), "a "),
        (["aab"], ("ab",), "a"),
        (["aa", "ab"], ("aab",), "a"),
        (["never"], ("stop",), "never"),
        (["unfinished st"], ("stop",), "unfinished st"),
    ],
)
def test_stop_strings(pieces, stop, text):
    tokenizer = Scripted([piece.encode() for piece in pieces])
    states, final = spell(tokenizer, range(len(pieces)), stop)
    assert final == text
    for state in states:
        assert text.startswith(state)  # nothing shown has to be taken back


def greedy(loaded, prompt, **options):
    (row,) = complete(loaded, [prompt], Sampling(tokens_to_generate=24, **options))
    return row


def test_a_stop_string_ends_a_row_and_is_not_part_of_it(loaded):
    free = greedy(loaded, "the cat")
    stop = free.text[3:6]
    row = greedy(loaded, "the cat", stop=(stop,))
    assert row.finished == "stop"
    assert row.text == free.text[: free.text.index(stop)]
    assert free.tokens[: len(row.tokens)] == row.tokens
    assert len(row.tokens) < len(free.tokens)


@pytest.mark.parametrize("stop", [(), ("at",), ("zzz", "\n")])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2}])
def test_streamed_pieces_are_the_text(loaded, stop, sampling):
    options = Sampling(tokens_to_generate=40, stop=stop, **sampling)
    *pieces, last = stream(loaded, "a dog", options, number=2, logprobs=True)
    (row,) = complete(loaded, ["a dog"], options, numbers=[2], logprobs=True)
    assert isinstance(last, Completion)
    assert "".join(pieces) == last.text
    assert last.tokens == row.tokens
    assert last.text == row.text
    assert last.finished == row.finished
    assert last.logprobs == pytest.approx(row.logprobs)
    assert all(pieces)


def test_prompts_of_any_words(loaded):
    """`stop` in a prompt ends nothing; an empty prompt begins a document."""
    rows = complete(loaded, ["stop", "please stop it", ""], Sampling(tokens_to_generate=5))
    assert [len(row.tokens) for row in rows] == [5, 5, 5]
    assert [row.prompt for row in rows] == ["stop", "please stop it", ""]


def test_json(loaded):
    plain, full = (
        complete(loaded, ["a"], Sampling(tokens_to_generate=2), logprobs=wanted)[0].to_json()
        for wanted in (False, True)
    )
    assert list(plain) == ["prompt", "text", "tokens", "finished"]
    assert list(full) == ["prompt", "text", "tokens", "logprobs", "finished"]
    assert len(full["logprobs"]) == len(full["tokens"]) == 2


def test_a_checkpoint_without_tokenizer(loaded, tmp_path):
    bare = Loaded(loaded.model, None, tmp_path, {})
    with pytest.raises(CheckpointError, match="--tokenizer"):
        complete(bare, ["a"], Sampling())
