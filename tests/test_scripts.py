"""Every dataset's scripts from the raw world to table and plots, as a user runs them."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import models
import running
import worlds
from conftest import WORLDS, Dataset
from running import Outcome, table
from utils import load_basis

QUICK = {"iterations": 60, "few_shot_iterations": 60, "progress": "false"}
TRAIN = {
    "PersonalLLM": {"users": 20, "unseen_users": 10, "pairs_per_user": 12, "few_shot_pairs": 5,
                    "ranks": [0, 1, 2, 3], "seeds": [0, 1]},
    "RedditTLDR": {"pairs_per_user": 12, "few_shot_pairs": 5, "ranks": [0, 1, 2, 3],
                   "seeds": [0, 1], "shrinkage": [0, 3]},
    "PRISM": {"ranks": [0, 1, 2, 3], "alpha": [0, 1e4]},
    "CommunityAlignment": {"ranks": [2, 3], "select_rank": "true"},
}  # fmt: skip
SWEEP = {
    "PersonalLLM": {"users": 20, "unseen_users": 10, "pairs_per_user": 12, "shots": [2, 5, 9],
                    "trials": 3, "ranks": 3},
    "RedditTLDR": {"shots": [2, 5, 9], "trials": 3, "ranks": 3},
    "PRISM": {"shots": [1, 2], "trials": 3, "ranks": [2, 3]},
    "CommunityAlignment": {"shots": [1, 3], "trials": 3, "ranks": 3},
}  # fmt: skip
SCRIPTS = sorted(
    str(path.relative_to(running.ROOT))
    for path in running.ROOT.glob("*/*.py")
    if path.parent.name in WORLDS and "experiments.cli(main)" in path.read_text()
)


class Run(NamedTuple):
    """A script's finished run."""

    outcome: Outcome
    folder: Path


@pytest.fixture(scope="session")
def finished(dataset: Callable[[str], Dataset], tmp_path_factory) -> Callable[[str, str], Run]:
    """A dataset's train_basis or vary_fewshot, run once in a process of its own."""

    @functools.cache
    def get(name: str, script: str) -> Run:
        results = tmp_path_factory.mktemp("results")
        settings = (TRAIN if script == "train_basis" else SWEEP)[name]
        where = {"data": dataset(name).data, "results": results, "run": "here"}
        outcome = running.run(f"{name}/{script}.py", {**where, **settings, **QUICK})
        return Run(outcome, results / name / "here")

    return get


