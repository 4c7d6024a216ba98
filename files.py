"""Files and the user's mistakes: the ground floor, which every other module may stand on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class InputError(ValueError):
    """A mistake in what the user gave; the message alone says where and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside the path, then put it in place: whole or not at all.

    Raises:
        InputError: it cannot be written, for want of room or of permission.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        os.replace(draft, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError
        draft.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({error}); what was there is kept") from error
    except KeyboardInterrupt:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, lambda draft: draft.write_text(text))


def read_json(path: Path) -> Any:
    """A JSON file's content, None where there is no file; damage is an InputError."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); remove it") from error


def digest(value: Any) -> str:
    """SHA-256 of what lists, dicts, texts and numbers make, as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
