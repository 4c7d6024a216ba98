"""criteria.py: what answers say of a user, the question to ask next, and what more would add; and
shots chosen by a criterion, as if every user were asked alone, and without looking ahead."""

import time

import pytest
import torch
from torch import Tensor

import people
import planted
from lore.common.files import InputError
from lore.elicitation import criteria
from lore.elicitation.criteria import CRITERIA, QuestionPool, UserPosterior, next_question
from lore.experiments import results, runner
from lore.learning.comparisons import Comparisons, Users
from lore.learning.method import Fitted
from lore.methods.fitting.posterior import Prior, posteriors
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedFit
from lore.methods.pref import PReF
from made_bases import standard


def after(answers: Tensor) -> UserPosterior:
    """What some answers say of tastes that are standard normal."""
    return UserPosterior.after(standard(answers.shape[1] - 1), answers)


def questions(n: int, K: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1 + K, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("n", "K"), [(12, 1), (12, 2), (12, 8), (12, 20), (0, 2)])
def test_a_posterior_has_no_slope_at_its_mean_and_the_curvature_there(n, K):
    answers, eye = questions(n, K, seed=5), torch.eye(K).double()
    prior = Prior(torch.ones(K).double(), 2 * eye)
    mean, covariance = UserPosterior.after(prior, answers)
    p, Z = torch.sigmoid(answers[:, 0] + answers[:, 1:] @ mean), answers[:, 1:]
    torch.testing.assert_close(((1 - p)[:, None] * Z).sum(0), (mean - 1) / 2)
    precision = eye / 2 + Z.T @ ((p * (1 - p))[:, None] * Z)
    torch.testing.assert_close(covariance, torch.linalg.inv(precision))


def test_a_question_of_several_comparisons_has_the_gains_of_all():
    rows = torch.tensor([[0.0, 1.0], [0.0, 1.5], [0.0, -1.4]])
    posterior = after(rows[:0])
    assert next_question(posterior, QuestionPool(rows)) == 1
    assert next_question(posterior, QuestionPool(rows, [1, 2])) == 1
    assert next_question(posterior, QuestionPool(rows[[0, 2, 1]], [2, 1])) == 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_which_response_comes_first_changes_no_choice(criterion):
    rows = questions(50, 3, seed=6)
    coin = torch.where(torch.arange(50) % 2 > 0, -1.0, 1.0)[:, None]
    pools = QuestionPool(rows), QuestionPool(rows * coin)
    chosen = [next_question(after(rows[:1]), pool, criterion, [0], 3) for pool in pools]
    assert chosen[0] == chosen[1] != 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_question_comes_twice_and_a_pair_that_was_asked_comes_last(criterion):
    five = questions(5, 2, seed=7)
    rows = torch.cat([five, five.flip(0), -five])  # each pair three times
    pool, earlier = QuestionPool(rows), []
    for number in range(15):
        earlier.append(next_question(after(rows[earlier]), pool, criterion, earlier, number))
    assert sorted(earlier) == list(range(15))
    assert len({tuple(rows[i].abs().tolist()) for i in earlier[:5]}) == 5
    with pytest.raises(InputError, match="nothing left to ask"):
        next_question(after(rows), pool, criterion, earlier)


def test_among_equals_any_may_be_asked():
    rows = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.1], [0.0, -1.0]])
    found = {next_question(after(rows[:0]), QuestionPool(rows), generator=s) for s in range(40)}
    assert found == {0, 1, 3}


def test_ten_thousand_questions_take_well_under_a_second():
    rows = questions(10_000, 8)
    pool, posterior = QuestionPool(rows), after(rows[:1])
    begin = time.perf_counter()
    next_question(posterior, pool, earlier=[0])
    assert time.perf_counter() - begin < 1


def test_expected_accuracy_is_what_simulated_people_give():
    logits, now, later = torch.tensor([[0.3, -2.0, 0.0], [1.0, 4.0, 9.0], [0.8] * 3]).double()
    noise = torch.randn(2, 200_000, 3, generator=torch.Generator().manual_seed(0)).double()
    mean = logits + (now - later).sqrt() * noise[0]  # once more is known
    chance = torch.sigmoid(mean + later.sqrt() * noise[1])
    expected = torch.where(mean > 0, chance, 1 - chance).mean()
    assert abs(criteria.expected_accuracy(logits, now, later) - expected) < 0.002


