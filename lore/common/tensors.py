"""Tensors in safetensors files: read whole or refused, and of the form that is expected."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lore.common.files import InputError, first_line, require

# What damaged headers raise: safetensors checks sizes, but not every type and shape.
DAMAGE = (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and memory-mapped tensors of a file; InputError with the remedy if it is damaged."""
    require(path.is_file(), f"{path} is missing: {remedy}")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except DAMAGE as error:
        raise InputError(f"{path} is damaged ({first_line(error)}): {remedy}") from error


def expect(
    path: Path, tensors: dict[str, Tensor], remedy: str,
    name: str, dtype: torch.dtype, *shape: int | None,
) -> Tensor:  # fmt: skip
    """The tensor of this name, type and shape (None: any size) among a file's, or InputError."""
    require(name in tensors, f"{path}: lacks {name}; {remedy}")
    tensor = tensors[name]
    sizes = zip(tensor.shape, shape, strict=False)
    fits = tensor.dim() == len(shape) and all(want in (None, size) for size, want in sizes)
    found, wanted = (
        f"{str(kind)[6:]} [{', '.join('any' if size is None else str(size) for size in sizes)}]"
        for kind, sizes in ((tensor.dtype, tensor.shape), (dtype, shape))
    )  # without "torch."
    require(fits and tensor.dtype == dtype, f"{path}: {name} is {found}, not {wanted}; {remedy}")
    return tensor


def require_finite(path: Path, tensors: dict[str, Tensor], remedy: str) -> None:
    """Raise InputError if one of a file's tensors holds NaN or infinity."""
    for name, tensor in tensors.items():
        finite = bool(tensor.isfinite().all())
        require(finite, f"{path}: {name} holds NaN or infinity; {remedy}")


def checksum(state: Any) -> str:
    """SHA-256 of tensors, numbers and texts in dicts and lists."""
    total = hashlib.sha256()
    if isinstance(state, Tensor):
        total.update(f"{state.dtype} {list(state.shape)}".encode())
        total.update(state.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(state, dict):
        for key in sorted(state, key=repr):
            total.update(f"{key!r}: {checksum(state[key])}".encode())
    elif isinstance(state, list | tuple):
        total.update(" ".join(map(checksum, state)).encode())
    else:
        total.update(repr(state).encode())
    return total.hexdigest()
