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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.common.cli import cli
from lore.common.files import InputError, check_output, digest, require, write_whole
from lore.common.settings import PositiveInt, SeedNumber
from lore.preparing.tables import Funnel, draw

OUT = Path(__file__).resolve().parents[1] / "RedditTLDR" / "data-ukp" / "raw"
ANSWERS = {"a1": 0, "a2": 1, "equal": None}
SPLITS = {"train": "train", "validation": "valid"}
OF_A_PAIR = ("id", "debateMetaData/title", "arg1/stance", "arg1/text", "arg2/text")


class Judgment(NamedTuple):
    """One worker's answer: the first (0) or the second (1) argument, None for neither."""

    topic: str  # name of the file
    pair: str
    worker: str
    title: str
    stance: str
    texts: list[str]  # two
    choice: int | None

    @property
    def unit(self) -> str:
        """Names the two texts, in either order; some stand in the corpus under two numbers."""
        return digest([self.title, self.stance, *sorted(self.texts)])


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
    judgments, funnel = [judgment for file in files for judgment in read(file)], Funnel()
    kept = keep(judgments, min_judgments, funnel, ties)
    units = {judgment.unit for judgment in kept}
    train = draw(units, (len(units) + 1) // 2, seed)
    workers = sorted({judgment.worker for judgment in kept})
    names = {worker: f"w{number:03d}" for number, worker in enumerate(workers)}
    paths = {split: out / f"{split}.jsonl.gz" for split in SPLITS}
    for path in paths.values():
        check_output(path, "--out", is_ours)
    for split, path in paths.items():
        side = [each for each in kept if (each.unit in train) == (split == "train")]
        rows = sorted((row(each, names, split) for each in side), key=json.dumps)
        funnel.count(f"judgments in {split}", len(rows))
        lines = "".join(json.dumps(each) + "\n" for each in rows).encode()
        compressed = gzip.compress(lines, mtime=0)  # the same bytes for the same rows
        write_whole(path, lambda draft, data=compressed: draft.write_bytes(data))
    print(funnel.lines())
    print(f"wrote {len(kept):,} judgments of {len(workers):,} workers to {out}")


def read(file: Path) -> list[Judgment]:
    """The judgments in a file; InputError for damaged XML, or a pair that lacks something."""
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{file} is not valid XML: {error}") from error
    judgments = []
    for number, pair in enumerate(root.iter("annotatedArgumentPair"), start=1):
        place = f"{file} pair {number}"
        name, title, stance, *texts = (content(pair, path, place) for path in OF_A_PAIR)
        for answer in pair.iterfind("mTurkAssignments/mTurkAssignment"):
            worker, value = (content(answer, path, place) for path in ("turkID", "value"))
            require(value in ANSWERS, f"{place}: value must be a1, a2 or equal, not {value!r:.40}")
            found = Judgment(file.stem, name, worker, title, stance, texts, ANSWERS[value])
            judgments.append(found)
    return judgments


def content(element: ElementTree.Element, path: str, place: str) -> str:
    """The text of an element below another."""
    found = (element.findtext(path) or "").strip()
    require(bool(found), f"{place} has no {path}")
    return found


def keep(
    judgments: Sequence[Judgment], min_judgments: int, funnel: Funnel, ties: bool
) -> list[Judgment]:
    """The judgments, decided or with ties all, of the workers with enough decided ones."""
    decided = [judgment for judgment in judgments if judgment.choice is not None]
    sizes = Counter(judgment.worker for judgment in decided)
    some = judgments if ties else decided
    kept = [judgment for judgment in some if sizes[judgment.worker] >= min_judgments]
    pairs = {judgment.pair for judgment in kept}
    busy = f"workers with at least {min_judgments} decided judgments"
    funnel.count("topics and positions", len({judgment.topic for judgment in judgments}))
    funnel.count("judgments", len(judgments))
    funnel.count("workers", len({judgment.worker for judgment in judgments}))
    funnel.count("decided judgments", len(decided))
    funnel.count(busy, len({judgment.worker for judgment in kept}))
    funnel.count("judgments of these workers", len(kept))
    funnel.count("argument pairs", len(pairs))
    funnel.count("arguments", len({name for pair in pairs for name in pair.split("_")}))
    require(bool(kept), f"no worker has {min_judgments} decided judgments; lower --min-judgments")
    return kept


def row(judgment: Judgment, names: dict[str, str], split: str) -> dict[str, object]:
    """A judgment as a row of the comparisons in openai/summarize_from_feedback."""
    post = f"{judgment.title} Position: {judgment.stance}."
    info = {"id": judgment.pair, "post": post, "title": judgment.title}
    summaries = [{"text": text, "policy": "human", "note": None} for text in judgment.texts]
    return {
        "info": {**info, "subreddit": None, "site": None, "article": None},
        "summaries": summaries, "choice": judgment.choice, "worker": names[judgment.worker],
        "batch": judgment.topic, "split": SPLITS[split],
        "extra": {"confidence": None, **({"tie": True} if judgment.choice is None else {})},
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
