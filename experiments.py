"""What the experiment scripts share: command line, prepared data, run folders, tables, plots."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonargparse
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

import files
from embeddings import Store, open_store
from reports import basis_file, label_of, read_json, report
from utils import (
    Basis,
    Checkpoint,
    Comparisons,
    DenseFeatures,
    InputError,
    LoRe,
    LoRe_regularized,
    RowFeatures,
    Shots,
    draw_shots,
    fit_bases,
    generate_population,
    learn_multiple,
    personalize,
    save_basis,
    simulate_choices,
    sweep_accuracies,
    sweep_shots,
    write_whole,
)

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
        main(**parser.instantiate(settings).as_dict())
    except (InputError, OSError) as error:
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


def _arguments(argv: Sequence[str], defaults: jsonargparse.Namespace) -> list[str]:
    """Spell flags with underscores, gather the values of lists, and let a bare switch be true."""
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
        default = defaults.get(name[2:])
        if isinstance(default, bool) and not values:
            values = ["true"]
        if values and isinstance(default, list) and not values[0].startswith("["):
            values = [json.dumps(values)]  # as texts: they are read as what the flag's type says
        arguments += [f"{name}={values[0]}", *values[1:]] if values else [name]
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
    counts["dialogues with comparisons"] = table.groupby(["user_id", "dialog_id"]).ngroups
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
    write_whole(
        folder / "conversations.parquet", lambda path: _write_conversations(path, conversations)
    )
    hashes = {"conversations_sha256": files.digest(conversations)}
    if isinstance(table, pd.DataFrame):
        path = folder / "comparisons.parquet"
        write_whole(path, lambda draft: table.to_parquet(draft, index=False))
        hashes["data_sha256"] = digest([hashes["conversations_sha256"], table.to_csv(index=False)])
    elif table is not None:
        write_whole(folder / "scores.safetensors", lambda path: save_file(table, path))
        parts = [[name, table[name].tolist()] for name in sorted(table)]
        hashes["data_sha256"] = digest([hashes["conversations_sha256"], parts])
    write_text(folder / "prepare.json", json.dumps({**info, **hashes}, indent=2))


def _write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """In parts, since a single Arrow column of text ends at 2 GB."""
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("messages", pa.list_(message))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(conversations), 10_000):
            part = list(conversations[start : start + 10_000])
            writer.write_table(pa.table({"messages": part}, schema=schema))


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
    return [row["messages"] for row in _parquet_rows(folder / "conversations.parquet")]


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a killed run leaves the old one."""
    write_whole(path, lambda draft: draft.write_text(text))


# ------------------------------------------------------------- Loading features


@dataclass
class Prepared:
    """A prepared and embedded dataset: its folder, prepare.json and the embeddings on disk."""

    folder: Path
    info: dict[str, Any]
    store: Store

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return str(self.info["dataset"])


def load(folder: Path) -> Prepared:
    """Open a folder that ``prepare.py`` wrote.

    Raises:
        InputError: it is missing or incomplete, or its embeddings belong to other conversations.
    """
    info = read_info(folder)
    if not (folder / "embeddings").exists():
        raise InputError(f"{folder / 'embeddings'}: not there; embed the conversations first")
    store = open_store(folder / "embeddings")
    store.check(read_conversations(folder))
    return Prepared(folder, info, store)


