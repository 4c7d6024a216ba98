"""The file of a run that says what users' rewards are, whichever method wrote it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lore.learning.basis import Basis, load_basis
from lore.methods import mixed_logit

Learned = Basis | mixed_logit.Saved


def load_learned(path: str | Path) -> Learned:
    """Read a basis file or a mixed logit's; InputError where it is missing, damaged or no such."""
    try:
        with safe_open(path, "pt") as file:
            mixed = (file.metadata() or {}).get("format") == mixed_logit.FORMAT
    except (OSError, SafetensorError):
        mixed = False  # the reader of basis files says what is wrong
    return mixed_logit.load(Path(path)) if mixed else load_basis(path)
