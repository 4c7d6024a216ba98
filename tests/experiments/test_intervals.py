"""How many random shots do what chosen ones do: read off curves, with users resampled."""

import math

import numpy as np
import pytest

from lore.experiments.report.intervals import equivalent_random_shots, shots_to_reach
from lore.experiments.results import Record, Results


@pytest.mark.parametrize(("curve", "level", "shots"), [
    ([0.5, 0.6, 0.7], 0.65, 15), ([0.5, 0.6, 0.7], 0.4, 0), ([0.5, 0.6, 0.7], 0.71, math.inf),
    ([0.5, 0.7, 0.6], 0.65, 7.5),
])  # fmt: skip
def test_a_level_is_reached_on_a_straight_line_between_two_numbers(curve, level, shots):
    assert shots_to_reach([0, 10, 20], curve, level) == pytest.approx(shots)


def results(gain: float, users: int = 40) -> Results:
    """Accuracy grows by .01 a random shot; that of a chosen one is ``gain`` times as much."""
    rng, names = np.random.default_rng(0), np.array([f"u{u}" for u in range(users)])
    base, found = 0.5 + 0.1 * rng.random(users), []
    for label, slope in (("A", 0.01), ("B", 0.01 * gain)):
        for shots in (0, 10, 20):
            accuracy = base + slope * shots
            values = {"accuracy": accuracy, "log_loss": 1 - accuracy}
            found.append(Record(0, "a", label, "", "unseen", shots, names, values, {}, None, None))
    fits = [{"label": "A"}, {"label": "B", "random_label": "A"}]
    repeat = {"seed": 0, "methods": {"a": {"fits": fits}}}
    settings = {"script": "vary_fewshot", "dataset": "made"}
    return Results(settings, [repeat], found, {"A": "a", "B": "a"})


@pytest.mark.parametrize("measure", ["accuracy", "log_loss"])
@pytest.mark.parametrize(("gain", "expected"), [(1.5, 15.0), (0.5, 5.0), (1.0, 10.0)])
def test_ten_chosen_ones_equal_what_reaches_their_level(measure, gain, expected):
    found = equivalent_random_shots(results(gain), "B", measure, 10)
    assert found == pytest.approx((expected,) * 3)  # users differ by a constant, so no spread


def test_four_users_have_no_interval_and_more_than_was_drawn_at_random_is_infinite():
    middle, *ends = equivalent_random_shots(results(1.5, users=4), "B", "accuracy", 10)
    assert middle == pytest.approx(15) and all(map(math.isnan, ends))
    assert equivalent_random_shots(results(3.0), "B", "accuracy", 10)[0] == math.inf
