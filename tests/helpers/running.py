"""The project's scripts, run as a user runs them: in their folder, in a process of their own.

``invoke`` runs them within this process instead, which is quicker still.
"""

import atexit
import contextlib
import functools
import io
import itertools
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import warm

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
Flags = dict[str, Any]


class Outcome(NamedTuple):
    """How a script ended."""

    status: int
    out: str
    err: str


def flags(settings: Flags) -> list[str]:
    """{"few_shot_pairs": 5, "ranks": [0, 1]} as --few-shot-pairs 5 --ranks 0 1."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


@functools.cache
def _server() -> str:
    """The socket of warm.py, which runs as long as this process."""
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "warm")
    server = subprocess.Popen(
        [sys.executable, warm.__file__, path], env=ENV, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # ends it
    assert server.stdout.readline() == "ready\n"
    return path


def start(
    script: str, settings: Flags, processes: int = 1, stderr: int | None = subprocess.PIPE
) -> subprocess.Popen:
    """Start a script such as "PRISM/prepare.py", in several processes as torchrun does, without
    the seconds that importing takes; see warm.py."""
    path = ROOT / script
    words = [warm.__file__, _server(), str(processes), path.name, *flags(settings)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", *words], cwd=path.parent, env=ENV, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
    )  # fmt: skip


def end(process: subprocess.Popen) -> Outcome:
    """How a process ends."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def run(script: str, settings: Flags, processes: int = 1) -> Outcome:
    """Run a script to its end."""
    return end(start(script, settings, processes))


def fresh(script: str, settings: Flags) -> Outcome:
    """Run a script to its end in a process that imports all by itself, as a user does."""
    path = ROOT / script
    command = [sys.executable, path.name, *flags(settings)]
    done = subprocess.run(command, cwd=path.parent, env=ENV, text=True, capture_output=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def invoke(script: str, settings: Flags, *words: str) -> Outcome:
    """Run a script to its end within this process."""
    path, out, err = ROOT / script, io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", [path.name, *flags(settings), *words]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return Outcome(status, out.getvalue(), err.getvalue())


def table(text: str) -> dict[str, dict[str, str]]:
    """The first Markdown table of a text: row name -> column -> cell."""
    after = text[text.index("\n|") + 1 :].splitlines()
    lines = itertools.takewhile(lambda line: line.startswith("|"), after)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, rows = cells[0][1:], cells[2:]
    return {row[0]: dict(zip(head, row[1:], strict=True)) for row in rows}
