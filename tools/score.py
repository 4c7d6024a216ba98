"""Rewards of conversations or candidate responses for known users of a basis.

    python tools/score.py --basis results/PRISM/<run>/mixed_logit.safetensors --user ann bob \\
        --texts drafts.jsonl
"""

import sys
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import begins, check_output, require, write_whole
from lore.elicitation.choices import read_candidates
from lore.elicitation.scoring import Scorer
from lore.elicitation.user import ranking
from lore.embeddings.reward_model import OF_BASIS, ModelChoice
from lore.methods.saved import load_learned
from lore.preparing.own_rows import USUAL, Columns


def main(
    basis: Path, user: tuple[str, ...] = (), texts: Path | None = None, average: bool = False,
    list_users: bool = False, columns: Columns = USUAL, lm: ModelChoice = OF_BASIS,
    out: Path | None = None, progress: bool = True, **loading: Any,
) -> None:  # fmt: skip
    """Print the rewards of known users, each prompt's best response first.

    Rewards are log odds, less the mean over the conversations that the basis was learned on: the
    probability that one response is preferred to another is sigmoid(reward - other reward). The
    standard deviation is what the user's own choices leave open, where the file knows it.

    Args:
        basis: basis file of a run, or mixed_logit file.
        user: names of users of the file.
        texts: a file with "prompt" or "messages", and "response" (one text or a list); or with
            "messages" alone, which end in the response.
        average: score for the average user too, with how far users lie apart.
        list_users: print the names of the file's users and do nothing else.
        columns: what the columns are called, such as --response answer.
        lm: the reward model.
        out: write the table to this .csv or .jsonl file instead.
        progress: show a progress bar.
    """
    learned = load_learned(basis)
    if list_users:
        print("\n".join(learned.names))
        return
    users = {name: name for name in user} | ({"average user": None} if average else {})
    require(bool(users), "--user is missing: name users, or give --average true")
    for known in users.values():
        learned.direction(known, "--user")  # an error for one who is not in the file
    require(texts is not None, "--texts is missing: name the file of what is to be scored")
    if out:
        require(out.suffix in (".csv", ".jsonl"), f"--out {out}: end its name in .csv or .jsonl")
        head = "user,line,prompt,place" if out.suffix == ".csv" else '{"user":'
        check_output(out, "--out", begins(head), [basis, texts])
    drafts = read_candidates(texts, columns)
    scorer = Scorer(learned, basis, lm=lm, **loading)
    rows = scorer.embed(drafts, progress)
    tables = {name: ranking(drafts, *scorer.score(rows, known)) for name, known in users.items()}
    table = pd.concat(tables, names=["user", None]).reset_index("user").drop(columns="p_over_next")
    if out is None:
        print(table.to_string(index=False, max_colwidth=60, float_format="%.3f", na_rep=""))
    elif out.suffix == ".csv":
        write_whole(out, lambda draft: table.to_csv(draft, index=False))
    else:
        lines = {"orient": "records", "lines": True, "force_ascii": False}
        write_whole(out, lambda draft: table.to_json(draft, **lines))


if __name__ == "__main__":
    cli(main, short="columns lm")
