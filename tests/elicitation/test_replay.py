"""Shots chosen by a criterion: as if every user were asked alone, and without looking ahead."""

import pytest
import torch
from torch import Tensor

import people
import planted
from lore.common.files import InputError
from lore.elicitation.criteria import QuestionPool, UserPosterior, choose_shots, next_question
from lore.experiments import results as records
from lore.experiments import runner as experiments
from lore.experiments.judging import sweep
from lore.learning.comparisons import Comparisons, Shots, draw_shots
from lore.learning.method import Task
from lore.methods.fitting.posterior import Prior
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedFit
from lore.methods.pref import PReF
from lore.methods.rbd import RBD


def known_fit(task: Task, rank: int = 3) -> MixedFit:
    """A mixed logit with tastes along the first features, which need not be the true ones."""
    x = torch.eye(task.train.num_features, 1 + rank).double()
    return MixedFit(x[:, 0], 1.5 * x[:, 1:], standard(rank), {})


def standard(K: int) -> Prior:
    return Prior(torch.zeros(K).double(), torch.eye(K).double())


def some_task(users: int = 5, shots: int = 12) -> Task:
    return planted.task(users=users, shots=shots, held_out=30, rank=3, seed=1)


def chosen_rows(
    task: Task, fit: MixedFit, sizes: list[int], few: Comparisons | None = None
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return choose_shots(fit, few or task.few, sizes, "d_optimal", g).rows


def test_users_are_asked_as_if_each_were_alone():
    task = some_task()
    fit = known_fit(task)
    rows = chosen_rows(task, fit, [6])
    Q = fit.questions(fit.view(task.few))
    for u, found in enumerate(rows):
        own = (task.few.user == u).nonzero()[:, 0]
        order = []
        for _ in range(6):
            posterior = UserPosterior.after(fit.prior, Q[own][order])
            order.append(next_question(posterior, QuestionPool(Q[own]), "d_optimal", order))
        assert own[order].tolist() == found.tolist()


def test_labels_that_were_not_asked_for_change_nothing():
    task = some_task()
    fit = known_fit(task)
    rows = chosen_rows(task, fit, [4])
    used = torch.zeros(len(task.few), dtype=torch.bool)
    used[torch.cat(rows)] = True
    flipped = task.few.flipped(~used)
    again = chosen_rows(task, fit, [4], flipped)
    assert [row.tolist() for row in rows] == [row.tolist() for row in again]
    other = chosen_rows(task, fit, [4], task.few.flipped(used))
    assert [row.tolist() for row in rows] != [row.tolist() for row in other]


def test_more_shots_go_on_where_fewer_ended_until_nothing_is_left():
    task = some_task(users=3, shots=5)
    rows = chosen_rows(task, known_fit(task), [0, 2, 5, 9])
    users = task.few.num_users
    for u in range(users):
        none, two, five, nine = (rows[s * users + u].tolist() for s in range(4))
        assert none == [] and five[:2] == two and nine == five
        assert sorted(five) == (task.few.user == u).nonzero()[:, 0].tolist()


def test_a_shot_is_a_whole_dialogue_where_there_are_dialogues():
    task = some_task(users=3, shots=8)
    task.few.dialogs = torch.arange(len(task.few)) // 2
    for row in chosen_rows(task, known_fit(task), [2]):
        assert len(row) == 4
        assert (task.few.dialogs[row].bincount().unique()).tolist() in ([0, 2], [2])


def test_a_pair_that_was_asked_is_not_asked_again_while_others_are_left():
    task = some_task(users=2, shots=4)
    features = task.few.features.dense().x
    twice = Comparisons(
        type(task.few.in_memory().features)(torch.cat([x for u in range(2) for x in (
            features[4 * u : 4 * u + 4], -features[4 * u : 4 * u + 4])])), [8, 8],
    )  # fmt: skip
    for row in chosen_rows(task, known_fit(task), [4], twice):
        assert len((row % 4).unique()) == 4


@pytest.mark.parametrize("method", [Lore(ranks=(3,), iterations=50), PReF(rank=3, strengths=(1.0,)),
                                    RBD(rank=3, strengths=((1.0, 10.0),))])  # fmt: skip
def test_methods_with_a_vector_for_each_user_can_choose_too(method):
    task = planted.task(users=8, shots=12, held_out=20, rank=2)
    fit = next(f for f in method.fit(task) if f.population() is not None)
    logits = fit.logits(fit.view(task.unseen), fit.population_state.expand(8, -1), task.unseen.user)
    Q, b = fit.questions(fit.view(task.unseen)), fit.population_state.double()
    torch.testing.assert_close(Q[:, 0] + Q[:, 1:] @ b, logits.double(), rtol=1e-4, atol=1e-5)
    rows = chosen_rows(task, fit, [3])
    assert all(len(row.unique()) == 3 for row in rows)


def true_fit(task: Task, rank: int, spread: float, strength: float, seed: int) -> MixedFit:
    """The planted world itself as a mixed logit."""
    g = torch.Generator().manual_seed(seed)
    torch.randn(planted.ROWS, planted.F, generator=g)
    basis = torch.linalg.qr(torch.randn(planted.F, rank + 1, generator=g))[0].double()
    return MixedFit(strength * basis[:, 0], strength * spread * basis[:, 1:], standard(rank), {})


def log_losses(fit: MixedFit, task: Task, draws: Shots) -> list[float]:
    found = [r for r in sweep(fit, task, draws) if (r["set"], r["control"]) == ("unseen", "")]
    return [sum(r["log_loss"]) / len(r["log_loss"]) for r in found]


@pytest.mark.slow
def test_chosen_questions_are_worth_more_than_as_many_random_ones_in_a_planted_world():
    world = {"rank": 3, "spread": 0.5, "strength": 2.0, "seed": 2}
    task = planted.task(users=80, shots=60, held_out=60, **world)
    fit = true_fit(task, **world)
    fit.random_label = "at random"
    fit.controlled = False
    at_random = log_losses(fit, task, draw_shots(task.few, [6, 12], 3, 0))
    g = torch.Generator().manual_seed(0)
    chosen = log_losses(fit, task, choose_shots(fit, task.few, [6, 12], "d_optimal", g))
    assert chosen[0] < at_random[1]


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
