"""BERT, T5 and BART answer prompts: the same on any number of processes; refused by name where only a GPT can be used."""

from __future__ import annotations

import pytest
import torch

from megalith.errors import CheckpointError, ConfigError, DataError
from megalith.generate.guess import guess
from megalith.generate.jobs import Options, sample_all
from megalith.generate.loading import load_model
from megalith.generate.text import complete, stream
from megalith.topology.sizes import Sizes
from tests.generate.families import PROMPTS, answers, loaded_of, sampling_of, save_family


@pytest.fixture(scope="module", params=PROMPTS)
def family(request):
    return str(request.param)


@pytest.fixture(scope="module")
def run(family, tmp_path_factory, rank_pool):
    """A run folder that two pipeline stages of two tensor ranks saved."""
    folder = tmp_path_factory.mktemp(family)
    rank_pool.run(save_family, 4, str(folder), family, Sizes(tensor=2, pipeline=2))
    return folder


def rounded(found):
    """Without what rounding may change: numbers to six digits."""
    if isinstance(found, float):
        return pytest.approx(found, abs=2e-6)
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    return [rounded(value) for value in found] if isinstance(found, list) else found


LAYOUTS = [Sizes(tensor=2), Sizes(replicate=2), Sizes(pipeline=2), Sizes(tensor=2, pipeline=2)]
TWO_SIDED = [Sizes(pipeline=3, pipeline_split=1), Sizes(pipeline=4)]
"""Two stages of the decoder, of either side."""


def test_answers_do_not_depend_on_the_processes(run, family, rank_pool):
    expected = answers(str(run))
    for sizes in LAYOUTS + (TWO_SIDED if family != "bert" else []):
        for found in rank_pool.run(answers, sizes.world, str(run), sizes):
            assert found == rounded(expected), str(sizes)
    texts = [row["text"] for rows in expected.values() for row in rows]
    assert len(set(texts)) > 2


@pytest.mark.parametrize("family", ["t5", "bart"], indirect=True)
def test_a_streamed_answer_is_the_whole_one(run, family):
    loaded = loaded_of(run)
    for prompt in PROMPTS[family]:
        *pieces, last = stream(loaded, prompt, sampling_of())
        (whole,) = complete(loaded, [prompt], sampling_of())
        assert ("".join(pieces), last) == (whole.text, whole)
        assert len(whole.tokens) <= 8


@pytest.mark.parametrize("family", ["bert"], indirect=True)
def test_guesses_are_the_models_probabilities(run):
    loaded = loaded_of(run)
    tokenizer = loaded.needs_tokenizer()
    for found, prompt in zip(guess(loaded, PROMPTS["bert"], 3), PROMPTS["bert"], strict=True):
        ids = [tokenizer.cls]
        for word in prompt.replace("[MASK]", "<mask>").replace("<mask>", " <mask> ").split():
            ids += [tokenizer.mask] if word == "<mask>" else tokenizer.encode(word)
        with torch.inference_mode():
            logits = loaded.model.logits(loaded.model(torch.tensor([[*ids, tokenizer.sep]])))[0]
        places = [i for i, id in enumerate(ids) if id == tokenizer.mask]
        assert len(places) == len(found.masks)
        for place, guesses in zip(places, found.masks, strict=True):
            best = logits[place].softmax(-1).topk(3)
            assert [each.token for each in guesses] == best.indices.tolist()
            assert [each.probability for each in guesses] == pytest.approx(best.values.tolist(), abs=1e-9)
        words = prompt.replace("[MASK]", "{}").replace("<mask>", "{}")
        if not any(guesses[0].text.startswith("##") for guesses in found.masks):
            assert found.text == words.format(*(guesses[0].text for guesses in found.masks))


def test_what_cannot_be_answered(run, family):
    loaded = loaded_of(run)
    wrong = {
        "bert": [("no blank", "no blank"), ("<extra_id_0> a", "T5's"), ("[MASK] " + "a " * 40, "reads 24 at most"), ("", "empty")],
        "t5": [("<mask> " * 6, "5 sentinel tokens"), ("<mask> <extra_id_0>", "masks and sentinels"), ("", "empty")],
        "bart": [("<extra_id_0> a", "T5's"), ("a " * 25, "the encoder reads 24 at most"), ("", "empty")],
    }  # fmt: skip
    for prompt, words in wrong[family]:
        with pytest.raises(DataError, match=words):
            guess(loaded, [prompt]) if family == "bert" else complete(loaded, [prompt], sampling_of())
    with pytest.raises(ConfigError, match="answers a prompt"):
        next(sample_all(loaded, 2, sampling_of(), Options()))


def test_refused_by_name_where_a_gpt_is_needed(run, family):
    with pytest.raises(CheckpointError, match=f"is a {family.upper()}") as caught:
        load_model(run, families=("gpt",))
    assert "GPT" in caught.value.problem.fix
