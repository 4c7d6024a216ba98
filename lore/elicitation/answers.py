"""A person's answers in a file of choices, as tools/rank_responses.py and OwnData read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from lore.common.files import require, write_whole
from lore.elicitation.pool import Pair, pair_of
from lore.elicitation.ranking import both_endings
from lore.preparing.messages import Conversation
from lore.preparing.own_rows import read_choices
from lore.preparing.raw import read_file

Side = Literal["a", "b"]
NOBODY = "me"  # the user's name where none is given


class Answers:
    """What one person answered and skipped, on disk after every change.

    The file has a row for every answer. Beside what rows of choices have, ``first`` says which
    response was shown first, ``question`` counts answers and skipped questions, and ``timestamp``
    says when. Rows that were in the file before, from elsewhere, stay and count too. What was
    skipped is in a second file, ``<name>.skipped.jsonl``, as it says nothing of tastes.

    Args:
        path: of the .jsonl file; it need not be there.
        user: whose answers they are; by default the file's user, else "me".

    Raises:
        InputError: another kind of file, a row that cannot be read, or rows of another user.
    """

    def __init__(self, path: Path, user: str = "") -> None:
        require(path.suffix == ".jsonl", f"--answers {path}: end its name in .jsonl")
        require(path.parent.is_dir(), f"--answers {path}: there is no folder {path.parent}")
        self.path, self.skipped = path, path.with_suffix(".skipped.jsonl")
        self.rows, self.skips = _read(self.path), _read(self.skipped)
        for row in self.skips:
            good = isinstance(row.get("question"), int) and isinstance(row.get("pair"), str)
            require(good, f"{self.skipped}: not a file of skipped questions; move it away")
        self.ends = [_ends(path, i, row) for i, row in enumerate(self.rows, start=1)]
        users = {user for *_, user in self.ends}
        require(len(users) <= 1, f"{path} has the choices of {len(users)} users; keep one's")
        self.user = user or next(iter(users), "") or NOBODY
        other = next(iter(users), self.user)
        same = other in ("", self.user)
        require(same, f"{path} has the choices of {other}, not of {self.user}: name another file")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pairs(self) -> list[tuple[Conversation, Conversation]]:
        """Every comparison of the answers: the conversation that was preferred, and the other."""
        return [pair for pairs, _ in self.ends for pair in pairs]

    @property
    def settled(self) -> set[str]:
        """Keys of the pairs that need not be asked: answered or skipped."""
        answered = {
            pair_of(liked[:-1], liked[-1]["content"], other[-1]["content"]).key
            for liked, other in self.pairs
        }
        return answered | {row["pair"] for row in self.skips}

    @property
    def asked(self) -> int:
        """The number of the last question that was answered or skipped, 0 at the beginning."""
        return max((_number(row) for row in (*self.rows, *self.skips)), default=0)

    def answer(self, pair: Pair, shown: tuple[str, str], side: Side) -> None:
        """Keep an answer.

        Args:
            pair: what was asked.
            shown: the two responses as a and b were.
            side: the better one.
        """
        chosen, rejected = shown if side == "a" else shown[::-1]
        row = {"user": self.user} | _history(pair.history)
        row |= {"chosen": chosen, "rejected": rejected, "question": self.asked + 1}
        row |= {"first": "chosen" if side == "a" else "rejected"}
        row |= {"timestamp": datetime.now(UTC).isoformat(timespec="seconds")}
        rows = [*self.rows, row]
        _write(self.path, rows)
        self.rows, self.ends = rows, [*self.ends, _ends(self.path, len(rows), row)]

    def skip(self, pair: Pair) -> None:
        """Keep that a question was not answered."""
        skips = [*self.skips, {"question": self.asked + 1, "pair": pair.key}]
        _write(self.skipped, skips)
        self.skips = skips

    def undo(self) -> bool:
        """Take back the last answer or skip; False if there is none that was asked for here."""
        if not (last := self.asked):
            return False
        if any(_number(row) == last for row in self.skips):
            skips = [row for row in self.skips if _number(row) != last]
            _write(self.skipped, skips)
            self.skips = skips
        else:
            kept = [i for i, row in enumerate(self.rows) if _number(row) != last]
            rows = [self.rows[i] for i in kept]
            _write(self.path, rows)
            self.rows, self.ends = rows, [self.ends[i] for i in kept]
        return True


def _number(row: Mapping[str, Any]) -> int:
    number = row.get("question")
    return number if isinstance(number, int) else 0


def _history(history: Conversation) -> dict[str, Any]:
    """A dialogue as a row has it: the prompt alone, where there is no more."""
    if len(history) == 1 and history[0]["role"] == "user":
        return {"prompt": history[0]["content"]}
    return {"messages": history}


def _read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_file(path)] if path.exists() else []


def _ends(
    path: Path, number: int, row: dict[str, Any]
) -> tuple[list[tuple[Conversation, Conversation]], str]:
    """A row's comparisons, and whose they are."""
    choice = read_choices([(f"{path} row {number}", row)])[0]
    return list(both_endings(choice)), choice.user


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Whole or not at all, so that a kill or a power cut leaves every answer but the last."""
    text = "".join(json.dumps(row) + "\n" for row in rows)

    def write(draft: Path) -> None:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)
