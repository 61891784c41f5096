"""Preprocessing that is killed, starved or lied to: nothing half-done is published, nothing finished is done again."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard

from megalith.data.preprocess import files, pipeline, worker
from megalith.data.preprocess.run import preprocess
from megalith.data.sentences import Sentences
from megalith.errors import DataError
from tests.data.preprocessing import (
    expected_files,
    json_lines,
    make_prose,
    make_texts,
    make_tokenizer,
    options,
    output,
    run,
)

TEXTS = make_texts(3000, 9)
PROSE = make_prose(3000, 9)
ENGLISH = Sentences("en")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def wanted(tokenizer_folder):
    """What an undisturbed run writes."""
    from megalith.tokenizers.load import load_tokenizer

    return expected_files(load_tokenizer(tokenizer_folder), TEXTS)


@pytest.fixture
def folder(tmp_path, tokenizer_folder):
    os.symlink(tokenizer_folder, tmp_path / "tok")
    (tmp_path / "c.jsonl").write_bytes(json_lines(TEXTS))
    return tmp_path


def start(folder: Path, *, name: str = "c.jsonl", delay: float = 0.0, **changes) -> subprocess.Popen:
    """A process that preprocesses `folder`/`name` with 2 workers, `delay` seconds slower a part."""
    script = (
        "import sys, time, pathlib\n"
        "from megalith.data.preprocess.journal import Store\n"
        "from megalith.data.sentences import Sentences\n"
        "from megalith.errors import MegalithError\n"
        "from tests.data.preprocessing import run\n"
        "commit = Store.commit\n"
        f"Store.commit = lambda self: (time.sleep({delay}), commit(self))\n"
        "try:\n"
        f"    print(run(pathlib.Path({str(folder)!r}), [{str(folder / name)!r}], workers=2, **{changes!r}).resumed_parts)\n"
        "except MegalithError as error:\n"
        "    print(error, file=sys.stderr)\n"
        "    sys.exit(error.exit_code)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished_parts(folder: Path) -> int:
    return _journal(folder).count(b'"publishing":false')


def wait_for_parts(process: subprocess.Popen, folder: Path, parts: int) -> None:
    while finished_parts(folder) < parts and process.poll() is None:
        time.sleep(0.002)


def children_of(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("out_*"))


# Killed


@pytest.mark.parametrize(
    ("name", "sentences"), [("c.jsonl", None), ("c.jsonl.gz", None), ("c.jsonl", ENGLISH)]
)
def test_kill_9_at_random_moments_loses_no_finished_part(folder, wanted, name, sentences):
    if name.endswith("gz"):
        (folder / name).write_bytes(gzip.compress((folder / "c.jsonl").read_bytes()))
    if sentences:
        (folder / name).write_bytes(json_lines(PROSE))
        wanted = expected_files(_tokenizer(folder), PROSE, sentences=sentences)
    rng = random.Random(name)
    kills = 0
    while True:
        before = finished_parts(folder)
        process = start(folder, name=name, delay=0.02, sentences=sentences)
        wait_for_parts(process, folder, before + rng.randint(1, 12))
        time.sleep(rng.random() * 0.02)
        workers = children_of(process) if process.poll() is None else []
        process.kill()
        out, errors = process.communicate()
        if process.returncode == 0:
            assert int(out) >= before
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        if not (folder / "out.parts/plan.json").exists() and published(folder):
            break  # all was done, and only the process's own end was left to kill
        assert not published(folder) or b'"publishing":true' in _journal(folder)
        for _ in range(500):
            if not any(map(alive, workers)):
                break
            time.sleep(0.01)
        assert not any(map(alive, workers)), "a worker outlived its parent"
    assert kills >= 2
    assert output(folder, unit="sentence" if sentences else "document") == wanted
    if process.returncode == 0:
        assert not (folder / "out.parts").exists()


def _journal(folder: Path) -> bytes:
    try:
        return (folder / "out.parts/journal.jsonl").read_bytes()
    except FileNotFoundError:  # a finished run takes it away, also between a look and a read
        return b""


def test_finished_parts_are_not_tokenized_again(folder, wanted, monkeypatch):
    process = start(folder, delay=0.02)
    wait_for_parts(process, folder, 9)
    process.kill()
    process.communicate()
    kept = finished_parts(folder)
    commits = []
    commit = pipeline.Store.commit
    monkeypatch.setattr(
        pipeline.Store, "commit", lambda self: (commit(self), commits.append(self.state.part))
    )
    summary = run(folder, [folder / "c.jsonl"], workers=2)
    assert summary.resumed_parts == kept >= 9
    assert commits == list(range(kept + 1, summary.parts + 1))
    assert summary.text_bytes == (folder / "c.jsonl").stat().st_size - kept * (1 << 14)
    assert output(folder) == wanted


def test_another_number_of_workers_and_block_size_may_go_on(folder, wanted):
    process = start(folder, delay=0.02)
    wait_for_parts(process, folder, 5)
    process.kill()
    process.communicate()
    assert run(folder, [folder / "c.jsonl"], workers=3, block_bytes=5000).resumed_parts >= 5
    assert output(folder) == wanted


@pytest.mark.parametrize("moment", range(5))
def test_killed_while_publishing(folder, wanted, moment):
    """Die at the n-th rename or removal that publishing does; the next run finishes the job."""
    (folder / "old.jsonl").write_bytes(json_lines(["an earlier corpus"]))
    run(folder, [folder / "old.jsonl"])
    pid = os.fork()
    if pid == 0:
        _die_at(moment)
        run(folder, [folder / "c.jsonl"], workers=2)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    names = published(folder)
    if "out_text_document.idx" in names:
        assert output(folder)[0] in (wanted[0], expected_files(_tokenizer(folder), ["an earlier corpus"])[0])
        assert output(folder)[0] != wanted[0] or output(folder)[1] == wanted[1]
    run(folder, [folder / "c.jsonl"], workers=2)
    assert output(folder) == wanted
    assert published(folder) == [f"out_text_document.{suffix}" for suffix in ("bin", "idx", "meta.json")]


@pytest.mark.parametrize("moment", [4, 5, 6, 7, 8, 9])
def test_killed_while_publishing_the_second_of_two_keys(folder, tokenizer_folder, moment):
    titles = make_texts(len(TEXTS), 4, words=5)
    lines = [json.dumps({"text": a, "title": b}) for a, b in zip(TEXTS, titles, strict=True)]
    (folder / "c.jsonl").write_text("\n".join(lines))
    keys = ("text", "title")
    pid = os.fork()
    if pid == 0:
        _die_at(moment)
        run(folder, [folder / "c.jsonl"], workers=2, keys=keys)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    summary = run(folder, [folder / "c.jsonl"], workers=2, keys=keys)
    assert summary.resumed_parts == summary.parts
    for key, texts in (("text", TEXTS), ("title", titles)):
        assert output(folder, key) == expected_files(_tokenizer(folder), texts)


def _tokenizer(folder):
    from megalith.tokenizers.load import load_tokenizer

    return load_tokenizer(folder / "tok")


def _die_at(moment: int) -> None:
    calls = iter(range(1000))

    def dying(change):
        def wrapped(self, *args, **kwargs):
            if "_document" in f"{self} {args}" and next(calls) == moment:
                os._exit(9)
            return change(self, *args, **kwargs)

        return wrapped

    Path.replace = dying(Path.replace)
    Path.unlink = dying(Path.unlink)


@pytest.mark.parametrize(
    "damage", ["cut tokens", "flip a token", "cut the journal", "flip a length", "lose hashes"]
)
def test_damaged_parts_are_made_again(folder, wanted, damage):
    process = start(folder, delay=0.02)
    wait_for_parts(process, folder, 8)
    process.kill()
    process.communicate()
    parts = folder / "out.parts"
    kept = finished_parts(folder)
    name = {"flip a length": "0.lengths", "lose hashes": "0.hashes", "cut the journal": "journal.jsonl"}.get(
        damage, "0.tokens"
    )
    data = bytearray((parts / name).read_bytes())
    middle = len(data) // 2
    if damage.startswith("cut"):
        del data[middle:]
    elif damage.startswith("flip"):
        data[middle] ^= 1
    (parts / name).write_bytes(data)
    if damage.startswith("lose"):
        (parts / name).unlink()
    summary = run(folder, [folder / "c.jsonl"], workers=2)
    assert summary.resumed_parts < kept
    assert (summary.resumed_parts > 0) == (not damage.startswith("lose"))
    assert output(folder) == wanted


def test_other_inputs_or_options_do_not_go_on_with_these_parts(folder, wanted):
    process = start(folder, delay=0.02)
    wait_for_parts(process, folder, 3)
    process.kill()
    process.communicate()
    kept = finished_parts(folder)
    for changes, name in (
        ({"append_eod": True}, "append_eod"),
        ({"keys": ("text", "title")}, "keys"),
        ({"implementation": "cached"}, "implementation"),
        ({"sentences": ENGLISH}, "split_sentences"),
    ):
        with pytest.raises(DataError, match="unfinished parts of another run") as caught:
            run(folder, [folder / "c.jsonl"], **changes)
        assert name in str(caught.value)
        assert "--restart" in caught.value.problem.fix
    os.utime(folder / "c.jsonl")
    with pytest.raises(DataError, match="the inputs"):
        run(folder, [folder / "c.jsonl"])
    assert finished_parts(folder) == kept
    assert run(folder, [folder / "c.jsonl"], restart=True).resumed_parts == 0
    assert output(folder) == wanted


def test_two_runs_at_once_on_one_prefix(folder):
    process = start(folder, delay=0.05)
    wait_for_parts(process, folder, 1)
    with pytest.raises(DataError, match="another process is preprocessing"):
        run(folder, [folder / "c.jsonl"])
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_run_and_say_how_to_go_on(folder, wanted, number):
    process = start(folder, delay=0.02)
    wait_for_parts(process, folder, 4)
    workers = children_of(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 3, errors
    assert f"stopped by {number.name}" in errors.decode()
    assert "run the same command again" in errors.decode()
    assert not any(map(alive, workers))
    assert not published(folder)
    assert run(folder, [folder / "c.jsonl"], workers=2).resumed_parts >= 4
    assert output(folder) == wanted


def test_a_worker_killed_is_one_clear_message(folder, wanted, monkeypatch):
    die_in = {"job": 5}
    honest = worker.Worker._run

    def dying(self, job):
        if job.number == die_in["job"]:
            os.kill(os.getpid(), signal.SIGKILL)
        honest(self, job)

    monkeypatch.setattr(worker.Worker, "_run", dying)
    with pytest.raises(DataError, match=r"worker [12] was killed by signal 9 \(SIGKILL\)") as caught:
        run(folder, [folder / "c.jsonl"], workers=2)
    assert "fewer --workers" in caught.value.problem.fix
    assert not published(folder)
    die_in["job"] = -1
    run(folder, [folder / "c.jsonl"], workers=2)
    assert output(folder) == wanted


def test_a_defect_in_a_worker_is_not_called_a_users_mistake(folder, monkeypatch):
    monkeypatch.setattr(worker.Worker, "_run", lambda self, job: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run(folder, [folder / "c.jsonl"])


# Disks and folders


def test_a_full_disk(folder, wanted):
    """RLIMIT_FSIZE refuses what a full disk would."""
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            run(folder, [folder / "c.jsonl"], workers=2)
        except DataError as error:
            os._exit(
                42 if "disk is full" in str(error) and "run the same command again" in str(error) else 43
            )
        os._exit(44)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert not published(folder)
    kept = finished_parts(folder)
    assert run(folder, [folder / "c.jsonl"], workers=2).resumed_parts == kept > 0
    assert output(folder) == wanted


@pytest.mark.parametrize("name", ["0.tokens", "0.lengths", "journal.jsonl", "plan.json"])
def test_no_space_wherever_it_runs_out(folder, wanted, monkeypatch, name):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_all(handle, data, path):
        if path.name == name:
            raise files.cannot_write(path, full)
        return files_write_all(handle, data, path)

    def write_bytes(self, data):
        if self.name.startswith("plan"):
            raise full
        return path_write_bytes(self, data)

    files_write_all, path_write_bytes = files.write_all, Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr("megalith.data.preprocess.journal.write_all", write_all)
        if name == "plan.json":
            patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(DataError, match="disk is full"):
            run(folder, [folder / "c.jsonl"], workers=2)
    assert not published(folder)
    run(folder, [folder / "c.jsonl"], workers=2)
    assert output(folder) == wanted


def test_no_space_for_the_index(folder, wanted, monkeypatch):
    from megalith.data.indexed import builder

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(builder.HashedFile, "write", write)
        with pytest.raises(DataError, match="disk is full"):
            run(folder, [folder / "c.jsonl"], workers=2)
    assert "out_text_document.idx" not in published(folder)
    summary = run(folder, [folder / "c.jsonl"], workers=2)
    assert summary.resumed_parts == summary.parts
    assert output(folder) == wanted


def test_an_output_folder_that_cannot_be(folder):
    (folder / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        run(folder, [folder / "c.jsonl"], output_prefix=folder / "file/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everything")
def test_permissions(folder):
    (folder / "c.jsonl").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        run(folder, [folder / "c.jsonl"])
    (folder / "c.jsonl").chmod(0o644)
    folder.chmod(0o555)
    with pytest.raises(DataError, match="cannot be written"):
        run(folder, [folder / "c.jsonl"])
    folder.chmod(0o755)


# Inputs that lie


class _Meddler:
    """A progress display that changes the world after the first part."""

    def __init__(self, action) -> None:
        self.action = action

    def update(self, job, documents) -> None:
        action, self.action = self.action, None
        if action:
            action()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "shorter while it was being read|changed while"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "changed while"),
        (lambda path: os.utime(path), "changed while"),
    ],
)
def test_an_input_that_changes_meanwhile(folder, action, message):
    path = folder / "c.jsonl"
    with pytest.raises(DataError, match=message):
        preprocess(
            options(folder, [path], workers=2),
            notify=print,
            show=lambda meter: _Meddler(lambda: action(path)),
        )
    assert not published(folder)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("x.jsonl.gz", lambda data: data[:-20], "cut off|damaged gzip"),
        ("x.jsonl.gz", lambda data: data[:5000], "cut off"),
        ("x.jsonl.gz", lambda data: data[:5000] + bytes(50) + data[5050:], "damaged gzip"),
        ("x.jsonl.gz", lambda data: data + b"garbage", "damaged gzip"),
        ("x.jsonl.zst", lambda data: data[:-20], "cut off|damaged zstd"),
        ("x.jsonl.zst", lambda data: data[:5000], "cut off"),
        ("x.jsonl.zst", lambda data: data[:5000] + bytes(50) + data[5050:], "damaged zstd"),
        ("x.jsonl.zst", lambda data: data + b"garbage", "damaged zstd"),
    ],
)
def test_damaged_archives(folder, name, damage, message):
    data = (folder / "c.jsonl").read_bytes()
    packed = (
        gzip.compress(data)
        if name.endswith("gz")
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )
    (folder / name).write_bytes(damage(packed))
    with pytest.raises(DataError, match=message) as caught:
        run(folder, [folder / name], workers=2)
    assert caught.value.problem.where == str(folder / name)
    assert not published(folder)


def test_a_zstd_file_that_wants_too_much_memory(folder):
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=False)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = writer.compress((folder / "c.jsonl").read_bytes()) + writer.flush()
    (folder / "x.jsonl.zst").write_bytes(packed)
    with pytest.raises(DataError, match="memory"):
        run(folder, [folder / "x.jsonl.zst"])


# Memory


def tree_memory(pid: int) -> int:
    """Bytes of a process and its descendants, shared pages counted once (PSS)."""
    total, todo = 0, [pid]
    while todo:
        each = todo.pop()
        try:
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            todo += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(kib) for kib in re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)) << 10
    return total


def peak_memory(process: subprocess.Popen) -> int:
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.02)
    return peak


def random_words(size: int, seed: int = 0) -> bytes:
    """Lines of words that never repeat: the tokenizer's word cache learns every one of them, 10 bytes a byte."""
    letters = random.Random(seed).randbytes(size).translate(bytes(97 + number % 26 for number in range(256)))
    words = b" ".join(letters[at : at + 8] for at in range(0, size, 8))
    return b"".join(b'{"text": "' + words[at : at + 10_000] + b'"}\n' for at in range(0, len(words), 10_000))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_random_words_do_not_fill_the_memory(folder):
    """Without a limit on the cache these words would take more than 500 MiB."""
    (folder / "c.jsonl").write_bytes(random_words(32 << 20))
    process = start(folder, block_bytes=1 << 20, max_memory=464 << 20)
    peak = peak_memory(process)
    assert process.wait() == 0, process.communicate()
    assert peak < 330 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["random words", "one line", "one word", "one text", "bomb", "no lines", "newlines"]
)
def test_one_gibibyte_is_enough_for_any_input(folder, kind):
    name = {"one text": "x.txt", "bomb": "x.jsonl.gz", "newlines": "x.txt"}.get(kind, "x.jsonl")
    with (folder / name).open("wb") as file:
        if kind == "random words":
            file.write(random_words(200 << 20))
        elif kind in ("one line", "no lines", "one text"):
            words = b"the cat sat on a mat and over again " * 29_000
            file.write(b'{"text": "' if kind == "one line" else b"")
            for _ in range(2048):
                file.write(words)
            file.write(b'"}\n' if kind == "one line" else b"")
        elif kind == "one word":
            file.write(b'{"text": "' + b"x" * (100 << 20) + b'"}\n')
        elif kind == "bomb":
            with gzip.open(file, "wb", compresslevel=1) as packed:
                for _ in range(512):
                    packed.write(bytes(4 << 20))
        else:
            file.write(b"a\n" * (10 << 20))
    process = start(
        folder, name=name, block_bytes=4 << 20, txt_documents="line" if kind == "newlines" else "file"
    )
    peak = peak_memory(process)
    _, errors = process.communicate()
    print(f"{kind}: {peak / 2**20:.0f} MiB, exit {process.returncode}, {errors.decode()[:300]}")
    assert peak < 1 << 30
    assert process.returncode == (1 if kind in ("one word", "bomb", "no lines") else 0), errors
