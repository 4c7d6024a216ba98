"""Command lines: flags become arguments, and a user's mistake is one line."""

import errno
import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_scripts import SCRIPTS

import hub_client
import running
from lore import HEAVY
from lore.common import cli as command
from lore.common.cli import cli
from lore.common.files import InputError, write_whole
from lore.methods import METHODS

Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(monkeypatch, capsys) -> Call:
    """Run a function as a script with a command line; its status and what stands on stderr."""

    def run(main: Callable[..., None], line: str = "", short: str | None = None) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
        try:
            cli(main, short)
            status = 0
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    return run


@dataclass(frozen=True)
class Lore:
    """Settings of a method."""

    ranks: tuple[int, ...] = (5,)
    iterations: int = 1000
    select_rank: bool = False


@pytest.mark.parametrize(("line", "expected"), [
    ("", {}),
    ("--few-shot 3 --learning_rate=.5", {"few_shot": 3, "learning_rate": 0.5}),
    ("--few_shot=3 --learning-rate 1e-3", {"few_shot": 3, "learning_rate": 1e-3}),
    ("--alpha 0 1e4 --name=12", {"alpha": (0.0, 1e4), "name": "12"}),
    ("--alpha 7", {"alpha": (7.0,)}),
    ("--alpha=[0,2]", {"alpha": (0.0, 2.0)}),
    ("--users 123 0x1F 1e3 null true user-7 1_000",
     {"users": ("123", "0x1F", "1e3", "null", "true", "user-7", "1_000")}),
    ("--embed --silent=true", {"embed": True, "silent": True}),
    ("--silent --few-shot 2", {"silent": True, "few_shot": 2}),
    ("--embed false --few-shot -2", {"embed": False, "few_shot": -2}),
    ("--run 12", {"name": "12"}),
    # A group's flags may go without its name
    ("--ranks 0 1 5", {"lore": Lore((0, 1, 5))}),
    ("--lore.ranks 2 4 --iterations=7", {"lore": Lore((2, 4), 7)}),
    ("--select-rank --lore.iterations 7", {"lore": Lore((2, 3), 7, True)}),
    ("--iterations 8 --config c.yaml", {"lore": Lore((7,), 8), "alpha": (3.0,)}),
    *((line, line.split()[0].strip("-")) for line in (
        "--bogus 3", "--few-shot three", "--few-shot 1 2", "--ranks 0 one", "--ranks",
        "stray", "--lore.bogus 1", "--iterations many")),
])  # fmt: skip
def test_flags_become_arguments_or_are_refused_by_name(call, tmp_path, monkeypatch, line, expected):
    (tmp_path / "c.yaml").write_text("lore:\n  ranks: [7]\n  iterations: 9\nalpha: [3]\n")
    monkeypatch.chdir(tmp_path)
    given = {}

    def main(
        alpha: tuple[float, ...] = (0.0,), users: tuple[str, ...] = (), few_shot: int = 9,
        learning_rate: float = 0.1, embed: bool = True, silent: bool = False,
        name: str | None = None, lore: Lore = Lore((2, 3)),  # noqa: B008
    ) -> None:  # fmt: skip
        """Nothing."""
        given.update({name: value for name, value in locals().items() if name != "given"})

    status, err = call(main, line, "lore")
    if isinstance(expected, str):
        assert status == 2 and expected in err and not given
    else:
        assert status == 0, err
        assert given == {**dict(zip(given, main.__defaults__, strict=True)), **expected}
        assert {type(x) for x in given["alpha"]} == {float}


@pytest.mark.parametrize(("line", "progress", "said"), [
    ("", True, "a step\na warning\n"), ("--quiet", False, "a warning\n"),
    ("--quiet false", True, "a step\na warning\n"),
])  # fmt: skip
def test_quiet_leaves_warnings_and_results(call, monkeypatch, line, progress, said):
    results = []

    def main(progress: bool = True) -> None:
        logging.getLogger("lore.learning.training").info("a step")
        logging.getLogger("httpx").info("a step")
        logging.getLogger("httpx").warning("a warning")
        results.append(progress)

    monkeypatch.setattr(logging.root, "handlers", [])
    for name in command.OURS:
        monkeypatch.setattr(logging.getLogger(name), "level", 0)
    assert call(main, line) == (0, said)
    assert results == [progress]


STOPPED = "stopped: what was written whole is kept; the same command goes on from there\n"


