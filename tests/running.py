"""The project's scripts, run as a user runs them: in their folder, in a process of their own.

``invoke`` runs them within this process instead, which saves the seconds that importing takes.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
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


def start(script: str, settings: Flags, processes: int = 1) -> subprocess.Popen:
    """Start a script such as "PRISM/prepare.py", by torchrun where there are several processes."""
    path = ROOT / script
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = torchrun if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, path.name, *flags(settings)],
        cwd=path.parent, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(script: str, settings: Flags, processes: int = 1) -> Outcome:
    """Run a script to its end."""
    process = start(script, settings, processes)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def together(script: str, settings: Flags, processes: int) -> Outcome:
    """Run a script to its end in several processes, which torchrun's own imports would slow."""
    path = ROOT / script
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/ranks.py"), str(processes), path.name, *flags(settings)],
        cwd=path.parent, env=ENV, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
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
    lines = text[text.index("\n|") :].lstrip().split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, rows = cells[0][1:], cells[2:]
    return {row[0]: dict(zip(head, row[1:], strict=True)) for row in rows}
