"""Real people's judgments for the scripts in RedditTLDR: UKPConvArg1 in that dataset's rows.

UKPConvArg1 (Habernal and Gurevych, ACL 2016, CC-BY-4.0) asked crowd workers which of two
arguments for the same position convinces them more. Get it, convert it, prepare it:

    git clone https://github.com/UKPLab/acl2016-convincing-arguments
    python tools/ukpconvarg.py --source acl2016-convincing-arguments/data/UKPConvArg1-full-XML
    cd RedditTLDR; python prepare.py --source data-ukp/raw --out data-ukp
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import InputError, check_output, digest, require, write_whole
from lore.common.settings import PositiveInt, SeedNumber
from lore.preparing.tables import Funnel, halve

OUT = Path(__file__).resolve().parents[1] / "RedditTLDR" / "data-ukp" / "raw"
ANSWERS = {"a1": 0, "a2": 1, "equal": None}
SPLITS = {"train": ("train", "train"), "validation": ("valid", "test")}  # theirs, and of halve
OF_A_PAIR = ("id", "debateMetaData/title", "arg1/stance", "arg1/text", "arg2/text")
COLUMNS = ("topic", "pair", "title", "stance", "texts", "unit", "worker", "answer")


def main(
    source: Path, out: Path = OUT, min_judgments: PositiveInt = 50, ties: bool = False,
    seed: SeedNumber = 0,
) -> None:  # fmt: skip
    """Write the judgments of the workers with many, half of the pairs on either side.

    What a worker judged again, in either order, is written again: on the same side.

    Args:
        source: folder with one XML file per topic and position (UKPConvArg1-full-XML).
        out: folder of train.jsonl.gz and validation.jsonl.gz.
        min_judgments: fewest decided judgments of a worker.
        ties: also write undecided judgments, which RedditTLDR/prepare.py counts and leaves out.
        seed: of the draw of the pairs for training. A pair is on one side whoever judged it.
    """
    files = sorted(source.glob("*.xml"))
    require(bool(files), f"--source {source} has no .xml files; name UKPConvArg1-full-XML")
    every, funnel = [judgment for file in files for judgment in read(file)], Funnel()
    kept = keep(pd.DataFrame(every, columns=COLUMNS), min_judgments, funnel, ties)
    codes, workers = pd.factorize(kept["worker"], sort=True)
    kept = kept.assign(worker=[f"w{code:03d}" for code in codes], side=halve(kept["unit"], seed))
    paths = {split: out / f"{split}.jsonl.gz" for split in SPLITS}
    for path in paths.values():
        check_output(path, "--out", is_ours)
    for split, path in paths.items():
        name, side = SPLITS[split]
        some = kept[kept["side"] == side].to_dict("records")
        rows = sorted((row(judgment, name) for judgment in some), key=json.dumps)
        funnel.count(f"judgments in {split}", len(rows))
        lines = "".join(json.dumps(each) + "\n" for each in rows).encode()
        compressed = gzip.compress(lines, mtime=0)  # the same bytes for the same rows
        write_whole(path, lambda draft, data=compressed: draft.write_bytes(data))
    print(funnel.lines())
    print(f"wrote {len(kept):,} judgments of {len(workers):,} workers to {out}")


def read(file: Path) -> Iterator[tuple[Any, ...]]:
    """The judgments in a file, a row of COLUMNS each: topic is the file's name, and unit names the
    two texts in either order (some stand in the corpus under two numbers). InputError for damaged
    XML, or a pair that lacks something."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{file} is not valid XML: {error}") from error
    for number, pair in enumerate(root.iter("annotatedArgumentPair"), start=1):
        place = f"{file} pair {number}"
        name, title, stance, *texts = (content(pair, path, place) for path in OF_A_PAIR)
        unit = digest([title, stance, *sorted(texts)])
        for answer in pair.iterfind("mTurkAssignments/mTurkAssignment"):
            worker, value = (content(answer, path, place) for path in ("turkID", "value"))
            require(value in ANSWERS, f"{place}: value must be a1, a2 or equal, not {value!r:.40}")
            yield file.stem, name, title, stance, texts, unit, worker, value


def content(element: ElementTree.Element, path: str, place: str) -> str:
    """The text of an element below another."""
    found = (element.findtext(path) or "").strip()
    require(bool(found), f"{place} has no {path}")
    return found


def keep(judgments: pd.DataFrame, least: int, funnel: Funnel, ties: bool) -> pd.DataFrame:
    """The judgments, decided or with ties all, of the workers with enough decided ones."""
    decided = judgments["answer"] != "equal"
    sizes = judgments["worker"][decided].value_counts()
    busy = judgments["worker"].isin(sizes.index[sizes >= least])
    kept = judgments[busy if ties else busy & decided]
    funnel.count("topics and positions", judgments["topic"].nunique())
    funnel.count("judgments", len(judgments))
    funnel.count("workers", judgments["worker"].nunique())
    funnel.count("decided judgments", decided.sum())
    funnel.count(f"workers with at least {least} decided judgments", kept["worker"].nunique())
    funnel.count("judgments of these workers", len(kept))
    funnel.count("argument pairs", kept["pair"].nunique())
    funnel.count("arguments", kept["pair"].str.split("_").explode().nunique())
    require(len(kept) > 0, f"no worker has {least} decided judgments; lower --min-judgments")
    return kept


def row(judgment: dict[str, Any], split: str) -> dict[str, Any]:
    """A judgment as a row of the comparisons in openai/summarize_from_feedback."""
    title, choice = judgment["title"], ANSWERS[judgment["answer"]]
    post = f"{title} Position: {judgment['stance']}."
    info = {"id": judgment["pair"], "post": post, "title": title}
    summaries = [{"text": text, "policy": "human", "note": None} for text in judgment["texts"]]
    return {
        "info": {**info, "subreddit": None, "site": None, "article": None},
        "summaries": summaries, "choice": choice, "worker": judgment["worker"],
        "batch": judgment["topic"], "split": split,
        "extra": {"confidence": None, **({"tie": True} if choice is None else {})},
    }  # fmt: skip


def is_ours(path: Path) -> bool:
    """Whether a file's first row is of these; those of Reddit have a subreddit."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            first = json.loads(next(lines))
        return first["batch"] and first["info"]["post"].startswith(f"{first['info']['title']} Pos")
    except (OSError, EOFError, StopIteration, ValueError, LookupError, TypeError, AttributeError):
        return False


if __name__ == "__main__":
    cli(main)
