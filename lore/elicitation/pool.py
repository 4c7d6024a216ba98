"""Pairs of responses that a person may be asked about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

from lore.common.files import digest, require
from lore.elicitation.ranking import ending
from lore.preparing.own_rows import (
    USUAL,
    Columns,
    Conversation,
    read_choices,
    read_history,
    read_responses,
)
from lore.preparing.raw import read_file


@dataclass(frozen=True)
class Pair:
    """A dialogue and two responses to it.

    Attributes:
        history: the dialogue so far.
        texts: the responses, in alphabetical order: nothing is told by which comes first.
    """

    history: Conversation
    texts: tuple[str, str]

    @cached_property
    def key(self) -> str:
        """Tells the pair from others, wherever and in whichever order it is found."""
        return digest([self.history, *self.texts])[:16]

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """The dialogue with either response."""
        first, second = self.texts
        return ending("", self.history, first, ""), ending("", self.history, second, "")


def pair_of(history: Conversation, one: str, other: str) -> Pair:
    """The pair of two responses, in whichever order they are given."""
    return Pair(history, (min(one, other), max(one, other)))


def read_pool(file: Path, columns: Columns = USUAL) -> list[Pair]:
    """The distinct pairs in a file.

    A row has prompt or messages, and responses (a list: all pairs of them), or chosen and rejected
    as in a file of choices; which of them was chosen is not kept.

    Raises:
        InputError: no such file, a row that lacks something, or no pair of two different texts.
    """
    pairs: dict[str, Pair] = {}
    for place, row in read_file(file):
        for pair in _pairs(place, row, columns):
            pairs.setdefault(pair.key, pair)
    require(bool(pairs), f"{file} has no two different responses to compare")
    return list(pairs.values())


def _pairs(place: str, row: Mapping[str, Any], columns: Columns) -> Iterator[Pair]:
    if "responses" in row:
        history, column = read_history(place, row, columns), "responses"
        texts = combinations(read_responses(place, row, column), 2)
    else:
        choice = next(read_choices(iter([(place, row)]), columns))
        history, column = choice.history, f"{columns.chosen} or {columns.rejected}"
        texts = product(choice.chosen, choice.rejected)
    for one, other in texts:
        for text in (one, other):
            ending(place, history, text, column)  # refuses what has no text
        if one != other:
            yield pair_of(history, one, other)
