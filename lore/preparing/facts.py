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

LEAST_USERS = 5  # of an interval


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
    shares = {}
    for name, whose in (("seen", seen), ("unseen", ~seen)):
        if (test & whose).any():
            kind = kinds(judged(test & whose), judged(train & whose), judged(train & seen))
            is_kind = pd.DataFrame({what: kind == i for i, what in enumerate(KINDS)})
            by_user = is_kind.groupby(users[test & whose]).mean().mean().round(4).to_dict()
            found[name] = {**is_kind.sum().to_dict(), "by_user": by_user}
            shares[name] = is_kind.mean()
    parts = [
        " and ".join(f"{share[what]:.1%} of {name} users'" for name, share in shares.items())
        + f" are {meaning}"
        for what, meaning in SAYS.items()
    ]
    return {**found, "sentence": f"Of the held-out comparisons, {'; '.join(parts)}."}


def retest(
    table: pd.DataFrame, chosen: str = "chosen", rejected: str = "rejected"
) -> dict[str, Any]:
    """How often users who judged a pair again chose as before, and others as they did.

    Args:
        table: user_id, split, and numbers or names of the conversations; a pair may stand in either
            order.
        chosen, rejected: the columns of these.

    Returns:
        judged_again: pairs of a user with two judgments or more; both_sides: those that training
        and the held-out comparisons share; where there are any, same: the mean over them of the
        share of their pairs of judgments that agree, with its interval (Wilson's, 95 %; None of
        fewer than five users); others: the mean share of other users' judgments of the same pairs
        that agree with the user's; sentence.
    """
    swap = table[chosen] > table[rejected]
    low, high = table[chosen].mask(swap, table[rejected]), table[rejected].mask(swap, table[chosen])
    judged = table.assign(low=low, high=high, low_wins=~swap)
    units = judged.groupby(["user_id", "low", "high"]).agg(
        n=("low_wins", "size"), low_wins=("low_wins", "sum"), sides=("split", "nunique")
    )
    everybody = units.groupby(["low", "high"])[["n", "low_wins"]].transform("sum")
    again = units.n > 1
    n, wins = units.n[again], units.low_wins[again]
    found: dict[str, Any] = {
        "judged_again": len(n), "both_sides": int((units.sides[again] > 1).sum())
    }  # fmt: skip
    if not len(n):
        return {**found, "sentence": "No user judged a pair twice."}
    same = float(((wins * (wins - 1) + (n - wins) * (n - wins - 1)) / (n * (n - 1))).mean())
    rest, rest_wins = everybody.n[again] - n, everybody.low_wins[again] - wins
    agree = ((wins * rest_wins + (n - wins) * (rest - rest_wins)) / (n * rest))[rest > 0]
    several = n.index.get_level_values("user_id").nunique() >= LEAST_USERS
    found |= {"same": round(same, 4), "interval": wilson(same, len(n)) if several else None}
    found["others"] = round(float(agree.mean()), 4) if len(agree) else None
    sentence = f"Users judged {len(n):,} pairs again and chose as before in {same:.1%}"
    if several:
        sentence += " (95 % interval {:.1%} to {:.1%})".format(*found["interval"])
    others = f"others agree with them on these in {found['others']:.1%}" if len(agree) else ""
    sentence += f"; {others or 'nobody else judged these'}"
    if found["both_sides"]:
        sentence += f"; {found['both_sides']:,} of them stand on both sides of the split"
    return {**found, "sentence": f"{sentence}."}


def wilson(share: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share of ``count``."""
    z = 1.959964
    middle, width = share + z * z / (2 * count), share * (1 - share) / count
    half = z * (width + z * z / (4 * count * count)) ** 0.5
    return [round((middle + sign * half) / (1 + z * z / count), 4) for sign in (-1, 1)]
