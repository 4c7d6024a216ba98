"""Ask a person which responses are better, choosing questions that tell the most.

    python tools/ask.py --basis results/PRISM/<run>/mixed_logit.safetensors \\
        --pool pairs.jsonl --candidates drafts.jsonl --answers alice.jsonl
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import check_output, has_keys, lock_folder, require
from lore.common.settings import NonNegativeFloat, NonNegativeInt, Port, SeedNumber
from lore.elicitation.choices import Answers, read_candidates, read_pool
from lore.elicitation.criteria import Criterion
from lore.elicitation.page import ask_on_page
from lore.elicitation.session import Session, gather
from lore.elicitation.terminal import Terminal
from lore.elicitation.user import as_text, load_fit
from lore.preparing.own_rows import USUAL, Columns


def main(
    basis: Path, pool: Path, answers: Path = Path("answers.jsonl"), candidates: Path | None = None,
    profile: Path | None = None, user: str = "", columns: Columns = USUAL,
    criterion: Criterion = "d_optimal", tolerance: NonNegativeFloat = 0.5, most: NonNegativeInt = 0,
    page: bool = False, port: Port = 0, seed: SeedNumber = 0, **embedding: Any,
) -> None:  # fmt: skip
    """Ask a person which of two responses is better, and learn what the person likes.

    Every answer is kept at once; the same command goes on where it was stopped. Asking ends when
    more answers would hardly raise the expected accuracy: the chance that the better one of two
    responses is foretold, over pairs of candidates for the same prompt, or over the pool.

    Args:
        basis: basis file of a run, LoRe's or the mixed logit's.
        pool: what may be asked: rows of "prompt" or "messages", and "responses" (a list), or of
            choices in any layout of docs/formats.md, whose preferences are not read.
        answers: the .jsonl file for the answers; choices that are there already count.
        candidates: rank these too: rows of "prompt" or "messages", and "response".
        profile: where weights and ranking go, a .json file; by default beside answers.
        user: whose answers they are; by default the user of the answers file, else "me".
        columns: what the columns of pool and candidates are called, such as --prompt question.
        criterion: what is asked next: what says most ("d_optimal"), or anything ("random").
        tolerance: stop when 20 more questions would raise the expected accuracy by less than
            this many points; 0 goes on to the end of the pool.
        most: stop after this many answers; 0 for no such limit.
        page: ask on a page in the browser, which only this machine can open.
        port: of the page; 0 for a free one.
        seed: of the order in which two responses are shown.
    """
    profile = profile or answers.with_suffix(".profile.json")
    require(profile.suffix == ".json", f"--profile {profile}: end its name in .json")
    require(profile.parent.is_dir(), f"--profile {profile}: there is no folder {profile.parent}")
    inputs = [basis, pool, candidates]
    check_output(profile, "--profile", has_keys("method", "answers", "weights"), inputs)
    require(page or not port, "--port is the page's: give --page too")
    require(answers.parent.is_dir(), f"--answers {answers}: there is no folder {answers.parent}")
    with lock_folder(answers):
        book, pairs, found = Answers(answers, user), read_pool(pool, columns), load_fit(basis)
        offered = read_candidates(candidates, columns) if candidates else []
        about = pairs, offered, gather(found, pairs, book, offered, **embedding), book
        session = Session(found.fit, *about, criterion, tolerance / 100, most, seed)
        if page:
            ask_on_page(session, profile, port)
        else:
            Terminal(session, sys.stdin, sys.stdout).run()
        kept = session.save(profile)
    print(*session.progress, *session.user.lines(), sep="\n")
    if "ranking" in kept:
        print(as_text(kept["ranking"]))
    print(f"answers in {answers}, profile in {profile}")


if __name__ == "__main__":
    cli(main, short="columns lm")
