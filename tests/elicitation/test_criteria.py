"""criteria.py: what answers say of a user, the question to ask next, and what more would add."""

import math
import time

import pytest
import torch
from torch import Tensor

from lore.common.files import InputError
from lore.elicitation import criteria
from lore.elicitation.criteria import CRITERIA, QuestionPool, UserPosterior, next_question
from lore.learning.comparisons import Users
from lore.methods.fitting.posterior import Prior, posteriors
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


def test_d_optimal_shrinks_the_laplace_posteriors_volume_most():
    rows = questions(30, 3, seed=4)
    posterior = after(torch.stack([rows[0], -rows[5]]))
    p = torch.sigmoid(rows[:, 0] + rows[:, 1:] @ posterior.mean)
    added = (p * (1 - p))[:, None, None] * rows[:, 1:, None] * rows[:, None, 1:]
    volumes = torch.logdet(torch.linalg.inv(posterior.covariance) + added)
    volumes[[0, 5]] = -math.inf
    chosen = next_question(posterior, QuestionPool(rows), "d_optimal", [0, 5])
    assert chosen == int(volumes.argmax())


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


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ten_thousand_questions_take_well_under_a_second(criterion):
    rows = questions(10_000, 8)
    pool, posterior = QuestionPool(rows), after(rows[:1])
    begin = time.perf_counter()
    next_question(posterior, pool, criterion, [0], 0)
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
