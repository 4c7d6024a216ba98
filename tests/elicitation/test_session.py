"""What lies behind tools/ask.py: the pool, the answers on disk, the outlook and the terminal."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lore.common.files import InputError, digest
from lore.elicitation.choices import Answers, Pair, read_pool
from lore.elicitation.criteria import CRITERIA, UserPosterior
from lore.elicitation.outlook import expected_accuracy, look_ahead, same_prompt_pairs, thinned
from lore.elicitation.page import Page
from lore.elicitation.session import Material, Session
from lore.elicitation.terminal import Terminal
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import Prior, posteriors
from lore.methods.mixed_logit import MixedFit
from lore.preparing.own_rows import Columns
from made_bases import write_lines

ASKED = [{"role": "user", "content": "Why?"}]


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def session(path: Path, pairs: int = 30, K: int = 3, **changes) -> Session:
    """A session whose rewards are drawn instead of embedded."""
    pool = [Pair(ASKED, (f"one {i}", f"other {i}")) for i in range(pairs)]
    known = {
        digest(c): 2 * torch.randn(1 + K, generator=torch.Generator().manual_seed(i)).double()
        for i, c in enumerate(c for pair in pool for c in pair.conversations)
    }
    directions = torch.zeros(5, 1 + K).double()
    prior = Prior(torch.zeros(K).double(), torch.eye(K).double())
    fit = MixedFit(directions[:, 0], directions[:, 1:], prior, {})
    return Session(fit, Material(pool, [], known), Answers(path), **changes)


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


def test_answers_are_not_added_to_rows_of_another_layout(tmp_path):
    row = {"user": "ann", "prompt": "Why?", "response_a": "a", "response_b": "b", "winner": "a"}
    with pytest.raises(InputError, match="ann.jsonl row 1 lacks chosen or rejected; .* another"):
        Answers(write_lines(tmp_path / "ann.jsonl", [row]))


def test_an_answer_that_cannot_be_written_is_not_taken_for_one(tmp_path, monkeypatch):
    answers = Answers(tmp_path / "ann.jsonl")
    answers.answer(Pair(ASKED, ("a", "b")), ("a", "b"), "a")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="No space left"):
        patched.setattr("os.fsync", full_disk)
        answers.answer(Pair(ASKED, ("a", "c")), ("a", "c"), "a")
    assert len(answers) == len(Answers(tmp_path / "ann.jsonl")) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["ann.jsonl"]


def test_texts_of_any_kind_come_back_as_they_were(tmp_path):
    texts = ("line\u2028one\n\n  two\t \U0001f600", '["a list", "in \\ JSON"]')
    answers = Answers(tmp_path / "ann.jsonl")
    history = [*ASKED, {"role": "assistant", "content": "Because"}, *ASKED]
    answers.answer(Pair(history, texts), texts, "b")
    liked, other, _ = Answers(tmp_path / "ann.jsonl").comparisons[0]
    assert (other[-1]["content"], liked[-1]["content"]) == texts and liked[:-1] == history


# ----------------------------------------------------------------------- The outlook


def test_expected_accuracy_is_what_simulated_people_give():
    rng = np.random.default_rng(0)
    logits, now, later = np.array([0.3, -2.0, 0.0]), np.array([1.0, 4.0, 9.0]), np.full(3, 0.8)
    size = (200_000, 3)
    mean = logits + np.sqrt(now - later) * rng.standard_normal(size)  # once more is known
    taste = mean + np.sqrt(later) * rng.standard_normal(size)
    prefers = rng.random(size) < 1 / (1 + np.exp(-taste))
    expected = ((mean > 0) == prefers).mean()
    found = expected_accuracy(*map(torch.from_numpy, (logits, now, later)))
    assert float(found) == pytest.approx(expected, abs=0.002)


def test_looking_ahead_foretells_the_accuracy_of_people_who_are_asked():
    rng, people, K = torch.Generator().manual_seed(0), 1500, 3
    targets, pool = (2 * torch.randn(n, 1 + K, generator=rng).double() for n in (200, 12))
    prior = Prior(torch.zeros(K).double(), torch.eye(K).double())
    outlook = look_ahead(UserPosterior(prior.mean, prior.cov), targets, pool, 0.005)
    tastes = torch.cat([torch.ones(people, 1), torch.randn(people, K, generator=rng)], 1).double()
    chances = torch.sigmoid(tastes @ pool.T)
    signs = torch.where(torch.rand(people, 12, generator=rng) < chances, 1.0, -1.0).double()
    answers = (signs[:, :, None] * pool).flatten(0, 1)
    modes = posteriors(answers, Users([12] * people), prior, tolerance=1e-6).mode
    guesses = targets[:, 0] + modes @ targets[:, 1:].T > 0
    truth = torch.sigmoid(tastes @ targets.T)
    accuracy = torch.where(guesses, truth, 1 - truth).mean()
    assert outlook.accuracy[12] > outlook.accuracy[0] + 0.1
    assert float(accuracy) == pytest.approx(outlook.accuracy[12], abs=0.01)


def test_the_outlook_says_how_many_more_questions_are_worth_it():
    unknown = UserPosterior(torch.zeros(1).double(), torch.eye(1).double())
    pool = torch.tensor([[0.0, 3.0]] * 30).double()
    sure = look_ahead(unknown._replace(covariance=1e-6 * unknown.covariance), pool, pool, 0.005)
    unsure = look_ahead(unknown, pool, pool, 0.005)
    assert sure.useful == 0 < unsure.useful < 20 and unsure.best > unsure.accuracy[0]
    assert len(look_ahead(unknown, pool, pool[:4], 0.005).accuracy) == 5
    assert look_ahead(unknown, pool, pool[:0], 0.005).useful == 0


def test_targets_are_pairs_of_the_same_prompt_and_never_too_many():
    rng = torch.Generator().manual_seed(0)
    assert same_prompt_pairs(["p", "q", "p", "r", "p"], rng).tolist() == [[0, 2], [0, 4], [2, 4]]
    assert same_prompt_pairs(["p", "q"], rng).shape == (0, 2)
    many = same_prompt_pairs(["p"] * 100, rng)
    assert len(many) == len({tuple(row) for row in many.tolist()}) < 4950
    assert len(many) == len(thinned(torch.arange(4950), rng))


# ----------------------------------------------------------------------- The session


def test_no_pair_comes_twice_and_the_pool_has_an_end(tmp_path):
    asked, own = [], session(tmp_path / "ann.jsonl", pairs=8, tolerance=0)
    while question := own.question():
        assert own.question() is question  # looking again changes nothing
        asked.append(question.pair.key)
        own.do("skip" if len(asked) == 3 else "a")
    assert len(asked) == len(set(asked)) == 8 and own.reason == "every pair of the pool was asked"
    assert not own.do("a")
    assert len(own.answers) == 7 and own.do("undo") and own.question().number == 8


def test_answers_move_what_is_known_and_either_response_may_come_first(tmp_path, caplog):
    caplog.set_level("INFO")
    own, b = session(tmp_path / "ann.jsonl", tolerance=0), torch.tensor([2.0, -1.0, 0.5]).double()
    turned = []
    while question := own.question():
        turned.append(question.shown != question.pair.texts)
        z = own.material.differences([question.pair.conversations])[0]
        first = bool(z[0] + z[1:] @ b > 0)
        own.do("a" if first != turned[-1] else "b")
    assert torch.cosine_similarity(own.posterior.mean, b, dim=0) > 0.9
    assert own.outlook.accuracy[0] > own.before + 0.1
    assert 5 < sum(turned) < 25
    assert not caplog.text  # which a terminal would show beside every question


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_asks_and_asks_the_same_after_a_restart(tmp_path, criterion):
    def start(seed: int) -> Session:
        return session(tmp_path / "ann.jsonl", 10, tolerance=0, criterion=criterion, seed=seed)

    start(0).do("a")
    start(0).do("skip")
    start(0).do("b")
    assert start(0).question() == start(0).question()
    keys = {start(seed).question().pair.key for seed in range(8)}
    assert (len(keys) > 2) == (criterion == "random")


# ---------------------------------------------------------------------- The terminal


def test_long_texts_come_a_page_at_a_time_and_an_answer_may_come_early(tmp_path):
    own = session(tmp_path / "ann.jsonl", pairs=3, tolerance=0)
    long = [{"role": "user", "content": "word " * 200 + "\n\n\x1b[2Jend"}]
    own.material.pairs = [Pair(long, pair.texts) for pair in own.material.pairs]
    own.material.views |= {
        digest(c): torch.zeros(4).double() for p in own.material.pairs for c in p.conversations
    }
    out = io.StringIO()
    Terminal(own, io.StringIO("\n\nb\nq\n"), out, height=6).run()
    text = out.getvalue()
    assert text.count("-- Enter for more --") >= 4 and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(own.answers) == 1


def test_the_end_of_the_input_or_an_interrupt_quits(tmp_path):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    for source in (io.StringIO(""), Interrupted()):
        own = session(tmp_path / "ann.jsonl", tolerance=0)
        Terminal(own, source, io.StringIO()).run()
        assert len(own.answers) == 0


def test_a_page_whose_answer_cannot_be_written_says_so_and_keeps_the_question(
    tmp_path, monkeypatch
):
    own = session(tmp_path / "ann.jsonl", tolerance=0)
    page = Page(own, tmp_path / "ann.json", "secret")
    key = own.question().pair.key

    def post(body: str) -> tuple[str, str]:
        said = []
        environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/secret/", "SERVER_NAME": "here"}
        environ |= {"CONTENT_TYPE": "application/x-www-form-urlencoded"}
        environ |= {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body.encode())}
        environ |= {"SERVER_PORT": "80", "wsgi.url_scheme": "http", "wsgi.errors": io.StringIO()}
        text = b"".join(page.app(environ, lambda status, *_: said.append(status))).decode()
        return said[0], text

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full_disk)
        status, text = post(f"do=a&question={key}")
    assert status.startswith("500") and "No space left on device" in text
    assert len(own.answers) == 0 and own.question().pair.key == key
    assert post(f"do=b&question={key}")[0].startswith("303") and len(own.answers) == 1
    assert post(f"do=b&question={key}")[0].startswith("303") and len(own.answers) == 1  # twice


def test_who_is_done_may_go_back_or_on(tmp_path):
    out, own = io.StringIO(), session(tmp_path / "ann.jsonl", most=1, tolerance=0)
    Terminal(own, io.StringIO("a\nu\nb\nm\na\nq\n"), out).run()
    assert len(own.answers) == 2 and out.getvalue().count("--most is 1") == 2
