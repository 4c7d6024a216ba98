"""What one person's files hold: choices, candidates, the pairs that may be asked, the answers."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lore.common.files import digest, require, write_text
from lore.preparing import own_rows
from lore.preparing.messages import Conversation
from lore.preparing.own_rows import USUAL, Cells, Choice, Columns
from lore.preparing.raw import read_file

log = logging.getLogger(__name__)

Comparison = tuple[Conversation, Conversation, float]  # chosen, rejected, weight
NAMELESS = "me"  # the user where no name is given
NO_TEXT = "the prompt or a message is empty"


def read_user_choices(
    file: Path, columns: Columns = USUAL
) -> tuple[list[Conversation], list[Conversation], Tensor, Tensor]:
    """One person's choices from a file, in any layout of docs/formats.md; ties are left out. There
    is a pair for every chosen and rejected response of a row: the chosen and the rejected
    conversations, from which row each comes, from 0 [n], and how much it counts, pairs sharing the
    weight of their row [n]. Rows that name no user are those of the one whom other rows name.
    InputError for no rows, a row that lacks something, or rows of several users."""
    choices = own_rows.read_choices(read_file(file), columns)
    require(bool(choices), f"{file} is empty")
    counted = [choice for choice in choices if choice.left_out != own_rows.TIES]
    if len(counted) < len(choices):
        log.info("%s: %d ties left out", file, len(choices) - len(counted))
    require(bool(counted), f"{file}: every row is a tie, so that nothing is preferred")
    pairs = [(*pair, i) for i, choice in enumerate(counted) for pair in _pairs(choice, columns)]
    _only_user(file, choices)
    chosen, rejected, weight, row = map(list, zip(*pairs, strict=True))
    return chosen, rejected, torch.tensor(row), torch.tensor(weight).double()


def _pairs(choice: Choice, columns: Columns = USUAL) -> Iterator[Comparison]:
    """Every chosen conversation beside every rejected one; none may be empty, no two equal."""
    require(choice.left_out != own_rows.NO_PROMPT, f"{choice.place}: {NO_TEXT}")
    names = (columns.chosen, columns.rejected)
    weight = choice.weight / (len(choice.chosen) * len(choice.rejected))
    for pair in product(choice.chosen, choice.rejected):
        require(pair[0] != pair[1], f"{choice.place}: {' and '.join(names)} are equal")
        for talk, name in zip(pair, names, strict=True):
            require(bool(talk[-1]["content"]), f"{choice.place}: {name} is empty")
        yield *pair, weight


def _only_user(file: Path, choices: Sequence[Choice]) -> str:
    """Whose these choices are, "" where none names a user; InputError where several are named."""
    users = Counter(choice.user for choice in choices)
    nameless, some = users.pop("", 0), ", ".join(sorted(users)[:3])
    more = f" and {nameless} that name none" if nameless else ""
    several = f"{file} has the choices of {len(users)} users ({some}){more}; keep one's"
    require(len(users) <= 1, several)
    return some


def read_candidates(file: Path, columns: Columns = USUAL) -> list[Conversation]:
    """The conversations that end in a candidate response; "messages" alone may end in it.
    InputError for no rows, or a row that lacks something."""
    candidates = []
    for place, row in read_file(file):
        known, column = own_rows.resolve(row, columns), columns.response
        if column not in row and row.get(known.messages):
            row, column = {known.messages: row[known.messages]}, known.messages
        require(column in row, f"{place} has no column {columns.response}")
        candidates += _endings(place, row, known, column)
    require(bool(candidates), f"{file} is empty")
    return candidates


def _endings(place: str, row: Cells, columns: Columns, column: str) -> list[Conversation]:
    """The conversations that end in the responses of a column."""
    found = own_rows.read_endings(place, row, columns, [column])
    require(found is not None, f"{place}: {NO_TEXT}")
    for talk in found[0]:
        require(bool(talk[-1]["content"]), f"{place}: {column} is empty")
    return found[0]


@dataclass(frozen=True)
class Pair:
    """A dialogue and two responses to it."""

    history: Conversation
    texts: tuple[str, str]  # in alphabetical order, which says nothing of which was preferred

    @classmethod
    def of(cls, one: Conversation, other: Conversation) -> "Pair":
        """The pair of two conversations that differ in their last message alone."""
        first, second = sorted((one[-1]["content"], other[-1]["content"]))
        return cls(one[:-1], (first, second))

    @cached_property
    def key(self) -> str:
        """Tells the pair from others, wherever and in whichever order it is found."""
        return digest([self.history, *self.texts])[:16]

    @property
    def conversations(self) -> list[Conversation]:
        """The dialogue with either response."""
        return [[*self.history, {"role": "assistant", "content": text}] for text in self.texts]


def read_pool(file: Path, columns: Columns = USUAL) -> list[Pair]:
    """The distinct pairs in a file of choices, or of responses (a list: all pairs of them).
    InputError for a row that lacks something, or no pair of two different texts."""
    compared, others = [], []
    for place, row in read_file(file):
        if "responses" in row:
            some = _endings(place, row, own_rows.resolve(row, columns), "responses")
            compared += [(place, *both) for both in combinations(some, 2)]
        else:
            others.append((place, row))
    for choice in own_rows.read_choices(others, columns, judged=False):
        require(choice.left_out != own_rows.NO_PROMPT, f"{choice.place}: {NO_TEXT}")
        compared += [(choice.place, *both) for both in product(choice.chosen, choice.rejected)]
    pairs: dict[str, Pair] = {}
    for place, one, other in compared:
        for talk in (one, other):
            require(bool(talk[-1]["content"]), f"{place}: a response is empty")
        alike = f"{place}: both responses must be one message each, after the same dialogue"
        require(one[:-1] == other[:-1], alike)
        if one != other:
            pair = Pair.of(one, other)
            pairs.setdefault(pair.key, pair)
    require(bool(pairs), f"{file} has no two different responses to compare")
    return list(pairs.values())


class Answers:
    """What one person answered and skipped, on disk after every change. The .jsonl file, which need
    not be there, has a row of choices for every answer: ``first`` says which response was shown
    first, ``question`` counts answers and skipped questions, of which ``last_question`` is the
    last. Choices that were in it before count too. What was skipped is in
    ``<name>.skipped.jsonl``. InputError for rows that cannot be read, or are another user's."""

    def __init__(self, path: Path, user: str = "") -> None:
        require(path.suffix == ".jsonl", f"--answers {path}: end its name in .jsonl")
        self.path, self.skipped, self.user = path, path.with_suffix(".skipped.jsonl"), user
        both = (read_file(file) if file.exists() else () for file in (path, self.skipped))
        self._take(*([row for _, row in placed] for placed in both))

    def _take(self, rows: list[dict[str, Any]], skips: list[dict[str, Any]]) -> None:
        """Take in what both files hold."""
        self.rows, self.skips, choices = rows, skips, []
        for row in skips:
            good = isinstance(row.get("question"), int) and isinstance(row.get("pair"), str)
            require(good, f"{self.skipped}: not a file of skipped questions; move it away")
        for number, row in enumerate(rows, start=1):
            place = f"{self.path} row {number}"
            require(row.keys() >= {"chosen", "rejected"}, f"{place} lacks chosen or rejected; "
                    "answers are kept as chosen and rejected, so name another file for --answers")
            choices += own_rows.read_choices([(place, row)])
        self.comparisons = [pair for choice in choices for pair in _pairs(choice)]
        numbers = [row.get("question") for row in (*rows, *skips)]
        self.last_question = max((n for n in numbers if isinstance(n, int)), default=0)
        found = _only_user(self.path, choices)
        self.user = self.user or found or NAMELESS
        another = f"has the choices of {found}, not of {self.user}: name another file"
        require(found in ("", self.user), f"{self.path} {another}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def settled(self) -> set[str]:
        """Keys of the pairs that need not be asked: answered or skipped."""
        answered = {Pair.of(*both).key for *both, _ in self.comparisons}
        return answered | {row["pair"] for row in self.skips}

    def answer(self, pair: Pair, shown: tuple[str, str], side: Literal["a", "b"]) -> None:
        """Keep that of a pair's responses, shown as a and b, the one of a side is the better."""
        chosen, rejected = shown if side == "a" else shown[::-1]
        before = {"messages": pair.history}
        if len(pair.history) == 1 and pair.history[0]["role"] == "user":
            before = {"prompt": pair.history[0]["content"]}
        row = {
            "user": self.user, **before, "chosen": chosen, "rejected": rejected,
            "question": self.last_question + 1, "first": "chosen" if side == "a" else "rejected",
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        self._save([*self.rows, row], self.skips)

    def skip(self, pair: Pair) -> None:
        """Keep that a question was not answered."""
        row = {"question": self.last_question + 1, "pair": pair.key}
        self._save(self.rows, [*self.skips, row])

    def undo(self) -> bool:
        """Take back the last answer or skip; False if there is none that was given here."""
        if last := self.last_question:
            both = self.rows, self.skips
            self._save(*([row for row in rows if row.get("question") != last] for rows in both))
        return last > 0

    def _save(self, rows: list[dict[str, Any]], skips: list[dict[str, Any]]) -> None:
        """Write what has changed; a kill or a power cut leaves every answer but the last."""
        for path, old, new in ((self.path, self.rows, rows), (self.skipped, self.skips, skips)):
            if new != old:
                write_text(path, "".join(json.dumps(row) + "\n" for row in new), lasting=True)
        self._take(rows, skips)