@dataclass
class Pairs:
    """Comparisons of some users as row numbers of the embeddings, users one after the other.

    Attributes:
        users: names [U].
        counts: comparisons of each user [U].
        chosen, rejected: rows [N].
        weight: how much each comparison counts [N]; None for one each.
        dialogs: number of each comparison's dialogue [N]; None where every one stands alone.
    """

    users: list[str]
    counts: list[int]
    chosen: Tensor
    rejected: Tensor
    weight: Tensor | None = None
    dialogs: Tensor | None = None

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Pairs:
        """From rows with user_id, dialog_id, turn, chosen, rejected, weight; users sorted."""
        table = table.sort_values(["user_id", "dialog_id", "turn", "rejected"], kind="stable")
        sizes = table.groupby("user_id", sort=True).size()
        columns = [torch.tensor(table[c].to_numpy()) for c in ("chosen", "rejected", "weight")]
        dialogs = torch.from_numpy(pd.factorize(table["dialog_id"])[0].astype(np.int64))
        return cls(sizes.index.tolist(), sizes.tolist(), *columns, dialogs)

    def select(self, keep: Tensor) -> Pairs:
        """Those comparisons where ``keep`` [N] is true; users left without any are left out."""
        owner = torch.repeat_interleave(torch.tensor(self.counts))[keep]
        left = torch.bincount(owner, minlength=len(self.users)).tolist()
        users = [user for user, count in zip(self.users, left, strict=True) if count]
        columns = [
            None if column is None else column[keep]
            for column in (self.chosen, self.rejected, self.weight, self.dialogs)
        ]
        return Pairs(users, [count for count in left if count], *columns)

    def share(self, process: int, processes: int) -> Pairs:
        """One process's users: a run of them, at least one, with about its share of comparisons.

        Raises:
            InputError: there are fewer users than processes.
        """
        if processes == 1:
            return self
        if processes > len(self.users):
            raise InputError(f"{processes} processes for {len(self.users)} users: start fewer")
        counts = torch.tensor(self.counts)
        middle = counts.cumsum(0) - counts / 2
        owner, last = (middle * processes / counts.sum()).long().tolist(), -1
        for u, wanted in enumerate(owner):  # in order, and enough users left for all who follow
            last = owner[u] = min(max(wanted, processes - len(owner) + u), last + 1)
        return self.select(torch.repeat_interleave(torch.tensor(owner), counts) == process)

    def comparisons(self, store: Store, device: torch.device) -> Comparisons:
        """As the learning core takes them, features streamed from the store."""
        rows = RowFeatures(store.rows, store.num_features, self.chosen, self.rejected, device)
        return Comparisons(rows, self.counts, self.weight)


class FourSets(NamedTuple):
    """Training and held-out comparisons of seen users, few-shot and held-out of new ones."""

    train: Pairs
    seen: Pairs
    few: Pairs
    unseen: Pairs


def read_comparisons(prepared: Prepared) -> pd.DataFrame:
    """The table of comparisons of a prepared dataset.

    Raises:
        InputError: it is missing, lacks a column, or points past the conversations.
    """
    path = prepared.folder / "comparisons.parquet"
    if not path.exists():
        raise InputError(f"{path}: not there; run prepare.py again")
    table = pd.read_parquet(path)
    wanted = ["user_id", "split", "seen", "dialog_id", "turn", "chosen", "rejected", "weight"]
    missing = [column for column in wanted if column not in table]
    if missing:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)}; run prepare.py again")
    last = max(table["chosen"].max(), table["rejected"].max())
    if last >= len(prepared.store):
        raise InputError(f"{path}: row {last} is past the {len(prepared.store)} embeddings")
    return table


def four_sets(table: pd.DataFrame) -> FourSets:
    """The four sets of a table whose ``seen`` and ``split`` say where each comparison belongs.

    Users without comparisons on both sides of the split are left out, and counted in the log.

    Raises:
        InputError: no seen or no unseen user is left.
    """
    sides = table.groupby("user_id")["split"].nunique()
    whole = table[table["user_id"].isin(sides.index[sides == 2])]
    if (sides < 2).any():
        log.info("left out %d users without both training and test data", (sides < 2).sum())
    sets = [
        whole[(whole["seen"] == seen) & (whole["split"] == split)]
        for seen in (True, False)
        for split in ("train", "test")
    ]
    for part, kind in ((sets[0], "seen"), (sets[2], "unseen")):
        if part.empty:
            raise InputError(f"no {kind} users are left; loosen the filters of prepare.py")
    return FourSets(*(Pairs.from_table(part) for part in sets))


def given_split(prepared: Prepared) -> Callable[[int], FourSets]:
    """The four sets that prepare.py drew, the same for every seed."""
    sets = four_sets(read_comparisons(prepared))
    return lambda seed: sets


def drawn_split(
    prepared: Prepared, seen_fraction: float, pairs_per_user: int, few_shot_pairs: int
) -> Callable[[int], FourSets]:
    """Seen and unseen users drawn anew for every seed, with a sample of their training data.

    Args:
        prepared: the dataset; its ``split`` says what is training and what is held out.
        seen_fraction: share of the users who are seen.
        pairs_per_user: random training comparisons of each seen user; all where there are fewer.
        few_shot_pairs: the same of each unseen user.
    """
    table = read_comparisons(prepared)

    def sets(seed: int) -> FourSets:
        drawn = split_users(table, seed, Counter(), seen_fraction)
        rng = np.random.default_rng(seed)
        drawn = drawn.sort_values(["user_id", "dialog_id", "chosen", "rejected"], kind="stable")
        drawn["order"] = rng.random(len(drawn))
        place = drawn.groupby(["user_id", "split"])["order"].rank(method="first")
        most = np.where(drawn["seen"], pairs_per_user, few_shot_pairs)
        return four_sets(drawn[(drawn["split"] == "test") | (place <= most)])

    return sets


