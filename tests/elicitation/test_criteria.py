"""criteria.py: what answers say of a user, and the question to ask next."""

import math
import time

import pytest
import torch
from torch import Tensor

from lore.common.files import InputError
from lore.elicitation import criteria
from lore.elicitation.criteria import CRITERIA, QuestionPool, UserPosterior, next_question
from lore.methods.fitting.posterior import Prior
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
    assert len(criteria.distinct(rows)[earlier[:5]].unique()) == 5
    with pytest.raises(InputError, match="nothing left to ask"):
        next_question(after(rows), pool, criterion, earlier)


def test_among_equals_any_may_be_asked():
    rows = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.1], [0.0, -1.0]])
    found = {next_question(after(rows[:0]), QuestionPool(rows), generator=s) for s in range(40)}
    assert found == {0, 1, 3}


def test_an_empty_pool_and_an_unknown_criterion_are_refused():
    with pytest.raises(InputError, match="nothing to ask"):
        QuestionPool(torch.zeros(0, 2))
    with pytest.raises(InputError, match="NaN or infinity"):
        QuestionPool(torch.tensor([[0.0, math.nan]]))
    rows = torch.zeros(3, 2)
    with pytest.raises(InputError, match="criterion surprise: there are random, d_optimal"):
        next_question(after(rows[:0]), QuestionPool(rows), "surprise")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ten_thousand_questions_take_well_under_a_second(criterion):
    rows = questions(10_000, 8)
    pool, posterior = QuestionPool(rows), after(rows[:1])
    begin = time.perf_counter()
    next_question(posterior, pool, criterion, [0], 0)
    assert time.perf_counter() - begin < 1
