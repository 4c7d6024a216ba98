"""Calibration, confidence and label sensitivity, against what they are by definition."""

import numpy as np
import pytest
import torch

from lore.experiments import metrics
from lore.learning.comparisons import Users


def choices(n: int = 30_000, stretch: float = 1.0, users: int = 10) -> tuple[Users, torch.Tensor]:
    """Choices made with the probabilities that the log odds say, which are then stretched."""
    rng = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(n, generator=rng).double()
    right = torch.rand(n, generator=rng) < z.abs().sigmoid()
    return Users([n // users] * users), stretch * torch.where(right, z.abs(), -z.abs())


def test_calibration_error_is_the_mean_gap_of_bins_of_equal_mass() -> None:
    data, z = choices(n=1500)
    order = np.argsort(np.abs(z.numpy()), kind="stable").reshape(15, -1)
    confidence, right = 1 / (1 + np.exp(-np.abs(z.numpy()))), z.numpy() > 0
    gaps = [abs(confidence[rows].mean() - right[rows].mean()) for rows in order]
    assert metrics.calibration_error(z, data.weight) == pytest.approx(np.mean(gaps))


def test_a_weight_of_two_counts_as_two_comparisons() -> None:
    data, z = choices(n=600)
    twice, ones = z.repeat_interleave(2), torch.ones(1200).double()
    for figure in (metrics.calibration_error, metrics.most_confident, metrics.temperature):
        assert figure(z, 2 * data.weight) == pytest.approx(figure(twice, ones), abs=0.02)


def test_the_temperature_undoes_a_stretch_and_is_learned_from_other_users() -> None:
    data, z = choices(stretch=3.0)
    assert metrics.temperature(z, data.weight) == pytest.approx(3, rel=0.03)
    assert metrics.calibration_error(metrics.tempered(data, z), data.weight) < 0.01
    other = torch.where(data.user % 2 == 0, z / 3, z)  # only the odd users are overconfident
    scaled = metrics.tempered(data, other)
    even = data.user % 2 == 0
    assert float((scaled / other)[even].mean()) == pytest.approx(1 / 3, rel=0.05)
    assert float((scaled / other)[~even].mean()) == pytest.approx(1, rel=0.05)


def test_the_most_confident_are_the_quarter_of_largest_log_odds() -> None:
    data, z = choices()
    top = z[z.abs().argsort(descending=True)[: len(z) // 4]]
    assert metrics.most_confident(z, data.weight) == pytest.approx(float((top > 0).double().mean()))


def test_brier_score_and_label_sensitivity_by_user() -> None:
    data = Users([2, 2], torch.tensor([1.0, 3, 1, 1]))
    z = torch.tensor([0.0, 1, -1, 2])
    p = z.double().sigmoid()
    expected = [float((1 - p[0]) ** 2 + 3 * (1 - p[1]) ** 2) / 4, float(((1 - p[2:]) ** 2).mean())]
    assert metrics.brier(data, z).tolist() == pytest.approx(expected)
    assert metrics.label_sensitivity(data, z, torch.tensor([1.0, -1, -1, 2])).tolist() == [1, 0]
    assert metrics.label_sensitivity(data, z, z).tolist() == [0, 0]
