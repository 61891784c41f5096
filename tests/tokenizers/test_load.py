"""Finding and opening tokenizers, saving them, and their hash."""

import json
import pickle

import pytest

from megalith.errors import DataError, UnsupportedError
from megalith.tokenizers import fast
from megalith.tokenizers.base import Tokenizer
from megalith.tokenizers.config import TokenizerConfig
from megalith.tokenizers.fast import fast_encoder
from megalith.tokenizers.load import gpt2_tokenizer, load_tokenizer
from megalith.tokenizers.names import LATER_TYPES
from megalith.tokenizers.train import TrainingOptions, train_bpe, write_trained

TEXT = "the cat sat on the mat, the dog's dog\n" * 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_trained(train_bpe([TEXT], TrainingOptions(300)), path)
    return path


def test_every_way_to_name_it_gives_the_same_tokenizer(folder, tmp_path):
    ways = [
        load_tokenizer(folder),
        load_tokenizer(str(folder / "tokenizer.json")),
        load_tokenizer(TokenizerConfig(file=str(folder))),
        load_tokenizer(TokenizerConfig(type="HFTokenizer", model=str(folder / "tokenizer.json"))),
        load_tokenizer(TokenizerConfig(library="huggingface", type=str(folder))),
        load_tokenizer(
            TokenizerConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))
        ),
    ]
    ways[0].save(tmp_path / "again")
    ways.append(load_tokenizer(tmp_path / "again"))
    ways.append(pickle.loads(pickle.dumps(ways[0])))
    for tokenizer in ways:
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.hash() == ways[0].hash()
        assert (tokenizer.vocab_size, tokenizer.eod) == (ways[0].vocab_size, 0)
        assert tokenizer.encode(TEXT) == ways[0].encode(TEXT)
    assert [tokenizer.type for tokenizer in ways[:2]] == ["GPT2BPETokenizer", "HFTokenizer"]


def test_a_folder_with_gpt2s_two_files(folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert load_tokenizer(tmp_path).hash() == load_tokenizer(folder).hash()


def test_the_hash_depends_on_what_makes_ids_and_nothing_else(folder, tmp_path):
    definition = json.loads((folder / "tokenizer.json").read_text())
    own = load_tokenizer(folder).hash()

    def hash_with(change):
        changed = json.loads(json.dumps(definition))
        change(changed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed, indent=1))
        return load_tokenizer(tmp_path / "tokenizer.json").hash()

    def older_spelling(changed):
        changed["model"]["merges"] = [" ".join(pair) for pair in changed["model"]["merges"]]
        changed["model"]["unk_token"] = ""
        changed["pre_tokenizer"]["trim_offsets"] = False
        del changed["pre_tokenizer"]["use_regex"]
        changed["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}

    def swapped(changed):
        vocabulary = changed["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    assert hash_with(lambda changed: None) == own
    assert hash_with(older_spelling) == own
    assert hash_with(swapped) != own
    assert hash_with(lambda changed: changed["model"]["merges"].pop()) != own
    assert hash_with(lambda changed: changed["pre_tokenizer"].update(add_prefix_space=True)) != own
    assert hash_with(lambda changed: changed.update(normalizer={"type": "Lowercase"})) != own


def test_saved_folder_opens_in_the_library(folder):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert theirs.encode("the cat").ids == load_tokenizer(folder).encode("the cat")
    assert theirs.encode("the<|endoftext|>").ids[-1] == 0


def test_a_changed_saved_tokenizer_is_refused(folder, tmp_path):
    load_tokenizer(folder).save(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DataError, match="was changed"):
        load_tokenizer(tmp_path)


def test_hugging_faces_companion_files_name_the_roles(folder, tmp_path):
    definition = json.loads((folder / "tokenizer.json").read_text())
    for id, token in enumerate(("<bos>", "<eos>", "<pad>"), start=300):
        definition["added_tokens"].append({**definition["added_tokens"][0], "id": id, "content": token})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "unk_token": None})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special == {"eod": 0, "bos": 300, "eos": 301, "pad": 302}
    assert tokenizer.vocab_size == 303
    override = TokenizerConfig(file=str(tmp_path), special_tokens={"eod": "<eos>"})
    assert load_tokenizer(override).eod == 301
    with pytest.raises(DataError, match="not in the vocabulary"):
        load_tokenizer(TokenizerConfig(file=str(tmp_path), special_tokens={"eod": "<none>"}))


