"""No text can spell a special token, in any family of tokenizer.json, and every special id can still be decoded."""

import json

import pytest

import tokenizers
from megalith.tokenizers.definition import corpus_definition
from megalith.tokenizers.fast import GigatokenEncoder, ReferenceEncoder, fast_encoder
from megalith.tokenizers.load import load_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = "a<|endoftext|>b [SEP] <s></s> [CLS] <|im_start|> the end\n<|endoftext|>"


def special(content):
    return AddedToken(content, special=True, normalized=False)


def byte_level(ignore_merges=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<|endoftext|>", "</s>", *alphabet, "th", "the"]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    engine = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")], ignore_merges=ignore_merges)
    )
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([special("<|endoftext|>"), special("</s>")])
    return engine


def whole_words():
    """BPE that takes a whole white-space-separated word if it is in the vocabulary: specials would be."""
    engine = byte_level(ignore_merges=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return engine


def outside():
    """Llama 3's way: specials live outside the model's vocabulary, a template adds one in front."""
    engine = byte_level()
    engine.add_special_tokens([special("<|im_start|>")])
    engine.add_tokens([AddedToken("   ", special=False, normalized=False)])
    engine.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", engine.token_to_id("<|im_start|>"))]
    )
    return engine


def unigram():
    engine = tokenizers.Tokenizer(
        models.Unigram(
            [
                ("<unk>", 0.0),
                ("</s>", 0.0),
                ("<s>", 0.0),
                *((c, -3.0) for c in "abcdefhnotxil<>/|s_ep\u2581"),
            ],
            unk_id=0,
        )
    )
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    engine.add_special_tokens([special("</s>"), special("<s>")])
    return engine


def word_piece():
    engine = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    engine.train_from_iterator(["the end of a sep cls"], trainer)
    return engine


FAMILIES = {
    "byte level": byte_level,
    "whole words": whole_words,
    "outside": outside,
    "unigram": unigram,
    "word piece": word_piece,
}


@pytest.fixture(params=list(FAMILIES))
def engine(request):
    return FAMILIES[request.param]()


@pytest.fixture
def tokenizer(engine, tmp_path):
    engine.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path / "tokenizer.json")


def special_ids(engine):
    unknown = json.loads(engine.to_str())["model"].get("unk_token")
    added = engine.get_added_tokens_decoder().items()
    return {id for id, token in added if token.special and token.content != unknown}


def test_the_families_would_parse_specials_by_themselves(engine):
    """Without this, the tests below prove nothing."""
    assert special_ids(engine) & set(engine.encode(TEXT, add_special_tokens=False).ids)


def test_no_text_becomes_a_special_id(engine, tokenizer):
    assert not special_ids(engine) & set(tokenizer.encode(TEXT))
    assert not special_ids(engine) & {id for row in tokenizer.encode_batch([TEXT, TEXT]) for id in row}
    ids, _ = ReferenceEncoder(tokenizer).encode([TEXT.encode()])
    assert not special_ids(engine) & set(ids.tolist())


def test_the_fast_path_parses_none_either(engine, tokenizer):
    encoder, notice = fast_encoder(tokenizer, [TEXT])
    if encoder is None:
        assert "fast tokenizer off" in notice
    else:
        ids, _ = encoder.encode([TEXT.encode()])
        assert ids.tolist() == tokenizer.encode(TEXT)


def test_ordinary_text_has_the_librarys_ids(engine, tokenizer):
    for text in ("the end", "a   then", "on the shelf"):
        assert tokenizer.encode(text) == engine.encode(text, add_special_tokens=False).ids


def test_special_ids_decode_to_themselves(engine, tokenizer):
    for id in special_ids(engine):
        assert tokenizer.decode([id]).strip() == engine.id_to_token(id)


def test_nothing_is_cut_padded_or_wrapped(tmp_path):
    engine = outside()
    engine.enable_truncation(4)
    engine.enable_padding(length=8)
    engine.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert len(loaded.encode("abcdefgh")) == 8
    assert len(loaded.encode("ab")) == 2
    encoder, notice = fast_encoder(loaded, ["abcdefgh"])
    assert notice == ""
    assert encoder.encode([b"abcdefgh", b"ab"])[1].tolist() == [8, 2]


def test_added_tokens_that_are_not_special_keep_their_ids(tmp_path):
    engine = outside()
    engine.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode("a   b") == engine.encode("a   b", add_special_tokens=False).ids
    assert engine.token_to_id("   ") in loaded.encode("a   b")


def test_corpus_definition_is_for_the_fast_path_alone(tmp_path):
    engine = byte_level()
    engine.save(str(tmp_path / "tokenizer.json"))
    definition = load_tokenizer(tmp_path / "tokenizer.json").definition
    injected = GigatokenEncoder(json.dumps(definition).encode()).encode([TEXT.encode()])[0].tolist()
    safe = (
        GigatokenEncoder(json.dumps(corpus_definition(definition)).encode())
        .encode([TEXT.encode()])[0]
        .tolist()
    )
    assert 0 in injected
    assert 0 not in safe
