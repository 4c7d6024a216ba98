"""The file of a run that says what users' rewards are, whichever method wrote it."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lore.common.files import require
from lore.learning.basis import Basis, load_basis
from lore.methods import mixed_logit

Learned = Basis | mixed_logit.Saved


def load_learned(path: str | Path) -> Learned:
    """Read a basis file or a mixed logit's; InputError if it is missing, damaged or no such file,
    or was learned with further features."""
    try:
        with safe_open(path, "pt") as file:
            mixed = (file.metadata() or {}).get("format") == mixed_logit.FORMAT
    except (OSError, SafetensorError):
        mixed = False  # the reader of basis files says what is wrong
    found = mixed_logit.load(Path(path)) if mixed else load_basis(path)
    extra = found.settings.get("extra") or []
    what = f"{path} was learned with features that texts do not have ({', '.join(map(str, extra))})"
    require(not extra, f"{what}: prepare without --extra and train without --features")
    return found
