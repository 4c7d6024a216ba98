"""lore/common/kinds.py and lore/preparing/facts.py: what training knows of held-out comparisons."""

import numpy as np
import pandas as pd
import pytest

from lore.common.kinds import KINDS
from lore.preparing import facts


def ratings() -> pd.DataFrame:
    """Four users' choices among seven responses; c and d are unseen.

    a trains on 0-1 and 1-2, b on 3-4, c's shot is 0-5, d's shot is 3-4; 6 is in no training.
    """
    rows = [
        *(("a", "train", 0, 1), ("a", "train", 1, 2), ("b", "train", 3, 4)),
        *(("c", "train", 0, 5), ("d", "train", 3, 4)),
        ("a", "test", 0, 2),  # known
        ("a", "test", 2, 3),  # met: 3 is b's
        ("a", "test", 0, 5),  # new: 5 is in an unseen user's shots alone
        ("b", "test", 4, 3),  # known
        ("c", "test", 5, 0),  # known
        ("c", "test", 5, 1),  # met: 5 is c's own, 1 is a's
        ("d", "test", 5, 3),  # new: 5 is another unseen user's
        ("d", "test", 6, 3),  # new
    ]
    table = pd.DataFrame(rows, columns=["user_id", "split", "chosen", "rejected"])
    return table.assign(seen=table.user_id.isin(["a", "b"]))


def test_counts_are_those_made_by_hand_and_neither_labels_nor_the_order_of_rows_matter():
    found = facts.count_kinds(ratings())
    assert [found["seen"][name] for name in KINDS] == [2, 1, 1]
    assert [found["unseen"][name] for name in KINDS] == [1, 1, 2]
    assert found["seen"]["by_user"] == {"known": 0.6667, "met": 0.1667, "new": 0.1667}
    assert found["unseen"]["by_user"] == {"known": 0.25, "met": 0.25, "new": 0.5}
    assert "50.0% of seen users' and 25.0% of unseen users' are known" in found["sentence"]
    assert "25.0% of seen users' and 50.0% of unseen users' are new" in found["sentence"]
    for seed in range(3):
        other = ratings().sample(frac=1, random_state=seed)
        turned = np.arange(len(other)) % 2 == 0
        other.loc[turned, ["chosen", "rejected"]] = other[turned][["rejected", "chosen"]].to_numpy()
        assert facts.count_kinds(other) == found


def twice(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["user_id", "chosen", "rejected"]).assign(split="train")


def test_how_often_users_choose_as_before_is_that_made_by_hand():
    table = twice([
        *(("a", 0, 1), ("a", 0, 1), ("b", 0, 1), ("c", 1, 0)),  # a as before; b agrees, c does not
        *(("a", 2, 3), ("a", 3, 2)),  # a otherwise; nobody else
        *(("b", 2, 4), ("b", 2, 4), ("b", 4, 2), ("c", 4, 2)),  # 1 of 3; c agrees with 1 of 3
        ("c", 5, 6),
    ])  # fmt: skip
    found = facts.retest(table)
    assert (found["judged_again"], found["both_sides"]) == (3, 0)
    assert found["same"] == round((1 + 0 + 1 / 3) / 3, 4)
    assert found["others"] == round((1 / 2 + 1 / 3) / 2, 4)
    assert found["interval"] is None  # of two users who judged again
    assert "judged 3 pairs again and chose as before in 44.4%; others" in found["sentence"]
    split = table.assign(split=["train", "test", *["train"] * 9])
    assert facts.retest(split)["both_sides"] == 1
    assert "; 1 of them stand on both sides" in facts.retest(split)["sentence"]
    found = facts.retest(twice([("a", 0, 1), ("b", 1, 0)]))
    assert found == {"judged_again": 0, "both_sides": 0, "sentence": "No user judged a pair twice."}


def test_how_often_five_users_choose_as_before_has_its_interval():
    table = twice([(user, *pair) for user in "abcde" for pair in ((0, 1), (1, 0), (2, 3), (2, 3))])
    found = facts.retest(table)
    assert (found["judged_again"], found["same"]) == (10, 0.5)
    assert found["interval"] == facts.wilson(0.5, 10)
    assert "in 50.0% (95 % interval 23.7% to 76.3%); others agree" in found["sentence"]
    # Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20
    for hits, count, ends in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)),
                              (0, 20, (0.0, 0.1611))):  # fmt: skip
        assert facts.wilson(hits / count, count) == pytest.approx(ends, abs=1e-4)
