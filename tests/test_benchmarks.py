"""The benchmarks at tiny sizes: what they print adds up, and both sides compute the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import models

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CORE = [
    "--features=32", "--joint", "12", "4", "3", "--alternating", "9", "5", "4",
    "--few-shot", "2", "3", "4", "2", "--ranks", "1", "2", "--heads", "10", "4", "3",
    "--steps=3", "--rounds=1", "--few-shot-iterations=4",
]  # fmt: skip


def run(script: str, *flags: str, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def table(printed: str) -> pd.DataFrame:
    """The Markdown table of an output, by its first column."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(cells[2:], columns=cells[0]).set_index(cells[0][0])


def check_core(rows: pd.DataFrame) -> None:
    """Both sides agree, and the ratios are those of the seconds."""
    numbers = rows[["plain s", "ours s", "ratio", "floor s", "deviation"]].astype(float)
    assert (numbers["deviation"] < 1e-4).all()
    assert (numbers["floor s"] > 0).all()
    ratio = numbers["plain s"] / numbers["ours s"]
    assert numbers["ratio"].to_numpy() == pytest.approx(ratio.to_numpy(), rel=0.01, abs=0.06)


def test_the_core_against_plain_loops() -> None:
    rows = table(run("core.py", *CORE).stdout)
    assert [case.split(",")[0] for case in rows.index] == [
        "joint", "alternating", "few-shot", *["ranks 1 to 2 together"] * 2, "3 heads"
    ]  # fmt: skip
    check_core(rows)


def test_everything_in_one_table(tmp_path: Path) -> None:
    model = models.tiny_llama(tmp_path / "model")
    sizes = ["posts=2", "dialogues=2", "prompts=2", "prism=2", "parts=1", f"model={model}"]
    rows = table(run("all.py", *CORE, "--embedding", *sizes).stdout)
    engine = rows[rows.index.str.startswith("embedding, ")]
    assert len(engine) >= 3
    assert (engine["aim"].astype(float) > 0.85).all()
    check_core(rows.drop(engine.index))


def test_a_failing_part_is_named(tmp_path: Path) -> None:
    missing = f"model={tmp_path / 'missing'}"
    done = run("all.py", *CORE, "--embedding", missing, status=2)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "embedding.py failed" in done.stderr


def test_growth_is_measured_over_a_decade(tmp_path: Path) -> None:
    sizes = ["--users=10", "--pairs=3", "--rank=1", "--features=12", "--steps=3"]
    rows = table(run("scaling.py", *sizes, f"--out={tmp_path}").stdout)
    assert list(rows.index) == ["users", "pairs", "rank", "features"]
    assert rows.loc["features", "x10"].startswith("120: ")
    assert {file.name for file in tmp_path.iterdir()} == {
        "scaling.csv", "scaling.pdf", "scaling.png"
    }  # fmt: skip
    kept = pd.read_csv(tmp_path / "scaling.csv")
    assert len(kept) == 16 and (kept["seconds"] > 0).all()


def test_a_million_users_by_proportion(tmp_path: Path) -> None:
    sizes = ["--gigabytes=0.001", "--target", "1000", "5", "50", "2", "--steps=3"]
    rows = table(run("scaling.py", "--million", *sizes, f"--out={tmp_path}").stdout)
    here, there = rows["measured here"], rows["by proportion"]
    assert here["users"] == "2,000"  # 1 MB of 5 x 50 numbers of two bytes each
    assert there["comparisons"] == "5,000"
    seconds = here["seconds of an iteration"], there["seconds of an iteration"]
    assert float(seconds[0]) / float(seconds[1]) == pytest.approx(2, rel=0.01)
    assert not list(tmp_path.iterdir())
