"""Decoding: the cache changes nothing, neighbours change nothing, ends are honoured."""

import pytest
import torch

from megalith.errors import DataError
from megalith.generate.engine import decode
from megalith.generate.sampling import Sampling
from tests.generate.tiny import VARIANTS, tiny_model

RAGGED = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7], [8, 8]]


def run(model, prompts, sampling, **options):
    *_, rows = decode(model, prompts, sampling, eod=options.pop("eod", None), logprobs=True, **options)
    return [row.tokens for row in rows], rows


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(tokens_to_generate=20),
        Sampling(temperature=1.3, top_p=0.9, tokens_to_generate=20),
        Sampling(tokens_to_generate=20, repetition_penalty=1.4),
    ],
    ids=["greedy", "drawn", "penalty"],
)
def test_cache_equals_no_cache_and_batch_equals_single(name, sampling):
    model = tiny_model(**VARIANTS[name])
    together, rows = run(model, RAGGED, sampling)
    assert together == run(model, RAGGED, sampling, recompute=True)[0]
    for i, prompt in enumerate(RAGGED):
        alone, (row,) = run(model, [prompt], sampling, numbers=[i])
        assert alone[0] == together[i]
        assert row.logprobs == pytest.approx(rows[i].logprobs, abs=1e-9)
        assert row.made == 20
        assert together[i][: len(prompt)] == prompt


def straight(model, prompt, count, eod=None):
    """Greedy, one forward over everything a token, nothing shared."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
        if tokens[-1] == eod:
            break
    return tokens


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_rows_that_end_early_leave_and_disturb_nobody(name, recompute):
    """Ends at different steps, the position table among them: each row equals a straight loop of its own."""
    model = tiny_model(**VARIANTS[name])
    prompts = [*RAGGED, [3] * 40, [4, 1]]
    eod = straight(model, [7], 9)[6]
    positions = model.config.max_positions or 1000
    found, rows = run(model, prompts, Sampling(tokens_to_generate=15), eod=eod, recompute=recompute)
    for prompt, tokens, row in zip(prompts, found, rows, strict=True):
        assert tokens == straight(model, prompt, min(15, positions - len(prompt)), eod)
        if row.finished == "eod":
            assert tokens[-1] == eod
            assert eod not in row.continuation[:-1]
        elif row.finished == "positions":
            assert len(tokens) == positions
        else:
            assert (row.finished, row.made) == ("length", 15)
    assert len({row.made for row in rows}) > 1
    assert {"eod", "length"} <= {row.finished for row in rows}


def test_a_step_reads_living_rows_only():
    """What a step costs falls as rows end."""
    model = tiny_model()
    ends = {0: 3, 1: 8, 2: 5}
    sizes, forward = [], model.forward
    model.forward = lambda x, **more: sizes.append(tuple(x.shape)) or forward(x, **more)
    run(
        model,
        [[5], [6], [7]],
        Sampling(tokens_to_generate=10),
        stopped=lambda row: row.made == ends[row.number],
    )
    assert sizes == [(3, 1)] * 3 + [(2, 1)] * 2 + [(1, 1)] * 3


def test_rows_that_all_end_at_once():
    _, rows = run(tiny_model(), RAGGED, Sampling(tokens_to_generate=5), stopped=lambda row: row.made == 2)
    assert [(row.made, row.finished) for row in rows] == [(2, "stop")] * 4


def test_greedy_takes_the_most_probable_token():
    model = tiny_model()
    tokens, (row,) = run(model, [[3, 1]], Sampling(tokens_to_generate=6))
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor(tokens)))[0]
    assert logits[1:-1].argmax(-1).tolist() == row.continuation
    logprobs = logits.log_softmax(-1)[1:-1].max(-1).values
    assert row.logprobs == pytest.approx(logprobs.tolist(), abs=1e-9)


def test_logprobs_are_the_models_own():
    """Before temperature, filters, penalties and bans."""
    model = tiny_model()
    sampling = Sampling(tokens_to_generate=8, temperature=3.0, top_k=5, repetition_penalty=2.0)
    tokens, (row,) = run(model, [[3, 1]], sampling)
    with torch.inference_mode():
        known = model.logits(model(torch.tensor(tokens)))[0].log_softmax(-1)[1:-1]
    expected = known.gather(-1, torch.tensor(row.continuation)[:, None])[:, 0]
    assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-9)


def test_end_of_document_ends_a_row_and_minimum_delays_it():
    model = tiny_model()
    (tokens,), _ = run(model, [[3, 1]], Sampling(tokens_to_generate=8))
    eod = tokens[4]
    (ended,), (row,) = run(model, [[3, 1]], Sampling(tokens_to_generate=8), eod=eod)
    assert ended == tokens[:5]
    assert row.finished == "eod"
    (later,), (row,) = run(model, [[3, 1]], Sampling(tokens_to_generate=8, min_tokens_to_generate=6), eod=eod)
    assert eod not in later[2:8]


def test_the_position_table_ends_a_row():
    model = tiny_model()
    (tokens,), (row,) = run(model, [[1] * 40], Sampling(tokens_to_generate=100))
    assert len(tokens) == 48
    assert row.finished == "positions"
    with pytest.raises(DataError, match="48 at most"):
        run(model, [[1] * 48], Sampling())
    with pytest.raises(DataError, match="empty prompt"):
        run(model, [[]], Sampling())


def test_a_prompt_of_any_length_leaves_room_to_go_on():
    """The reference refuses prompts of half the positions."""
    model = tiny_model()
    (tokens,), _ = run(model, [[1] * 47], Sampling(tokens_to_generate=5))
    assert len(tokens) == 48


def test_nothing_asked_for_is_nothing_generated():
    (tokens,), (row,) = run(tiny_model(), [[3, 1]], Sampling(tokens_to_generate=0))
    assert tokens == [3, 1]
    assert row.continuation == []


def test_attempts_and_numbers_key_the_draws():
    model = tiny_model()
    sampling = Sampling(temperature=1.5, tokens_to_generate=12)
    texts = [
        run(model, [[5]], sampling, numbers=[number], attempt=attempt)[0][0]
        for number in (0, 1)
        for attempt in (0, 1)
    ]
    assert len({tuple(text) for text in texts}) == 4
    assert texts[0] == run(model, [[5]], sampling)[0][0]
