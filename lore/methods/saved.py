"""The file of a run that tells users' rewards, whichever method wrote it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lore.learning.basis import Basis, load_basis
from lore.methods import mixed_logit


def load_learned(path: str | Path) -> Basis | mixed_logit.Saved:
    """Read a basis file or a mixed logit's.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            mixed = (file.metadata() or {}).get("format") == mixed_logit.FORMAT
    except (OSError, SafetensorError):
        mixed = False  # the reader of basis files says what is wrong
    return mixed_logit.load(Path(path)) if mixed else load_basis(path)
