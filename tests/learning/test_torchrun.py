"""Several processes as the README starts them: a mistake and a stop are one line each.

The real torchrun, whose processes import everything anew, ends in each way once; other mistakes and
another signal are told to the processes of warm.py.
"""

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
LONG = {**QUICK, "iterations": 100, "checkpoint_every": 5}


def start(torchrun: bool, **settings: Any) -> subprocess.Popen:
    """Type the README's words for two processes in a dataset's folder, with more flags."""
    if not torchrun:
        return running.start("PRISM/train_basis.py", settings, processes=2)
    (words,) = re.findall(r"`(torchrun [^`]*)`", (running.ROOT / "README.md").read_text())
    program, *rest = shlex.split(words.replace(" N ", " 2 "))
    program, pipe = str(Path(sys.executable).with_name(program)), subprocess.PIPE
    return subprocess.Popen(
        [program, *rest, *running.flags(settings)], cwd=running.ROOT / "PRISM", env=running.ENV,
        stdout=pipe, stderr=pipe, text=True,
    )  # fmt: skip


def said(outcome: Outcome, start: str) -> str:
    """The one line that the project says; torchrun adds what it thinks of the end."""
    assert outcome.status not in (0, None)
    (line,) = [line for line in outcome.err.splitlines() if line.startswith(start)]
    for name in ("PRISM/", "lore/"):
        assert f'File "{running.ROOT}/{name}' not in outcome.err, outcome.err
    return line


@pytest.mark.parametrize(
    ("torchrun", "mistake", "line"),
    [(False, {"data": "nowhere"}, "error: nowhere"), (False, {"ranks": "x"}, "error: --ranks"),
     (True, {"ranks": 99}, "error: ")],
)  # fmt: skip
def test_a_mistake_is_told_once(dataset, tmp_path, torchrun, mistake, line):
    settings = {"data": dataset("PRISM").data, "results": tmp_path, **QUICK, **mistake}
    assert said(running.end(start(torchrun, **settings)), "error: ").startswith(line)
    assert not list(tmp_path.rglob("results.json"))


def stopped(settings: dict[str, Any], torchrun: bool, number: signal.Signals) -> None:
    """Start a training that is sent a signal once both have kept a state."""
    process, results = start(torchrun, **settings), settings["results"]
    until = time.monotonic() + 120
    while not list(results.rglob("state-*.1.*.pt")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    assert "the same command goes on from there" in said(running.end(process), "stopped: ")
    assert list(results.rglob("state-*.1.*.pt")) and not list(results.rglob("*.lock"))


def test_ctrl_c_is_one_line(dataset, tmp_path):
    settings = {**LONG, "data": dataset("PRISM").data, "results": tmp_path, "iterations": 100_000}
    stopped(settings, False, signal.SIGINT)


def test_the_readmes_command_takes_a_name_and_what_it_has_kept_is_gone_on_from(dataset, tmp_path):
    settings = {**LONG, "data": dataset("PRISM").data, "results": tmp_path}
    stopped(settings, True, signal.SIGTERM)
    outcome = running.end(start(False, **settings))
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("Verdict:") == 1
    (part,) = saved(tmp_path / "PRISM/a")["seeds"]
    assert list(part["methods"]) == ["reference", "bt", "own", "ridge_bt", "lore"]
