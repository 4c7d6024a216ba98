"""Methods for personal rewards: each is one file here and one line of ``METHODS``."""

from lore.learning.method import Method
from lore.methods import lore, mixed_logit, mlp, mrm, pal, pebs, pref, rbd, ridge_bt, vpl

METHODS: dict[str, type[Method]] = {
    "ridge_bt": ridge_bt.RidgeBT,
    "lore": lore.Lore,
    "mixed_logit": mixed_logit.MixedLogit,
    "pal": pal.PAL,
    "vpl": vpl.VPL,
    "pref": pref.PReF,
    "mrm": mrm.MRM,
    "rbd": rbd.RBD,
    "pebs": pebs.PEBS,
    "mlp": mlp.MLP,
}
