"""A typed ``main`` as a command: flags from its arguments, help from its docstring."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from files import InputError
from flags import Flags

ROOT = Path(__file__).resolve().parent


def cli(main: Callable[..., Any], short: str | None = None) -> None:
    """Run a script's typed ``main`` with settings from flags or ``--config file.yaml``.

    Flags are the arguments of ``main``, see ``flags.Flags``; their help is its docstring. A user's
    mistake (``InputError``, a missing file, a full disk) ends in one line, status 2.

    Args:
        main: what to run.
        short: a group of flags, such as lore, that may be given without its name: ``--ranks``
            for ``--lore.ranks``, unless there is a flag of that name.
    """
    _log_to_stderr()
    try:
        main(**Flags(main, short).read(sys.argv[1:]))
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def _log_to_stderr() -> None:
    """This project's messages, and the warnings of libraries."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_shown)


def is_shown(record: logging.LogRecord) -> bool:
    """Whether a message is a warning or comes from the project, not from an environment in it."""
    path = Path(record.pathname).resolve()
    is_ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts
    return is_ours or record.levelno >= logging.WARNING
