"""Asking a person: tools/ask.py from the first question to the saved profile, in the terminal and
in a browser; and what lies behind it, the pool, the answers on disk and the session."""

import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

import running
from browser import BROWSER, a_tab
from lore.common.files import digest
from lore.elicitation.choices import Answers, Pair, read_pool
from lore.elicitation.criteria import CRITERIA
from lore.elicitation.page import ask_on_page
from lore.elicitation.session import MOST_TARGETS, Session, target_pairs
from lore.elicitation.terminal import Terminal
from lore.learning.basis import Basis, save_basis
from lore.methods.mixed_logit import MixedFit
from lore.preparing.messages import Conversation
from lore.preparing.own_rows import Columns
from made_bases import embed, make_basis, standard, write_lines
from tools import rank_responses

PAIRS, PROMPTS, DRAFTS = 24, 4, 3
WIDTHS = 390, 1280  # of a phone and a desktop
HOSTILE = "<script>document.title = 'hacked'</script>\x1b[31m red"
ASKED = [{"role": "user", "content": "Why?"}]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
    return [json.loads(line) for line in lines]


def session(
    path: Path, pairs: int = 30, K: int = 3, asked: Conversation = ASKED, **changes: Any
) -> Session:
    """A session without a tolerance, whose rewards are drawn instead of embedded."""
    pool = [Pair(asked, (f"one {i}", f"other {i}")) for i in range(pairs)]
    keys = [digest(c) for pair in pool for c in pair.conversations]
    views = 2 * torch.randn(len(keys), 1 + K, generator=torch.Generator().manual_seed(0)).double()
    fit = MixedFit(torch.zeros(5).double(), torch.eye(5, K).double(), standard(K), {})
    known = dict(zip(keys, views, strict=True))
    return Session(fit, pool, [], known, Answers(path), **{"tolerance": 0, **changes})


def test_a_pool_has_every_pair_once_and_does_not_tell_which_was_chosen(tmp_path):
    pool = [
        {"ask": "Why?", "responses": ["a", "b", "c", "a"]},
        {"ask": "Why?", "chosen": "b", "rejected": ["a", "d"]},
        {"ask": "Else?", "chosen": "b", "rejected": "a"},
    ]
    pairs = read_pool(write_lines(tmp_path / "pool.jsonl", pool), Columns(prompt="ask"))
    assert [(p.history[0]["content"], p.texts) for p in pairs] == [
        ("Why?", ("a", "b")), ("Why?", ("a", "c")), ("Why?", ("b", "c")), ("Why?", ("b", "d")),
        ("Else?", ("a", "b")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "expected"), [("pqprp", ["0 2", "0 4", "2 4"]), ("pq", ["x y"]), ("p" * 100, None)]
)
def test_targets_are_pairs_of_the_same_prompt_or_the_pool_and_never_too_many(prompts, expected):
    offered = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": f"{i}"}]
               for i, prompt in enumerate(prompts)]  # fmt: skip
    found = target_pairs([Pair(ASKED, ("x", "y"))], offered, torch.Generator().manual_seed(0))
    said = [" ".join(talk[-1]["content"] for talk in both) for both in found]
    assert said == expected or expected is None and len(said) == len(set(said)) == MOST_TARGETS


# ----------------------------------------------------------------------- The answers


def test_choices_from_elsewhere_stay_and_texts_of_any_kind_come_back(tmp_path):
    before = {"user": "ann", "prompt": "Why?", "chosen": ["a", "b"], "rejected": "c", "note": 7}
    path = write_lines(tmp_path / "ann.jsonl", [before])
    answers = Answers(path)
    assert answers.user == "ann" and len(answers.comparisons) == 2 and answers.last_question == 0
    assert answers.settled == {Pair(ASKED, ("a", "c")).key, Pair(ASKED, ("b", "c")).key}
    assert not answers.undo()
    history = [*ASKED, {"role": "assistant", "content": "Because"}, *ASKED]
    texts = ("line\u2028one\n\n  two\t \U0001f600", '["a list", "in \\ JSON"]')
    answers.answer(Pair(history, texts), texts, "b")
    again = Answers(path)
    *_, (liked, other, _) = again.comparisons
    assert (other[-1]["content"], liked[-1]["content"]) == texts and liked[:-1] == history
    assert len(again) == 2 and again.undo() and not again.undo()
    assert rows(path) == [before]


# ----------------------------------------------------------------------- The session


def test_no_pair_comes_twice_either_response_may_come_first_and_the_pool_has_an_end(
    tmp_path, caplog
):
    caplog.set_level("INFO")
    asked, own = [], session(tmp_path / "ann.jsonl")
    while question := own.question():
        assert own.question() == question  # looking again changes nothing
        asked.append(question)
        own.do("skip" if len(asked) == 3 else "a")
    assert len(asked) == len({question.pair.key for question in asked}) == 30
    assert 5 < sum(question.shown != question.pair.texts for question in asked) < 25
    assert own.reason == "every pair of the pool was asked" and not own.do("a")
    assert len(own.answers) == 29 and own.do("undo") and own.question().number == 30
    assert not caplog.text  # which a terminal would show beside every question


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_asks_and_asks_the_same_after_a_restart(tmp_path, criterion):
    again = partial(session, tmp_path / "ann.jsonl", 10, criterion=criterion)
    for word in ("a", "skip", "b"):
        again().do(word)
    assert again().question() == again().question()
    keys = {again(seed=seed).question().pair.key for seed in range(8)}
    assert (len(keys) > 2) == (criterion == "random")


