"""Candidate responses in the order a new user would like them, from a few of the user's choices.

    python tools/rank_responses.py --basis results/PRISM/<run>/mixed_logit.safetensors \\
        --choices alice.jsonl --candidates drafts.jsonl
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import begins, check_output, has_keys, require, write_text, write_whole
from lore.common.settings import SeedNumber
from lore.elicitation import user as users
from lore.elicitation.choices import read_candidates, read_user_choices
from lore.preparing.own_rows import USUAL, Columns


def main(
    basis: Path, choices: Path, candidates: Path, columns: Columns = USUAL,
    save: Path | None = None, seed: SeedNumber = 0, **embedding: Any,
) -> None:  # fmt: skip
    """Learn a new user's weights from choices, and rank candidates by the user's reward.

    Rewards are log odds: the probability that one response is preferred to another is
    sigmoid(reward - other reward). A mixed logit also knows how sure it is: its rewards have
    standard deviations. What is known of the user is judged by leaving out each row of choices in
    turn and predicting it from the others.

    Args:
        basis: basis file of a run, or mixed_logit file.
        choices: the user's choices, a file of rows in any layout that OwnData/prepare.py reads
            (docs/formats.md), such as "prompt", "chosen" and "rejected"; rows that name no user
            are those of the one whom others name.
        candidates: a file with "prompt" or "messages", and "response" (one text or a list).
        columns: what the columns are called, such as --chosen better.
        save: also write the ranking to this .csv, or weights and ranking to this .json file.
        seed: of the initial values of LoRe's weights.
    """
    if save:
        require(save.suffix in (".csv", ".json"), f"--save {save}: end its name in .csv or .json")
        require(save.parent.is_dir(), f"--save {save}: there is no folder {save.parent}")
        is_ours = begins("line,prompt,place") if save.suffix == ".csv" else has_keys("ranking")
        check_output(save, "--save", is_ours, [basis, choices, candidates])
    found = users.load_fit(basis)
    chosen, rejected, row, weight = read_user_choices(choices, columns)
    offered = read_candidates(candidates, columns)
    views = users.view_conversations(found, [*chosen, *rejected, *offered], **embedding)
    liked, disliked, views = views.split([len(chosen), len(rejected), len(offered)])
    user = users.User(found.fit, liked - disliked, weight, seed)
    table, left_out = user.rank(offered, views), user.leave_one_out(row)
    print(*user.lines(), users.agreement(left_out), users.as_text(table), sep="\n")
    if save and save.suffix == ".csv":
        write_whole(save, lambda draft: table.to_csv(draft, index=False))
    elif save:
        write_text(save, json.dumps({**user.known(), "ranking": users.as_records(table)}, indent=2))


if __name__ == "__main__":
    cli(main, short="columns lm")
