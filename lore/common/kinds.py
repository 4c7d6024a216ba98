"""What training knows of each held-out comparison's two responses; no label is looked at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = ("known", "met", "new")
KNOWN, MET, NEW = range(3)

Ints = NDArray[np.integer]


class Judged(NamedTuple):
    """Comparisons by numbers: whose, of which response and which other; the order is no matter.

    Attributes:
        user: of each comparison [n].
        one, other: its two responses [n].
    """

    user: Ints
    one: Ints
    other: Ints


def kinds(held_out: Judged, own: Judged, training: Judged) -> NDArray[np.int8]:
    """The kind of each held-out comparison [n], as its place in ``KINDS``.

    Args:
        held_out: what is to be foretold.
        own: what the same users judged for training; of unseen users, their shots.
        training: what the basis is trained on, the seen users' comparisons; the same as ``own``
            where the users are seen.

    Returns:
        KNOWN where the user judged both responses in training, perhaps not with each other; NEW
        where at least one stands in no comparison of training or of the user's own; MET otherwise.
    """
    sides = (held_out.one, held_out.other)
    everybody = np.concatenate([training.one, training.other])
    most = 1 + max(int(part.max(initial=0)) for part in (everybody, own.one, own.other, *sides))

    def name(user: Ints, response: Ints) -> NDArray[np.int64]:
        return user.astype(np.int64) * most + response

    known = np.concatenate([name(own.user, own.one), name(own.user, own.other)])
    by_user = [np.isin(name(held_out.user, side), known) for side in sides]
    by_any = [
        np.isin(side, everybody) | own_one for side, own_one in zip(sides, by_user, strict=True)
    ]
    kind = np.where(by_user[0] & by_user[1], KNOWN, MET)
    return np.where(by_any[0] & by_any[1], kind, NEW).astype(np.int8)
