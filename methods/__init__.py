"""Methods for personal rewards: each is one file here and one line of ``METHODS``."""

from __future__ import annotations

from methods.base import Method
from methods.lore import Lore
from methods.mixed_logit import MixedLogit
from methods.mlp import MLP
from methods.mrm import MRM
from methods.pal import PAL
from methods.pebs import PEBS
from methods.pref import PReF
from methods.rbd import RBD
from methods.ridge_bt import RidgeBT
from methods.vpl import VPL

METHODS: dict[str, type[Method]] = {
    "ridge_bt": RidgeBT,
    "lore": Lore,
    "mixed_logit": MixedLogit,
    "pal": PAL,
    "vpl": VPL,
    "pref": PReF,
    "mrm": MRM,
    "rbd": RBD,
    "pebs": PEBS,
    "mlp": MLP,
}
