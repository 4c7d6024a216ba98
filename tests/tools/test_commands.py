"""What the commands that read a basis refuse, and the users that they list."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_rewardbench2 import raw_rows

import running
from made_bases import make_basis, make_mixed, write_lines

EXPORT, SCORE, RANK = (f"tools/{name}.py" for name in ("export", "score", "rank_responses"))
EVAL = "PRISM/eval_rb2.py"
UNKNOWN = "is not in the basis, which has 3 users, such as ann"
USUAL: dict[str, dict[str, Any]] = {  # the model of this basis is missing: it is never loaded
    EXPORT: {"basis": "basis", "out": "out"},
    SCORE: {"basis": "basis", "user": "ann", "texts": "drafts.jsonl"},
    RANK: {"basis": "basis", "choices": "choices.jsonl", "candidates": "drafts.jsonl"},
    EVAL: {"source": "bench.jsonl", "model": "model", "results": "out"},
}
REFUSED = [
    (EXPORT, {"users": "bob"}, f"--users bob {UNKNOWN}"),
    (EXPORT, {"users": "ann", "average": "true"}, "exclude each other"),
    (EXPORT, {"out": None}, "--out is missing"),
    (EXPORT, {"out": "taken"}, "already exists"),
    (EXPORT, {"model": "/nowhere/at/all"}, "cannot be loaded"),
    (EXPORT, {"basis": "wide"}, "the basis has 48 features, the model 32"),
    (EXPORT, {"basis": "nameless"}, "name it by --model"),
    (EXPORT, {"basis": "other"}, "--any-model true"),
    (EXPORT, {"basis": "middle"}, "--pool last alone can be exported"),
    (EXPORT, {"basis": "bananas"}, "its unit is 'bananas', not log odds times 100"),
    (SCORE, {"user": "bob"}, f"--user bob {UNKNOWN}"),
    (SCORE, {"user": None}, "--user is missing: name users, or give --average true"),
    (SCORE, {"texts": None}, "--texts is missing"),
    (SCORE, {"out": "found.txt"}, "end its name in .csv or .jsonl"),
    (SCORE, {"out": "drafts.jsonl"}, "is what is to be read"),
    (SCORE, {"out": "thesis.csv"}, "not what this writes"),
    (SCORE, {"model": "/nowhere/at/all"}, "cannot be loaded"),
    (SCORE, {"basis": "middle"}, "by the last token's alone"),
    (RANK, {"save": "found.txt"}, "end its name in .csv or .json"),
    (RANK, {"save": "missing/found.csv"}, "there is no folder missing"),
    (RANK, {"basis": "wide"}, "32 features, the basis 48"),
    (EVAL, {"subset": "Maths"}, "--subset Maths: unknown; the subsets are Factuality, Focus, Math"),
    (EVAL, {"basis": "basis", "users": "dan"}, "--users dan is not in the basis"),
    (EVAL, {"list_users": "true"}, "--users and --list-users belong to --basis"),
    (EVAL, {"head_key": "a"}, "belong to --rm_head"),
    (EVAL, {"save_csv": "thesis.csv"}, "--save-csv thesis.csv: is there and not what this writes"),
    (EVAL, {"save_csv": "wide.npy", "rm_head": "wide.npy"}, "wide.npy: is what is to be read"),
    (EVAL, {"save_csv": "basis", "basis": "basis"}, "--save-csv basis: is what is to be read"),
    (EVAL, {"mode": "seqclf", "basis": "basis"}, "--mode seqclf"),
    (EVAL, {"rm_head": "wide.npy"}, "head 1 has 33 features, embeddings of model have 32"),
    (EVAL, {"model": "/nowhere/at/all"}, "/nowhere/at/all cannot be loaded"),
    (EVAL, {"results": "taken"}, "--results taken/scores.csv: is there and not what this writes"),
    (EVAL, {"results": "read"}, "--results read/scores/reference.json: is there and not what"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """All that the flags above name."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "model").symlink_to(model)
    for name, given in {
        "wide": {"features": 48}, "nameless": {"model": None}, "middle": {"pool": "layer:2"},
        "other": {"weights_sha256": "0" * 64}, "basis": {"model": "/nowhere/at/all"},
    }.items():  # fmt: skip
        make_basis(folder, **{"model": model} | given).rename(folder / name)
    with safe_open(folder / "basis", "pt") as file:
        notes = file.metadata() | {"unit": "bananas"}
    save_file(load_file(folder / "basis"), folder / "bananas", notes)
    make_mixed(folder, None)
    np.save(folder / "wide.npy", np.ones(33))
    asked = {"prompt": "Which?"}
    write_lines(folder / "choices.jsonl", [asked | {"chosen": "a", "rejected": "b"}])
    write_lines(folder / "drafts.jsonl", [asked | {"response": "c"}])
    write_lines(folder / "bench.jsonl", raw_rows())
    (folder / "thesis.csv").write_text("chapter,words\n")
    for name in ("taken/scores.csv", "read/scores/reference.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('{"scores": "of a match"}')
    return folder


@pytest.mark.parametrize(("script", "given", "message"), REFUSED)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(
    folder, monkeypatch, script, given, message
):
    def content() -> dict[Path, bytes]:
        return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    monkeypatch.chdir(folder)
    before, flags = content(), USUAL[script] | given
    done = running.invoke(script, {name: x for name, x in flags.items() if x is not None})
    assert done.status == 2 and done.err.count("error: ") == 1, done.err
    assert message in done.err.splitlines()[-1] and content() == before


@pytest.mark.parametrize("script", [EXPORT, SCORE, EVAL])
def test_users_are_listed(folder, script):
    for name in ("basis", "mixed_logit.safetensors"):
        done = running.invoke(script, {"basis": folder / name, "list_users": "true"})
        assert done.out.split() == ["ann", "17", "new"]
