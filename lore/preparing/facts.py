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


def count_kinds(table: pd.DataFrame) -> dict[str, Any]:
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
    parts = []
    for what, meaning in SAYS.items():
        said = [f"{share[what]:.1%} of {name} users'" for name, share in shares.items()]
        parts.append(f"{' and '.join(said)} are {meaning}")
    return {**found, "sentence": f"Of the held-out comparisons, {'; '.join(parts)}."}


def retest(
    table: pd.DataFrame, chosen: str = "chosen", rejected: str = "rejected"
) -> dict[str, Any]:
    """How often users who judged a pair again chose as before (same), and others as they did.

    The table has user_id, split, and numbers or names of conversations in the columns ``chosen``
    and ``rejected``. judged_again are the pairs that a user judged twice or more, both_sides those
    of them in training and held out. same is the mean share of such judgments that agree, two by
    two, with Wilson's 95 % interval (None of fewer than five users); others is the mean share of
    other users' judgments of these pairs that agree with the user's.
    """
    swap = table[chosen] > table[rejected]
    low, high = table[chosen].mask(swap, table[rejected]), table[rejected].mask(swap, table[chosen])
    units = table.assign(low=low, high=high, low_wins=~swap).groupby(["user_id", "low", "high"])
    units = units.agg(
        n=("low_wins", "size"), low_wins=("low_wins", "sum"), sides=("split", "nunique")
    )
    everybody = units.groupby(["low", "high"])[["n", "low_wins"]].transform("sum")
    again = units.n > 1
    n, wins = units.n[again], units.low_wins[again]
    found = {"judged_again": len(n), "both_sides": int((units.sides[again] > 1).sum())}
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