def simulated_users(
    prepared: Prepared,
    dirichlet_alpha: float,
    users: int,
    unseen_users: int,
    pairs_per_user: int,
    few_shot_pairs: int,
) -> Callable[[int], FourSets]:
    """Users simulated for every seed: their best response of a prompt against their worst.

    Args:
        prepared: the dataset, with scores.safetensors: scores [P, R, M] by M reward models of R
            responses, and the responses' rows [P, R] among the embeddings, of both splits.
        dirichlet_alpha: the users' weights over the reward models are Dirichlet(alpha * 1).
        users, unseen_users: how many are simulated.
        pairs_per_user, few_shot_pairs: training prompts of each; all test prompts are held out.

    Raises:
        InputError: no score tensors, or fewer training prompts than asked for.
    """
    path = prepared.folder / "scores.safetensors"
    if not path.exists():
        raise InputError(f"{path}: not there; run prepare.py again")
    tensors = load_file(path)
    prompts = len(tensors["train.scores"])
    if max(pairs_per_user, few_shot_pairs) > prompts:
        raise InputError(
            f"{max(pairs_per_user, few_shot_pairs)} training prompts per user are asked for and "
            f"{prompts} are there; lower --pairs-per-user or --few-shot-pairs"
        )

    def sets(seed: int) -> FourSets:
        generator = torch.Generator().manual_seed(seed)
        W = generate_population(dirichlet_alpha, users + unseen_users, generator)
        parts = []
        for name, weights, pairs in (
            ("user", W[:users], pairs_per_user), ("new user", W[users:], few_shot_pairs)
        ):  # fmt: skip
            names = [f"{name} {seed}.{i}" for i in range(len(weights))]
            for split, count in (("train", pairs), ("test", None)):
                parts.append(_simulate(tensors, split, names, weights, count, generator))
        return FourSets(*parts)

    return sets


def _simulate(
    tensors: Mapping[str, Tensor],
    split: str,
    names: list[str],
    W: Tensor,
    count: int | None,
    generator: torch.Generator,
) -> Pairs:
    """Comparisons of simulated users on ``count`` random prompts of a split each, or on all."""
    scores, rows = tensors[f"{split}.scores"], tensors[f"{split}.rows"]
    chosen, rejected = [], []
    for w in W:
        some = torch.arange(len(scores))
        if count is not None:
            some = torch.randperm(len(scores), generator=generator)[:count]
        best, worst = simulate_choices(scores[some], w[None])
        chosen.append(rows[some].gather(1, best.T)[:, 0])
        rejected.append(rows[some].gather(1, worst.T)[:, 0])
    counts = [len(part) for part in chosen]
    return Pairs(names, counts, torch.cat(chosen), torch.cat(rejected))


# --------------------------------------------------------------------- Training

ESTIMATORS = {"lore": LoRe, "lore_regularized": LoRe_regularized}
PERMUTATIONS = 10  # over which other users' weights are averaged
VALIDATION = 0.2  # share of each user's training comparisons (or dialogues) held out for choosing


