"""The benchmark of questions: numbers that follow from curves, its worlds, a whole small run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import planted
import question_data
import questions
from lore.common.files import InputError
from lore.elicitation.criteria import CRITERIA
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT
from question_data import Planted, World

SHOTS = (0, 2, 10, 20)


def curve(gain: float, users: int = 30) -> np.ndarray:
    """Users differ by a constant; each grows by ``gain`` hundredths a question [S, U]."""
    base = 0.5 + 0.1 * np.random.default_rng(0).random(users)
    return base + 0.01 * gain * np.array(SHOTS)[:, None]


@pytest.mark.parametrize(("gain", "worth"), [(1.5, 15.0), (0.5, 5.0), (3.0, math.inf)])
def test_ten_chosen_questions_are_worth_as_many_random_ones_as_reach_their_level(gain, worth):
    found = questions.crossing(SHOTS, curve(1), curve(gain)[SHOTS.index(10)])
    assert found == pytest.approx((worth,) * 3)


def test_a_number_of_questions_is_less_certain_where_users_differ_in_it():
    noise = 0.3 * np.random.default_rng(1).standard_normal(30)
    middle, low, high = questions.crossing(SHOTS, curve(1), curve(1)[2] + noise)
    assert low < middle < high and high - low > 1


def test_a_table_has_paired_differences_and_both_numbers_of_questions():
    world = World("made", "Made", "", (0,), SHOTS, None, {})
    curves = {rule: {"accuracy": curve(g), "log_loss": 1 - curve(g)}
              for rule, g in (("random", 1), ("d_optimal", 1.5))}  # fmt: skip
    row = questions.table(world, curves).loc["d_optimal"]
    assert row["accuracy at 10, minus random"] == "+5.0 [5.0, 5.0]"
    assert row["log loss at 10, minus random"] == "-0.050 [-0.050, -0.050]"
    assert row["10 are worth, by accuracy"] == "15.0 [15.0, 15.0]"
    assert row["to reach random's 20, by log loss"] == "13.3 [13.3, 13.3]"


@pytest.mark.parametrize("rank", [2, 5])
def test_the_truth_of_a_planted_world_is_as_often_right_as_it_says(rank):
    task, truth = Planted(rank, 1.5, users=300, pool=20, held_out=40).draw(Path(), 0)
    state = truth.adapt(truth.view(task.few), task.few)
    logits = truth.logits(truth.view(task.unseen), state, task.unseen.user)
    right, said = task.unseen.accuracies(logits).mean(), logits.abs().sigmoid().mean()
    assert float(right) == pytest.approx(float(said), abs=0.04)  # a plugged-in mode says too much
    assert right > 0.7 > task.unseen.accuracies(-logits).mean()
    assert torch.equal(task.train.counts, torch.full((question_data.SEEN,), 60))


def test_those_who_are_asked_have_enough_comparisons_and_keep_all_of_them():
    task = planted.task(users=4, shots=10, held_out=5)
    few = task.few.select((task.few.user < 2) | (torch.arange(40) % 2 == 0))
    task.few = few  # 10, 10, 5 and 5 comparisons, beside 5 held out
    found = question_data.with_enough(task, 15)
    assert found.few.names == found.unseen.names == few.names[:2]
    assert found.few.counts.tolist() == [10, 10] and found.unseen.counts.tolist() == [5, 5]
    torch.testing.assert_close(found.few.in_memory().features.x, few.in_memory().features.x[:20])
    assert question_data.with_enough(task, 10).few.num_users == 4


@pytest.fixture
def tiny(monkeypatch):
    """One planted world, asked by its truth and by a fit to it; ridge BT has nothing to ask."""
    for name, value in (("SEEN", 8), ("TRAINING", 10), ("FEATURES", 6)):
        monkeypatch.setattr(question_data, name, value)
    mixed = MixedLogit(floor=0.1, l_mu=1.0, tau2=1.0, pi=10.0)
    methods = {"Mixed logit": mixed, "Ridge BT": RidgeBT()}
    draw = Planted(2, 1.5, users=5, pool=8, held_out=6).draw
    world = World("tiny", "Tiny", "", (0, 1), (0, 2, 4), draw, methods)
    there = World("absent", "Absent", "ukp", (0,), (0, 2), draw, {})
    monkeypatch.setattr(questions, "WORLDS", (world, there))
    monkeypatch.setattr(questions, "RESAMPLES", 20)
    monkeypatch.setattr(questions, "COUNTS", (20, 30))
    return world


@pytest.mark.slow
def test_one_command_asks_what_is_missing_and_makes_tables_and_one_figure(
    tiny, tmp_path, monkeypatch, caplog
):
    given = {"ukp": tmp_path / "nowhere", "results": tmp_path, "out": tmp_path, "rounds": 1}
    with caplog.at_level("INFO"):
        questions.main(**given, repeats=1, pools=False)
    assert "absent left out: --ukp" in caplog.text
    first = (tmp_path / "tiny-seed0.json").read_text()
    questions.main(**given, repeats=2, pools=False)
    assert (tmp_path / "tiny-seed0.json").read_text() == first
    text = (tmp_path / "questions.md").read_text()
    assert "10 users in 2 repeats; questions in a user's pool: 8." in text
    assert "Ridge BT had tastes to ask about in 0 of 2." in text
    for rule in CRITERIA:
        for row in (f"the truth: {rule}", f"Mixed logit: {rule}", rule):  # the last one's is time
            assert text.count(f"| {row} ") == 1
    size = (tmp_path / "questions.svg").stat().st_size
    assert 5_000 < size < 500_000
    monkeypatch.setattr(questions, "ask_world", None)
    questions.main(**given, tables_only=True)
    assert (tmp_path / "questions.md").read_text() == text
    monkeypatch.setattr(questions, "WORLDS", (tiny._replace(shots=(0, 1)),))
    with pytest.raises(InputError, match=r"tiny-seed0.json has other numbers of questions"):
        questions.main(**given, tables_only=True)


@pytest.mark.slow
def test_a_larger_pool_has_better_questions_to_choose_from(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "POOLS", (10, 80))
    monkeypatch.setattr(questions, "POOL_WORLD", Planted(2, 1.5, users=40, held_out=40))
    questions.vary_pool(0, tmp_path)
    head, body = questions.pool_table(tmp_path)
    assert "number of pairs" in head
    rows = [line.split("|")[1:-1] for line in body.splitlines()[2:]]
    chosen = [float(row[2].split(",")[0]) for row in rows]
    assert chosen[1] > chosen[0]


@pytest.mark.parametrize(("curve", "level", "shots"), [
    ([0.5, 0.6, 0.7], 0.65, 15), ([0.5, 0.6, 0.7], 0.4, 0), ([0.5, 0.6, 0.7], 0.71, math.inf),
    ([0.5, 0.7, 0.6], 0.65, 7.5),
])  # fmt: skip
def test_a_level_is_reached_on_a_straight_line_between_two_numbers(curve, level, shots):
    assert questions.shots_to_reach([0, 10, 20], curve, level) == pytest.approx(shots)
