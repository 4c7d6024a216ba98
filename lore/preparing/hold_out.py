"""Which comparisons are held out: those of other dialogues, prompts, responses or pairs."""

from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lore.common.files import digest, require
from lore.preparing.tables import Funnel, draw, first_prompts, halve, keep, on_both_sides

Split = Literal["given", "dialogs", "prompts", "responses", "pairs"]
ENOUGH = 100  # comparisons for training, and as many held out, that a default split leaves
UNITS = 20  # prompts or responses that a default split divides
USERS = 0.8  # share of the users whom a default split leaves comparisons on both sides
HELD_OUT = 0.4  # of the responses: of 100 comparisons about 16 are between two of these, 48 cross
SAYS: dict[Split, str] = {  # the hardest first
    "given": "The source's own split says what is held out.",
    "dialogs": "Half of each user's dialogues are held out.",
    "prompts": "Half of the prompts are held out, with all that was compared after them.",
    "responses": "40 % of the responses are held out, so that held-out comparisons are between "
    "responses that training lacks; {crossing:,} comparisons of one with another of training are "
    "left out.",
    "pairs": "Half of the distinct comparisons are held out; their responses may stand in "
    "training, compared with others.",
}
GIVEN = {"given": "split", "dialogs": "dialog_id"}  # columns that hold what is divided, if given
BOTH = "users with comparisons for training and for test"


def hold_out(
    table: pd.DataFrame, by: Split | None, seed: int, funnel: Funnel, what: str = BOTH
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Add ``split``, train or test, by what is divided (None: the hardest that leaves enough).

    Nothing that is divided is on both sides, nor is a pair that a user judged twice; users without
    comparisons on both are left out, and the others are counted as ``what``. Names, texts and the
    seed decide, not the order of the rows. The table has user_id, dialog_id and split ("" where
    there are none), row (of the source), chosen (a conversation) and the names of both. With it
    come by, crossing (how many were left out for a response on either side) and a sentence.
    InputError where ``by`` asks for what there is not, or nothing is left.
    """
    chosen = by or next(way for way in SAYS if _leaves_enough(table, way, seed))
    there = chosen not in GIVEN or bool(table[GIVEN[chosen]].iloc[0])
    require(there, f"--split {chosen}: the rows have none; choose another")
    split = _sides(table, chosen, seed)
    crossing = int((split == "").sum())
    funnel.left_out("comparisons of a held-out response with one of training", crossing)
    kept = table.assign(split=split)[split != ""]
    kept = keep(kept, on_both_sides(kept), funnel, what)
    sentence = SAYS[chosen].format(crossing=crossing)
    if by is None:
        sentence += f" This is --split {chosen}, the hardest that leaves enough."
    return kept, {"by": chosen, "crossing": crossing, "sentence": sentence}


def _leaves_enough(table: pd.DataFrame, by: Split, seed: int) -> bool:
    """Whether a default may be this split; pairs always may."""
    if by not in ("prompts", "responses"):
        return by not in GIVEN or bool(table[GIVEN[by]].iloc[0])
    names = pd.concat([table.chosen_name, table.rejected_name])
    if (first_prompts(table.chosen) if by == "prompts" else names).nunique() < UNITS:
        return False
    split = table.assign(split=_sides(table, by, seed))
    users = split.user_id[on_both_sides(split)].nunique()
    sizes = [(split.split == side).sum() for side in ("train", "test")]
    return bool(min(sizes) >= ENOUGH and users >= USERS * table.user_id.nunique())


def _sides(table: pd.DataFrame, by: Split, seed: int) -> pd.Series:
    """The side of each comparison, "" where it has a response on either."""
    if by == "given":
        return table.split
    if by == "responses":
        names = set(table.chosen_name) | set(table.rejected_name)
        train = draw(names, round((1 - HELD_OUT) * len(names)), seed)
        known = table[["chosen_name", "rejected_name"]].isin(train).sum(axis=1)
        return known.map({2: "train", 0: "test", 1: ""})
    if by == "prompts":
        return halve(first_prompts(table.chosen), seed)
    if by == "pairs":
        return halve(connected(pair_names(table), table.row), seed)
    own = (table.user_id + "\n" + names for names in (table.dialog_id, pair_names(table)))
    return halve(connected(*own), seed, table.user_id)


def pair_names(table: pd.DataFrame) -> pd.Series:
    """A name for the two conversations of each comparison, the same in either order."""
    both = zip(table.chosen_name, table.rejected_name, strict=True)
    return pd.Series([digest(sorted(two)) for two in both], table.index)


def connected(names: pd.Series, others: pd.Series) -> pd.Series:
    """The first name of the comparisons that hang together with each through either series.

    They must be on one side: one row's share a response, and a pair judged again tells the former.
    """
    one, other = pd.factorize(names)[0], pd.factorize(others)[0]
    size = one.max() + other.max() + 2
    edges = coo_array((np.ones(len(one)), (one, one.max() + 1 + other)), (size, size))
    group = connected_components(edges, directed=False)[1][one]
    return names.groupby(group).transform("min")
