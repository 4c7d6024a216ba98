"""Kinds of held-out comparisons as shares, from row numbers alone; no label is looked at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lore.common.kinds import KINDS, Judged, kinds
from lore.learning.comparisons import Comparisons, RowFeatures

Shares = dict[str, float]  # of ``KINDS``; they add up to 1


def judged(data: Comparisons, names: dict[str, int] | None = None) -> Judged:
    """Whose the comparisons are and which two rows each is about; the order of the two is lost.

    Args:
        data: comparisons of rows of a table.
        names: number of each user's name; a user's own number if None.
    """
    x = data.features
    assert isinstance(x, RowFeatures)
    ends = np.stack([x.index[side.cpu()].numpy() for side in (x.chosen, x.rejected)])
    user = data.user.cpu().numpy()
    if names is not None:
        user = np.array([names[name] for name in data.names])[user]
    return Judged(user, ends.min(0), ends.max(0))


def shares(held_out: Judged, own: Judged, training: Judged) -> Shares:
    """Mean over users of the share of each kind among their held-out comparisons."""
    return by_user(held_out.user, kinds(held_out, own, training))


def by_user(user: NDArray[np.integer], kind: NDArray[np.int8]) -> Shares:
    """Mean over users of the share of each kind."""
    _, row, counts = np.unique(user, return_inverse=True, return_counts=True)
    weight = 1 / counts[row] / len(counts)
    return {name: float(weight[kind == place].sum()) for place, name in enumerate(KINDS)}


def shares_of_test(
    train: Comparisons,
    few: Comparisons | None,
    seen: Comparisons,
    unseen: Comparisons | None,
) -> dict[str, Shares] | None:
    """Kinds of the test: ``seen``, and ``unseen`` where users are new. None without row numbers.

    Args:
        train, seen: training and held-out comparisons of the seen users.
        few, unseen: shots and held-out comparisons of the new users.
    """
    sets = [data for data in (train, few, seen, unseen) if data is not None]
    if not all(isinstance(data.features, RowFeatures) and data.names for data in sets):
        return None
    names = {name: row for row, name in enumerate({n: 0 for data in sets for n in data.names})}
    training = judged(train, names)
    found = {"seen": shares(judged(seen, names), training, training)}
    if few is not None and unseen is not None:
        found["unseen"] = shares(judged(unseen, names), judged(few, names), training)
    return found
