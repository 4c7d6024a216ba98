"""Kinds of held-out comparisons as shares, from row numbers alone; no label is looked at."""

import numpy as np

from lore.common.kinds import KINDS, Judged, kinds
from lore.learning.comparisons import Comparisons, RowFeatures

Shares = dict[str, float]  # of ``KINDS``; they add up to 1


def judged(data: Comparisons, names: dict[str, int] | None = None) -> Judged:
    """Whose the comparisons are, numbered by ``names`` if given, and which two rows each is about;
    the order of the two is lost."""
    x = data.features
    assert isinstance(x, RowFeatures)
    ends = np.stack([x.index[side.cpu()].numpy() for side in (x.chosen, x.rejected)])
    user = data.user.cpu().numpy()
    if names is not None:
        user = np.array([names[name] for name in data.names])[user]
    return Judged(user, ends.min(0), ends.max(0))


def shares(held_out: Judged, own: Judged, training: Judged) -> Shares:
    """Mean over users of the share of each kind among their held-out comparisons."""
    kind = kinds(held_out, own, training)
    _, row, counts = np.unique(held_out.user, return_inverse=True, return_counts=True)
    weight = 1 / counts[row] / len(counts)
    return {name: float(weight[kind == number].sum()) for number, name in enumerate(KINDS)}


def shares_of_test(*sets: Comparisons | None) -> dict[str, Shares] | None:
    """Kinds of the held-out comparisons of ``seen`` and, if any, ``unseen`` users, from a task's
    sets: train, few, seen and unseen. None without row numbers."""
    return {name: shares(*parts) for name, parts in judged_sets(*sets).items()} or None


def judged_sets(
    train: Comparisons, few: Comparisons | None, seen: Comparisons, unseen: Comparisons | None
) -> dict[str, tuple[Judged, Judged, Judged]]:
    """What is held out, the same users' own and the training comparisons, as ``kinds`` takes them,
    by set as ``shares_of_test``; empty without row numbers."""
    sets = [data for data in (train, few, seen, unseen) if data is not None]
    if not all(isinstance(data.features, RowFeatures) and data.names for data in sets):
        return {}
    names = {name: row for row, name in enumerate({n: 0 for data in sets for n in data.names})}
    training = judged(train, names)
    found = {"seen": (judged(seen, names), training, training)}
    if few is not None and unseen is not None:
        found["unseen"] = (judged(unseen, names), judged(few, names), training)
    return found