@dataclass
class Fitting:
    """How bases and weights are fitted, on what, and where the results go.

    Args:
        ranks: Ranks K; 0 is the reference model, 1 Bradley-Terry. Both are always fitted, as
            controls, where there is a reference.
        alpha: Strengths of the pull of the basis to the reference.
        shrinkage: Strengths of the pull of each user's weights to the users' mean, counted in
            comparisons; 0 is plain LoRe.
        estimator: "lore" is the paper's joint objective, "lore_regularized" the published
            scripts' alternating one.
        iterations: Steps of the joint fit; by default the estimator's (1,000 or 20,000).
        learning_rate: Of the joint fit's Adam.
        few_shot_iterations: Steps of the new users' fit.
        few_shot_learning_rate: Of the new users' Adam; by default the estimator's (0.1 or 0.5).
        optimizer: Another optimiser for both fits, such as torch.optim.AdamW with
            --optimizer.lr 0.05; it then brings its own learning rate.
        select_rank: Choose rank, alpha and shrinkage on a fifth of the seen users' training
            comparisons, held out for that; test comparisons never choose anything.
        reference: The reference reward: the model's score head; or "last_linear", the vector the
            published code took for it; or none.
        seeds: One repeat of the experiment for each.
        device: Where to compute: auto, cpu, cuda.
        stream: Read features from disk in every step instead of holding them; by default where
            they take more than half of the free memory.
        results: Folder of all results; the run's own folder is made inside it.
        run: Name of the run's folder; by default made from the settings.
        checkpoint_every: Steps between two saved states of the training; 0 for none.
        progress: Show progress bars.
    """

    ranks: list[int]
    alpha: list[float] = field(default_factory=lambda: [0.0])
    shrinkage: list[float] = field(default_factory=lambda: [0.0])
    estimator: Literal["lore", "lore_regularized"] = "lore"
    iterations: int | None = None
    learning_rate: float = 0.5
    few_shot_iterations: int = 500
    few_shot_learning_rate: float | None = None
    optimizer: Callable[[Iterable], Optimizer] | None = None
    select_rank: bool = False
    reference: Literal["head", "last_linear", "none"] = "head"
    seeds: list[int] = field(default_factory=lambda: [0])
    device: str = "auto"
    stream: bool | None = None
    results: Path = ROOT / "results"
    run: str | None = None
    checkpoint_every: int = 200
    progress: bool = True

    def grid(self, has_reference: bool) -> list[int]:
        """Ranks to fit: those asked for and the controls."""
        return sorted({*self.ranks, 1, *([0] if has_reference else [])})

    def joint(self) -> dict[str, Any]:
        """Settings of the joint fit."""
        chosen = {} if self.iterations is None else {"num_iterations": self.iterations}
        return {
            **chosen, "learning_rate": self.learning_rate, "optimizer": self.optimizer,
            "progress": self.progress and processes()[0] == 0,
        }  # fmt: skip

    def few_shot(self) -> dict[str, Any]:
        """Settings of the new users' fit."""
        rate = self.few_shot_learning_rate
        if rate is None:
            rate = 0.1 if self.estimator == "lore" else 0.5
        return {
            "num_iterations": self.few_shot_iterations, "learning_rate": rate,
            "optimizer": self.optimizer,
        }  # fmt: skip


def processes() -> tuple[int, int]:
    """This process's rank and how many share the work (torchrun); joins them on first use."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2)
        )
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def pick_device(name: str) -> torch.device:
    """The device a flag names; auto takes a GPU where there is one.

    Raises:
        InputError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here; use cpu") from error
    return torch.device(name)


@dataclass
class Task:
    """One repeat of an experiment: its four sets as the learning core takes them."""

    pairs: FourSets
    train: Comparisons  # this process's share of the seen users
    few: Comparisons
    held_out: dict[str, Comparisons]
    reference: Tensor | None
    seed: int

    def projections(self, bases: Sequence[Basis]) -> dict[str, tuple[Tensor, ...]]:
        """X V of each set for every basis, each set's features being read once."""
        together = torch.cat([basis.V for basis in bases], 1)
        ranks = [basis.V.shape[1] for basis in bases]
        sets = {"train": self.train, "few_shot": self.few, **self.held_out}
        return {k: s.features.project(together).split(ranks, 1) for k, s in sets.items()}


def make_task(
    prepared: Prepared,
    pairs: FourSets,
    fitting: Fitting,
    seed: int,
    share: tuple[int, int] = (0, 1),
) -> Task:
    """Put a repeat's comparisons where they are computed on; training features in memory if so.

    Args:
        prepared, fitting, seed: the repeat.
        pairs: its comparisons.
        share: this process and how many share the seen users.
    """
    device, store = pick_device(fitting.device), prepared.store
    train = pairs.train.share(*share).comparisons(store, device)
    few, seen, unseen = (
        p.comparisons(store, device) for p in (pairs.few, pairs.seen, pairs.unseen)
    )
    if not _streams(fitting, len(train) * store.num_features * 4, device):
        train.features = train.features.dense()
    held_out = {"seen": seen, "unseen": unseen}
    return Task(pairs, train, few, held_out, _reference(prepared, fitting), seed)


def _streams(fitting: Fitting, size: int, device: torch.device) -> bool:
    if fitting.stream is not None:
        return fitting.stream
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return size > free / 2


def _reference(prepared: Prepared, fitting: Fitting) -> Tensor | None:
    store = prepared.store
    reference = {"head": store.head, "last_linear": store.last_linear, "none": None}
    direction = reference[fitting.reference]
    if fitting.reference == "last_linear":
        log.warning("WARNING: the reference is the published code's mistaken one (last_linear)")
    if direction is None and (0 in fitting.ranks or any(fitting.alpha)):
        raise InputError(
            "rank 0 and --alpha need a reference, and there is none: the model has no score head "
            "(or --reference none); give --ranks without 0 and --alpha 0"
        )
    return direction


