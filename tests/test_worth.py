"""How many random questions chosen ones are worth: read off curves, with users resampled."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lore.experiments.report.intervals import reached, worth
from lore.experiments.results import Record, Results


def test_a_level_is_reached_on_a_straight_line_between_two_numbers():
    assert reached([0, 10, 20], [0.5, 0.6, 0.7], 0.65) == pytest.approx(15)
    assert reached([0, 10, 20], [0.5, 0.6, 0.7], 0.4) == 0
    assert reached([0, 10, 20], [0.5, 0.6, 0.7], 0.71) == math.inf
    assert reached([0, 10, 20], [0.5, 0.7, 0.6], 0.65) == pytest.approx(7.5)


def results(gain: float, users: int = 40) -> Results:
    """Accuracy grows by .01 a random shot; that of a chosen one is ``gain`` times as much."""
    rng, names = np.random.default_rng(0), tuple(f"u{u}" for u in range(users))
    base, found = 0.5 + 0.1 * rng.random(users), []
    for label, slope in (("A", 0.01), ("A, asks information", 0.01 * gain)):
        for shots in (0, 10, 20):
            accuracy = base + slope * shots
            values = {"accuracy": accuracy, "log_loss": 1 - accuracy}
            found.append(Record(0, "a", label, "", "unseen", shots, names, values, None, None))
    settings = {"script": "vary_fewshot", "dataset": "made"}
    return Results(settings, [], found, {"A": "a", "A, asks information": "a"})


@pytest.mark.parametrize("measure", ["accuracy", "log_loss"])
@pytest.mark.parametrize(("gain", "expected"), [(1.5, 15.0), (0.5, 5.0), (1.0, 10.0)])
def test_ten_chosen_ones_are_worth_what_reaches_their_level(measure, gain, expected):
    found = worth(results(gain), "A, asks information", measure, 10)
    assert found == pytest.approx((expected,) * 3)  # users differ by a constant, so no spread


def test_more_than_was_drawn_at_random_is_infinite():
    assert worth(results(3.0), "A, asks information", "accuracy", 10).shots == math.inf
