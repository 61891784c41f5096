"""Archives of strangers: read in place, refused by name where they would write elsewhere, one message where they are damaged."""

from __future__ import annotations

import gc
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
import torch

from megalith.checkpoint.convert.source import of_foreign
from megalith.checkpoint.files import file_digest
from megalith.checkpoint.foreign import find, open_foreign, recognise
from megalith.checkpoint.formats.nemo_archive import Temporary, open_archive
from megalith.checkpoint.formats.nemo_tar import append, begin, lay_out
from megalith.checkpoint.pickles.scan import scan
from megalith.errors import CheckpointError, MegalithError
from tests.checkpoint.nemo_archives import SIZES, nemo_archive, nemo_state

FILES = {"model_config.yaml": b"num_layers: 2\n", "mp_rank_00/model_weights.ckpt": b"weights"}


def pack(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for entry in more:
            archive.addfile(entry)
    return path


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


def test_members_lie_in_the_archive(tmp_path):
    path = pack(tmp_path / "a.nemo", {f"./{name}": content for name, content in FILES.items()})
    archive = open_archive(path)
    assert archive.members.keys() == FILES.keys()
    for name, content in FILES.items():
        member = archive.members[name]
        assert member.path == path
        assert path.read_bytes()[member.offset : member.offset + member.length] == content
        assert archive.read(name) == content


@pytest.mark.parametrize("more", [
    (entry("../evil.pt", tarfile.REGTYPE), "'../evil.pt' leads out of its folder"),
    (entry("a/../../evil", tarfile.REGTYPE), "leads out of its folder"),
    (entry("/etc/cron.d/evil", tarfile.REGTYPE), "'/etc/cron.d/evil' leads out of its folder"),
    (entry("..\\evil", tarfile.REGTYPE), "leads out of its folder"),
    (entry("./link", tarfile.SYMTYPE, "/etc/passwd"), "'./link' is a link to '/etc/passwd'"),
    (entry("hard", tarfile.LNKTYPE, "model_config.yaml"), "'hard' is a link to 'model_config.yaml'"),
    (entry("device", tarfile.BLKTYPE), "'device' is no ordinary file"),
    (entry("terminal", tarfile.CHRTYPE), "'terminal' is no ordinary file"),
    (entry("pipe", tarfile.FIFOTYPE), "'pipe' is no ordinary file"),
    (entry("model_config.yaml", tarfile.REGTYPE), "two members 'model_config.yaml'"),
], ids=lambda more: more[1])  # fmt: skip
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_members_that_would_write_elsewhere(tmp_path, mode, more):
    bad, message = more
    path = pack(tmp_path / "a.nemo", FILES, bad, mode=mode)
    with pytest.raises(CheckpointError) as caught:
        open_archive(path)
    assert message in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.nemo"]


def test_a_folder_with_a_link_out_of_it(tmp_path):
    folder = tmp_path / "unpacked"
    folder.mkdir()
    (folder / "model_config.yaml").write_bytes(b"num_layers: 2\n")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "model_weights.ckpt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"'model_weights\.ckpt' leads out of it"):
        open_archive(folder)


def test_what_grows_beyond_all_measure(tmp_path, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.formats.nemo_archive.MAX_GROWTH", 1 << 16)
    path = pack(tmp_path / "a.nemo", {"model_config.yaml": bytes(1 << 22)}, mode="w:gz")
    with pytest.raises(CheckpointError, match=r"unpacks to more than .*, 100 times its size"):
        open_archive(path)


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr("megalith.checkpoint.formats.nemo_archive.MAX_MEMBERS", 3)
    with pytest.raises(CheckpointError, match="more than 3 members"):
        open_archive(pack(tmp_path / "a.nemo", {f"file{i}": b"" for i in range(4)}))


def test_what_gzip_shrank_lies_in_a_temporary_file_while_somebody_needs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "unpacked"))
    (tmp_path / "unpacked").mkdir()
    path = nemo_archive(tmp_path / "a.nemo", mode="w:gz")
    source = of_foreign(open_foreign(path))
    gc.collect()
    assert len(list((tmp_path / "unpacked").iterdir())) == 1
    assert source.inputs == (path,)
    assert source.tensors["final_norm.weight"].read().shape == (SIZES["hidden_size"],)
    del source
    gc.collect()
    assert not list((tmp_path / "unpacked").iterdir())


def test_temporary_folders_go_with_their_paths():
    folder = Temporary.folder()
    (folder / "file").write_bytes(b"content")
    name = str(folder)
    del folder
    gc.collect()
    assert not Path(name).exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 1.0])
