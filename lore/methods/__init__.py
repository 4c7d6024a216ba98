"""Methods for personal rewards: each is one file here and one line of ``METHODS``."""

from lore.learning.method import Method
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedLogit
from lore.methods.mlp import MLP
from lore.methods.mrm import MRM
from lore.methods.pal import PAL
from lore.methods.pebs import PEBS
from lore.methods.pref import PReF
from lore.methods.rbd import RBD
from lore.methods.ridge_bt import RidgeBT
from lore.methods.vpl import VPL

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
