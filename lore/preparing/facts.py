"""What a table of comparisons tells before anything is learned: kinds, and choices made twice."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lore.common.kinds import KINDS, Judged, kinds

SAYS = {
    "known": "known (the user judged both responses in training)",
    "met": "met (both were judged in training, not both by this user)",
    "new": "new (a response that training lacks)",
}


def count_kinds(table: pd.DataFrame) -> dict[str, Any]:
    """How many held-out comparisons are known, met and new, of seen and of unseen users.

    Args:
        table: user_id, split, seen, and chosen and rejected as numbers of conversations. What an
            unseen user has in training are that user's own shots and what seen users judged.

    Returns:
        seen and unseen, where there are such users: the number of each kind, and ``by_user``, the
        mean over users of its share of their comparisons; sentence.
    """
    users = pd.factorize(table.user_id)[0]
    train, test, seen = table.split == "train", table.split == "test", table.seen

    def judged(rows: pd.Series) -> Judged:
        return Judged(users[rows], table.chosen[rows].to_numpy(), table.rejected[rows].to_numpy())

    found: dict[str, Any] = {}
    for name, whose in (("seen", seen), ("unseen", ~seen)):
        if (test & whose).any():
            kind = kinds(judged(test & whose), judged(train & whose), judged(train & seen))
            is_kind = pd.DataFrame({what: kind == i for i, what in enumerate(KINDS)})
            shares = is_kind.groupby(users[test & whose]).mean().mean()
            found[name] = {what: int(is_kind[what].sum()) for what in KINDS}
            found[name]["by_user"] = {what: round(float(shares[what]), 4) for what in KINDS}
    return {**found, "sentence": _sentence(found)}


def _sentence(found: dict[str, Any]) -> str:
    parts = []
    for what, meaning in SAYS.items():
        shares = [
            f"{counts[what] / sum(counts[kind] for kind in KINDS):.1%} of {name} users'"
            for name, counts in found.items()
        ]
        parts.append(f"{' and '.join(shares)} are {meaning}")
    return f"Of the held-out comparisons, {'; '.join(parts)}."
