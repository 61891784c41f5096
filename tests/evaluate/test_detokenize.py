"""Each detokenizer rule on its own, the quirks, their order, and how `auto` chooses. Golden strings, written by hand."""

import pytest

from megalith.errors import ConfigError
from megalith.evaluate.detokenize import choose, detokenize

WIKI = [
    ("the dogs ' tails", "the dogs' tails"),
    ("is 'x", "is'x"),  # any s before an apostrophe
    ("in ' 90s", "in ' 90s"),  # the rule that was meant for this has slashes in it
    ("a /' 7/ b", "a /'[0-9]/ b"),  # and puts its own text where they are
    ("long @-@ term", "long-term"),
    ("1 @,@ 234", "1,234"),
    ("3 @.@ 5", "3.5"),
    ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
    ("end .", "end ."),  # only between spaces
    ("( a b )", "(a b)"),
    ("(  a\n)", "(a)"),
    ("[ a ] { b }", "[a] {b}"),
    ("( a ( b ) )", "(a ( b) )"),  # the nearest closing one
    ('he said " go now " twice', 'he said "go now" twice'),
    ('a " b\nc " d', 'a "b\nc" d'),  # across lines
    ('odd " one " two " three', 'odd "one" two " three'),
    ("' a ' b", "'a' b"),
    ("don 't and won 't", "don 't and won't"),  # two apostrophes are a pair of quotes
    ("= = = = Deep = = = =", "==== Deep ===="),
    ("= = = Mid = = =", "=== Mid ==="),
    ("= = Top = =", "== Top =="),
    (" = Title = ", " = Title = "),
    ("50 ° C", "50°C"),
    ("50 °C", "50 °C"),
    ("a \n b", "a\nb"),
    ("a N b", "a 1 b"),
    ("it 's here", "it's here"),
    ("a 'say b", "a'say b"),  # anything that begins with 's
    ("a  ,  b", "a ,  b"),
    (
        " \n = Robert Boulter = \n \n Robert Boulter is an English actor . \n",
        "\n= Robert Boulter =\n\nRobert Boulter is an English actor.\n",
    ),
]
PTB = [
    ("it 's", "it's"),
    ("the ' 80s", "the' 80s"),
    ("a \n b", "a\nb"),
    ("do n't", "don't"),
    ("ca n'ts", "can'ts"),
    ("$ N million", "$1 million"),
    ("# N is", "#1 is"),
]


@pytest.mark.parametrize(("text", "expected"), WIKI)
def test_wiki(text, expected):
    assert detokenize(text, "wiki") == expected


@pytest.mark.parametrize(("text", "expected"), PTB)
def test_ptb(text, expected):
    assert detokenize(text, "ptb") == expected


def test_ptb_glues_numbers_and_its_repair_does_not():
    text = "about N years , $ N million and $ 100 , # 1"
    assert detokenize(text, "ptb") == "about1 years , $1 million and $100 , #1"
    assert detokenize(text, "ptb-fixed") == "about 1 years , $1 million and $100 , #1"


@pytest.mark.parametrize("name", ["lambada", "none"])
def test_nothing_is_changed(name):
    text = " a \n ( b ) @-@ 's N "
    assert detokenize(text, name) == text


def test_rules_run_in_their_order():
    """`s '` first, so that no quotation begins behind an s; joined numbers before punctuation; headings from the longest."""
    assert detokenize("cats ' and ' x '", "wiki") == "cats'and' x '"
    assert detokenize("1 @,@ 5 , x", "wiki") == "1,5, x"
    assert detokenize("= = = = x = =", "wiki") == "==== x =="


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/ptb.txt", "ptb"),
        ("wikitext-103/wiki.test.tokens", "wiki"),
        ("lambada_test.jsonl", "lambada"),
        ("wiki/ptb.txt", "ptb"),  # the order is the reference's, not the path's
        ("lambada/wiki.txt", "wiki"),
    ],
)
def test_auto_goes_by_the_path(path, name):
    assert choose("auto", path) == name
    assert choose("none", path) == "none"


def test_auto_without_a_word_names_the_flag():
    with pytest.raises(ConfigError) as error:
        choose("auto", "data/valid.txt")
    (problem,) = error.value.problems
    assert problem.where == "--detokenizer"
    assert "data/valid.txt" in problem.what
    with pytest.raises(ConfigError, match="'wikitext' is not one"):
        choose("wikitext", "wiki.txt")
