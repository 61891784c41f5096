"""The command line: lazy commands, fast help, errors without tracebacks, exit codes."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from rich.console import Console
from rich.text import Text

from megalith.cli import errors
from megalith.cli import main as cli
from megalith.errors import CheckpointError, ConfigError, Problem

PROGRAM = [sys.executable, "-m", "megalith.cli.main"]


def megalith(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=env, timeout=60)


@pytest.fixture
def run(capsys):
    """arguments → (exit code, stdout, stderr), in this process."""

    def go(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return go


@pytest.fixture
def command(monkeypatch):
    """Put a function in the table as the command `probe`."""

    def put(function):
        module = type(sys)("megalith_probe")
        module.probe = function
        monkeypatch.setitem(sys.modules, "megalith_probe", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("megalith_probe:probe", "A probe."))

    return put


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom megalith.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([m for m in ('torch', 'lightning', 'numpy', 'pydantic', 'hydra', 'omegaconf', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


def test_help_takes_half_a_second_of_processor_time():
    times = []
    for _ in range(3):
        before = os.times()
        assert megalith("--help").returncode == 0
        after = os.times()
        times.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert min(times) <= 0.5


def test_help_lists_every_command_with_its_line(run):
    _, out, _ = run("--help")
    for name, entry in cli.COMMANDS.items():
        assert re.search(rf"{name}\s+{re.escape(entry.help[:20])}", out), name


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_is_there_and_has_help_with_an_example(name, run):
    assert find_spec(cli.COMMANDS[name].target.partition(":")[0])
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "Usage: megalith " + name in out


def test_version(run):
    assert run("--version")[1].startswith("megalith 0")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("datta", "data"), ("pretrian", "pretrain"), ("eval", "evaluate"), ("zzzz", "There are: quickstart")],
)
def test_unknown_commands_name_the_nearest(run, typed, hint):
    code, _, err = run(typed)
    assert code == 2
    assert err.startswith(f"✗ megalith: There is no command '{typed}'")
    assert hint in " ".join(err.split())


def test_a_configs_problems_are_one_message_and_exit_code_2(run, command):
    def probe() -> None:
        raise ConfigError(
            [Problem("model.a (command line)", "is not a key", "did you mean model.b?"), Problem("x", "y")]
        )

    command(probe)
    code, out, err = run("probe")
    assert (code, out) == (2, "")
    assert err == (
        "✗ 2 problems in the configuration\n"
        "  model.a (command line): is not a key\n"
        "      → did you mean model.b?\n"
        "  x: y\n"
    )


def test_other_errors_look_alike(run, command):
    def probe() -> None:
        raise CheckpointError("it is damaged", where="run/step_1", fix="use step_0")

    command(probe)
    assert run("probe") == (2, "", "✗ run/step_1: it is damaged\n    → use step_0\n")


def test_brackets_in_errors_are_not_markup(run, command):
    def probe() -> None:
        raise ConfigError([Problem("a", "[bold]x[/bold] [/nothing]", "[red]")])

    command(probe)
    assert "[bold]x[/bold] [/nothing]" in run("probe")[2]


def test_long_errors_stay_on_one_line_where_there_is_no_terminal(run, command):
    def probe() -> None:
        raise ConfigError([Problem("a", "word " * 60)])

    command(probe)
    assert len(run("probe")[2].splitlines()) == 1


def test_a_bug_is_short_and_its_traceback_is_in_a_file(run, command):
    def probe() -> None:
        raise KeyError("gone")

    command(probe)
    code, _, err = run("probe")
    assert code == 70
    assert "This is a bug in Megalith. KeyError: 'gone'" in err
    assert "Traceback" not in err
    file = re.search(r"in (\S+megalith-bug-\S+\.txt)", err)[1]
    with open(file, encoding="utf-8") as report:
        text = report.read()
    os.unlink(file)
    assert "raise KeyError" in text
    assert "Python" in text


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_traceback_is_shown_when_asked_for(run, command, monkeypatch, how):
    def probe() -> None:
        raise KeyError("gone")

    command(probe)
    if how == "variable":
        monkeypatch.setenv("MEGALITH_TRACEBACK", "1")
    code, _, err = run("probe", *(["--traceback"] if how == "option" else []))
    assert code == 70
    assert "Traceback (most recent call last)" in err


def test_a_users_mistake_shows_a_traceback_only_when_asked(run, command):
    def probe() -> None:
        raise CheckpointError("it is damaged")

    command(probe)
    assert "Traceback" not in run("probe")[2]
    assert "Traceback" in run("--traceback", "probe")[2]


def test_exit_codes_of_commands_pass_through(run, command):
    import typer

    def probe() -> None:
        raise typer.Exit(3)

    command(probe)
    assert run("probe")[0] == 3


def test_interrupts_are_tidy(tmp_path):
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import sys, time\nfrom megalith.cli import main as cli\n"
        "module = type(sys)('slow'); module.slow = lambda: (print('ready', flush=True), time.sleep(30)) and None\n"
        "sys.modules['slow'] = module\ncli.COMMANDS['slow'] = cli.Command('slow:slow', 'x')\ncli.main(['slow'])\n",
        encoding="utf-8",
    )
    child = subprocess.Popen(
        [sys.executable, str(probe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores SIGINT, and its children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout.readline().strip() == "ready"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert err.strip() == "Interrupted."


def test_a_closed_pipe_is_no_error():
    shell = f"{' '.join(PROGRAM)} explain model | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.stdout == "model\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("generate", "--chekpoint", "x"), "✗ megalith generate: there is no option --chekpoint\n"),
        (("generate", "--prompt", "x"), "✗ megalith generate: Missing option '--checkpoint'"),
        (
            ("generate", "--checkpoint", "x", "--seed", "no"),
            "✗ megalith generate: Invalid value for '--seed'",
        ),
        (("evaluate", "lambda"), "✗ megalith evaluate: "),
    ],
)
def test_a_command_line_that_cannot_be_read_is_an_error_like_all_others(run, typed, message):
    code, out, err = run(*typed)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert "    → " in err
    assert "╭" not in err


def test_a_command_without_arguments_shows_its_help(run):
    code, out, err = run("evaluate")
    assert code == 2
    assert "perplexity" in out + err
    assert "✗" not in err


@pytest.mark.parametrize("name", ["generate", "evaluate perplexity", "pretrain gpt", "data merge"])
def test_help_spells_all_names_out_in_80_columns(name):
    done = megalith(*name.split(), "--help", COLUMNS="80")
    assert "…" not in re.sub(r"\]…", "", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    if name == "generate":
        assert "--min-tokens-to-generate" in done.stdout
        assert "--input-file, --sample-input-file" in done.stdout


def test_one_problem_needs_no_count(run, command):
    def probe() -> None:
        raise ConfigError([Problem("model.a (command line)", "is not a key", "did you mean model.b?")])

    command(probe)
    assert run("probe")[2] == "✗ model.a (command line): is not a key\n    → did you mean model.b?\n"


def test_problems_of_flags_are_not_the_configurations(run, command):
    def probe() -> None:
        raise ConfigError([Problem("--a", "x"), Problem("top_p", "y")])

    command(probe)
    assert run("probe")[2].startswith("✗ 2 problems on the command line\n")


def test_a_full_disk_is_no_bug(run, command):
    def probe() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "folder/file")

    command(probe)
    code, _, err = run("probe")
    assert code == 2
    assert err == "✗ folder/file: No space left on device\n    → make room, or write elsewhere\n"


def test_on_a_terminal_a_long_error_continues_under_its_text():
    text = io.StringIO()
    console = Console(file=text, width=40, force_terminal=True, color_system=None)
    errors._print(console, Text("word " * 12), mark="    → ")
    first, second = (line.rstrip() for line in text.getvalue().splitlines())
    assert first.startswith("    → word")
    assert second.startswith("      word")
