"""Anybody's rows, from a file to the page of a run by the three commands of the README."""

import random
import re
from pathlib import Path

import pytest

import running
import worlds
from lore.common.files import InputError
from lore.methods.saved import load_learned

pytestmark = pytest.mark.slow
EXAMPLE = running.ROOT / "OwnData" / "example.jsonl"
WORDS = ["sun", "rain", "wind", "tea", "bread", "river", "stone", "light", "music", "paper"]
QUICK = {
    "progress": "false", "iterations": 30, "few_shot_iterations": 30, "mixed_logit.floor": 0.1,
    "mixed_logit.l_mu": 1, "mixed_logit.tau2": 1, "mixed_logit.pi": 10,
}  # fmt: skip


def choices(path: Path, users: int = 30, rows: int = 12) -> Path:
    """Half of the users like short answers, the others long ones."""
    draw, made = random.Random(0), []
    for u in range(users):
        for i in range(rows):
            short, long = (" ".join(draw.choices(WORDS, k=k)) for k in (4, 16))
            likes_short = (u % 2 == 0) == (draw.random() < 0.9)
            chosen, rejected = (short, long) if likes_short else (long, short)
            prompt = f"Tell me about {draw.choice(WORDS)}, number {i}"
            sides = {"chosen": chosen, "rejected": rejected}
            # the embeddings of a random model hardly tell which text is long
            lengths = {f"{side}_length": len(text) for side, text in sides.items()}
            made.append({"user": f"u{u:02d}", "prompt": prompt, **sides, **lengths})
    worlds.write(path, made)
    return path


def few(path: Path, users: int) -> Path:
    """The example's rows of its first users."""
    rows = worlds.read(EXAMPLE)
    names = sorted({row["user"] for row in rows})[:users]
    worlds.write(path, [row for row in rows if row["user"] in names])
    return path


def case(name: str) -> Path:
    """A public file of preferences."""
    path = running.ROOT.parent / "shared" / "cases" / name
    if not path.exists():
        pytest.skip(f"there is no {name}")
    return path


def carried_out(source: Path, model: Path, folder: Path, **more: dict) -> None:
    """The three commands of the README."""
    quick = {"data": folder / "data", "results": folder, **QUICK}
    steps = {
        "prepare": {"source": source, "out": quick["data"], "model": model, "progress": "false"},
        "train_basis": {**quick, "name": "fit"},
        "vary_fewshot": {**quick, "trials": 2, "name": "shots"},
    }
    for script, settings in steps.items():
        done = running.invoke(f"OwnData/{script}.py", {**settings, **more.get(script, {})})
        assert done.status == 0, done.err


def test_the_example_becomes_a_page(model, tmp_path, monkeypatch):
    monkeypatch.setattr("lore.experiments.report.tables.write_plots", lambda *given: [])
    carried_out(EXAMPLE, model, tmp_path)
    for name in ("fit", "shots"):
        page = (tmp_path / "OwnData" / name / "report.html").read_text(encoding="utf-8")
        assert "Mixed logit" in page and "LoRe K=5" in page and "held-out comparisons" in page


FEW = {  # whose rows -> one of the runs, what its table has, and what it has not
    "six of the example": ("fit", "LoRe K=2", "LoRe K=5"),  # three of them are seen
    "C01-response-a-b-preferred.csv": ("fit", "LoRe K=", r"\d \[\.?\d"),  # an interval
    "small.jsonl": ("shots", "at 2 shots", r"at (?!2 )\d+ shots"),  # five of six users have two
}


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("name", FEW)
def test_few_users_are_fitted_and_judged_by_the_defaults(model, tmp_path, name):
    run, has, lacks = FEW[name]
    rows = few(tmp_path / "six.jsonl", 6) if name.startswith("six") else case(name)
    carried_out(rows, model, tmp_path)
    table = (tmp_path / "OwnData" / run / "table.md").read_text()
    assert re.search(has, table) and not re.search(lacks, table)


@pytest.mark.usefixtures("no_plots")
def test_a_single_user_is_a_seen_one(model, tmp_path):
    with pytest.raises(AssertionError, match="error: no user of OwnData is unseen"):
        carried_out(few(tmp_path / "one.jsonl", 1), model, tmp_path)
    assert (tmp_path / "OwnData/fit/table.md").exists()  # vary_fewshot.py alone was refused


@pytest.mark.usefixtures("no_plots")
def test_further_features_are_learned_from_and_texts_without_them_are_refused(model, tmp_path):
    more = {"prepare": {"extra": ["length"]}, "train_basis": {"features": ["length"]}}
    carried_out(choices(tmp_path / "mine.jsonl"), model, tmp_path, **more)
    files = list((tmp_path / "OwnData" / "fit").glob("*.safetensors"))
    assert len(files) > 1  # LoRe's and the mixed logit's
    for file in files:
        with pytest.raises(InputError, match=r"texts do not have \(length, log length\)"):
            load_learned(file)
