"""Your own data: rows that say what each user chose, from files or the hub."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import digest, require
from lore.common.settings import Fraction, PositiveInt, SeedNumber
from lore.embeddings import store as embeddings
from lore.preparing import hold_out, own_rows, raw, tables
from lore.preparing.facts import retest
from lore.preparing.hold_out import Split
from lore.preparing.own_rows import USUAL, Choice, Columns

HERE = Path(__file__).resolve().parent


def main(
    source: str, out: Path = HERE / "data", columns: Columns = USUAL,
    min_comparisons: PositiveInt = 2, seen_fraction: Fraction = 0.5,
    split: Split | None = None, seed: SeedNumber = 0, extra: tuple[str, ...] = (),
    embed: bool = True, **embedding: Any,
) -> None:  # fmt: skip
    """Make comparisons from rows that say what a user chose, and embed their texts.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv or .parquet; compressed too), a folder of such, or
            a hub dataset.
        out: folder of the prepared data.
        columns: what the columns are called, such as --user worker_id, and how they are read.
        min_comparisons: fewest comparisons of a user.
        seen_fraction: share of the users whose data train the basis.
        split: what is divided into training and held out: given (the source's column, named by
            --columns.split), dialogs (of each user), prompts, responses (held-out comparisons are
            between two that training lacks) or pairs (whose responses training may compare with
            others); by default the first of these that there is and that leaves enough.
        seed: of the draw of seen users, and of what is for training.
        extra: numbers of either response that are features beside the embedding, such as length,
            read from columns named after the response's: chosen_length and rejected_length.
        embed: false writes the tables only.
    """
    if embed:
        embeddings.check_model(embedding)
    funnel = tables.Funnel()
    table = tables.tabulate(read(source, columns, funnel, split, extra), funnel)
    table = tables.keep_users(table, "users", min_comparisons, "comparisons", funnel)
    table, held_out = hold_out.hold_out(table, split, seed, funnel)
    pairs = hold_out.pair_names(table)
    if not table.dialog_id.iloc[0]:  # what hangs together is a dialogue of its own
        table = table.assign(dialog_id=hold_out.connected(pairs, table.row))
    before = table.chosen.map(lambda messages: digest(messages[:-1]))
    order = zip(table.time, table.chosen.map(len), before, strict=True)  # by time, then by length
    place = pd.Series(order, table.index).groupby([table.user_id, table.dialog_id]).rank("dense")
    table = table.assign(turn=place.astype(int) - 1, seen=True)
    if table.user_id.nunique() > 1:  # else there is no other to be unseen
        table = tables.split_users(table, seed, seen_fraction)
    rows = table.groupby([table.place, pairs]).row.transform("nunique")
    ties = rows > 1  # halves of a tie are no second judgment of a pair
    judged_again = retest(table[~ties], "chosen_name", "rejected_name")
    conversations, table = tables.number_conversations(table, funnel)
    settings = {"source": source, "columns": asdict(columns), "min_comparisons": min_comparisons,
                "seen_fraction": seen_fraction, "split": split, "seed": seed,
                "extra": list(extra)}  # fmt: skip
    info = {"dataset": "OwnData", "settings": settings, "split": held_out, "retest": judged_again}
    print(tables.write_prepared(out, conversations, table, info, funnel, embedding.get("shard")))
    if embed:
        embeddings.embed(conversations, out / "embeddings", **embedding)


def read(
    source: str, columns: Columns, funnel: tables.Funnel,
    split: Split | None = None, extra: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """The comparisons of all rows; those of a row share its weight. InputError for one without a
    user, or where some rows name a dialogue or a split and others do not."""
    is_given, comparisons = split in (None, "given"), []
    rows = own_rows.read_choices(raw.read_all(source), columns)
    for number, row in enumerate(rows):
        funnel.count("rows")
        require(bool(row.user), f"{row.place} has no {columns.user}; name the user, or the column "
                "by --user; --user-name me names one user for all rows")  # fmt: skip
        for what in ("dialog", "split"):
            has, lacks = (row, rows[0]) if getattr(row, what) else (rows[0], row)
            require(bool(getattr(has, what)) == bool(getattr(lacks, what)),
                    f"{lacks.place} has no {getattr(columns, what)}, but {has.place} has; fill it "
                    "in everywhere or leave the column out")  # fmt: skip
        if is_given and row.split and row.split not in tables.SPLITS:
            funnel.left_out(f"rows whose {columns.split} is {row.split}")
        elif row.left_out:
            funnel.left_out(row.left_out)
        else:
            same = {"user_id": row.user, "dialog_id": row.dialog, "split": row.split, "row": number,
                    "place": row.place, "time": row.time, **numbers_beside(row, extra, funnel)}
            found = tables.against(row.chosen, row.rejected, same, funnel)
            comparisons += [{**each, "weight": row.weight / len(found)} for each in found]
    return comparisons


def numbers_beside(row: Choice, extra: Sequence[str], funnel: tables.Funnel) -> dict[str, float]:
    """The further features of both responses by column; those that are missing are counted."""
    single = len(row.chosen) == len(row.rejected) == 1
    require(not extra or single, f"{row.place}: --extra needs one response on either side")
    found = {}
    for name in extra:
        for start, (place, cells, side) in zip(tables.EXTRA.values(), row.sources, strict=True):
            column = f"{side}_{name}"
            require(column in cells, f"{place} has no column {column}, which --extra {name} reads")
            cell = own_rows.as_number(cells[column])
            missing = cell in (None, "") or cell != cell
            found[f"{start}{name}"] = math.nan if missing else raw.number(cell, place, column)
            funnel.count(f"responses without {name}", missing)
    return found


if __name__ == "__main__":
    cli(main, short="columns", kept="what is embedded already is kept")
