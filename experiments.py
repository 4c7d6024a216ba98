"""What the experiment scripts share: command line, prepared data, run folders, tables, plots."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

import embeddings
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

LEFT_OUT = "left out: "
EMPTY = "EMPTY STRING"  # what some published tables write in a cell without text
FILES = ("{}.jsonl", "{}.jsonl.gz", "{}.parquet", "{}-*.parquet", "data/{}-*.parquet")
COLUMNS = {
    "user_id": str, "split": str, "seen": bool, "dialog_id": str, "turn": "int64",
    "chosen": "int64", "rejected": "int64", "weight": "float64",
}  # fmt: skip
Rows = Iterator[tuple[str, dict[str, Any]]]


class Unusable(Exception):
    """Why a row or turn gives no comparison; the text becomes a line of the printed counts."""


class Turn(NamedTuple):
    """One turn of a dialogue: what the user said, the response chosen and those rejected."""

    prompt: str
    chosen: str
    rejected: list[str]


def read_rows(source: str, table: str, columns: Iterable[str], **hub: Any) -> Rows:
    """Rows of a raw table, each with its place for messages, such as "train.jsonl row 12".

    Args:
        source: a folder with table.jsonl, .jsonl.gz or .parquet, or the name of a hub dataset.
        table: name of the table.
        columns: what every row must have.
        hub: further arguments of ``datasets.load_dataset``, such as the configuration.

    Raises:
        InputError: nothing to read there, a damaged file, or a row without these columns.
    """
    is_folder = os.path.isdir(source)
    for place, row in _local_rows(source, table) if is_folder else _hub_rows(source, table, hub):
        missing = [name for name in columns if name not in row]
        if missing:
            raise InputError(f"{place} has no column {', '.join(missing)}")
        yield place, row


def _local_rows(source: str, table: str) -> Rows:
    names = [pattern.format(table) for pattern in FILES]
    files = next(filter(None, (sorted(Path(source).glob(name)) for name in names)), None)
    if files is None:
        raise InputError(f"--source {source} has none of {', '.join(names)}")
    for file in files:
        log.info("reading %s", file)
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
        try:
            for number, row in enumerate(rows, start=1):
                yield f"{file} row {number}", row
        except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, pa.ArrowInvalid) as e:
            raise InputError(f"{file} cannot be read: {_first_line(e)}") from e


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{file} row {number} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{file} row {number} is not a JSON object")
            yield row


def _hub_rows(source: str, table: str, hub: dict[str, Any]) -> Rows:
    import datasets  # takes seconds, and local files do without

    try:
        rows = datasets.load_dataset(source, **hub)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--source {source} is no folder here and does not load from the hub "
            f"({_first_line(error)}); give a folder with {table}.jsonl or {table}.parquet"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source} {table} row {number}", row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def text(value: Any, place: str, what: str) -> str:
    """A cell's text, "" where it is empty in one of the usual ways.

    Raises:
        InputError: the cell holds something else than text, or text that is no valid Unicode.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: {what} must be text, not a {type(value).__name__}")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{place}: {what} holds half a surrogate pair; clean the text")
    return "" if value.strip() in ("", EMPTY) else value


