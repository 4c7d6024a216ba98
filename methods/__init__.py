"""Methods for personal rewards: each is one file here and one line of ``METHODS``."""

from __future__ import annotations

from methods.base import Method
from methods.lore import Lore

METHODS: dict[str, type[Method]] = {
    "lore": Lore,
}