def fit_grid(
    task: Task, train: Comparisons, users: int, fitting: Fitting, checkpoint: Path | None
) -> list[Basis]:
    """A basis for every alpha, rank and shrinkage of the settings."""
    state = None
    if checkpoint is not None and fitting.checkpoint_every:
        state = Checkpoint(checkpoint, fitting.checkpoint_every)
    return fit_bases(
        ESTIMATORS[fitting.estimator], fitting.grid(task.reference is not None), fitting.alpha,
        task.reference, train, users, shrinkages=fitting.shrinkage, checkpoint=state,
        generator=task.seed, distributed=processes()[1] > 1, **fitting.joint(),
    )  # fmt: skip


def choose(prepared: Prepared, task: Task, fitting: Fitting) -> dict[str, float]:
    """Rank, alpha and shrinkage with the best accuracy on held-out training comparisons."""
    pairs, device = task.pairs.train, task.train.device
    held = _validation(pairs, task.seed)
    fit, validation = pairs.select(~held), pairs.select(held)
    mine = fit.share(*processes())
    data = mine.comparisons(prepared.store, device)
    if not isinstance(task.train.features, RowFeatures):
        data.features = data.features.dense()
    bases = fit_grid(task, data, len(fit.users), fitting, None)
    check = validation.comparisons(prepared.store, device)
    rows = [fit.users.index(user) for user in validation.users]
    together = torch.cat([basis.V for basis in bases], 1)
    parts = check.features.project(together).split([b.V.shape[1] for b in bases], 1)
    scores = [
        float(check.accuracies(Z, basis.W[rows]).mean()) if basis.settings["rank"] else -1.0
        for Z, basis in zip(parts, bases, strict=True)
    ]
    best = bases[int(np.argmax(scores))].settings
    log.info("validation: " + ", ".join(
        f"{label_of(b.settings, vars(fitting))} {score:.4f}"
        for b, score in zip(bases, scores, strict=True) if score >= 0
    ))  # fmt: skip
    return {key: best[key] for key in ("rank", "alpha", "shrinkage")}


def _validation(pairs: Pairs, seed: int) -> Tensor:
    """Which training comparisons are held out [N]: a fifth of each user's dialogues."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(pairs.chosen), dtype=torch.bool)
    for rows in torch.arange(len(held)).split(pairs.counts):
        units = rows if pairs.dialogs is None else pairs.dialogs[rows]
        names = units.unique()
        if len(names) > 1:
            count = max(1, round(VALIDATION * len(names)))
            some = names[torch.randperm(len(names), generator=generator)[:count]]
            held[rows] = torch.isin(units, some)
    if not held.any():
        raise InputError("--select-rank: no user has two dialogues to hold one out for choosing")
    return held


def train_basis(
    prepared: Prepared,
    draw: Callable[[int], FourSets],
    fitting: Fitting,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Fit, personalise and evaluate every basis with its controls; save results, table, plots.

    Finished repeats are kept: the same command goes on where a killed run was.

    Args:
        prepared: the dataset.
        draw: the four sets of a seed.
        fitting: the settings.
        about: the script's own settings, recorded beside them.

    Returns:
        The table, the verdict and where the files lie; empty on all processes but the first.
    """
    run = Run.start("train_basis", prepared, fitting, about)
    for seed in run.missing_seeds():
        task = make_task(prepared, draw(seed), fitting, seed, processes())
        chosen = choose(prepared, task, fitting) if fitting.select_rank else None
        state = run.folder / f"state-seed{seed}"
        bases = fit_grid(task, task.train, len(task.pairs.train.users), fitting, state)
        if processes()[0] == 0:
            records = _evaluate(prepared, task, bases, fitting)
            _save_bases(run, task, bases)
            run.add(seed, task.pairs, records, [describe(b) for b in bases], chosen)
            Checkpoint(state).remove()
        if processes()[1] > 1:
            dist.barrier()
            Checkpoint(state).remove()
    return report(run.folder) if processes()[0] == 0 else ""


def _save_bases(run: Run, task: Task, bases: Sequence[Basis]) -> None:
    fitting = run.settings["fitting"]
    for basis in bases:
        basis.users, basis.users_unseen = task.pairs.train.users, task.pairs.few.users
        basis.settings |= {"seed": task.seed, "dataset": run.settings["dataset"],
                           "model": run.settings["embeddings"]["model"]}  # fmt: skip
        save_basis(run.folder / basis_file(basis.settings, fitting), basis)


