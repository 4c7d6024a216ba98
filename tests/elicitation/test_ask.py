"""tools/ask.py from the first question to the saved profile: in the terminal and in a browser."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import running
from browser import BROWSER, a_tab
from lore.learning.basis import Basis, save_basis
from lore.methods.mixed_logit import MixedFit
from made_bases import embed, make_basis, write_lines
from tools import rank_responses

PAIRS, PROMPTS, DRAFTS = 24, 4, 3
WIDTHS = 390, 1280  # of a phone and a desktop
HOSTILE = "<script>document.title = 'hacked'</script>\x1b[31m red"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    """Flags that name a basis, whose columns are the widest directions of the embeddings of its own
    texts, a pool and candidates."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, 5)) for _ in range(2 * PAIRS + PROMPTS * DRAFTS)]
    texts[0] = HOSTILE
    pool = [{"prompt": f"Which {i}?", "responses": texts[2 * i : 2 * i + 2]} for i in range(PAIRS)]
    history = [{"role": role, "content": text} for role, text in
               (("user", "Hi"), ("assistant", "Hello"), ("user", "Which 1?"))]  # fmt: skip
    pool[1] = {"messages": history, "chosen": texts[2], "rejected": [texts[3]]}
    drafts = [{"prompt": f"Best {i % PROMPTS}?", "response": text}
              for i, text in enumerate(texts[2 * PAIRS :])]  # fmt: skip
    x = embed(model, folder / "rows", [[{"role": "assistant", "content": text}] for text in texts])
    V = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3].T
    W = torch.from_numpy(rng.dirichlet([0.4] * 3, 40)).float()
    basis = Basis(300 * V / (x @ V).std(0), W, settings={"rank": 3, "model": str(model)})
    save_basis(folder / "basis.safetensors", basis)
    return {
        "basis": folder / "basis.safetensors", "pool": write_lines(folder / "pool.jsonl", pool),
        "candidates": write_lines(folder / "drafts.jsonl", drafts), "progress": "false",
    }  # fmt: skip


