"""What lies behind tools/ask.py: the pool, the answers on disk, the terminal and the page."""

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

import pytest
import torch

from lore.common.files import digest
from lore.elicitation.choices import Answers, Pair, read_pool
from lore.elicitation.criteria import CRITERIA
from lore.elicitation.page import ask_on_page
from lore.elicitation.session import MOST_TARGETS, Session, target_pairs
from lore.elicitation.terminal import Terminal
from lore.methods.mixed_logit import MixedFit
from lore.preparing.messages import Conversation
from lore.preparing.own_rows import Columns
from made_bases import standard, write_lines

ASKED = [{"role": "user", "content": "Why?"}]


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
    rows = [
        {"ask": "Why?", "responses": ["a", "b", "c", "a"]},
        {"ask": "Why?", "chosen": "b", "rejected": ["a", "d"]},
        {"ask": "Else?", "chosen": "b", "rejected": "a"},
    ]
    pairs = read_pool(write_lines(tmp_path / "pool.jsonl", rows), Columns(prompt="ask"))
    assert [(p.history[0]["content"], p.texts) for p in pairs] == [
        ("Why?", ("a", "b")), ("Why?", ("a", "c")), ("Why?", ("b", "c")), ("Why?", ("b", "d")),
        ("Else?", ("a", "b")),
    ]  # fmt: skip
    assert len({pair.key for pair in pairs}) == 5
    one, other = Pair(ASKED, ("x", "y")).conversations
    assert Pair.of(one, other) == Pair.of(other, one) == Pair(ASKED, ("x", "y"))


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


def test_choices_from_elsewhere_stay_and_count_but_are_not_undone(tmp_path):
    before = {"user": "ann", "prompt": "Why?", "chosen": ["a", "b"], "rejected": "c", "note": 7}
    path = write_lines(tmp_path / "ann.jsonl", [before])
    answers = Answers(path)
    assert answers.user == "ann" and len(answers.comparisons) == 2 and answers.last_question == 0
    assert answers.settled == {Pair(ASKED, ("a", "c")).key, Pair(ASKED, ("b", "c")).key}
    assert not answers.undo()
    answers.answer(Pair(ASKED, ("d", "e")), ("e", "d"), "a")
    row = json.loads(path.read_text().splitlines()[1])
    assert (row["chosen"], row["rejected"], row["first"]) == ("e", "d", "chosen")
    again = Answers(path)
    assert len(again) == 2 and again.undo() and not again.undo()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [before]


def test_texts_of_any_kind_come_back_as_they_were(tmp_path):
    texts = ("line\u2028one\n\n  two\t \U0001f600", '["a list", "in \\ JSON"]')
    answers = Answers(tmp_path / "ann.jsonl")
    history = [*ASKED, {"role": "assistant", "content": "Because"}, *ASKED]
    answers.answer(Pair(history, texts), texts, "b")
    liked, other, _ = Answers(tmp_path / "ann.jsonl").comparisons[0]
    assert (other[-1]["content"], liked[-1]["content"]) == texts and liked[:-1] == history


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