def _evaluate(
    prepared: Prepared, task: Task, bases: Sequence[Basis], fitting: Fitting
) -> list[dict[str, Any]]:
    """Records of every basis' accuracies and of its controls, on the same comparisons."""
    whole = task
    if processes()[1] > 1:
        whole = make_task(prepared, task.pairs, fitting, task.seed)
    projections = whole.projections(bases)
    records = []
    for i, basis in enumerate(bases):
        Z = {name: parts[i] for name, parts in projections.items()}
        basis.W_unseen = personalize(
            basis, task.few, task.seed, Z["few_shot"], **fitting.few_shot()
        )
        for method, sets in _controls(whole, basis, Z, fitting).items():
            for name, users in sets.items():
                records.append(record(method, name, basis.settings, users))
    for name, users in _own_models(prepared, whole, fitting).items():
        records.append(record("own model", name, {}, users))
    return records


def _controls(
    task: Task, basis: Basis, Z: Mapping[str, Tensor], fitting: Fitting
) -> dict[str, dict[str, Tensor]]:
    """Accuracies per user: method -> set -> [U], of a basis and what it must beat."""
    seen, unseen, rank = task.held_out["seen"], task.held_out["unseen"], basis.settings["rank"]

    def held_out(W: Tensor, W_unseen: Tensor) -> dict[str, Tensor]:
        pairs = (("seen", seen, W), ("unseen", unseen, W_unseen))
        return {name: data.accuracies(Z[name], w) for name, data, w in pairs}

    own = held_out(basis.W, basis.W_unseen)
    own["train"] = task.train.accuracies(Z["train"], basis.W)
    own["few_shot"] = task.few.accuracies(Z["few_shot"], basis.W_unseen)
    if rank < 2:
        return {("reference", "BT")[rank]: own}
    mean = basis.W.mean(0)
    g = torch.Generator().manual_seed(task.seed)
    others = [
        held_out(basis.W[swap(len(basis.W), g)], basis.W_unseen[swap(len(basis.W_unseen), g)])
        for _ in range(PERMUTATIONS)
    ]
    return {
        "LoRe": own,
        "mean weights": held_out(mean.expand_as(basis.W), mean.expand_as(basis.W_unseen)),
        "others' weights": {
            name: torch.stack([other[name] for other in others]).mean(0) for name in others[0]
        },
        "shuffled shots": {"unseen": _shuffled(task, basis, Z, fitting)},
    }