def test_truncated(tmp_path, mode, share):
    """1.0: the last byte of the last member is missing, or of what gzip says at its end."""
    path = nemo_archive(tmp_path / "a.nemo", mode=mode)
    ends = [member.offset + member.length for member in open_archive(path).members.values()]
    whole = path.read_bytes()[: max(ends) if mode == "w" else None]
    path.write_bytes(whole[: min(int(len(whole) * share), len(whole) - 1)])
    with pytest.raises(CheckpointError) as caught:
        open_foreign(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_flipped_bits_are_one_message_or_nothing(tmp_path, mode, count):
    """Bits of weights may be others unseen; everything else is whole, or refused. A third of them fall on the first headers."""
    path = nemo_archive(tmp_path / "a.nemo", mode=mode)
    whole = path.read_bytes()
    draw = random.Random(5)
    messages = [said for number in range(count) if (said := message(path, flipped(whole, draw, number)))]
    assert len(messages) > count / 6
    assert all(len(said) < 2000 for said in messages)


def flipped(whole: bytes, draw: random.Random, number: int) -> bytes:
    content = bytearray(whole)
    at = draw.randrange(len(content) if number % 3 else min(2048, len(content)))
    content[at] ^= 1 << draw.randrange(8)
    return bytes(content)


def message(path: Path, content: bytes) -> str:
    """What is said of an archive of this content; empty where it opens. Any other exception is a failure."""
    path.write_bytes(content)
    try:
        open_foreign(path).tensors["final_norm.weight"].read()
    except MegalithError as error:
        return str(error)
    return ""


def test_a_pickle_that_would_run_code(tmp_path):
    class Evil:
        def __reduce__(self) -> object:
            return (print, ("ran",))

    stream = io.BytesIO()
    torch.save({**nemo_state(), "evil": Evil()}, stream)
    path = nemo_archive(tmp_path / "a.nemo", weights=stream.getvalue())
    with pytest.raises(CheckpointError) as caught:
        open_foreign(path)
    assert "would have run" in str(caught.value)
    assert "a.nemo:model_weights.ckpt" in str(caught.value)
    assert any("would run code" in str(found.record()) for found in scan(path))


def test_what_else_is_a_tar(tmp_path):
    path = pack(tmp_path / "holiday.tar", {"photo.jpg": b"photo"})
    assert recognise(path) == "nemo"
    with pytest.raises(CheckpointError, match=r"there is no model_config\.yaml in it; it holds photo\.jpg"):
        open_foreign(path)


def test_weights_of_the_distributed_format(tmp_path):
    path = pack(
        tmp_path / "a.nemo", {"model_config.yaml": b"num_layers: 2\n", "model_weights/.metadata": b""}
    )
    with pytest.raises(CheckpointError, match="distributed format"):
        open_foreign(path)


@pytest.mark.parametrize(("keys", "message"), [
    ({"transformer_block_type": "normformer"}, "transformer_block_type='normformer'"),
    ({"normalization": "layernorm1p", "headscale": True}, "headscale=True, normalization='layernorm1p'"),
    ({"activation": "mish"}, "activation='mish'"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type='alibi'"),
    ({"hidden_size": 64}, "hidden_size: 64 by hidden_size"),
    ({"tensor_model_parallel_size": 2}, "2 tensor-parallel ranks"),
    ({"num_layers": "many"}, "num_layers: many by"),
    ([1, 2], "does not hold keys and values"),
    ("{", "is not YAML"),
], ids=str)  # fmt: skip
def test_configurations_that_are_no_model_of_ours(tmp_path, keys, message):
    path = nemo_archive(tmp_path / "a.nemo", keys=keys)
    with pytest.raises(CheckpointError) as caught:
        open_foreign(path)
    assert message in str(caught.value)


def test_soft_prompts_are_no_part_of_the_model_and_said(tmp_path):
    stream = io.BytesIO()
    table = "model.language_model.prompt_table.prompt_table"
    prompts = {f"{table}.{tag}.prompt_embeddings.weight": torch.ones(4, 16) for tag in ("Winogrande", "RTE")}
    torch.save({**nemo_state(), **prompts}, stream)
    foreign = open_foreign(nemo_archive(tmp_path / "a.nemo", weights=stream.getvalue()))
    assert (
        "it holds soft prompts (RTE, Winogrande), which are read apart: --prompts takes it, too"
        in foreign.notices
    )
    assert foreign.tensors


def test_recognised_by_content(tmp_path):
    path = nemo_archive(tmp_path / "model_without_a_suffix", mode="w:gz")
    assert find(path).kind == "nemo"
    assert recognise(tmp_path) is None


def test_the_same_members_are_the_same_bytes_for_any_order_of_writing(tmp_path):
    sizes = {name: len(content) for name, content in FILES.items()}
    laid = lay_out(sizes)
    for name, order in (("a", list(FILES)), ("b", list(FILES)[::-1])):
        begin(tmp_path / name, laid)
        with open(tmp_path / name, "r+b") as file:
            for member in order:
                file.seek(laid.places[member])
                file.write(FILES[member])
        append(tmp_path / name, laid, "conversion.json", json.dumps({}).encode())
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b")
    archive = open_archive(tmp_path / "a")
    assert {name: archive.read(name) for name in FILES} == FILES
    with tarfile.open(tmp_path / "a") as read:
        assert read.getnames() == [".", "./model_config.yaml", "./mp_rank_00", "./mp_rank_00/model_weights.ckpt",
                                   "./conversion.json"]  # fmt: skip