def compare(turns: Iterable[Turn], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """One comparison per rejected response, after the history of chosen responses.

    Args:
        turns: of one dialogue, in order; it ends where taking one raises ``Unusable``.
        counts: what is left out is added, by reason.
    """
    history: Conversation = []
    try:
        for number, (prompt, chosen, rejected) in enumerate(turns):
            if not prompt or not chosen:
                what = "chosen response" if prompt else "prompt"
                raise Unusable(f"dialogues from a turn with an empty {what} on")
            history = [*history, {"role": "user", "content": prompt}]
            won = [*history, {"role": "assistant", "content": chosen}]
            for response in rejected:
                if response in ("", chosen):
                    why = "equal to the chosen one" if response else "empty"
                    counts[f"{LEFT_OUT}rejected responses {why}"] += 1
                    continue
                lost = [*history, {"role": "assistant", "content": response}]
                yield {"turn": number, "chosen": won, "rejected": lost, "weight": 1.0}
            history = won
    except Unusable as reason:
        counts[f"{LEFT_OUT}{reason}"] += 1


def tabulate(comparisons: Iterable[dict[str, Any]], counts: Counter[str]) -> pd.DataFrame:
    """Comparisons as a table, one a row; the counts get their number, after what was left out.

    Raises:
        InputError: there are no comparisons.
    """
    table = pd.DataFrame(comparisons)
    left_out = sorted(what for what in counts if what.startswith(LEFT_OUT))
    counts.update({what: counts.pop(what) for what in left_out})  # the order of rows shows nowhere
    counts["comparisons"] = len(table)
    _require_some(table, counts)
    counts["users with comparisons"] = table.user_id.nunique()
    return table


def keep(
    comparisons: pd.DataFrame, rows: pd.Series, counts: Counter[str], users: str
) -> pd.DataFrame:
    """The comparisons of these rows (true or false each); whose they are is counted as ``users``.

    Raises:
        InputError: nothing is left.
    """
    kept = comparisons[rows]
    counts[users] = kept.user_id.nunique()
    _require_some(kept, counts)
    return kept


def _require_some(comparisons: pd.DataFrame, counts: Counter[str]) -> None:
    if comparisons.empty:
        path = "; ".join(f"{n} {what}" for what, n in counts.items())
        raise InputError(f"no comparisons are left: {path}")


def draw(names: Iterable[str], count: int, seed: int) -> set[str]:
    """A random choice of ``count`` names; their order does not matter, nor does Python's hash."""

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed} {name}".encode()).digest()

    return set(sorted(set(names), key=rank)[:count])