def swap(users: int, generator: torch.Generator) -> Tensor:
    """A random permutation that gives every user another one's place (where there are two)."""
    order = torch.randperm(users, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


def _shuffled(task: Task, basis: Basis, Z: Mapping[str, Tensor], fitting: Fitting) -> Tensor:
    """Held-out accuracies of new users whose few shots' labels were swapped by a coin."""
    generator, results = torch.Generator().manual_seed(task.seed), []
    for _ in range(3):
        coin = torch.randint(2, (len(task.few), 1), generator=generator) * 2 - 1
        shuffled = Z["few_shot"] * coin.to(Z["few_shot"])
        W = personalize(basis, task.few, generator, shuffled, **fitting.few_shot())
        results.append(task.held_out["unseen"].accuracies(Z["unseen"], W))
    return torch.stack(results).mean(0)


def _own_models(prepared: Prepared, task: Task, fitting: Fitting) -> dict[str, Tensor]:
    """Accuracies of a model of each user alone, fitted with the joint fit's settings."""
    if isinstance(task.train.features, RowFeatures):
        log.info("each user's own model is left out: the features do not fit in memory")
        return {}
    results = {}
    settings = {
        "learning_rate": fitting.learning_rate, "optimizer": fitting.optimizer,
        "progress": fitting.progress, "num_iterations": fitting.few_shot_iterations,
    }  # fmt: skip
    for name, data, test in (
        ("seen", task.train, task.held_out["seen"]),
        ("unseen", task.few, task.held_out["unseen"]),
    ):
        features = data.features
        dense = features if isinstance(features, DenseFeatures) else features.dense()
        counts = data.counts.tolist()
        V = learn_multiple(dense.x.split(counts), weights=data.weight.split(counts), **settings)
        results[name] = own_accuracies(test, torch.cat(V, 1))
    return results


def own_accuracies(data: Comparisons, V: Tensor) -> Tensor:
    """Accuracies [U] of users who have each a direction of their own, the columns of V [F, U]."""
    features, right = data.features, torch.empty(len(data), dtype=torch.bool, device=data.device)
    ends = data.counts.cumsum(0).tolist()
    for first in range(0, data.num_users, 256):
        block = slice(first, first + 256)
        rewards = features.rewards(V[:, block].contiguous())  # [rows, 256]
        rows = slice(ends[first - 1] if first else 0, ends[min(first + 256, len(ends)) - 1])
        column = data.user[rows] - first
        z = rewards[features.chosen[rows], column] - rewards[features.rejected[rows], column]
        right[rows] = z > 0
    return data.share(right)


def describe(basis: Basis) -> dict[str, Any]:
    """What a basis looks like: columns kept, effective rank, cosines, entropy, loss curve.

    The effective rank is exp of the entropy of the squared singular values of V, the entropy of
    the weights is the users' mean, in units of log(columns).
    """
    singular = torch.linalg.svdvals(basis.V.float()).cpu()
    share = singular.square() / singular.square().sum()
    columns, entropy = basis.V.shape[1], torch.special.entr(basis.W.float()).sum(1).mean()
    cosines = None
    if basis.reference is not None:
        direction = basis.reference.to(basis.V)[:, None]
        cosines = torch.nn.functional.cosine_similarity(basis.V, direction, dim=0).tolist()
    step = max(1, len(basis.losses) // 400)
    return {
        **basis.settings, "columns": columns,
        "effective_rank": float(torch.special.entr(share).sum().exp()),
        "cosines": cosines, "singular_values": singular.tolist(),
        "weight_entropy": float(entropy / math.log(columns)) if columns > 1 else 0.0,
        "losses": basis.losses[::step].tolist(), "loss_step": step,
    }  # fmt: skip


def vary_fewshot(
    prepared: Prepared,
    draw: Callable[[int], FourSets],
    fitting: Fitting,
    shots: Sequence[int],
    trials: int,
    unit: Literal["comparisons", "dialogues"] = "comparisons",
    about: Mapping[str, Any] | None = None,
) -> str:
    """Accuracy of new users against their number of shots, with controls; save table and plot.

    Args:
        prepared, draw, fitting, about: as for ``train_basis``.
        shots: numbers of shots.
        trials: random draws per number of shots.
        unit: what a shot is.

    Returns:
        The table, the verdict and where the files lie.
    """
    if processes()[1] > 1:
        raise InputError("vary_fewshot.py runs in one process: start it without torchrun")
    about = {**(about or {}), "shots": list(shots), "trials": trials, "unit": unit}
    run = Run.start("vary_fewshot", prepared, fitting, about)
    for seed in run.missing_seeds():
        task = make_task(prepared, draw(seed), fitting, seed)
        state = run.folder / f"state-seed{seed}"
        bases = fit_grid(task, task.train, len(task.pairs.train.users), fitting, state)
        dialogs = task.pairs.few.dialogs if unit == "dialogues" else None
        draws = draw_shots(task.few, shots, trials, seed, dialogs)
        records = [r for basis in bases for r in _sweep(task, basis, draws, fitting)]
        records += _own_sweep(task, draws, fitting)
        run.add(seed, task.pairs, records, [describe(b) for b in bases], None)
        Checkpoint(state).remove()
    return report(run.folder)


def _sweep(task: Task, basis: Basis, draws: Shots, fitting: Fitting) -> list[dict[str, Any]]:
    """Records of one basis and its controls at every number of shots."""
    unseen, rank, settings = task.held_out["unseen"], basis.settings["rank"], fitting.few_shot()
    W, fitted = sweep_shots(basis, task.few, draws, task.seed, **settings)
    method = ("reference", "BT", "LoRe")[min(rank, 2)]
    results = {
        (method, "few_shot"): fitted,
        (method, "unseen"): sweep_accuracies(basis, unseen, W),
    }
    if rank > 1:
        generator = torch.Generator().manual_seed(task.seed)
        others = W[:, :, swap(task.few.num_users, generator)]
        mean = basis.W.mean(0).expand_as(W[:1, :1]).expand_as(W)
        shuffled, _ = sweep_shots(basis, task.few, draws, generator, flip=True, **settings)
        for name, weights in (
            ("others' weights", others), ("mean weights", mean), ("shuffled shots", shuffled)
        ):  # fmt: skip
            results[name, "unseen"] = sweep_accuracies(basis, unseen, weights)
    return [
        record(name, part, basis.settings, accuracy[:, s].mean(0), size, accuracy[:, s].mean(1))
        for (name, part), accuracy in results.items()
        for s, size in enumerate(draws.sizes)
    ]


def _own_sweep(task: Task, draws: Shots, fitting: Fitting) -> list[dict[str, Any]]:
    """Records of each new user's own model, on the first trial's shots."""
    x, records, users = task.few.features.dense().x, [], task.few.num_users
    for s, size in enumerate(draws.sizes):
        rows = draws.rows[s * users : (s + 1) * users]
        V = learn_multiple(
            [x[row] for row in rows], fitting.few_shot_iterations, fitting.learning_rate,
            weights=[task.few.weight[row] for row in rows], optimizer=fitting.optimizer,
        )  # fmt: skip
        accuracy = own_accuracies(task.held_out["unseen"], torch.cat(V, 1))
        records.append(record("own model", "unseen", {}, accuracy, size, accuracy.mean()[None]))
    return records


def record(
    method: str,
    name: str,
    settings: Mapping[str, Any],
    users: Tensor,
    shots: int | None = None,
    trials: Tensor | None = None,
) -> dict[str, Any]:
    """One line of the results: a method's accuracy on a set, of every user [U]."""
    line = {"method": method, **{k: settings.get(k) for k in ("rank", "alpha", "shrinkage")}}
    line |= {"set": name, "shots": shots, "users": [round(a, 5) for a in users.tolist()]}
    return line if trials is None else {**line, "trials": [round(a, 5) for a in trials.tolist()]}


# ------------------------------------------------------------------ Run folders


@dataclass
class Run:
    """A run's folder: settings before the work starts, results after every repeat."""

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    def start(
        cls, script: str, prepared: Prepared, fitting: Fitting, about: Mapping[str, Any] | None
    ) -> Run:
        """Make the folder and write the settings, or go on with what is there.

        Raises:
            InputError: the folder holds a run with other settings.
        """
        settings = _settings(script, prepared, fitting, about or {})
        identity = json.dumps(settings, sort_keys=True)
        short = hashlib.sha256(identity.encode()).hexdigest()[:8]
        folder = fitting.results / prepared.dataset / (fitting.run or f"{script}-{short}")
        old = read_json(folder / "settings.json")
        if old is not None and json.dumps(old["settings"], sort_keys=True) != identity:
            changed = _differences(old["settings"], settings)
            raise InputError(
                f"{folder}: holds a run with other settings ({changed}); choose another --run"
            )
        results = read_json(folder / "results.json") or {"seeds": []}
        run = cls(folder, settings, results)
        if processes()[0] == 0 and old is None:
            folder.mkdir(parents=True, exist_ok=True)
            text = {"settings": settings, "command": sys.argv, "versions": _versions()}
            write_text(folder / "settings.json", json.dumps(text, indent=2))
        return run

    def missing_seeds(self) -> list[int]:
        """Repeats that are not finished yet."""
        done = [part["seed"] for part in self.results["seeds"]]
        return [seed for seed in self.settings["fitting"]["seeds"] if seed not in done]

    def add(
        self,
        seed: int,
        pairs: FourSets,
        records: list[dict[str, Any]],
        bases: list[dict[str, Any]],
        chosen: dict[str, float] | None,
    ) -> None:
        """Keep a finished repeat: results.json anew, complete with all there is to report."""
        self.results["seeds"].append({
            "seed": seed, "users": {"seen": pairs.train.users, "unseen": pairs.few.users},
            "comparisons": {k: sum(p.counts) for k, p in pairs._asdict().items()},
            "chosen": chosen, "records": records, "bases": bases,
        })  # fmt: skip
        everything = {**json.loads((self.folder / "settings.json").read_text()), **self.results}
        write_text(self.folder / "results.json", json.dumps(everything))


def _settings(
    script: str, prepared: Prepared, fitting: Fitting, about: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides a run's results, as plain JSON values."""
    chosen = {k: v for k, v in vars(fitting).items() if k not in _NOT_SETTINGS}
    if fitting.optimizer is not None:
        chosen["optimizer"] = str(fitting.optimizer([torch.zeros(1)]))
    manifest, info = prepared.store.manifest, prepared.info
    return json.loads(json.dumps({
        "script": script, "dataset": prepared.dataset, "warning": info.get("warning"),
        "prepared": {k: v for k, v in info.items() if k != "warning"},
        "embeddings": {k: v for k, v in manifest.items() if not isinstance(v, list | dict)},
        "fitting": chosen, **about,
    }, default=str))  # fmt: skip


_NOT_SETTINGS = {"results", "run", "progress", "checkpoint_every", "stream", "device"}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Names of the settings that differ."""
    names = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            names.append(_differences(a, b, f"{prefix}{key}."))
        elif a != b:
            names.append(prefix + key)
    return ", ".join(names)


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "pandas", "transformers", "datasets", "scipy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": sys.version.split()[0], **found}
