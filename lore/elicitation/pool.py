"""Pairs of responses that a person may be asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

from lore.common.files import digest, require
from lore.elicitation.ranking import with_text
from lore.preparing.messages import Conversation
from lore.preparing.own_rows import (
    NO_PROMPT,
    USUAL,
    Columns,
    read_choices,
    read_endings,
    resolve,
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
        answers = ({"role": "assistant", "content": text} for text in (first, second))
        one, other = ([*self.history, answer] for answer in answers)
        return one, other


def pair_of(history: Conversation, one: str, other: str) -> Pair:
    """The pair of two responses, in whichever order they are given."""
    return Pair(history, (min(one, other), max(one, other)))


def read_pool(file: Path, columns: Columns = USUAL) -> list[Pair]:
    """The distinct pairs in a file.

    A row has prompt or messages, and responses (a list: all pairs of them), or is one of a file of
    choices; what was chosen is not kept.

    Raises:
        InputError: no such file, a row that lacks something, or no pair of two different texts.
    """
    rows = list(read_file(file))
    pairs: dict[str, Pair] = {}
    for place, one, other in _ended(rows, columns):
        texts = [with_text(each, place, "a response")[-1]["content"] for each in (one, other)]
        alike = f"{place}: both responses must be one message each, after the same dialogue"
        require(one[:-1] == other[:-1], alike)
        if one != other:
            pair = pair_of(one[:-1], *texts)
            pairs.setdefault(pair.key, pair)
    require(bool(pairs), f"{file} has no two different responses to compare")
    return list(pairs.values())


def _ended(
    rows: list[tuple[str, dict[str, Any]]], columns: Columns
) -> Iterator[tuple[str, Conversation, Conversation]]:
    """The place of every pair, and both conversations."""
    lists = [(place, row) for place, row in rows if "responses" in row]
    for place, row in lists:
        found = read_endings(place, row, resolve(row, columns), ["responses"])
        require(found is not None, f"{place}: the prompt or a message is empty")
        for one, other in combinations(found[0] if found else [], 2):
            yield place, one, other
    others = (placed for placed in rows if "responses" not in placed[1])
    for choice in read_choices(others, columns, judged=False):
        empty = f"{choice.place}: the prompt or a message is empty"
        require(choice.left_out != NO_PROMPT, empty)
        for one, other in product(choice.chosen, choice.rejected):
            yield choice.place, one, other
