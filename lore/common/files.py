"""Files and the user's mistakes: the ground floor, which every other module may stand on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

UMASK = os.umask(0)  # is read only by setting it
os.umask(UMASK)


class InputError(ValueError):
    """A mistake in what the user gave; the message alone says where and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


def write_whole(path: Path, write: Callable[[Path], Any], lasting: bool = False) -> None:
    """Let ``write`` make a file beside the path, then put it in place, whole; or InputError. What
    is ``lasting`` is on the disk first, so that a power cut does not lose it. It makes this file
    alone: safetensors' own writer makes another, which stays where it is killed."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        if lasting:
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        draft.chmod(0o666 & ~UMASK)  # some keep their files from all but their owner
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        raise InputError(f"{path}: cannot be written ({error}); what was there is kept") from error
    finally:
        with suppress(OSError):  # it is gone when all went well
            draft.unlink()


def check_output(
    path: Path, flag: str, is_ours: Callable[[Path], bool], inputs: Iterable[str | Path | None] = ()
) -> None:
    """Before work that takes long, refuse a place where nothing can be written, or where an input
    or a file lies that carries no mark of what is written there."""
    require(not path.is_dir(), f"{flag} {path}: is a folder; name a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    writable = above.is_dir() and os.access(above, os.W_OK)
    require(writable, f"{flag} {path}: nothing can be written in {above}")
    if path.exists():
        read = any(given and os.path.exists(given) and path.samefile(given) for given in inputs)
        require(not read, f"{flag} {path}: is what is to be read; name another place")
        advice = "name another place or move it"
        require(is_ours(path), f"{flag} {path}: is there and not what this writes; {advice}")


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """For ``check_output``: a JSON file is ours if it is an object with these keys."""

    def is_ours(path: Path) -> bool:
        with suppress(InputError, AttributeError):  # no JSON, or no object
            return read_json(path).keys() >= set(keys)
        return False

    return is_ours


def begins(text: str) -> Callable[[Path], bool]:
    """For ``check_output``: a file is ours if it begins with a text."""

    def is_ours(path: Path) -> bool:
        with path.open("rb") as file:  # which may be large
            return file.read(len(text.encode())) == text.encode()

    return is_ours


def write_text(path: Path, text: str, lasting: bool = False) -> None:
    """Write a text file whole or not at all, see ``write_whole``."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"), lasting)


def read_json(path: Path) -> Any:
    """A JSON file's content, None where there is no file; damage is an InputError."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        why = first_line(error)
        raise InputError(f"{path}: not readable as JSON ({why}); remove it") from error
    require(found is not None, f"{path}: holds nothing; remove it")
    return found


@contextmanager
def lock_folder(folder: Path, share: str | None = None) -> Iterator[None]:
    """Keep a folder or file, there or not, to this process, or raise InputError; a lock lies beside
    it meanwhile. Where n processes share the work (i/n, or torchrun's), each has its own lock.
    """
    path = Path(os.path.abspath(folder))
    process = os.environ.get("RANK", "0").removeprefix("0")
    parts = filter(None, (path.name, *(share or "").split("/"), process, "lock"))
    path = path.with_name(".".join(parts))
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        holder = path.read_text(encoding="utf-8") if path.is_file() else ""
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise InputError(f"{folder}: {who} works on it; wait for its end") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        path.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: whoever waits then makes another one
        lock.release()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of what lists, dicts, texts and numbers make, as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
