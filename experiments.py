"""What the experiment scripts share: command line, prepared data, run folders, tables, plots."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import pandas as pd

from utils import InputError

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent
Conversation = list[dict[str, str]]


# ---------------------------------------------------------------- Command line


def cli(main: Callable[..., Any]) -> None:
    """Run a script's typed ``main`` with settings from flags or ``--config file.yaml``.

    Flags are the arguments of ``main`` (and of the functions its ``**kwargs`` go to), their help
    is its docstring. Hyphens and underscores are the same; a list is given as ``--ranks 0 1 5``.
    A user's mistake (``InputError``, a missing file, a full disk) ends in one line, status 2.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_function_arguments(main, as_positional=False)
    settings = parser.parse_args(_arguments(sys.argv[1:], parser.get_defaults()))
    settings.pop("config", None)
    try:
        main(**parser.instantiate_classes(settings).as_dict())
    except (InputError, OSError) as error:
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


def _arguments(argv: Sequence[str], defaults: jsonargparse.Namespace) -> list[str]:
    """Spell flags with underscores and gather the values of list flags: [0, 1, 5]."""
    grouped: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            name, *value = word.split("=", 1)
            grouped.append(["--" + name[2:].replace("-", "_"), *value])
        elif grouped:
            grouped[-1].append(word)
        else:
            grouped.append([word])
    arguments = []
    for name, *values in grouped:
        is_list = isinstance(defaults.get(name[2:]), list) or len(values) > 1
        if values and is_list and not values[0].startswith("["):
            values = ["[" + ",".join(values) + "]"]
        arguments += [f"{name}={values[0]}"] if values else [name]
    return arguments


# -------------------------------------------------------------- Preparing data


def write_prepared(
    folder: Path,
    conversations: Sequence[Conversation],
    comparisons: pd.DataFrame | None,
    info: dict[str, Any],
) -> None:
    """Write the tables of a prepared dataset: conversations, comparisons and prepare.json.

    Args:
        folder: where to; made if missing.
        conversations: the distinct conversations, row i being embedding i.
        comparisons: one row a comparison: user_id, split, seen, dialog_id, turn, chosen, rejected,
            weight; None where the users are simulated at training time.
        info: what prepare.json says: dataset, settings, counts and perhaps a warning.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"messages": list(conversations)})
    table.to_parquet(folder / "conversations.parquet", index=False)
    if comparisons is not None:
        comparisons.to_parquet(folder / "comparisons.parquet", index=False)
    digest = hashlib.sha256(json.dumps(list(conversations)).encode()).hexdigest()
    text = json.dumps({**info, "conversations_sha256": digest}, indent=2)
    write_text(folder / "prepare.json", text)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a killed run leaves the old one."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(text)
    os.replace(draft, path)


# ------------------------------------------------------------- Loading features