def fails(error: BaseException) -> Callable[[], None]:
    """A script that ends with an error."""

    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(("main", "status", "line"), [
    (fails(InputError("file.jsonl row 3: no text")), 2, "error: file.jsonl row 3: no text\n"),
    (fails(OSError(errno.ENOSPC, "No space left on device", "x.json")), 2,
     "error: [Errno 28] No space left on device: 'x.json'\n"),
    (fails(MemoryError()), 2, "error: not enough memory\n"),
    (lambda: torch.zeros(10**15), 2, "error: not enough memory\n"),
    (lambda: os.kill(os.getpid(), signal.SIGINT), 130, STOPPED),
    (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, STOPPED),
])  # fmt: skip
def test_a_mistake_and_a_stop_are_one_line(call, main, status, line):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
    assert call(main) == (status, line)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("error", [KeyError("ours"), RuntimeError("ours")])
def test_a_mistake_of_ours_keeps_its_traceback(call, error):
    with pytest.raises(type(error), match="ours"):
        call(fails(error))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_several_processes_speaks(call, monkeypatch, rank):
    """Another one waits, in which time torchrun ends it; it speaks if it is not ended."""
    waited = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(command.time, "sleep", waited.append)
    assert call(fails(InputError("a mistake"))) == (2, "error: a mistake\n")
    assert waited == [command.PATIENCE] * rank
    assert call(fails(KeyboardInterrupt())) == (130, "" if rank else STOPPED)


def test_files_are_readable_by_whoever_the_umask_lets_and_no_draft_is_left(tmp_path):
    def stopped(draft: Path) -> None:
        draft.touch()
        raise KeyboardInterrupt

    path = tmp_path / "V.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, stopped)
    assert not list(tmp_path.iterdir())
    write_whole(path, lambda draft: save_file({"V": torch.ones(2)}, draft))
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


TRAIN = "PRISM/train_basis.py"


def test_help_is_a_screen_of_lores_own_flags_and_that_of_a_method_has_its_settings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text, flags = running.invoke(TRAIN, {}, "--help").out, re.compile(r"(?m)^  (--[\w.-]+)")
    found = set(flags.findall(text))
    own = {f"--{field.name}".replace("_", "-") for field in fields(METHODS["lore"])}
    assert own | {"--data", "--seeds", "--methods", "--device", "--stream"} < found
    assert not [flag for flag in found if "." in flag]
    assert text.count("\n") < 60 and max(map(len, text.splitlines())) <= 110
    others = [name for name in METHODS if name != "lore"]
    assert f"--help {'|'.join(others)}\n" in text
    assert "--ranks 0 1 5 10 15 20 25 50" in text and "--trials" not in text
    for name in others:
        found = flags.findall(running.invoke(TRAIN, {}, "--help", name.replace("_", "-")).out)
        expected = [f"--{name}.{field.name}".replace("_", "-") for field in fields(METHODS[name])]
        assert sorted(found) == sorted(expected)
    outcome = running.invoke(TRAIN, {}, "--help", "palm")
    assert outcome.status == 2 and outcome.err.startswith("error: --help palm: there ")
    assert "pal|vpl" in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.slow
def test_help_imports_nothing_heavy(tmp_path, monkeypatch):
    """Every script's is the same in a process where importing any of these libraries fails."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([[script, {"help": []}] for script in SCRIPTS]), encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "100")
    command = [sys.executable, hub_client.__file__, str(jobs)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True, timeout=60)
    for script, outcome in zip(SCRIPTS, json.loads(jobs.read_text()), strict=True):
        assert tuple(outcome) == running.invoke(script, {"help": []})


@pytest.mark.parametrize("line", ["", "--help"])
def test_a_closed_pipe_ends_without_a_word(call, monkeypatch, line):
    def main() -> None:
        print("x\n" * 100_000)

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:  # what is left is written when it is closed
        monkeypatch.setattr(sys, "stdout", pipe)
        assert call(main, line) == (141, "")


def test_an_older_python_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    with pytest.raises(SystemExit, match="^error: Python 3.11 or newer is needed"):
        runpy.run_path(str(running.ROOT / "lore/__init__.py"))


def test_every_text_file_is_read_and_written_as_utf_8():
    ruff = [sys.executable, "-m", "ruff", "check", "--preview", "--select", "PLW1514"]
    checked = subprocess.run([*ruff, str(running.ROOT)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
