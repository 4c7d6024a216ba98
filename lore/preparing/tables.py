"""From raw rows to two tables, distinct conversations and users' comparisons, and back from disk.

Nothing in a prepared folder is believed that prepare.py did not write.
"""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from lore.common import files
from lore.common.files import InputError, digest, require
from lore.common.tensors import expect, read_tensors, require_finite
from lore.preparing.facts import count_kinds, retest
from lore.preparing.messages import Conversation

log = logging.getLogger(__name__)

COLUMNS = {"user_id": str, "split": str, "seen": bool, "dialog_id": str, "turn": "int64",
           "chosen": "int64", "rejected": "int64", "weight": "float64"}  # fmt: skip
EXTRA = {side: f"extra {side} " for side in ("chosen", "rejected")}  # columns of numbers, by name
MARK = {b"written by": b"prepare.py"}
MESSAGES = pa.schema(
    [("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))], MARK
)
TALKS, COMPARISONS, SCORES = "conversations.parquet", "comparisons.parquet", "scores.safetensors"
TABLES = ({TALKS, COMPARISONS}, {TALKS, SCORES})  # what prepare.json may stand beside
INFO = {"dataset": str, "settings": dict, "counts": dict, "overlap": dict | None,
        "warning": str | None, "split": dict | None, "kinds": dict | None, "retest": dict | None,
        "conversations_sha256": str, "data_sha256": str, "files": dict}  # fmt: skip
PRINTED = ("split", "kinds", "retest")  # what of prepare.json is also printed
AGAIN = "run prepare.py again"
LIGHTEST, HEAVIEST = 1e-6, 1e6  # weights of rows: sums and shares of such are exact enough
SPLITS = ("train", "test")
VALIDATION = "val"  # a third split, of datasets that have one for choices


# -------------------------------------------------------------------------- Comparisons


Turn = tuple[str, str, list[str]]  # what the user said, the response chosen and those rejected


class Funnel:
    """What of a raw table is kept and what is left out, counted in the order of the work."""

    def __init__(self) -> None:
        self._kept: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def count(self, what: str, number: int = 1) -> None:
        self._kept[what] += int(number)

    def left_out(self, why: str, number: int = 1) -> None:
        self._left_out[f"left out: {why}"] += int(number)

    @property
    def counts(self) -> dict[str, int]:
        """What is left out comes last, in the order of the reasons."""
        return {**self._kept, **dict(sorted((+self._left_out).items()))}

    def lines(self) -> str:
        return "\n".join(f"{n:>9,}  {what}" for what, n in self.counts.items())

    def require_some(self, comparisons: pd.DataFrame) -> None:
        """Raise InputError with the counts so far if there are no comparisons."""
        path = "; ".join(f"{n} {what}" for what, n in self.counts.items())
        require(not comparisons.empty, f"no comparisons are left: {path}")


Comparisons = list[dict[str, Any]]  # with chosen and rejected as whole conversations


def compare(turns: Sequence[Turn], end: str, same: dict[str, Any], funnel: Funnel) -> Comparisons:
    """One comparison per rejected response of a dialogue, after the history of chosen responses.

    Each has what is the ``same`` of all. ``end`` is the reason, if any, why the dialogue goes on
    unread; an empty prompt or choice ends it too.
    """
    found: Comparisons = []
    history: Conversation = []
    for number, (prompt, chosen, rejected) in enumerate(turns):
        if not prompt or not chosen:
            end = f"dialogues cut at an empty {'chosen response' if prompt else 'prompt'}"
            break
        history = [*history, {"role": "user", "content": prompt}]
        answers = ({"role": "assistant", "content": text} for text in (chosen, *rejected))
        won, *lost = ([*history, answer] for answer in answers)
        found += against([won], lost, {**same, "turn": number, "weight": 1.0}, funnel)
        history = won
    funnel.left_out(end, bool(end))
    return found


def against(
    chosen: list[Conversation], rejected: list[Conversation], same: dict[str, Any], funnel: Funnel
) -> Comparisons:
    """Every chosen response against every rejected one, with what is the ``same`` of all."""
    found, said = [], [won for won in chosen if won[-1]["content"]]
    funnel.left_out("chosen responses empty", len(chosen) - len(said))
    for won, lost in product(said, rejected):
        if lost == won:
            funnel.left_out("rejected responses equal to the chosen one")
        elif not lost[-1]["content"]:
            funnel.left_out("rejected responses empty")
        else:
            found.append({**same, "chosen": won, "rejected": lost})
    return found


def tabulate(comparisons: Comparisons, funnel: Funnel) -> pd.DataFrame:
    """Comparisons as a table, one a row, with names of both conversations; InputError if none."""
    table = pd.DataFrame(comparisons)
    funnel.count("comparisons", len(table))
    funnel.require_some(table)
    table = table.assign(**{f"{side}_name": table[side].map(digest) for side in EXTRA})
    funnel.count("dialogues with comparisons", table.groupby(["user_id", "dialog_id"]).ngroups)
    funnel.count("users with comparisons", table.user_id.nunique())
    return table


def keep(comparisons: pd.DataFrame, rows: pd.Series, funnel: Funnel, what: str) -> pd.DataFrame:
    """The comparisons of these rows (true or false each), if any; users are counted as ``what``."""
    kept = comparisons[rows]
    funnel.count(what, kept.user_id.nunique())
    funnel.require_some(kept)
    return kept


def keep_users(
    comparisons: pd.DataFrame, users: str, least: int, units: str, funnel: Funnel
) -> pd.DataFrame:
    """The comparisons of the users with at least so many dialogues, or comparisons by any name."""
    of_user = comparisons.groupby("user_id").dialog_id
    enough = of_user.transform("nunique" if units == "dialogues" else "size") >= least
    return keep(comparisons, enough, funnel, f"{users} with at least {least} {units}")


# ------------------------------------------------------------------------------- Splits


def draw(names: Iterable[str], count: int, seed: int) -> set[str]:
    """A random choice of ``count`` names; neither their order matters nor Python's hash."""
    places = {name: hashlib.sha256(f"{seed} {name}".encode()).digest() for name in names}
    return set(sorted(places, key=places.__getitem__)[:count])


def halve(units: pd.Series, seed: int, users: pd.Series | None = None) -> pd.Series:
    """train for the comparisons of a drawn half of the units, or of each user's; else test."""
    groups = [units] if users is None else [group for _, group in units.groupby(users)]
    train = set().union(*(draw(group, (group.nunique() + 1) // 2, seed) for group in groups))
    return units.isin(train).map({True: "train", False: "test"})


def split_dialogues(
    comparisons: pd.DataFrame, seed: int, funnel: Funnel, units: pd.Series | None = None
) -> pd.DataFrame:
    """Add ``split``: train for half of each user's dialogues, or of the units (such as first
    prompts) that comparisons belong to, else test. Users who are not on both sides are left out.
    """
    users = comparisons.user_id
    own = users + "\n" + comparisons.dialog_id
    split = halve(own, seed, users) if units is None else halve(units, seed)
    table = comparisons.assign(split=split)
    what = "users with dialogues for training and for test"
    return keep(table, on_both_sides(table), funnel, what)


def on_both_sides(comparisons: pd.DataFrame) -> pd.Series:
    """Whether the user of each comparison has some in train and some in test."""
    train, test = (set(comparisons.user_id[comparisons.split == side]) for side in SPLITS)
    return comparisons.user_id.isin(train & test)


def split_users(comparisons: pd.DataFrame, seed: int, seen_fraction: float) -> pd.DataFrame:
    """Add ``seen``: true for a drawn share of the users; InputError where that is none or all."""
    users = comparisons.user_id.nunique()
    require(0 <= seen_fraction <= 1, f"--seen-fraction {seen_fraction} must be between 0 and 1")
    count = round(seen_fraction * users)
    require(0 < count < users, f"--seen-fraction {seen_fraction} of {users} users makes {count} of "
            "them seen; there must be seen and unseen ones")  # fmt: skip
    drawn = draw(comparisons.user_id, count, seed)
    return comparisons.assign(seen=comparisons.user_id.isin(drawn))


def first_prompts(talks: pd.Series) -> pd.Series:
    """What the user says first in each conversation."""
    return talks.map(lambda talk: next((m["content"] for m in talk if m["role"] == "user"), ""))


# ---------------------------------------------------------------------- Numbers for texts


def number_conversations(
    comparisons: pd.DataFrame, funnel: Funnel
) -> tuple[list[Conversation], pd.DataFrame]:
    """The distinct conversations, and the comparisons (``COLUMNS``) with their numbers, in a fixed
    order. Comparisons come with chosen and rejected as conversations, and the names of both.
    """
    extra = [f"{side}{name}" for name in extra_names(comparisons) for side in EXTRA.values()]
    names = ["chosen_name", "rejected_name"]
    order = ["user_id", "dialog_id", "turn", *names, "split", "weight", *extra]
    table = comparisons.sort_values(order, ignore_index=True)
    if table.seen.nunique() == 2:
        for kind, rows in (("seen", table.seen), ("unseen", ~table.seen)):
            funnel.count(f"{kind} users", table[rows].user_id.nunique())
    prompts = first_prompts(table.chosen)
    for side, what in (("train", "training"), (VALIDATION, "validation"), ("test", "test")):
        if len(part := table[table.split == side]):
            funnel.count(f"{what} comparisons", len(part))
            funnel.count(f"{what} dialogues", part.groupby(["user_id", "dialog_id"]).ngroups)
            funnel.count(f"first prompts of {what} dialogues", prompts[part.index].nunique())
    train, test = (prompts[table.split == side] for side in SPLITS)
    after = test[test.isin(train)]
    funnel.count("first prompts on both sides", after.nunique())
    funnel.count("test comparisons after such a prompt", len(after))
    named, talks = (table[two].to_numpy().ravel() for two in (names, list(EXTRA)))
    conversations = list(dict(zip(named, talks, strict=True)).values())  # in order of first use
    table[list(EXTRA)] = pd.factorize(named)[0].reshape(-1, 2)
    funnel.count("distinct conversations", len(conversations))
    return conversations, table[[*COLUMNS, *extra]].astype(COLUMNS)


def extra_names(comparisons: pd.DataFrame) -> list[str]:
    """The names of further features: numbers that a table has of either response."""
    start = EXTRA["chosen"]
    return [name.removeprefix(start) for name in comparisons if name.startswith(start)]


def overlap(conversations: Sequence[Conversation], comparisons: pd.DataFrame) -> dict[str, Any]:
    """Of how many held_out comparisons training has the prompt (the dialogue before the response),
    a response after it, both_responses or the pair; and a sentence that says so.
    """
    before = pd.Series([digest(conversation[:-1]) for conversation in conversations])
    sides = np.sort(comparisons[["chosen", "rejected"]].to_numpy(), axis=1)
    pairs = pd.MultiIndex.from_arrays(sides.T)
    prompts = before[comparisons.chosen].to_numpy()
    train, test = ((comparisons.split == side).to_numpy() for side in SPLITS)
    known = np.isin(sides[test], sides[train])
    shared = {
        "held_out": test,
        "prompt": np.isin(prompts[test], prompts[train]),
        "response": known.any(axis=1),
        "both_responses": known.all(axis=1),
        "pair": pairs[test].isin(pairs[train]),
    }
    found = {what: int(rows.sum()) for what, rows in shared.items()}
    sentence = "Of {held_out:,} held-out comparisons, {prompt:,} have a prompt that training has "
    sentence += "too, {response:,} a response ({both_responses:,} both) and {pair:,} the very pair."
    return {**found, "sentence": sentence.format(**found)}


# ------------------------------------------------------------ The prepared folder, written


def write_prepared(
    folder: Path, conversations: Sequence[Conversation],
    table: pd.DataFrame | dict[str, np.ndarray],
    info: Mapping[str, Any], funnel: Funnel, share: str | None = None,
) -> str:  # fmt: skip
    """Write a prepared dataset's tables and, last, prepare.json; what to print of its contents.

    Conversation i is that of embedding i. The table has ``COLUMNS``; or, where users are simulated
    at training time, it is train.scores and test.scores [P, R, M] (prompts, responses, scorers) and
    the conversations' numbers, train.rows and test.rows [P, R]. To info (dataset, settings and
    perhaps a warning, which every later output shows) come counts, hashes and what ``overlap``,
    ``count_kinds`` and ``retest`` find. Of n processes that share the embedding (i/n) each writes.
    InputError for a folder of scripts, or with files of these names that no prepare.py wrote.
    """
    info = {**info, "counts": funnel.counts}
    has_script, note = (folder / "prepare.py").exists(), folder / "prepare.json"
    require(not has_script, f"--out {folder} holds scripts; name a folder for the data alone")
    with files.lock_folder(folder, share):
        source = [info["settings"].get("source")]
        files.check_output(note, "--out", files.has_keys("dataset", "files"), source)
        is_ours = (lambda _: True) if note.exists() else _is_of_killed
        for name in (COMPARISONS, TALKS, SCORES):
            files.check_output(folder / name, "--out", is_ours, source)
        note.unlink(missing_ok=True)  # a half-written folder is not prepared
        talks = folder / TALKS
        files.write_whole(talks, lambda draft: _write_conversations(draft, conversations))
        texts = digest(list(conversations))
        if isinstance(table, pd.DataFrame):
            path, content = folder / COMPARISONS, table.to_csv(index=False)
            files.write_whole(path, lambda draft: table.to_parquet(draft, index=False))
            info = {"retest": retest(table), **info, "overlap": overlap(conversations, table)}
            info["kinds"] = count_kinds(table)
        else:
            path, content = folder / SCORES, [[k, table[k].tolist()] for k in sorted(table)]
            files.write_whole(path, lambda draft: draft.write_bytes(save(table)))
        info |= {"conversations_sha256": texts, "data_sha256": digest([texts, content])}
        info["files"] = {file.name: files.file_sha256(file) for file in (talks, path)}
        files.write_text(note, json.dumps(info, indent=2))
    says = [funnel.lines(), *(info[what]["sentence"] for what in PRINTED if info.get(what))]
    says += [f"WARNING: {info['warning']}"] if "warning" in info else []
    what = f"{len(table):,} comparisons" if isinstance(table, pd.DataFrame) else "scores"
    says += [f"prepared {what} of {len(conversations):,} conversations in {folder}"]
    return "\n".join(says)


def _is_of_killed(path: Path) -> bool:
    """Whether a table is of a run that was killed before it wrote prepare.json."""
    with suppress(OSError, pa.ArrowException, SafetensorError):
        if path.suffix == ".parquet":
            found = pq.read_schema(path)
            marked = MARK.items() <= (found.metadata or {}).items()
            return marked or found.names[: len(COLUMNS)] == list(COLUMNS)
        with safe_open(path, "np") as file:
            return "train.scores" in file.keys()  # noqa: SIM118
    return False


def _write_conversations(path: Path, conversations: Sequence[Conversation]) -> None:
    """In parts, since a single Arrow column of text ends at 2 GB."""
    with pq.ParquetWriter(path, MESSAGES) as writer:
        for start in range(0, len(conversations), 10_000):
            part = list(conversations[start : start + 10_000])
            writer.write_table(pa.table({"messages": part}, schema=MESSAGES))


# --------------------------------------------------------------- The prepared folder, read


def read_info(folder: Path, dataset: str | None = None) -> dict[str, Any]:
    """What prepare.json says; a warning in it is logged. InputError where the folder is not
    prepared, holds another dataset (None: any will do) or a file that prepare.py did not write.
    """
    path = folder / "prepare.json"
    info = files.read_json(path)
    require(info is not None, f"{folder} is not a prepared dataset; run prepare.py first")
    require(isinstance(info, dict), f"{path} is not as expected; {AGAIN}")
    wrong = [key for key, kind in INFO.items() if not isinstance(info.get(key), kind)]
    if not wrong:
        wrong = [key for key in ("overlap", *PRINTED)
                 if not isinstance((info.get(key) or {}).get("sentence", ""), str)]  # fmt: skip
        wrong += ["dataset"] * (not re.fullmatch(r"[\w-]+", info["dataset"]))
        wrong += ["files"] * (set(info["files"]) not in TABLES)
    require(not wrong, f"{path} is not as expected: {', '.join(wrong)}; {AGAIN}")
    found = info["dataset"]
    own = dataset in (None, found)
    require(own, f"{folder} holds {found}, not {dataset}: use the scripts in the folder {found}")
    if info.get("warning"):
        log.warning("WARNING: %s", info["warning"])
    for file, sha256 in info["files"].items():
        path = folder / file
        require(path.is_file(), f"{path}: not there; {AGAIN}")
        same = files.file_sha256(path) == sha256
        require(same, f"{path} is not the file that prepare.py wrote; run it again")
    is_right = _read_table(folder / TALKS, pq.read_schema).equals(MESSAGES)
    require(is_right, f"{folder / TALKS}: has other columns than messages; {AGAIN}")
    return info


def read_conversations(folder: Path) -> list[Conversation]:
    """The conversations, row i being of embedding i."""
    return _read_table(folder / TALKS)["messages"].to_pylist()


def read_comparisons(folder: Path, num_rows: int) -> pd.DataFrame:
    """The comparisons of a prepared folder, of num_rows conversations; InputError for damage."""
    path = folder / COMPARISONS
    table = _read_table(path).to_pandas()
    require(not table.empty, f"{path}: has no rows; {AGAIN}")
    numbers = {f"{side}{name}": float for name in extra_names(table) for side in EXTRA.values()}
    for column, kind in {**COLUMNS, **numbers}.items():
        require(column in table, f"{path}: lacks the column {column}; {AGAIN}")
        found = table[column]
        right = found.map(type).eq(str).all() if kind is str else found.dtype == kind
        what = {str: "text", bool: "true or false"}.get(kind, kind)
        require(right, f"{path}: {column} is not all {what}; {AGAIN}")
    known = (*SPLITS, VALIDATION)
    for good, what in (
        ((table[["chosen", "rejected"]] // num_rows == 0).all(axis=1),
         f"rows that are none of the {num_rows} embeddings"),
        (table.split.isin(known), f"a split that is none of {', '.join(known)}"),
        (table.weight.between(LIGHTEST / 1e3, HEAVIEST * 1e3),  # shared by a row's pairs
         "a weight that is not a number above 0, or is far from 1"),
    ):  # fmt: skip
        row = int((~good).to_numpy().argmax()) + 1
        require(good.all(), f"{path} row {row}: has {what}; {AGAIN}")
    return table


def read_scores(folder: Path, num_rows: int) -> dict[str, Tensor]:
    """train.scores, test.scores [P, R, M] and train.rows, test.rows [P, R]; or InputError."""
    path = folder / SCORES
    tensors = read_tensors(path, AGAIN)[1]
    found = {}
    for split in SPLITS:
        scores = expect(path, tensors, AGAIN, f"{split}.scores", torch.float32, None, None, None)
        require(len(scores) > 0, f"{path}: {split}.scores has no prompt; {AGAIN}")
        rows = expect(path, tensors, AGAIN, f"{split}.rows", torch.int64, *scores.shape[:2])
        inside = bool(((rows >= 0) & (rows < num_rows)).all())
        require(inside, f"{path}: {split}.rows are none of the {num_rows} embeddings; {AGAIN}")
        found |= {f"{split}.scores": scores, f"{split}.rows": rows}
    require_finite(path, found, AGAIN)
    alike = found["train.scores"].shape[2] == found["test.scores"].shape[2]
    require(alike, f"{path}: train and test have other reward models; {AGAIN}")
    return found


def _read_table(path: Path, read: Callable[[Path], Any] = pq.read_table) -> Any:
    try:
        return read(path)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        why = files.first_line(error)
        raise InputError(f"{path} cannot be read ({why}); {AGAIN}") from error