# ------------------------------------------------------------ The terminal and the page


def typed(path: Path, source: str | Any, height: int = 0, **changes: Any) -> tuple[Session, str]:
    """A session in a terminal where these words are typed, and what it wrote."""
    source = io.StringIO("\n".join(source.split(" ")) + "\n") if isinstance(source, str) else source
    terminal = Terminal(session(path, **changes), source, io.StringIO())
    terminal.height = height
    terminal.run()
    return terminal.session, terminal.out.getvalue()


def test_long_texts_come_a_page_at_a_time_and_an_answer_may_come_early(tmp_path):
    long = [{"role": "user", "content": "\x1b[2J\n\n" + "word " * 200}]
    own, text = typed(tmp_path / "ann.jsonl", "  b q", height=6, pairs=3, asked=long)
    assert text.count("-- Enter for more --") >= 4
    assert "\N{REPLACEMENT CHARACTER}[2J" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(own.answers) == 1


def test_the_end_of_the_input_or_an_interrupt_quits(tmp_path):
    interrupted = mock.Mock(**{"readline.side_effect": KeyboardInterrupt, "isatty.return_value": 0})
    for source in (io.StringIO(""), interrupted):
        assert len(typed(tmp_path / "ann.jsonl", source)[0].answers) == 0


def test_who_is_done_may_go_back_or_on(tmp_path):
    own, said = typed(tmp_path / "ann.jsonl", "a u b m a q", most=1)
    assert len(own.answers) == 2 and said.count("--most is 1") == 2


def test_undo_takes_back_answers_and_skips_also_those_of_an_earlier_session(tmp_path):
    path = tmp_path / "ann.jsonl"
    own, first = typed(path, "a s q")
    assert [row["question"] for row in own.answers.rows] == [1]
    own, back = typed(path, "u u u what b q")
    assert "There is nothing to undo." in back and own.answers.skips == []
    question = re.search(r"── Question 1 ─+\n(.*?)\nWhich is better", first, re.DOTALL)[1]
    assert question in back  # the same, in the same order
    one, other = re.findall(r"\[[ab]\] -+\n  (.*)\n", question)
    [row] = Answers(path).rows
    assert (row["chosen"], row["rejected"], row["first"]) == (other, one, "rejected")


def test_a_page_asks_on_and_an_answer_that_cannot_be_written_is_not_taken_for_one(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    own = session(tmp_path / "ann.jsonl")
    server = threading.Thread(target=ask_on_page, args=(own, tmp_path / "ann.json"), daemon=True)
    server.start()
    while not (said := re.search(r"open (http://127.0.0.1:\S+)", caplog.text)):
        time.sleep(0.01)

    def press(word: str, key: str) -> str:
        """The page that follows a button of the question that is or was asked."""
        form = f"do={word}&question={key}".encode()
        return urllib.request.urlopen(said[1], form, timeout=60).read().decode()

    full_disk = mock.Mock(side_effect=OSError(28, "No space left on device"))
    assert "Question 2: which is better?" in press("a", own.question().pair.key)
    key = own.question().pair.key
    with monkeypatch.context() as patched, pytest.raises(urllib.error.HTTPError) as refused:
        patched.setattr("os.fsync", full_disk)
        press("a", key)
    assert refused.value.code == 500 and "No space left on device" in refused.value.read().decode()
    assert len(own.answers) == len(Answers(tmp_path / "ann.jsonl")) == 1
    assert own.question().pair.key == key
    assert [file.name for file in tmp_path.iterdir()] == ["ann.jsonl"]
    for _ in range(2):  # the second one is of a question that is not asked any more
        assert "Question 3: " in press("b", key) and len(own.answers) == 2
    last = press("quit", own.question().pair.key)
    assert "You may close this page" in last and "Tastes: " in last
    server.join(60)
    assert not server.is_alive() and json.loads((tmp_path / "ann.json").read_text())["answers"] == 2


# ------------------------------------------------------------------------ The command


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


def given(world: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    """Flags of a session of its own, whose answers lie in a folder, which is made."""
    folder.mkdir(exist_ok=True)
    return world | {"answers": folder / "ann.jsonl", "user": "ann"} | changes


def ask(monkeypatch: pytest.MonkeyPatch, words: str, flags: dict[str, Any]) -> running.Outcome:
    """The command in a terminal where these words are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(words))
    return running.invoke("tools/ask.py", flags)


@pytest.mark.slow
def test_a_person_is_asked_until_more_answers_would_hardly_matter(world, tmp_path, monkeypatch):
    flags = given(world, tmp_path, tolerance=1)
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
    flags, whole = (given(world, tmp_path / n, tolerance=0, most=7) for n in ("killed", "whole"))
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
    for flag, value, message in (
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
        done = ask(monkeypatch, "", given(world, tmp_path, **{flag: value}))
        assert done.status == 2 and done.err.count("error:") == 1, done.err
        assert message in done.err.splitlines()[-1], done.err
    assert not (tmp_path / "ann.jsonl").exists() and not list(tmp_path.glob("*.profile.json"))


# ------------------------------------------------------------------------- A browser


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_leads_from_the_first_question_to_the_saved_profile(world, tmp_path):
    flags = given(world, tmp_path, page="true", tolerance=0, most=4)
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
