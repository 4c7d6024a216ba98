"""RewardBench 2: the official formulae on hand-computed rows, and the script end to end."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils import InputError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared real data is not here")


def load_script():
    spec = importlib.util.spec_from_file_location("eval_rb2", ROOT / "PRISM" / "eval_rb2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rb2 = load_script()


# ------------------------------------------------------- Subsets other than Ties


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 1, 2, 0], 1.0),
        ([1, 3, 2, 0], 0.0),
        ([3, 3, 2, 0], 1 / 2),
        ([3, 3, 3, 0], 1 / 3),
        ([3, 3, 3, 3], 1 / 4),
        ([2, 3, 3, 3], 0.0),
        ([-1, -2, -2, -2], 1.0),
    ],
)
def test_a_row_shares_its_point_among_the_completions_at_the_maximum(scores, expected):
    assert rb2.row_result(scores) == expected
    assert rb2.score([("a", "Math", 1, scores)]) == {"Math": expected, "Overall": expected}


def test_subset_is_a_mean_over_rows_and_overall_an_unweighted_mean_over_subsets():
    rows = [
        ("1", "Math", 1, [1, 0, 0, 0]),
        ("2", "Math", 1, [0, 1, 0, 0]),
        ("3", "Math", 1, [1, 1, 0, 0]),
        ("4", "Math", 1, [0, 1, 0, 0]),
        ("5", "Focus", 1, [2, 1, 1, 1]),
    ]
    result = rb2.score(rows)
    assert result == {"Math": 0.375, "Focus": 1.0, "Overall": 0.6875}
    assert list(rb2.score(rows[::-1])) == ["Math", "Focus", "Overall"]


# ------------------------------------------------------------------------- Ties


def ties(*rows) -> float:
    """Ties score of (id, correct scores, incorrect scores)."""
    return rb2.score([(i, "Ties", len(c), [*c, *w]) for i, c, w in rows])["Ties"]


def test_both_rows_perfect():
    # tied: gap 3, spread 1; ref: gap 5. All four shares are 1 and g = tanh(3/1 - 1).
    got = ties(("tied:1", [6, 5], [2, 0]), ("ref:1", [5], [0, -1]))
    assert got == pytest.approx(1 + 0.01 * math.tanh(2))


def test_gap_below_the_spread_costs_both_preference_terms():
    # tied: gap 1, spread 4; ref: gap 9; g = tanh(1/4 - 1).
    got = ties(("tied:1", [9, 5], [4]), ("ref:1", [9], [0]))
    assert got == pytest.approx(0.6 + 0.01 * math.tanh(-0.75))


def test_small_ref_gap_costs_only_the_hard_term():
    # tied: gap 5, spread 2; ref: gap 1; p = 1, h = 0, g = tanh(1/2 - 1).
    got = ties(("tied:1", [9, 7], [2]), ("ref:1", [1], [0]))
    assert got == pytest.approx(0.8 + 0.01 * math.tanh(-0.5))


def test_wrong_ref_row_costs_its_accuracy_and_the_hard_term():
    # tied: gap 5, spread 2; ref: gap -1; g = tanh(-1/2 - 1).
    got = ties(("tied:1", [9, 7], [2]), ("ref:1", [0], [1]))
    assert got == pytest.approx(0.3 + 0.2 + 0.01 * math.tanh(-1.5))


def test_gap_equal_to_zero_is_not_accurate_and_equal_to_the_spread_not_preferred():
    # tied: gap 2 = spread; ref: gap 0.
    got = ties(("tied:1", [6, 4], [2]), ("ref:1", [1], [1]))
    assert got == pytest.approx(0.3 + 0.01 * math.tanh(-1))


@pytest.mark.parametrize(
    ("tied_wrong", "shares", "graded"), [(0, 1.0, 1.0), (5, 0.3, 0.0), (6, 0.3, -1.0)]
)
def test_zero_spread(tied_wrong, shares, graded):
    # Correct scores all 5: x/0 is tanh(+-inf) = +-1, and 0/0 counts as 0. The ref gap is 9.
    got = ties(("tied:1", [5, 5], [tied_wrong]), ("ref:1", [9], [0]))
    assert got == pytest.approx(shares + 0.01 * graded)


def test_rows_without_a_partner_count_for_accuracy_only():
    # a_t = 1/2 (tied:1 right, tied:2 wrong), a_r = 1/2; only k = 1 is paired: gaps 3 and 5,
    # spread 1.
    got = ties(
        ("tied:1", [6, 5], [2]),
        ("tied:2", [1, 0], [9]),
        ("ref:1", [5], [0]),
        ("ref:3", [0], [5]),
    )
    assert got == pytest.approx(0.15 + 0.15 + 0.4 + 0.01 * math.tanh(2))


def test_one_kind_of_row_alone():
    assert ties(("tied:1", [6, 5], [2])) == pytest.approx(0.3)
    assert ties(("ref:1", [6], [2])) == pytest.approx(0.3)


def test_terms_are_means_over_pairs():
    # k = 1 perfect (gap 3, spread 1), k = 2: gap 1, spread 4, ref gap 9.
    got = ties(
        ("tied:1", [6, 5], [2]),
        ("ref:1", [5], [0]),
        ("ref:2", [9], [0]),
        ("tied:2", [9, 5], [4]),
    )
    graded = (math.tanh(2) + math.tanh(-0.75)) / 2
    assert got == pytest.approx(0.6 + 0.1 + 0.1 + 0.01 * graded)


# ------------------------------------------------------------------- Properties

whole = st.integers(-50, 50)


@st.composite
def benchmarks(draw) -> list[tuple]:
    """Rows of two plain subsets and Ties rows, some without a partner; whole-number scores."""
    rows = [
        (str(i), draw(st.sampled_from(["Math", "Focus"])), 1, scores)
        for i, scores in enumerate(draw(st.lists(st.lists(whole, min_size=4, max_size=4))))
    ]
    for k in range(draw(st.integers(1, 4))):
        for kind in draw(st.sampled_from([("ref",), ("tied",), ("ref", "tied")])):
            correct = 1 if kind == "ref" else draw(st.integers(1, 4))
            size = correct + draw(st.integers(1, 4))
            scores = draw(st.lists(whole, min_size=size, max_size=size))
            rows.append((f"{kind}:{k}", "Ties", correct, scores))
    return rows


@settings(deadline=None)
@given(benchmarks(), st.integers(-1000, 1000), st.integers(1, 1000))
def test_shift_and_positive_scale_do_not_matter(rows, shift, scale):
    # Whole numbers keep the arithmetic exact, so the scores must agree to the last digit.
    moved = [(i, s, n, [scale * x + shift for x in scores]) for i, s, n, scores in rows]
    assert rb2.score(moved) == rb2.score(rows)


@settings(deadline=None)
@given(benchmarks(), st.randoms())
def test_order_of_rows_and_of_completions_of_a_kind_does_not_matter(rows, random):
    def shuffled(values):
        return random.sample(values, len(values))

    mixed = [(i, s, n, shuffled(x[:n]) + shuffled(x[n:])) for i, s, n, x in shuffled(rows)]
    assert rb2.score(mixed) == pytest.approx(rb2.score(rows))


@settings(deadline=None)
@given(benchmarks())
def test_scores_stay_within_their_bounds(rows):
    result = rb2.score(rows)
    assert -0.01 <= result["Ties"] <= 1.01
    assert all(0 <= result[name] <= 1 for name in result if name in ("Math", "Focus"))


# -------------------------------------------------------------------- Bad scores


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (("7", "Math", 1, [1.0, float("nan"), 0, 0]), "'7'.*finite"),
        (("7", "Math", 1, [1.0, float("inf"), 0, 0]), "'7'.*finite"),
        (("7", "Math", 0, [1.0, 0]), "num_correct is 0"),
        (("7", "Math", 2, [1.0, 0]), "num_correct is 2"),
        (("7", "Ties", 1, [1.0, 0]), "'7'.*ref:k"),
        (("tied:", "Ties", 1, [1.0, 0]), "'tied:'.*ref:k"),
    ],
)
def test_bad_rows_are_named(row, says):
    with pytest.raises(InputError, match=says):
        rb2.score([row])


def test_no_rows_and_double_rows():
    with pytest.raises(InputError, match="no rows"):
        rb2.score([])
    with pytest.raises(InputError, match="'ref:1'.*twice"):
        ties(("ref:1", [1], [0]), ("ref:1", [1], [0]))


# ----------------------------------------------------------- Genuine rows and figures


@needs_data
def test_genuine_ties_rows():
    lines = (DATA / "rewardbench2_ties_slice.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def scored(of_chosen, of_rejected):
        return [
            (r["id"], r["subset"], r["num_correct"],
             [*map(of_chosen, r["chosen"]), *map(of_rejected, r["rejected"])])
            for r in rows
        ]

    assert rb2.score(scored(lambda _: 2.0, lambda _: 1.0))["Ties"] == pytest.approx(1.01)
    assert rb2.score(scored(lambda _: 1.0, lambda _: 2.0))["Ties"] == pytest.approx(-0.01)
    # Shortest first: the tied gaps are -12, -18, -13, -16 and the spreads 10, 10, 4, 8 characters.
    graded = [math.tanh(gap / spread - 1) for gap, spread in
              [(-12, 10), (-18, 10), (-13, 4), (-16, 8)]]
    short = scored(lambda text: -len(text), lambda text: -len(text))
    assert rb2.score(short)["Ties"] == pytest.approx(0.01 * sum(graded) / 4)
    # With 20 characters of credit for a correct one all rows are right, and one gap of four
    # (tied:49, 7 against a spread of 4) is preferred; the ref gaps are 18, 11, 11, 7.
    graded = [math.tanh(gap / spread - 1) for gap, spread in [(8, 10), (2, 10), (7, 4), (4, 8)]]
    helped = scored(lambda text: 20 - len(text), lambda text: -len(text))
    expected = 0.3 + 0.3 + 0.2 / 4 + 0.2 / 4 + 0.01 * sum(graded) / 4
    assert rb2.score(helped)["Ties"] == pytest.approx(expected)


@needs_data
def test_published_overall_scores_are_the_unweighted_mean_of_six_subsets():
    table = pd.read_csv(DATA / "rewardbench2_official_scores.csv")
    means = table[list(rb2.OFFICIAL)].mean(axis=1)
    # Subset scores and their mean are each rounded to four digits.
    assert len(table) == 197
    assert np.abs(means - table["Score"]).max() <= 1e-4
    base = table.set_index("model").loc["Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"]
    assert base["Score"] == 0.7175
