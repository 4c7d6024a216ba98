"""Anybody's rows, from a file to the page of a run by the three commands of the README."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import running

WORDS = ["sun", "rain", "wind", "tea", "bread", "river", "stone", "light", "music", "paper"]


def choices(path: Path, users: int = 30, rows: int = 12) -> Path:
    """Half of the users like short answers, the others long ones."""
    draw, lines = random.Random(0), []
    for u in range(users):
        for i in range(rows):
            short, long = (" ".join(draw.choices(WORDS, k=k)) for k in (4, 16))
            likes_short = (u % 2 == 0) == (draw.random() < 0.9)
            chosen, rejected = (short, long) if likes_short else (long, short)
            prompt = f"Tell me about {draw.choice(WORDS)}, number {i}"
            row = {"user": f"u{u:02d}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_a_file_of_thirty_users_becomes_a_page(model, tmp_path, monkeypatch):
    tables = "lore.experiments.report.tables"
    monkeypatch.setattr(f"{tables}.write_plots", lambda *given: [])  # the page has its own
    source, data = choices(tmp_path / "mine.jsonl"), tmp_path / "data"
    quick = {"data": data, "results": tmp_path, "progress": "false", "iterations": 30}
    quick |= {"mixed_logit.rank": 2, "mixed_logit.l_mu": 1, "mixed_logit.l_B": 0.1}
    steps = {
        "prepare": {"source": source, "out": data, "model": model, "progress": "false"},
        "train_basis": {**quick, "ranks": [2], "name": "fit"},
        "vary_fewshot": {**quick, "shots": [0, 2, 4], "trials": 2, "name": "shots"},
    }
    for script, settings in steps.items():
        done = running.invoke(f"OwnData/{script}.py", settings)
        assert done.status == 0, done.err
    for name in ("fit", "shots"):
        page = (tmp_path / "OwnData" / name / "report.html").read_text()
        assert "Mixed logit" in page and "LoRe K=" in page and "held-out comparisons" in page
