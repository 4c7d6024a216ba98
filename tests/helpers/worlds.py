"""Tiny raw worlds in each dataset's own schema, the same for the same seed, for all tests.

Texts are random words; a taste gives every word a value, and whoever has it prefers the response
whose words are worth most. Users alternate between two tastes.
"""

import functools
import gzip
import importlib.util
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "hazel", "inlet", "jade", "kelp",
    "lotus", "maple", "nectar", "olive", "pearl", "quartz", "river", "sage", "tulip", "umber",
    "velvet", "willow", "yarrow", "zephyr",
)  # fmt: skip
SCORERS = (
    "gemma_2b", "gemma_7b", "mistral_raft", "llama3_sfairx", "oasst_deberta_v3", "beaver_7b",
    "oasst_pythia_7b", "oasst_pythia_1b", "mistral_ray", "mistral_weqweasdas",
)  # fmt: skip
TURNS = ("first", "second", "third", "fourth")


class _World:
    """Random texts, and what tastes make of them."""

    def __init__(self, seed: int = 0, tastes: int = 2) -> None:
        self.rng = np.random.default_rng(seed)
        self.values = self.rng.standard_normal((tastes, len(WORDS)))

    def text(self, words: int = 6) -> str:
        return " ".join(self.rng.choice(WORDS, words))

    def question(self) -> str:
        return f"what of {self.text(3)}?"

    def texts(self, count: int) -> list[str]:
        """Distinct texts."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.text()] = None
        return list(found)

    def score(self, taste: int, text: str) -> float:
        return float(np.mean([self.values[taste, WORDS.index(word)] for word in text.split()]))

    def best(self, taste: int, texts: Sequence[str]) -> int:
        return int(np.argmax([self.score(taste, text) for text in texts]))


def personalllm(folder: Path, *, train: int = 24, test: int = 8) -> Path:
    """PersonalLLM: prompts with eight responses, each with ten scores (train and test.parquet)."""
    world = _World(tastes=len(SCORERS))
    for split, prompts in {"train": train, "test": test}.items():
        rows = []
        for number in range(prompts):
            rows.append({"prompt": f"{split} {number}: {world.question()}"})
            for i, response in enumerate(world.texts(8), start=1):
                rows[-1][f"response_{i}"] = response
                for taste, scorer in enumerate(SCORERS):
                    rows[-1][f"response_{i}_{scorer}"] = world.score(taste, response)
        write(folder / f"{split}.parquet", rows)
    return folder


def tldr(folder: Path, *, workers: int = 6, annotations: int = 30) -> Path:
    """Reddit TLDR: train and validation.jsonl.gz, ``annotations`` of each worker in either."""
    world = _World()
    texts = [f"post {number} on {world.text(4)}" for number in range(12)]
    summaries = [world.texts(6) for _ in texts]
    for split, name in {"train": "train", "validation": "valid2"}.items():
        rows = []
        for number in range(workers * annotations):
            worker, post = number % workers, int(world.rng.integers(len(texts)))
            pair = list(map(str, world.rng.permutation(summaries[post])[:2]))
            rows.append({
                "info": {"id": f"t3_{post}", "post": texts[post], "title": f"title {post}",
                         "subreddit": "r", "site": None, "article": None},
                "summaries": [{"text": text, "policy": "sup4", "note": None} for text in pair],
                "choice": world.best(worker % 2, pair), "worker": f"w{worker:02d}",
                "batch": "batch0", "split": name, "extra": {"confidence": None},
            })  # fmt: skip
        write(folder / f"{split}.jsonl.gz", rows)
    return folder


def prism(folder: Path, *, users: int = 8, dialogues: int = 6) -> Path:
    """PRISM: survey and conversations.jsonl; user i has dialogues + i % 3 dialogues."""
    world, survey, conversations = _World(), [], []
    for user in range(users):
        count, name = dialogues + user % 3, f"user{user}"
        survey.append({"user_id": name, "num_completed_conversations": count, "age": "25-34"})
        for _ in range(count):
            history = _prism_history(world, user % 2, int(world.rng.integers(1, 4)))
            conversations.append({
                "conversation_id": f"c{len(conversations)}", "user_id": name,
                "conversation_type": "unguided", "opening_prompt": history[0]["content"],
                "conversation_turns": history[-1]["turn"] + 1, "conversation_history": history,
                "open_feedback": "",
            })  # fmt: skip
    write(folder / "survey.jsonl", survey)
    write(folder / "conversations.jsonl", conversations)
    return folder


def _prism_history(world: _World, taste: int, turns: int) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    for turn in range(turns):
        history.append({"turn": turn, "role": "user", "content": world.question()})
        responses = world.texts(2 if turn else 4)
        best = world.best(taste, responses)
        for i, response in enumerate(responses):
            message = {"turn": turn, "role": "model", "content": response, "model_name": f"m{i}"}
            scores = {"score": 90 if i == best else 40, "if_chosen": i == best}
            history.append({**message, **scores, "within_turn_id": i})
    return history


def community(
    folder: Path, *, annotators: int = 6, conversations: int = 12, languages: str = "en fr"
) -> Path:
    """Community Alignment: train.parquet, one to four turns, ``annotators`` for each language.

    Every third conversation opens with one of four prompts of its language, whose candidates are
    the same for everybody; annotator i has conversations + i % 3 of them.
    """
    world, rows = _World(), []
    for language in languages.split():
        shared = [(f"{language} {world.question()}", world.texts(4)) for _ in range(4)]
        for annotator in range(annotators):
            for number in range(conversations + annotator % 3):
                opening = None if number % 3 else shared[number % 4]
                name = {"annotator_id": f"{language}{annotator}", "assigned_lang": language}
                row = {"conversation_id": f"conv{len(rows)}", **name}
                rows.append(row | _community_turns(world, annotator % 2, opening))
    write(folder / "train.parquet", rows)
    return folder


def _community_turns(
    world: _World, taste: int, opening: tuple[str, list[str]] | None
) -> dict[str, Any]:
    count, row = int(world.rng.integers(1, 5)), {}
    for number, turn in enumerate(TURNS):
        drawn = world.question(), world.texts(4)
        ask, answers = opening if opening and number == 0 else drawn
        cells = [ask, *answers, f"response_{'abcd'[world.best(taste, answers)]}", "it is better"]
        names = ["prompt", *(f"response_{x}" for x in "abcd"), "preferred_response", "feedback"]
        for name, cell in zip(names, cells, strict=True):
            row[f"{turn}_turn_{name}"] = cell if number < count else "EMPTY STRING"
    about = ("age", "gender", "education_level", "political", "ethnicity", "country")
    row |= {f"annotator_{name}": "EMPTY STRING" for name in about}
    flags = {"in_balanced_subset": False, "in_balanced_subset_10": False}
    return {**row, "is_pregenerated_first_prompt": opening is not None, **flags}


def rewardbench(folder: Path, *, users: int = 6, comparisons: int = 9, seed: int = 0) -> Path:
    """PersonalRewardBench's PRISM half: train, validation and test.parquet, a third of the users
    in each; a third of each user's rows is val and a third is test.

    User i has comparisons + i % 3 rows. A dialogue of two turns gives every third row.
    """
    world, rows = _World(seed), {"train": [], "validation": [], "test": []}
    for user in range(users):
        for number in range(comparisons + user % 3):
            context = [{"content": world.question(), "role": "user"}]
            if number % 3 == 2:
                context += [{"content": world.text(), "role": "model"},
                            {"content": f"and of {world.text(3)}?", "role": "user"}]  # fmt: skip
            pair = world.texts(2)
            best = world.best(user % 2, pair)
            rows[list(rows)[user % 3]].append({
                "conversation_id": f"c{user}.{number}", "user_id": f"user{user}",
                "context": context, "chosen": {"content": pair[best], "role": "model"},
                "rejected": {"content": pair[1 - best], "role": "model"},
                "turns": len(context) // 2 + 1, "split": ("train", "val", "test")[number % 3],
                "flip": bool(number % 2), "reasoning_judge": world.text(), "agreement": 0.5,
            })  # fmt: skip
    for name, some in rows.items():
        write(folder / f"{name}.parquet", some)
    return folder


def own_rows(users: int = 6, count: int = 12, winner: bool = False) -> list[dict[str, Any]]:
    """Rows of OwnData: chosen and rejected, or two responses and the winner.

    Half of the users mostly like long responses; pairs recur among users, prompts among pairs.
    """
    rng, rows = random.Random(0), []
    for number in range(count):
        pair = [f"answer {number}", f"a longer answer {number}"]
        for user in range(users):
            best = int(rng.random() >= (0.2 if user % 2 else 0.8))
            rows.append({"user": f"u{user}", "prompt": f"prompt {number % 5}"})
            if winner:
                rows[-1] |= dict(response_a=pair[0], response_b=pair[1], preferred="ab"[best])
            else:
                rows[-1] |= dict(chosen=pair[best], rejected=pair[1 - best])
    return rows


def own(folder: Path, **size: Any) -> Path:
    """OwnData: mine.jsonl, see ``own_rows``."""
    write(folder / "mine.jsonl", own_rows(**size))
    return folder


# The smallest worlds, for what can be wrong with a raw row.
SMALL = {
    "PersonalLLM": (personalllm, {"train": 3, "test": 1}),
    "RedditTLDR": (tldr, {"workers": 2, "annotations": 2}),
    "PRISM": (prism, {"users": 3, "dialogues": 2}),
    "CommunityAlignment": (community, {"annotators": 2, "conversations": 3, "languages": "en"}),
    "PersonalRewardBench": (rewardbench, {"users": 3, "comparisons": 3}),
    "OwnData": (own, {"users": 2, "count": 2}),
    "OwnData votes": (own, {"users": 2, "count": 2, "winner": True}),
}


@functools.cache
def small(name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of each raw table of a dataset's smallest world."""
    write, size = SMALL[name]
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), **size).iterdir()
        return {file.name.split(".")[0]: read(file) for file in files}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a raw table."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a raw table in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def edit(path: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change a raw table's rows in place, all of them by one function."""
    rows = read(path)
    change(rows)
    write(path, rows)


def script(name: str) -> ModuleType:
    """A script as a module, such as "PRISM/prepare.py"; its ``main`` is not run."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def comparisons(prepared: Path) -> pd.DataFrame:
    """A prepared dataset's comparisons, chosen and rejected being the conversations themselves."""
    table = pd.read_parquet(prepared / "comparisons.parquet")
    messages = pq.read_table(prepared / "conversations.parquet")["messages"].to_pylist()
    for name in ("chosen", "rejected"):
        table[name] = [messages[row] for row in table[name]]
    return table


def prepare(name: str, source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Run a dataset's prepare.py within this process; what prepare.json says."""
    script(f"{name}/prepare.py").main(source=str(source), out=out, **settings)
    return json.loads((out / "prepare.json").read_text())


def as_tuples(table: pd.DataFrame, columns: Sequence[str]) -> list[tuple]:
    """What ``comparisons`` gives as sorted tuples: these columns, chosen and rejected as JSON."""
    talks = {name: table[name].map(json.dumps) for name in ("chosen", "rejected")}
    return sorted(table[list(columns)].assign(**talks).itertuples(index=False, name=None))
