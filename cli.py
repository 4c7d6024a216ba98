"""A typed ``main`` as a command: flags from its arguments, help from its docstring."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from files import InputError

ALIASES = {"run": "name"}  # torchrun takes --run for an option of its own
ROOT = Path(__file__).resolve().parent


def cli(main: Callable[..., Any], short: str | None = None) -> None:
    """Run a script's typed ``main`` with settings from flags or ``--config file.yaml``.

    Flags are the arguments of ``main`` (and of the functions its ``**kwargs`` go to), their help
    is its docstring. Hyphens and underscores are the same; a list is given as ``--ranks 0 1 5``.
    A user's mistake (``InputError``, a missing file, a full disk) ends in one line, status 2.

    Args:
        main: what to run.
        short: a group of flags, such as lore, that may be given without its name: ``--ranks``
            for ``--lore.ranks``, unless there is a flag of that name.
    """
    _log_to_stderr()
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_function_arguments(main, as_positional=False)
    settings = parser.parse_args(_arguments(sys.argv[1:], parser.get_defaults(), short))
    settings.pop("config", None)
    try:
        main(**parser.instantiate(settings).as_dict())
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


def _arguments(
    argv: Sequence[str], defaults: jsonargparse.Namespace, short: str | None
) -> list[str]:
    """Spell flags with underscores, gather the values of lists, and let a bare switch be true."""
    grouped: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            name, *value = word[2:].split("=", 1)
            grouped.append(["--" + _full_name(name.replace("-", "_"), defaults, short), *value])
        elif grouped:
            grouped[-1].append(word)
        else:
            grouped.append([word])
    arguments = []
    for name, *values in grouped:
        default = defaults.get(name[2:])
        if isinstance(default, bool) and not values:
            values = ["true"]
        several = isinstance(default, Collection) and not isinstance(default, str | dict)
        if values and several and not values[0].startswith("["):
            values = [json.dumps(values)]  # as texts: they are read as what the flag's type says
        arguments += [f"{name}={values[0]}", *values[1:]] if values else [name]
    return arguments


def _full_name(name: str, defaults: jsonargparse.Namespace, short: str | None) -> str:
    """The flag's name, with its group where that was left out."""
    name = ALIASES.get(name, name)
    first = name.split(".")[0]
    grouped = short and first not in defaults and f"{short}.{first}" in defaults
    return f"{short}.{name}" if grouped else name
