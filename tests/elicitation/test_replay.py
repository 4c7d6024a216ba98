"""Shots chosen by a criterion: as if every user were asked alone, and without looking ahead."""

import pytest
import torch

import people
import planted
from lore.common.files import InputError
from lore.elicitation.criteria import QuestionPool, UserPosterior, choose_shots, next_question
from lore.experiments import results as records
from lore.experiments import runner as experiments
from lore.experiments.judging import sweep
from lore.learning.comparisons import Comparisons, Shots, draw_shots
from lore.learning.method import Fitted, Task
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedFit
from lore.methods.pref import PReF
from lore.methods.rbd import RBD
from made_bases import standard


def some_fit() -> MixedFit:
    """A mixed logit with tastes along the first features, which need not be the true ones."""
    x = torch.eye(planted.F, 4).double()
    return MixedFit(x[:, 0], 1.5 * x[:, 1:], standard(3), {})


def some_shots(users: int = 5, shots: int = 12) -> Comparisons:
    return planted.task(users=users, shots=shots, held_out=1, rank=3, seed=1).few


def chosen(few: Comparisons, sizes: list[int], fit: Fitted | None = None) -> list[list[int]]:
    """The rows of the shots that are asked for, every user's for each size."""
    g = torch.Generator().manual_seed(0)
    rows = choose_shots(fit or some_fit(), few, sizes, "d_optimal", g).rows
    return [row.tolist() for row in rows]


def test_users_are_asked_as_if_each_were_alone():
    few, fit = some_shots(), some_fit()
    Q, few.weight = fit.questions(fit.view(few)), 0.2 + 2 * few.weight.cumsum(0) % 3
    for u, found in enumerate(chosen(few, [6])):
        own, order = (few.user == u).nonzero()[:, 0], []
        for _ in range(6):
            posterior = UserPosterior.after(fit.prior, Q[own][order], few.weight[own][order])
            order.append(next_question(posterior, QuestionPool(Q[own]), "d_optimal", order))
        assert own[order].tolist() == found


def test_labels_that_were_not_asked_for_change_nothing():
    few = some_shots()
    rows, used = chosen(few, [4]), torch.zeros(len(few), dtype=torch.bool)
    used[sum(rows, [])] = True
    assert chosen(few.flipped(~used), [4]) == rows != chosen(few.flipped(used), [4])


def test_more_shots_go_on_where_fewer_ended_until_nothing_is_left():
    few = some_shots(users=3, shots=5)
    rows = chosen(few, [0, 2, 5, 9])
    for u in range(3):
        none, two, five, nine = rows[u::3]
        assert none == [] and five[:2] == two and nine == five
        assert sorted(five) == (few.user == u).nonzero()[:, 0].tolist()


def test_a_shot_is_a_whole_dialogue_where_there_are_dialogues():
    few = some_shots(users=3, shots=8)
    few.dialogs = torch.arange(len(few)) // 2
    for row in chosen(few, [2]):
        assert row[1::2] == [i + 1 for i in row[::2]] and len(row) == 4
        assert all(i % 2 == 0 for i in row[::2])


def test_a_pair_that_was_asked_is_not_asked_again_while_others_are_left():
    features = some_shots(users=1, shots=4).features.dense().x
    twice = Comparisons.from_list([torch.cat([features, -features])] * 2)
    for row in chosen(twice, [4]):
        assert len({i % 4 for i in row}) == 4


METHODS = (Lore(ranks=(3,), iterations=50), PReF(rank=3, strengths=(1.0,)),
           RBD(rank=3, strengths=((1.0, 10.0),)))  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=("LoRe", "PReF", "RBD"))
def test_methods_with_a_vector_for_each_user_can_choose_too(method):
    task = planted.task(users=8, shots=12, held_out=20, rank=2)
    fit = next(f for f in method.fit(task) if f.population() is not None)
    logits = fit.logits(fit.view(task.unseen), fit.population_state.expand(8, -1), task.unseen.user)
    Q, b = fit.questions(fit.view(task.unseen)), fit.population_state.double()
    torch.testing.assert_close(Q[:, 0] + Q[:, 1:] @ b, logits.double(), rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == 3 for row in chosen(task.few, [3], fit))


def log_losses(fit: MixedFit, task: Task, draws: Shots) -> list[float]:
    found = [r for r in sweep(fit, task, draws) if (r["set"], r["control"]) == ("unseen", "")]
    return [sum(r["log_loss"]) / len(r["log_loss"]) for r in found]


@pytest.mark.slow
def test_chosen_questions_are_worth_more_than_as_many_random_ones_in_a_planted_world():
    task = planted.task(users=80, shots=60, held_out=60, rank=3, spread=0.5, strength=2.0, seed=2)
    g = torch.Generator().manual_seed(2)
    torch.randn(planted.ROWS, planted.F, generator=g)
    basis = torch.linalg.qr(torch.randn(planted.F, 4, generator=g))[0].double()
    fit = MixedFit(2 * basis[:, 0], basis[:, 1:], standard(3), {})  # the planted world itself
    fit.random_label, fit.controlled = "at random", False
    at_random = log_losses(fit, task, draw_shots(task.few, [6, 12], 3, 0))
    asked = choose_shots(fit, task.few, [6, 12], "d_optimal", torch.Generator().manual_seed(0))
    assert log_losses(fit, task, asked)[0] < at_random[1]


@pytest.mark.slow
def test_a_run_that_asks_keeps_what_is_drawn_at_random_and_adds_a_label(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "report", lambda folder: "")
    world, found = people.planted(users=12, dialogues=8), {}
    for name, ask in (("plain", ("random",)), ("asks", ("random", "d_optimal"))):
        chosen = people.settings(tmp_path, name=name, select_rank=False)
        people.vary_fewshot(world.tasks(), chosen, (0, 1, 2), 2, ask)
        found[name] = people.records(tmp_path / "planted" / name)
    assert all(found["asks"][key] == record for key, record in found["plain"].items())
    added = {key for key in found["asks"] if key not in found["plain"]}
    assert {label for label, *_ in added} == {"LoRe K=2, shots by d_optimal"}
    assert {shots for _, _, part, shots in added if part == "unseen"} == {0, 1, 2}
    read = records.read_results(tmp_path / "planted" / "asks")
    plain = read.only(label for label, *_ in found["plain"])
    assert read.judged == plain.judged == ["LoRe K=2"]
    assert "ask" not in people.saved(tmp_path / "planted" / "plain")["settings"]


def test_an_unknown_criterion_is_refused_before_anything_is_made(tmp_path):
    chosen = people.settings(tmp_path)
    with pytest.raises(InputError, match="--ask surprise: there are random, d_optimal"):
        people.vary_fewshot(people.planted(users=4).tasks(), chosen, (1,), 1, ("surprise",))
    assert not any(tmp_path.iterdir())
