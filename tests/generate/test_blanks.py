"""Blanks of a prompt: found, read as the model knows them, filled; what stands around a prompt, by family and by who trained."""

from __future__ import annotations

import msgspec
import pytest

import tokenizers
from megalith.errors import ConfigError, DataError
from megalith.generate.blanks import find, spans
from megalith.generate.manner import manner_of
from megalith.models.family import ARCHITECTURE
from megalith.tokenizers.bpe import DefinedTokenizer
from tests.generate.families import tokenizer_at

TEXT = "the <mask> sat on <mask>."


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [(TEXT, (0, 1)), ("<extra_id_3>[MASK", (3,)), ("[MASK] a [MASK]", (0, 1)), ("no blank", ())],
)
def test_found(prompt, numbers):
    assert find(prompt, sentinels=4).numbers == numbers


@pytest.mark.parametrize(
    ("fillings", "text"),
    [
        (["cat", "the mat"], "the cat sat on the mat."),
        (["", " a "], "the sat on a."),
        (["##n", "it"], "then sat on it."),
    ],
)
def test_filled(fillings, text):
    assert find(TEXT).filled(fillings) == text


def test_spans_of_what_a_decoder_wrote():
    written = "<extra_id_1> b c <extra_id_0> a <extra_id_1> twice <extra_id_9>"
    assert spans(written, (0, 1, 2)) == [" a ", " b c ", ""]
    assert spans("nothing of the kind", (0,)) == [""]


def test_ids(tmp_path):
    tokenizer = tokenizer_at(tmp_path)
    found = find(TEXT, sentinels=len(tokenizer.sentinels)).ids(tokenizer, tokenizer.sentinels[:2])
    assert tokenizer.decode(found) == "the <extra_id_0> sat on <extra_id_1>."


def state(family, **more):
    return {ARCHITECTURE: {"family": family, "config": {}}, **more}


def test_manner_of_our_own_and_of_megatron(tmp_path):
    tokenizer = tokenizer_at(tmp_path)
    cls, sep, bos, eos = tokenizer.cls, tokenizer.sep, tokenizer.bos, tokenizer.eos
    found = {family: manner_of(state(family), tokenizer) for family in ("bert", "t5", "bart", "gpt")}
    assert (found["bert"].before, found["bert"].behind) == ((cls,), (sep,))
    for family in ("t5", "bart"):
        assert (found[family].before, found[family].behind, found[family].start) == ((), (), (bos,))
        assert (found[family].eod, found[family].forced) == (eos, (None, None))
    assert found["gpt"].before == ()
    assert manner_of(state("gpt"), tokenizer, True).before == (bos,)
    with pytest.raises(ConfigError, match="is a GPT's"):
        manner_of(state("t5"), tokenizer, False)


def templated(template):
    """A tokenizer of single letters as transformers' folders have them."""
    special = ["<s>", "<pad>", "</s>"]
    engine = tokenizers.Tokenizer(
        tokenizers.models.BPE({**{t: i for i, t in enumerate(special)}, "a": 3, "b": 4}, [])
    )
    engine.add_special_tokens(special)
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(token, id) for id, token in enumerate(special)]
    )
    roles = {"bos": "<s>", "pad": "<pad>", "eos": "</s>"}
    return DefinedTokenizer(msgspec.json.decode(engine.to_str()), roles, type="HFTokenizer", where="here")


@pytest.mark.parametrize(
    ("family", "template", "around", "start", "forced"),
    [
        ("t5", "$A </s>", ((), (2,)), (1,), (None, None)),
        ("bart", "<s> $A </s>", ((0,), (2,)), (2,), (0, 2)),
        ("gpt", "<s> $A", ((0,), ()), (), (None, None)),
    ],
)
def test_manner_of_transformers(family, template, around, start, forced):
    tokenizer = templated(template)
    assert tokenizer.around == around
    found = manner_of(state(family), tokenizer)
    assert (found.before, found.behind, found.start, found.forced) == (*around, start, forced)
    trained_here = manner_of(state(family, data_plan={}), tokenizer)
    assert (trained_here.before, trained_here.behind) == ((), ())
    if family == "gpt":
        assert manner_of(state(family), tokenizer, False).before == ()
    else:
        said = manner_of(state(family, decoding={"start": [3], "first": 4, "last": None}), tokenizer)
        assert (said.start, said.forced) == ((3,), (4, None))


def test_a_token_that_is_not_there(tmp_path):
    tokenizer = templated("$A")
    with pytest.raises(DataError, match=r"no \[CLS\] token"):
        manner_of(state("bert"), tokenizer)
