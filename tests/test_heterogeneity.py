"""The score test of users' tastes: its size, its power, and what it says."""

from __future__ import annotations

import pytest
import torch

from lore.learning.comparisons import Comparisons, DenseFeatures
from lore.methods.fitting.score_test import score_test
from test_mixed_logit import world


def rejections(taste: float, worlds: int, permutations: int = 99, **more: int) -> float:
    """Share of worlds in which the test finds something at 5 %."""
    found = [
        score_test(world(taste=taste, seed=s, **more)[0], permutations=permutations).p <= 0.05
        for s in range(worlds)
    ]
    return sum(found) / worlds


def test_small_tastes_are_found() -> None:
    """The tastes are a third of the shared reward, which one sees in the accuracy."""
    assert rejections(0.3, 20, users=60) >= 0.9


@pytest.mark.slow
def test_alike_users_are_seldom_found_to_differ() -> None:
    assert rejections(0.0, 60) <= 0.15


@pytest.mark.slow
def test_the_size_is_5_percent() -> None:
    found = rejections(0.0, 1000, permutations=19, users=20, pairs=15)  # p is 1/20, 2/20, ...
    assert 0.035 <= found <= 0.065


def test_a_repeated_response_is_no_taste() -> None:
    """Ten copies of a comparison in one dialogue agree with each other, not with the user."""
    ps = []
    for seed in range(20):
        data, _ = world(users=20, pairs=10, taste=0.0, seed=seed)
        rows = torch.arange(len(data)).repeat_interleave(10)
        copies = Comparisons(
            DenseFeatures(data.features.x[rows]), [100] * 20, dialogs=rows.clone()
        )
        ps.append(score_test(copies, permutations=99).p)
    assert sum(p <= 0.05 for p in ps) <= 4


def test_within_prompts_a_users_own_prompts_are_no_taste() -> None:
    """Where each user answers one prompt, only comparisons of that prompt may be exchanged."""
    data, _ = world(users=10, pairs=20, taste=1.5)
    group = data.user.clone()
    assert score_test(data, group=group, permutations=99).p == 1.0
    assert score_test(data, permutations=99).p <= 0.05


def test_the_variance_is_that_of_the_tastes() -> None:
    data, _ = world(users=300, pairs=30, taste=0.1, rank=6)
    found = score_test(data, permutations=99)
    scale = float(data.features.x.square().sum(1).mean()) ** 0.5
    shared = torch.Generator().manual_seed(99)
    torch.randn(6, generator=shared, dtype=torch.float64)
    B = 0.1 * torch.randn(6, 6, generator=shared, dtype=torch.float64)
    true = float(B.square().sum()) / 6 * scale**2
    assert found.variance == pytest.approx(true, rel=0.3)
    assert "weigh as much" in found.sentence
    assert "No sign" in score_test(world(taste=0.0)[0]).sentence
