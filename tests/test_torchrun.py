"""The real torchrun, typed as in the README: a mistake and a stop are one line each."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import running
from people import saved
from running import Outcome

pytestmark = pytest.mark.slow
QUICK = {"ranks": 2, "iterations": 10, "few_shot_iterations": 5, "progress": "false", "name": "a"}


def command() -> list[str]:
    """The README's words, for two processes."""
    (words,) = re.findall(r"`(torchrun [^`]*)`", (running.ROOT / "README.md").read_text())
    program, *rest = shlex.split(words.replace(" N ", " 2 "))
    return [str(Path(sys.executable).with_name(program)), *rest]


def start(**settings: Any) -> subprocess.Popen:
    """Type the command in a dataset's folder, with more flags."""
    return subprocess.Popen(
        [*command(), *running.flags(settings)], cwd=running.ROOT / "PRISM", env=running.ENV,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen) -> Outcome:
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def said(outcome: Outcome, start: str) -> str:
    """The one line that the project says; torchrun adds what it thinks of the end."""
    (line,) = [line for line in outcome.err.splitlines() if line.startswith(start)]
    ours = [f'File "{running.ROOT}/{name}' for name in ("PRISM/", "cli.py", "experiments.py")]
    assert not [frame for frame in ours if frame in outcome.err], outcome.err
    return line


def test_the_readmes_command_takes_a_name(dataset, tmp_path):
    outcome = end(start(data=dataset("PRISM").data, results=tmp_path, **QUICK))
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("Verdict:") == 1
    (part,) = saved(tmp_path / "PRISM/a")["seeds"]
    assert list(part["methods"]) == ["reference", "bt", "own", "lore"]


@pytest.mark.parametrize(
    ("mistake", "line"),
    [({"data": "nowhere"}, "error: nowhere"), ({"ranks": "x"}, "error: --ranks"),
     ({"ranks": 99}, "error: ")],
)  # fmt: skip
def test_a_mistake_is_told_once(dataset, tmp_path, mistake, line):
    settings = {"data": dataset("PRISM").data, "results": tmp_path, **QUICK, **mistake}
    outcome = end(start(**settings))
    assert outcome.status not in (0, None)
    assert said(outcome, "error: ").startswith(line)
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_one_line(dataset, tmp_path, number):
    long = {**QUICK, "iterations": 100_000, "checkpoint_every": 20}
    process = start(data=dataset("PRISM").data, results=tmp_path, **long)
    until = time.monotonic() + 120
    while not list(tmp_path.rglob("state-*.pt")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    outcome = end(process)
    assert outcome.status not in (0, None)
    assert "the same command goes on from there" in said(outcome, "stopped: ")
    assert list(tmp_path.rglob("state-*.1.*.pt")) and not list(tmp_path.rglob("*.lock"))