def test_located_config_loads_from_anywhere(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    located = TokenizerConfig(vocab_file="vocab.json", merge_file="merges.txt").located()
    monkeypatch.chdir(tmp_path)
    assert load_tokenizer(TokenizerConfig(**located)).hash() == load_tokenizer(folder).hash()


def test_types(folder):
    with pytest.raises(UnsupportedError, match="did you mean GPT2BPETokenizer"):
        load_tokenizer(TokenizerConfig(type="gpt2bpetokeniser"))
    for name in LATER_TYPES:
        with pytest.raises(UnsupportedError, match=f"{name} is not built yet"):
            load_tokenizer(TokenizerConfig(type=name, file=str(folder)))
    with pytest.raises(UnsupportedError, match="did you mean huggingface"):
        load_tokenizer(TokenizerConfig(library="hugingface"))
    with pytest.raises(UnsupportedError, match="not built yet"):
        load_tokenizer(TokenizerConfig(library="yttm"))
    with pytest.raises(DataError, match=r"needs a SentencePiece \.model"):
        load_tokenizer(TokenizerConfig(library="sentencepiece"))


def test_problems_are_all_reported_at_once():
    config = TokenizerConfig(
        library="yttm", type="GPT3", special_tokens={"end": "x"}, file="a", vocab_file="b"
    )
    where = [problem.where for problem in config.problems()]
    assert where == ["library", "type", "special_tokens.end", "file"]
    assert list(TokenizerConfig().problems()) == []


def test_ids_outside_the_vocabulary(folder):
    tokenizer = load_tokenizer(folder)
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.decode([1, wrong])
    assert tokenizer.piece(tokenizer.vocab_size) == ""


def test_lone_surrogates_are_refused(folder):
    tokenizer = load_tokenizer(folder)
    for call in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(DataError, match=r"lone surrogate \(U\+D800\)"):
            call("a\ud800")


def test_the_fast_path_is_refused_where_one_id_differs(folder, monkeypatch):
    tokenizer = load_tokenizer(folder)
    honest = fast.GigatokenEncoder.encode

    def wrong(self, documents):
        ids, lengths = honest(self, documents)
        if any(document.startswith(b"the dog") for document in documents):
            ids = ids.copy()
            ids[-1] += 1
        return ids, lengths

    monkeypatch.setattr(fast.GigatokenEncoder, "encode", wrong)
    assert fast_encoder(tokenizer, ["the cat"])[1] == ""
    encoder, notice = fast_encoder(tokenizer, ["the cat", b"the dog"])
    assert encoder is None
    assert "ids differ from the reference's on 'the dog'" in notice


def test_encoders_pickle_as_their_recipe(folder):
    encoder, _ = fast_encoder(load_tokenizer(folder), [])
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode([b"the cat"])[0].tolist() == encoder.encode([b"the cat"])[0].tolist()
    slow = pickle.loads(pickle.dumps(fast.ReferenceEncoder(load_tokenizer(folder))))
    assert slow.encode([b"the cat"])[0].tolist() == encoder.encode([b"the cat"])[0].tolist()


def test_no_torch_is_imported():
    import subprocess
    import sys

    code = (
        "import sys, megalith.tokenizers.load, megalith.tokenizers.fast, megalith.tokenizers.train\n"
        "import megalith.data.indexed.mmap, megalith.data.indexed.sidecar\n"
        "print([name for name in ('torch', 'numba', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gpt2_without_end_of_text_has_no_eod(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    tokenizer = gpt2_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert (tokenizer.eod, tokenizer.encode("ab")) == (None, [2])