def split_dialogues(
    comparisons: pd.DataFrame, seed: int, counts: Counter[str], unseen_prompts: bool = False
) -> pd.DataFrame:
    """Add ``split``: half of each user's dialogues are train, half test, whole dialogues each.

    Args:
        comparisons: user_id, dialog_id and chosen, the conversation.
        seed: of the draw.
        counts: the users with something on both sides are added; the others are left out.
        unseen_prompts: draw half of the first prompts instead, so that none is on both sides.
    """
    if unseen_prompts:
        units = _first_prompts(comparisons.chosen)
        groups = [units]
    else:
        units = comparisons.user_id + "\n" + comparisons.dialog_id
        groups = [group for _, group in units.groupby(comparisons.user_id)]
    train = set().union(*(draw(group, (group.nunique() + 1) // 2, seed) for group in groups))
    split = comparisons.assign(split=np.where(units.isin(train), "train", "test"))
    both = split.groupby("user_id").split.transform("nunique") == 2
    return keep(split, both, counts, "users with dialogues for training and for test")


def split_users(
    comparisons: pd.DataFrame, seed: int, counts: Counter[str], seen_fraction: float
) -> pd.DataFrame:
    """Add ``seen``: true for the comparisons of a drawn share of the users.

    Raises:
        InputError: a share that leaves nobody seen or nobody unseen.
    """
    users = comparisons.user_id.nunique()
    count = round(seen_fraction * users)
    if not 0 < count < users:
        raise InputError(
            f"--seen-fraction {seen_fraction} of {users} users makes {count} of them seen; "
            "there must be seen and unseen ones"
        )
    counts.update({"seen users": count, "unseen users": users - count})
    drawn = draw(comparisons.user_id, count, seed)
    return comparisons.assign(seen=comparisons.user_id.isin(drawn))


def _first_prompts(conversations: pd.Series) -> pd.Series:
    return conversations.map(lambda messages: messages[0]["content"])


class Numbering:
    """Distinct conversations, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.conversations: list[Conversation] = []
        self._numbers: dict[str, int] = {}

    def __call__(self, messages: Conversation) -> int:
        """The number of a conversation: the next one if it is new."""
        number = self._numbers.setdefault(digest(messages), len(self.conversations))
        if number == len(self.conversations):
            self.conversations.append(messages)
        return number


def digest(value: Any) -> str:
    """SHA-256 of what lists, dicts, texts and numbers make."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def number_conversations(
    comparisons: pd.DataFrame, counts: Counter[str]
) -> tuple[list[Conversation], pd.DataFrame]:
    """The distinct conversations, and the comparisons with their row numbers, in a fixed order.

    Args:
        comparisons: user_id, split, seen, dialog_id, turn, weight, and as conversations chosen
            and rejected; the order of the rows does not matter.
        counts: the sizes of the result are added.
    """
    pair = {f"{name}_digest": comparisons[name].map(digest) for name in ("chosen", "rejected")}
    order = ["user_id", "dialog_id", "turn", *pair, "split"]
    table = comparisons.assign(**pair).sort_values(order, ignore_index=True)
    _count_sets(table, counts)
    number = Numbering()
    rows = [(number(a), number(b)) for a, b in zip(table.chosen, table.rejected, strict=True)]
    table[["chosen", "rejected"]] = np.array(rows)
    counts["distinct conversations"] = len(number.conversations)
    return number.conversations, table[list(COLUMNS)].astype(COLUMNS)


def _count_sets(comparisons: pd.DataFrame, counts: Counter[str]) -> None:
    prompts = _first_prompts(comparisons.chosen)
    train, test = (comparisons.split == side for side in ("train", "test"))
    for side, rows in {"training": train, "test": test}.items():
        counts[f"{side} comparisons"] = int(rows.sum())
        counts[f"{side} dialogues"] = len(
            comparisons.loc[rows, ["user_id", "dialog_id"]].drop_duplicates()
        )
        counts[f"first prompts of {side} dialogues"] = prompts[rows].nunique()
    shared = set(prompts[train]) & set(prompts[test])
    counts["first prompts on both sides"] = len(shared)
    counts["test comparisons after such a prompt"] = int(prompts[test].isin(shared).sum())


def funnel(counts: Counter[str]) -> str:
    """The counts as lines to print."""
    return "\n".join(f"{n:>9,}  {what}" for what, n in counts.items())


def write_prepared(
    folder: Path,
    conversations: Sequence[Conversation],
    table: pd.DataFrame | dict[str, np.ndarray] | None,
    info: dict[str, Any],
) -> None:
    """Write a prepared dataset's tables and, last, prepare.json.

    Args:
        folder: where to; made if missing.
        conversations: the distinct conversations, row i being embedding i.
        table: one row a comparison: user_id, split, seen, dialog_id, turn, chosen, rejected,
            weight; or the scores, where users are simulated at training time: train.scores and
            test.scores [prompts, responses, scorers], train.rows and test.rows the conversations.
        info: what prepare.json says: dataset, settings, counts, users_split ("given" in the
            table, "drawn" or "simulated" at training time) and perhaps a warning, which every
            later output shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prepare.json").unlink(missing_ok=True)  # a half-written folder is not prepared
    messages = pd.DataFrame({"messages": list(conversations)})
    _replace(folder / "conversations.parquet", lambda path: messages.to_parquet(path, index=False))
    hashes = {"conversations_sha256": embeddings.digest(conversations)}
    if isinstance(table, pd.DataFrame):
        _replace(folder / "comparisons.parquet", lambda path: table.to_parquet(path, index=False))
        hashes["data_sha256"] = digest([hashes["conversations_sha256"], table.to_csv(index=False)])
    elif table is not None:
        _replace(folder / "scores.safetensors", lambda path: save_file(table, path))
        parts = [[name, table[name].tolist()] for name in sorted(table)]
        hashes["data_sha256"] = digest([hashes["conversations_sha256"], parts])
    write_text(folder / "prepare.json", json.dumps({**info, **hashes}, indent=2))


def read_info(folder: Path) -> dict[str, Any]:
    """What prepare.json says of a prepared dataset; a warning in it is logged.

    Raises:
        InputError: the folder is not prepared.
    """
    try:
        info = json.loads((folder / "prepare.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is not a prepared dataset; run prepare.py first") from error
    if info.get("warning"):
        log.warning("WARNING: %s", info["warning"])
    return info


def read_conversations(folder: Path) -> list[Conversation]:
    """The conversations of a prepared dataset, row i being embedding i."""
    return pq.read_table(folder / "conversations.parquet")["messages"].to_pylist()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a killed run leaves the old one."""
    _replace(path, lambda draft: draft.write_text(text))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(draft)
    os.replace(draft, path)


# ------------------------------------------------------------- Loading features
