"""What lies behind tools/ask.py: the pool, the answers on disk, the outlook and the terminal."""

import io
import json
from functools import partial
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import pytest
import torch

from lore.common.files import InputError, digest
from lore.elicitation.choices import Answers, Pair, read_pool
from lore.elicitation.criteria import CRITERIA, UserPosterior
from lore.elicitation.outlook import expected_accuracy, look_ahead, useful_questions
from lore.elicitation.page import Page
from lore.elicitation.session import MOST_TARGETS, Material, Session
from lore.elicitation.terminal import Terminal
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import posteriors
from lore.methods.mixed_logit import MixedFit
from lore.preparing.own_rows import Columns
from made_bases import standard, write_lines

ASKED = [{"role": "user", "content": "Why?"}]
ENVIRON = {"REQUEST_METHOD": "POST", "PATH_INFO": "/secret/",
           "CONTENT_TYPE": "application/x-www-form-urlencoded"}  # fmt: skip


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def session(path: Path, pairs: int = 30, K: int = 3, **changes) -> Session:
    """A session whose rewards are drawn instead of embedded."""
    pool = [Pair(ASKED, (f"one {i}", f"other {i}")) for i in range(pairs)]
    keys = [digest(c) for pair in pool for c in pair.conversations]
    views = 2 * torch.randn(len(keys), 1 + K, generator=torch.Generator().manual_seed(0)).double()
    fit = MixedFit(torch.zeros(5).double(), torch.zeros(5, K).double(), standard(K), {})
    known = dict(zip(keys, views, strict=True))
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
    logits, now, later = torch.tensor([[0.3, -2.0, 0.0], [1.0, 4.0, 9.0], [0.8] * 3]).double()
    noise = torch.randn(2, 200_000, 3, generator=torch.Generator().manual_seed(0)).double()
    mean = logits + (now - later).sqrt() * noise[0]  # once more is known
    chance = torch.sigmoid(mean + later.sqrt() * noise[1])
    expected = torch.where(mean > 0, chance, 1 - chance).mean()
    assert abs(expected_accuracy(logits, now, later) - expected) < 0.002


def test_looking_ahead_foretells_the_accuracy_of_people_who_are_asked():
    rng, people, K = torch.Generator().manual_seed(0), 1500, 3
    targets, pool = (2 * torch.randn(n, 1 + K, generator=rng).double() for n in (200, 12))
    prior = standard(K)
    foretold = look_ahead(UserPosterior(prior.mean, prior.cov), targets, pool)
    tastes = torch.cat([torch.ones(people, 1), torch.randn(people, K, generator=rng)], 1).double()
    chances = torch.sigmoid(tastes @ pool.T)
    signs = torch.where(torch.rand(people, 12, generator=rng) < chances, 1.0, -1.0).double()
    answers = (signs[:, :, None] * pool).flatten(0, 1)
    modes = posteriors(answers, Users([12] * people), prior, tolerance=1e-6).mode
    guesses = targets[:, 0] + modes @ targets[:, 1:].T > 0
    truth = torch.sigmoid(tastes @ targets.T)
    accuracy = torch.where(guesses, truth, 1 - truth).mean()
    assert foretold[12] > foretold[0] + 0.1
    assert float(accuracy) == pytest.approx(foretold[12], abs=0.01)


def test_the_outlook_says_how_many_more_questions_are_worth_it():
    pool, useful = torch.tensor([[0.0, 3.0]] * 30).double(), {}
    for variance in (1e-6, 1):
        posterior = UserPosterior(standard(1).mean, variance * standard(1).cov)
        accuracy = look_ahead(posterior, pool, pool)
        useful[variance] = useful_questions(accuracy, 0.005)
    assert useful[1e-6] == 0 < useful[1] < 20 == len(accuracy) - 1
    assert len(look_ahead(posterior, pool, pool[:4])) == 5
    assert useful_questions([0.7, 0.74, 0.75], 0.02) == 1


@pytest.mark.parametrize(
    ("prompts", "pairs"),
    [("pqprp", [(0, 2), (0, 4), (2, 4)]), ("pq", [(5, 6)]), ("p" * 100, None)],
)
def test_targets_are_pairs_of_the_same_prompt_or_the_pool_and_never_too_many(prompts, pairs):
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"{i}"}]
        for i, prompt in enumerate([*prompts, *["pool"] * (7 - len(prompts))])
    ]
    views = dict(zip(map(digest, talks), torch.eye(len(talks)), strict=True))
    material = Material([Pair.of(*talks[-2:])], talks[: len(prompts)], views)
    found = material.targets(torch.Generator().manual_seed(0))
    found = [(int(row.argmax()), int(row.argmin())) for row in found]
    assert found == pairs or pairs is None and len(found) == len(set(found)) == MOST_TARGETS