def test_looking_ahead_foretells_the_accuracy_of_people_who_are_asked():
    rng, people, K = torch.Generator().manual_seed(0), 1500, 3
    targets, pool = (2 * torch.randn(n, 1 + K, generator=rng).double() for n in (200, 12))
    prior = standard(K)
    foretold = criteria.look_ahead(UserPosterior(prior.mean, prior.cov), targets, pool)
    tastes = torch.cat([torch.ones(people, 1), torch.randn(people, K, generator=rng)], 1).double()
    chances = torch.sigmoid(tastes @ pool.T)
    signs = torch.where(torch.rand(people, 12, generator=rng) < chances, 1.0, -1.0).double()
    answers = (signs[:, :, None] * pool).flatten(0, 1)
    modes = posteriors(answers, Users([12] * people), prior).mode
    guesses = targets[:, 0] + modes @ targets[:, 1:].T > 0
    truth = torch.sigmoid(tastes @ targets.T)
    accuracy = torch.where(guesses, truth, 1 - truth).mean()
    assert foretold[12] > foretold[0] + 0.1
    assert float(accuracy) == pytest.approx(foretold[12], abs=0.01)


def test_the_outlook_says_how_many_more_questions_are_worth_it():
    pool, useful = torch.tensor([[0.0, 3.0]] * 30).double(), {}
    for variance in (1e-6, 1):
        posterior = UserPosterior(standard(1).mean, variance * standard(1).cov)
        accuracy = criteria.look_ahead(posterior, pool, pool)
        useful[variance] = criteria.useful_questions(accuracy, 0.005)
    assert useful[1e-6] == 0 < useful[1] < 20 == len(accuracy) - 1
    assert len(criteria.look_ahead(posterior, pool, pool[:4])) == 5
    assert criteria.useful_questions([0.7, 0.74, 0.75], 0.02) == 1


# ------------------------------------------------------------------------ Chosen shots


def some_fit() -> MixedFit:
    """A mixed logit with tastes along the first features, which need not be the true ones."""
    x = torch.eye(planted.F, 4).double()
    return MixedFit(x[:, 0], 1.5 * x[:, 1:], standard(3), {})


def some_shots(users: int = 5, shots: int = 12) -> Comparisons:
    return planted.task(users=users, shots=shots, held_out=1, rank=3, seed=1).few


def chosen(few: Comparisons, sizes: list[int], fit: Fitted | None = None) -> list[list[int]]:
    """The rows of the shots that are asked for, every user's for each size."""
    g = torch.Generator().manual_seed(0)
    rows = criteria.choose_shots(fit or some_fit(), few, sizes, "d_optimal", g).rows
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


@pytest.mark.parametrize("method", [Lore(ranks=(3,), iterations=50), PReF(3, strengths=(1.0,))])
def test_methods_with_a_vector_for_each_user_can_choose_too(method):
    task = planted.task(users=8, shots=12, held_out=20, rank=2)
    fit = next(f for f in method.fit(task) if f.population() is not None)
    logits = fit.logits(fit.view(task.unseen), fit.population_state.expand(8, -1), task.unseen.user)
    Q, b = fit.questions(fit.view(task.unseen)), fit.population_state.double()
    torch.testing.assert_close(Q[:, 0] + Q[:, 1:] @ b, logits.double(), rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == 3 for row in chosen(task.few, [3], fit))


@pytest.mark.slow
def test_a_run_that_asks_keeps_what_is_drawn_at_random_and_adds_a_label(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "report", lambda folder: "")
    world, found = people.planted(users=12, dialogues=8), {}
    for name, ask in (("plain", ("random",)), ("asks", ("random", "d_optimal"))):
        chosen = people.settings(tmp_path, name=name, select_rank=False)
        people.vary_fewshot(world.tasks(), chosen, (0, 1, 2), 2, ask)
        found[name] = people.records(tmp_path / "planted" / name)
    assert all(found["asks"][key] == record for key, record in found["plain"].items())
    added = {key for key in found["asks"] if key not in found["plain"]}
    assert {label for label, *_ in added} == {"LoRe K=2, shots by d_optimal"}
    assert {shots for _, _, part, shots in added if part == "unseen"} == {0, 1, 2}
    read = results.read_results(tmp_path / "planted" / "asks")
    plain = read.only(label for label, *_ in found["plain"])
    assert read.judged == plain.judged == ["LoRe K=2"]
    assert "ask" not in people.saved(tmp_path / "planted" / "plain")["settings"]


def test_an_unknown_criterion_is_refused_before_anything_is_made(tmp_path):
    chosen = people.settings(tmp_path)
    with pytest.raises(InputError, match="--ask surprise: there are random, d_optimal"):
        people.vary_fewshot(people.planted(users=4).tasks(), chosen, (1,), 1, ("surprise",))
    assert not any(tmp_path.iterdir())
