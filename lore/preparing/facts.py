"""What a table of comparisons tells before anything is learned: kinds, and choices made twice."""

from typing import Any

import pandas as pd

from lore.common.kinds import KINDS, Judged, kinds

SAYS = {
    "known": "known (the user judged both responses in training)",
    "met": "met (both were judged in training, not both by this user)",
    "new": "new (a response that training lacks)",
}
LEAST_USERS = 5  # of an interval
Found = dict[str, Any]


def count_kinds(table: pd.DataFrame) -> Found:
    """How many held-out comparisons are known, met and new, of seen and of unseen users (of whom
    training has their own shots and what seen users judged); ``by_user`` are the means over users
    of the kinds' shares. The table has user_id, split, seen, and numbers of chosen and rejected.
    """
    users = pd.factorize(table.user_id)[0]
    train, test, seen = table.split == "train", table.split == "test", table.seen

    def judged(rows: pd.Series) -> Judged:
        return Judged(users[rows], table.chosen[rows].to_numpy(), table.rejected[rows].to_numpy())

    found, shares = {}, {}
    for name, whose in (("seen", seen), ("unseen", ~seen)):
        if (test & whose).any():
            kind = kinds(judged(test & whose), judged(train & whose), judged(train & seen))
            is_kind = pd.DataFrame({what: kind == i for i, what in enumerate(KINDS)})
            by_user = is_kind.groupby(users[test & whose]).mean().mean().round(4).to_dict()
            found[name] = {**is_kind.sum().to_dict(), "by_user": by_user}
            shares[name] = is_kind.mean()
    said = {what: " and ".join(f"{share[what]:.1%} of {name} users'"
                               for name, share in shares.items()) for what in SAYS}  # fmt: skip
    parts = "; ".join(f"{said[what]} are {meaning}" for what, meaning in SAYS.items())
    return {**found, "sentence": f"Of the held-out comparisons, {parts}."}


def retest(table: pd.DataFrame, chosen: str = "chosen", rejected: str = "rejected") -> Found:
    """How often users who judged a pair again chose as before (same), and others as they did.

    The table has user_id, split, and numbers or names of conversations in the columns ``chosen``
    and ``rejected``. judged_again are the pairs that a user judged twice or more, both_sides those
    of them in training and held out. same is the mean share of such judgments that agree, two by
    two, with Wilson's 95 % interval (None of fewer than five users); others is the mean share of
    other users' judgments of these pairs that agree with the user's.
    """
    swap = table[chosen] > table[rejected]
    low, high = table[chosen].mask(swap, table[rejected]), table[rejected].mask(swap, table[chosen])
    units = table.assign(low=low, high=high, won=~swap).groupby(["user_id", "low", "high"])
    units = units.agg(n=("won", "size"), wins=("won", "sum"), sides=("split", "nunique"))
    others = units.groupby(["low", "high"])[["n", "wins"]].transform("sum") - units[["n", "wins"]]
    again = units[units.n > 1].join(others.add_prefix("rest_"))
    n, wins, sides, rest, rest_wins = (again[name] for name in again)
    found = {"judged_again": len(n), "both_sides": int((sides > 1).sum())}
    if again.empty:
        return {**found, "sentence": "No user judged a pair twice."}
    same = float(((wins * (wins - 1) + (n - wins) * (n - wins - 1)) / (n * (n - 1))).mean())
    agree = ((wins * rest_wins + (n - wins) * (rest - rest_wins)) / (n * rest))[rest > 0]
    several = again.index.get_level_values("user_id").nunique() >= LEAST_USERS
    found |= {"same": round(same, 4), "interval": wilson(same, len(n)) if several else None}
    found["others"] = round(float(agree.mean()), 4) if len(agree) else None
    sentence = f"Users judged {len(n):,} pairs again and chose as before in {same:.1%}"
    if several:
        sentence += " (95 % interval {:.1%} to {:.1%})".format(*found["interval"])
    alike = f"others agree with them on these in {found['others']:.1%}" if len(agree) else ""
    sentence += f"; {alike or 'nobody else judged these'}"
    if found["both_sides"]:
        sentence += f"; {found['both_sides']:,} of them stand on both sides of the split"
    return {**found, "sentence": f"{sentence}."}


def wilson(share: float, count: int) -> list[float]:
    """Wilson's 95 % interval of a share of ``count``."""
    z = 1.959964
    middle, width = share + z * z / (2 * count), share * (1 - share) / count
    half = z * (width + z * z / (4 * count * count)) ** 0.5
    return [round((middle + sign * half) / (1 + z * z / count), 4) for sign in (-1, 1)]