def rows(run: Run) -> list[dict[str, str]]:
    """The lines of results.csv."""
    with (run.folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def assert_shows_mean(cell: str, lines: list[dict[str, str]], **where: str) -> None:
    """A table's cell begins with the mean accuracy of some lines of results.csv, in percent."""
    some = [line for line in lines if all(line[k] == v for k, v in where.items())]
    mean = 100 * np.mean([float(line["accuracy"]) for line in some])
    assert float(cell.split()[0]) == pytest.approx(mean, rel=0, abs=0.0502)  # to one decimal


# -------------------------------------------------------------------- The good way


@pytest.mark.parametrize("name", WORLDS)
def test_prepare_and_embed_end_well(dataset, name):
    made = dataset(name)
    for outcome in made.outcomes:
        assert outcome.status == 0, outcome.err
    info = json.loads((made.data / "prepare.json").read_text())
    count = info["counts"]["distinct conversations"]
    last = made.outcomes[-1].out.splitlines()[-1]
    assert f"{count:,} conversations" in last and str(made.data) in last
    printed = made.outcomes[0].out.splitlines()
    for what, number in info["counts"].items():
        assert f"{number:>9,}  {what}" in printed


@pytest.mark.parametrize("name", WORLDS)
def test_train_basis_prints_what_it_saves(finished, name):
    run = finished(name, "train_basis")
    assert run.outcome.status == 0, run.outcome.err
    lines, printed = rows(run), table(run.outcome.out)
    assert {line["label"] for line in lines} == set(printed)
    for label, cells in printed.items():
        for part in ("seen", "unseen"):
            if cells[part]:
                assert_shows_mean(cells[part], lines, label=label, set=part)
    seeds = [str(seed) for seed in TRAIN[name].get("seeds", [0])]
    assert sorted({line["seed"] for line in lines}) == seeds
    assert {line["set"] for line in lines} == {"train", "seen", "few_shot", "unseen"}
    assert "Verdict (" in run.outcome.out


@pytest.mark.parametrize("name", WORLDS)
def test_vary_fewshot_prints_what_it_saves(finished, name):
    run = finished(name, "vary_fewshot")
    assert run.outcome.status == 0, run.outcome.err
    lines, printed = rows(run), table(run.outcome.out)
    assert list(next(iter(printed.values()))) == [f"{s} shots" for s in SWEEP[name]["shots"]]
    for label, cells in printed.items():
        for shots, cell in cells.items():
            assert_shows_mean(cell, lines, label=label, set="unseen", shots=shots.split()[0])
    methods = {"reference", "BT", "LoRe", "own model", "mean weights", "others' weights"}
    assert {line["method"] for line in lines} == methods | {"shuffled shots"}
    assert "Verdict (" in run.outcome.out


@pytest.mark.parametrize("script", ["train_basis", "vary_fewshot"])
@pytest.mark.parametrize("name", WORLDS)
def test_files_lie_where_the_last_line_says(finished, name, script):
    run = finished(name, script)
    last = run.outcome.out.splitlines()[-1]
    plots = re.search(r"\((.*)\)", last).group(1).split(", ")
    assert last.endswith(f": {run.folder}")
    for plot in plots:
        assert (run.folder / plot).read_bytes()[1:4] == b"PNG"
        assert (run.folder / plot).with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    main = "accuracy.png" if script == "train_basis" else "shots.png"
    assert main in plots
    assert run.outcome.out.startswith((run.folder / "table.md").read_text().splitlines()[0])
    assert not list(run.folder.glob("*.part")) and not list(run.folder.glob("state-*"))


@pytest.mark.parametrize("name", WORLDS)
def test_basis_files_name_their_users(finished, name):
    run = finished(name, "train_basis")
    results = json.loads((run.folder / "results.json").read_text())
    files = sorted(run.folder.glob("basis-K*.safetensors"))
    assert len(files) == sum(len(part["bases"]) for part in results["seeds"])
    for file in files:
        basis = load_basis(file)
        part = next(p for p in results["seeds"] if p["seed"] == basis.settings["seed"])
        assert basis.users == part["users"]["seen"]
        assert basis.users_unseen == part["users"]["unseen"]
        assert basis.V.shape[0] == 32 and basis.settings["dataset"] == name
        assert len(basis.W) == len(basis.users) and len(basis.W_unseen) == len(basis.users_unseen)


def test_rank_is_chosen_and_marked(finished):
    run = finished("CommunityAlignment", "train_basis")
    chosen = json.loads((run.folder / "results.json").read_text())["seeds"][0]["chosen"]
    assert chosen["rank"] in (1, 2, 3)
    assert "LoRe, chosen" in table(run.outcome.out)
    told = ", ".join(f"{name} {value:g}" for name, value in chosen.items())
    assert f"Chosen on held-out training comparisons: {told} in 1 repeat" in run.outcome.out


def test_the_same_command_shows_the_same_run_again(finished, dataset, tmp_path):
    run = finished("PRISM", "train_basis")
    copy = shutil.copytree(run.folder.parents[1], tmp_path / "results")
    where = {"data": dataset("PRISM").data, "results": copy, "run": "here"}
    again = running.invoke("PRISM/train_basis.py", {**where, **TRAIN["PRISM"], **QUICK})
    assert again.out == run.outcome.out.replace(str(run.folder.parents[1]), str(copy))


def test_two_repeats_of_a_command_give_the_same_results(finished, dataset, tmp_path):
    run = finished("RedditTLDR", "vary_fewshot")
    where = {"data": dataset("RedditTLDR").data, "results": tmp_path, "run": "here"}
    again = running.run("RedditTLDR/vary_fewshot.py", {**where, **SWEEP["RedditTLDR"], **QUICK})
    assert again.status == 0, again.err
    texts = [(f / "results.csv").read_text() for f in (run.folder, tmp_path / "RedditTLDR/here")]
    assert texts[0] == texts[1]


def test_reports_put_runs_side_by_side(finished):
    names = ("PersonalLLM", "PRISM")
    runs = [finished(name, "train_basis").folder for name in names]
    before = [(folder / "table.md").read_bytes() for folder in runs]
    outcome = running.invoke("reports.py", {}, *map(str, runs))
    assert outcome.status == 0, outcome.err
    assert [(folder / "table.md").read_bytes() for folder in runs] == before
    together = table("\n" + outcome.out.strip().split("\n\n")[-1])
    for name, folder in zip(names, runs, strict=True):
        alone = table(finished(name, "train_basis").outcome.out)
        for part in ("seen", "unseen"):
            cells = {row: columns[f"{folder} {part}"] for row, columns in together.items()}
            expected = {row: alone[row][part].split(" [")[0] for row in alone if row in cells}
            assert {row: cell for row, cell in cells.items() if cell} == expected


# -------------------------------------------------------------------- Published code


def test_the_list_rendering_is_marked_in_every_output(dataset, model, tmp_path):
    data, results = tmp_path / "data", tmp_path / "results"
    raw = {"source": dataset("PRISM").source, "out": data, "rejected": "list"}
    embedding = {"data": data, "model": model, "progress": "false"}
    where = {"data": data, "results": results, "run": "here"}
    steps = [
        ("prepare", raw), ("generate-prism-embeddings", embedding),
        ("train_basis", {**where, "ranks": [0, 1, 2], **QUICK}),
        ("vary_fewshot", {**where, "run": "shots", "shots": [1], "trials": 2, "ranks": 2, **QUICK}),
    ]  # fmt: skip
    for script, settings in steps:
        outcome = running.invoke(f"PRISM/{script}.py", settings)
        assert outcome.status == 0, outcome.err
        if script != "generate-prism-embeddings":  # which has a log line, no table
            assert "WARNING" in outcome.out and "list" in outcome.out
    for folder in ("here", "shots"):
        assert "WARNING" in (results / "PRISM" / folder / "table.md").read_text()


def test_the_published_reference_is_marked(dataset, tmp_path):
    where = {"data": dataset("PRISM").data, "results": tmp_path, "run": "here"}
    settings = {**where, "ranks": [0, 2], "reference": "last_linear", **QUICK}
    outcome = running.invoke("PRISM/train_basis.py", settings)
    assert outcome.status == 0, outcome.err
    assert "WARNING: the reference is the published code's mistaken one" in outcome.out
    right = running.invoke("PRISM/train_basis.py", {**settings, "reference": "head", "run": "b"})
    assert "WARNING" not in right.out
    assert table(right.out)["reference"] != table(outcome.out)["reference"]


# -------------------------------------------------------------------------- Settings


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_explained(script):
    outcome = running.invoke(script, {}, "--help")
    assert outcome.status == 0
    text = re.sub(r"\s+", " ", outcome.out[outcome.out.index("--config") :])
    flags = re.split(r" (?=--[a-z_]+[ .])", text)
    bare = [flag for flag in flags if re.match(r"--\w+ \S+ \(", flag) and ".help" not in flag]
    assert len(flags) > 3 and not bare


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_can_be_written_down_and_read_back(script, tmp_path):
    first = running.invoke(script, {}, "--print_config")
    assert first.status == 0, first.err
    (tmp_path / "config.yaml").write_text(first.out)
    again = running.invoke(script, {"config": tmp_path / "config.yaml"}, "--print_config")
    assert again.out == first.out


def test_config_file_and_optimizer_reach_the_run(dataset, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("ranks: [2]\nlearning_rate: 0.25\nfew_shot_iterations: 20\niterations: 20\n")
    where = {"data": dataset("PRISM").data, "results": tmp_path, "run": "here", "config": config}
    optimizer = {"optimizer": "torch.optim.AdamW", "optimizer.lr": 0.05, "progress": "false"}
    outcome = running.invoke("PRISM/train_basis.py", {**where, "iterations": 10, **optimizer})
    assert outcome.status == 0, outcome.err
    saved = json.loads((tmp_path / "PRISM/here/results.json").read_text())["settings"]["fitting"]
    assert (saved["ranks"], saved["learning_rate"]) == ([2], 0.25)
    assert saved["iterations"] == 10  # the command line wins
    assert "AdamW" in saved["optimizer"] and "lr: 0.05" in saved["optimizer"]


# ---------------------------------------------------------------------- User's mistakes


def refused(outcome: Outcome, *words: str) -> None:
    """One line on stderr that says what is wrong, status 2, no results."""
    line = outcome.err.strip().splitlines()[-1]
    assert outcome.status == 2 and line.startswith("error: ")
    assert "Traceback" not in outcome.err and "Results" not in outcome.out
    for word in words:
        assert word in line


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    """A prepared PRISM to damage."""
    return shutil.copytree(dataset("PRISM").data, tmp_path / "data")


def train(data: Path, **settings: object) -> Outcome:
    where = {"data": data, "results": data.parent / "results"}
    return running.invoke("PRISM/train_basis.py", {**where, **QUICK, "ranks": [0, 2], **settings})


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("script", ["train_basis", "vary_fewshot"])
def test_an_unprepared_folder_is_refused(name, script, tmp_path):
    outcome = running.invoke(f"{name}/{script}.py", {"data": tmp_path / "nothing"})
    refused(outcome, str(tmp_path / "nothing"), "prepare.py")


def test_missing_embeddings_are_refused(copy):
    shutil.rmtree(copy / "embeddings")
    refused(train(copy), "embeddings", "embed")


def test_embeddings_of_other_data_are_refused(copy, dataset):
    shutil.rmtree(copy / "embeddings")
    shutil.copytree(dataset("RedditTLDR").data / "embeddings", copy / "embeddings")
    refused(train(copy), str(copy / "embeddings"), "other conversations")


@pytest.mark.parametrize("damage", ["cut", "rubbish", "missing"])
def test_an_unreadable_shard_is_named(copy, damage):
    shard = next((copy / "embeddings").glob("embeddings-*.safetensors"))
    if damage == "missing":
        shard.unlink()
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[: len(content) // 2] if damage == "cut" else b"{" * len(content))
    refused(train(copy), str(shard))


@pytest.mark.parametrize("ranks", [[0, 40], [0, 9]])  # of 32 features, of 8 seen users
def test_a_rank_too_large_is_refused_before_training(copy, ranks):
    refused(train(copy, ranks=ranks), f"rank {ranks[1]}", "8")
    assert not list((copy.parent / "results").rglob("results.json"))


@pytest.mark.parametrize("flag", [{"device": "cuda:7"}, {"device": "abacus"}])
def test_a_device_that_is_not_there_is_refused(copy, flag):
    refused(train(copy, **flag), "--device", flag["device"])


def test_a_missing_column_is_named(copy):
    worlds.edit(copy / "comparisons.parquet", lambda rows: [row.pop("weight") for row in rows])
    refused(train(copy), "comparisons.parquet", "weight")


def test_more_pairs_than_prompts_are_refused(dataset, tmp_path):
    settings = {"data": dataset("PersonalLLM").data, "results": tmp_path, "pairs_per_user": 25}
    refused(running.invoke("PersonalLLM/train_basis.py", settings), "25", "24", "--pairs-per-user")


def test_without_a_score_head_there_is_no_rank_0(dataset, tmp_path):
    model, data = models.headless(tmp_path / "model"), tmp_path / "data"
    raw = {"source": dataset("PersonalLLM").source, "out": data, "model": model}
    outcome = running.invoke("PersonalLLM/prepare.py", {**raw, "progress": "false"})
    assert outcome.status == 0, outcome.err
    settings = {**TRAIN["PersonalLLM"], **QUICK, "data": data, "results": tmp_path, "seeds": 0}
    refused(running.invoke("PersonalLLM/train_basis.py", settings), "rank 0", "score head")
    outcome = running.invoke("PersonalLLM/train_basis.py", {**settings, "ranks": [1, 2]})
    assert outcome.status == 0, outcome.err
    assert "reference" not in table(outcome.out)