# ----------------------------------------------------------------------- The session


def test_no_pair_comes_twice_and_the_pool_has_an_end(tmp_path):
    asked, own = [], session(tmp_path / "ann.jsonl", pairs=8, tolerance=0)
    while question := own.question():
        assert own.question() == question  # looking again changes nothing
        asked.append(question.pair.key)
        own.do("skip" if len(asked) == 3 else "a")
    assert len(asked) == len(set(asked)) == 8 and own.reason == "every pair of the pool was asked"
    assert not own.do("a")
    assert len(own.answers) == 7 and own.do("undo") and own.question().number == 8


def test_answers_move_what_is_known_and_either_response_may_come_first(tmp_path, caplog):
    caplog.set_level("INFO")
    own, b = session(tmp_path / "ann.jsonl", tolerance=0), torch.tensor([2.0, -1.0, 0.5]).double()
    turned = []  # for each question, whether the texts changed places
    while question := own.question():
        turned.append(question.shown != question.pair.texts)
        z = own.material.differences([question.pair.conversations])[0]
        first = bool(z[0] + z[1:] @ b > 0)
        own.do("a" if first != turned[-1] else "b")
    assert torch.cosine_similarity(own.user.posterior.mean, b, dim=0) > 0.9
    assert own.accuracy[0] > own.before + 0.1
    assert 5 < sum(turned) < 25
    assert not caplog.text  # which a terminal would show beside every question


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_asks_and_asks_the_same_after_a_restart(tmp_path, criterion):
    again = partial(session, tmp_path / "ann.jsonl", 10, tolerance=0, criterion=criterion)
    for word in ("a", "skip", "b"):
        again().do(word)
    assert again().question() == again().question()
    keys = {again(seed=seed).question().pair.key for seed in range(8)}
    assert (len(keys) > 2) == (criterion == "random")


# ---------------------------------------------------------------------- The terminal


def test_long_texts_come_a_page_at_a_time_and_an_answer_may_come_early(tmp_path):
    out, own = io.StringIO(), session(tmp_path / "ann.jsonl", pairs=3, tolerance=0)
    long = [{"role": "user", "content": "\x1b[2J\n\n" + "word " * 200}]
    own.material.pairs = [Pair(long, pair.texts) for pair in own.material.pairs]
    talks = [c for pair in own.material.pairs for c in pair.conversations]
    own.material.views |= {digest(talk): torch.zeros(4).double() for talk in talks}
    terminal = Terminal(own, io.StringIO("\n\nb\nq\n"), out)
    terminal.height = 6
    terminal.run()
    text = out.getvalue()
    assert text.count("-- Enter for more --") >= 4
    assert "\N{REPLACEMENT CHARACTER}[2J" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(own.answers) == 1


def test_the_end_of_the_input_or_an_interrupt_quits(tmp_path):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    own = session(tmp_path / "ann.jsonl", tolerance=0)
    for source in (io.StringIO(""), Interrupted()):
        Terminal(own, source, io.StringIO()).run()
    assert len(own.answers) == 0


def test_a_page_whose_answer_cannot_be_written_says_so_and_keeps_the_question(
    tmp_path, monkeypatch
):
    own = session(tmp_path / "ann.jsonl", tolerance=0)
    page = Page(own, tmp_path / "ann.json", "secret")
    key = own.question().pair.key

    def post(body: str) -> str:
        """The status line and the page."""
        given = {"CONTENT_LENGTH": str(len(body)), "wsgi.input": io.BytesIO(body.encode())}
        environ, said = ENVIRON | given, []
        setup_testing_defaults(environ)
        text = b"".join(page.app(environ, lambda status, *_: said.append(status)))
        return said[0] + text.decode()

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full_disk)
        said = post(f"do=a&question={key}")
    assert said.startswith("500") and "No space left on device" in said
    assert len(own.answers) == 0 and own.question().pair.key == key
    for _ in range(2):  # the second one is of a question that is not asked any more
        assert post(f"do=b&question={key}").startswith("303") and len(own.answers) == 1


def test_who_is_done_may_go_back_or_on(tmp_path):
    out, own = io.StringIO(), session(tmp_path / "ann.jsonl", most=1, tolerance=0)
    Terminal(own, io.StringIO("a\nu\nb\nm\na\nq\n"), out).run()
    assert len(own.answers) == 2 and out.getvalue().count("--most is 1") == 2