def own(world: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    """Flags of a session of its own, whose answers lie in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    return world | {"answers": folder / "ann.jsonl", "user": "ann"} | changes


def ask(monkeypatch: pytest.MonkeyPatch, typed: str, flags: dict[str, Any]) -> running.Outcome:
    """A session in the terminal, in which this is typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return running.invoke("tools/ask.py", flags)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_person_is_asked_until_more_answers_would_hardly_matter(world, tmp_path, monkeypatch):
    flags = own(world, tmp_path, tolerance=1)
    write_lines(flags["answers"], [{"prompt": "Before?", "chosen": "w1", "rejected": "w2 w3"}])
    done = ask(monkeypatch, "a\n" * PAIRS, flags)
    assert done.status == 0, done.err
    profile = json.loads((tmp_path / "ann.profile.json").read_text())
    questions = done.out.count("── Question")
    assert 1 < questions + 1 == profile["answers"] == len(rows(flags["answers"])) < PAIRS
    assert "would raise the expected accuracy by less than 1 points" in done.out
    assert profile["questions_still_useful"] == 0
    assert profile["expected_accuracy"] > profile["expected_accuracy_without_answers"]
    assert "\x1b" not in done.out and profile["ranking"][0]["response"][:20] in done.out
    files = flags["basis"], flags["answers"], flags["candidates"]
    rank_responses.main(*files, save=tmp_path / "found.json", progress=False)
    found = json.loads((tmp_path / "found.json").read_text())  # the same from the same answers
    assert found["weights"] == pytest.approx(profile["weights"], abs=1e-4)
    ours, theirs = (pd.DataFrame(kept["ranking"]) for kept in (profile, found))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_killed_session_goes_on_where_it_was(world, tmp_path, monkeypatch):
    flags, whole = (own(world, tmp_path / n, tolerance=0, most=7) for n in ("killed", "whole"))
    answers = flags["answers"]
    process = running.start("tools/ask.py", flags)
    process.stdin.write("a\ns\nb\na\n")
    process.stdin.flush()
    while len(rows(answers)) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not answers.with_suffix(".profile.json").exists()
    resumed = ask(monkeypatch, "b\na\na\nb\n\n", flags)
    assert resumed.status == 0 and "── Question 5 " in resumed.out, resumed.err
    assert "── Question 4 " not in resumed.out and "3 answered, 1 skipped" in resumed.out
    assert ask(monkeypatch, "a\ns\nb\na\nb\na\na\nb\n\n", whole).status == 0
    ends = [f["answers"].with_suffix(".profile.json").read_text() for f in (flags, whole)]
    kept = [[row | {"timestamp": ""} for row in rows(f["answers"])] for f in (flags, whole)]
    assert ends[0] == ends[1] and kept[0] == kept[1]


@pytest.mark.slow
def test_a_basis_and_answers_that_do_not_do_are_one_line(world, model, tmp_path, monkeypatch):
    def holds(name: str, **row: Any) -> Path:
        return write_lines(tmp_path / name, [{"prompt": "?"} | row])

    flat = MixedFit(torch.randn(32), torch.randn(32, 2), None, {})
    flat.save(tmp_path / "flat.safetensors", torch.empty(0, 0), {"model": str(model)})
    bobs = holds("bob.jsonl", user="bob", chosen="a", rejected="b")
    voted = holds("voted.jsonl", response_a="a", response_b="b", winner="a")
    for flag, given, message in (
        ("answers", bobs, "has the choices of bob, not of ann"),
        ("answers", voted, "row 1 lacks chosen or rejected; answers are kept as chosen and"),
        ("answers", tmp_path / "ann.csv", "end its name in .jsonl"),
        ("answers", tmp_path / "no" / "ann.jsonl", "there is no folder"),
        ("profile", tmp_path / "ann.txt", "end its name in .json"),
        ("basis", world["pool"], "it is no basis file"),
        ("basis", make_basis(tmp_path, model, rank=1), "knows no differences between users"),
        ("basis", tmp_path / "flat.safetensors", "knows no differences between users"),
        ("pool", holds("same.jsonl", responses=["a", "a"]), "no two different responses"),
        ("pool", holds("empty.jsonl", chosen="a", rejected=""), "row 1: a response is empty"),
        ("candidates", world["pool"], "row 1 has no column response"),
        ("tolerance", -1, "--tolerance -1: "),
        ("port", 80, "--port is the page's"),
    ):
        done = ask(monkeypatch, "", own(world, tmp_path, **{flag: given}))
        assert done.status == 2 and done.err.count("error:") == 1, done.err
        assert message in done.err.splitlines()[-1], done.err
    assert not (tmp_path / "ann.jsonl").exists() and not list(tmp_path.glob("*.profile.json"))


# ---------------------------------------------------------------------- The page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_leads_from_the_first_question_to_the_saved_profile(world, tmp_path):
    flags = own(world, tmp_path, page="true", tolerance=0, most=4)
    process = running.start("tools/ask.py", flags)
    try:
        said = iter(process.stderr.readline, "")
        url = next(line.split()[1] for line in said if line.startswith("open http"))
        assert url.startswith("http://127.0.0.1:")
        with a_tab(tmp_path / "profile") as tab:
            tab.tell("Page.navigate", url=url)
            drive(tab, tmp_path / "ann.jsonl")
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    profile = json.loads((tmp_path / "ann.profile.json").read_text())
    assert profile["answers"] == 4 and profile["skipped"] == 1
    assert [row["question"] for row in rows(tmp_path / "ann.jsonl")] == [1, 2, 4, 5]
    assert "4 answered, 1 skipped" in out and profile["ranking"]


def drive(tab: Any, answers: Path) -> None:
    """Answer by keys and by clicks, take two back, and finish."""
    shown = {}
    for number, answered, what in (  # the question, the answers there are, key or button
        (1, 0, "b"), (2, 1, "a"), (3, 2, "s"), (4, 2, "a"), (5, 3, "u"),
        (4, 2, "click undo"), (3, 2, "click skip"), (4, 2, "click b"), (5, 3, "a"),
    ):  # fmt: skip
        tab.wait(f"document.querySelector('h1')?.innerText.startsWith('Question {number}:')")
        for width in WIDTHS:  # it fits every screen
            screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            tab.tell("Emulation.setDeviceMetricsOverride", **screen)
            inside = "[document.documentElement.scrollWidth, innerWidth]"
            assert tab.value(inside) == [width, width]
        texts = tab.value("[...document.querySelectorAll('article p')].map(p => p.textContent)")
        assert shown.setdefault(number, texts) == texts or number == 5  # after another answer to 4
        assert len(rows(answers)) == answered
        if what.startswith("click "):
            tab.value(f"document.querySelector('button[value={what[6:]}]').click()")
        else:
            tab.press(what)
    assert [rows(answers)[0][side] for side in ("rejected", "chosen")] == shown[1]
    tab.wait("document.body.innerText.includes('Thank you')")
    text = tab.value("document.body.innerText")
    assert "4 answers were given, and --most is 4" in text and "Weights:" in text
    assert tab.value("document.querySelectorAll('tbody tr').length") == PROMPTS * DRAFTS
    assert tab.value("document.title") == "Which is better?"
    tab.value("document.querySelector('button[value=quit]').click()")
    tab.wait("document.body.innerText.includes('You may close this page')")
