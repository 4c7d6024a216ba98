"""What training knows of each held-out comparison's two responses; no label is looked at."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = ("known", "met", "new")
KNOWN, MET, NEW = range(3)

Ints = NDArray[np.integer]


class Judged(NamedTuple):
    """Comparisons by numbers [n]: whose, of which response and which other, in either order."""

    user: Ints
    one: Ints
    other: Ints


def kinds(held_out: Judged, own: Judged, training: Judged) -> NDArray[np.int8]:
    """The kind of each held-out comparison [n], as its place in ``KINDS``.

    KNOWN where the user judged both responses among their ``own`` (the shots of unseen users),
    perhaps not with each other; NEW where one of them stands neither there nor in ``training``, the
    seen users' comparisons that train the basis; MET otherwise.
    """

    def judged(some: Judged) -> NDArray[np.int64]:
        """A number for the user with each of the two responses [2, n], whose own are below 2^32."""
        return some.user.astype(np.int64) * 2**32 + np.stack(some[1:])

    by_user = np.isin(judged(held_out), judged(own))
    by_any = by_user | np.isin(np.stack(held_out[1:]), np.stack(training[1:]))
    kind = np.where(by_user.all(axis=0), KNOWN, MET)
    return np.where(by_any.all(axis=0), kind, NEW).astype(np.int8)
