"""Every dataset's scripts from the raw world to table and plots, as a user runs them."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from conftest import OWN_PROCESS, WORLDS, Dataset, carry_out, without_plots

import running
from lore.experiments.results import CONTROLS, row_name
from lore.learning.basis import load_basis
from people import repeats
from running import Outcome, table

QUICK = {"iterations": 60, "few_shot_iterations": 60, "progress": "false"}
TRAIN = {
    "PersonalLLM": {"users": 20, "unseen_users": 10, "pairs_per_user": 12, "few_shot_pairs": 5,
                    "ranks": [0, 1, 2, 3], "seeds": [0, 1]},
    "RedditTLDR": {"pairs_per_user": 12, "few_shot_pairs": 5, "ranks": [0, 1, 2, 3],
                   "seeds": [0, 1], "shrinkage": [0, 3]},
    "PRISM": {"ranks": [0, 1, 2, 3], "alpha": [0, 1e4]},
    "CommunityAlignment": {"ranks": [2, 3], "select_rank": "true"},
    "PersonalRewardBench": {"methods": "lore", "ranks": [2, 3]},
}  # fmt: skip
SWEEP = {
    "PersonalLLM": {"users": 20, "unseen_users": 10, "pairs_per_user": 12, "shots": [2, 5, 9],
                    "trials": 3, "ranks": 3},
    "RedditTLDR": {"shots": [2, 5, 9], "trials": 3, "ranks": 3},
    "PRISM": {"shots": [1, 2], "trials": 3, "ranks": [2, 3]},
    "CommunityAlignment": {"shots": [1, 3], "trials": 3, "ranks": 3},
}  # fmt: skip
# Plots and pages take longer than all else, and are drawn from a run's results alone.
DRAWN = [("CommunityAlignment", "train_basis"), OWN_PROCESS]
SEEN_ONLY = WORLDS.keys() - SWEEP.keys()  # datasets in which nobody is new


def quick_and_slow(names: Iterable[str]) -> list:
    """Datasets as parameters of a test, all but PRISM slow."""
    return [n if n == "PRISM" else pytest.param(n, marks=pytest.mark.slow) for n in names]


SCRIPTS = sorted(
    str(path.relative_to(running.ROOT))
    for pattern in ("*.py", "*/*.py")
    for path in running.ROOT.glob(pattern)
    if re.search(r"(?ms)^if __name__ .*^    (cli|command)\(main\b", path.read_text())
)


class Run(NamedTuple):
    """A script's finished run."""

    outcome: Outcome
    folder: Path


@pytest.fixture(scope="session")
def finished(dataset: Callable[[str], Dataset], tmp_path_factory) -> Callable[[str, str], Run]:
    """A dataset's train_basis or vary_fewshot, run once."""

    @functools.cache
    def get(name: str, script: str) -> Run:
        results = tmp_path_factory.mktemp("results")
        settings = (TRAIN if script == "train_basis" else SWEEP)[name]
        where = {"data": dataset(name).data, "results": results, "run": "here"}
        drawing = contextlib.nullcontext() if (name, script) in DRAWN else without_plots()
        with drawing:
            outcome = carry_out(name, script, {**where, **settings, **QUICK})
        return Run(outcome, results / name / "here")

    return get


def rows_of(run: Run) -> pd.DataFrame:
    """The lines of results.csv, each with the row of the table that shows it."""
    lines = pd.read_csv(run.folder / "results.csv", keep_default_na=False)
    return lines.assign(row=[*map(row_name, lines["label"], lines["control"])])


def assert_shows_means(printed: dict, lines: pd.DataFrame, column: str) -> None:
    """A cell of the table begins with the mean accuracy in percent of its lines."""
    for (row, name), some in lines.groupby(["row", column]):
        shown, mean = printed[row][name].split()[0], some["accuracy"].astype(float).mean()
        assert float(shown) == pytest.approx(100 * mean, rel=0, abs=0.0502)


def assert_ended_well(run: Run, name: str, script: str) -> None:
    """Verdict, tables and plots are where the last line says."""
    assert run.outcome.status == 0, run.outcome.err
    last, out = run.outcome.out.splitlines()[-1], run.outcome.out
    assert last.endswith(f": {run.folder}") and "\nVerdict:" in out
    assert out.startswith((run.folder / "table.md").read_text().splitlines()[0])
    if (name, script) in DRAWN:
        plots = re.search(r"\((.*)\)", last).group(1).split(", ")
        assert ("accuracy.png" if script == "train_basis" else "shots.png") in plots
        for plot in plots:
            assert (run.folder / plot).read_bytes()[1:4] == b"PNG"
            assert (run.folder / plot).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", quick_and_slow(WORLDS))
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


@pytest.mark.parametrize("name", quick_and_slow(WORLDS))
def test_train_basis_prints_what_it_saves(finished, name):
    run = finished(name, "train_basis")
    assert_ended_well(run, name, "train_basis")
    lines, printed = rows_of(run), table(run.outcome.out)
    assert set(lines["row"]) == set(printed)
    assert_shows_means(printed, lines[lines["set"].isin(["seen", "unseen"])], "set")
    assert set(lines["seed"]) == {*TRAIN[name].get("seeds", [0])}
    sets = {"train", "seen"} | (set() if name in SEEN_ONLY else {"few_shot", "unseen"})
    assert set(lines["set"]) == sets
    columns = sets - {"few_shot"} | ({"overall"} if "unseen" in sets else set())
    assert set(printed["reference"]) == columns
    bases = [load_basis(file) for file in run.folder.glob("basis-*.safetensors")]
    assert bases and {basis.settings["dataset"] for basis in bases} == {name}
    assert ("LoRe, chosen" in printed) == (name in ("CommunityAlignment", "PersonalRewardBench"))


@pytest.mark.parametrize("name", quick_and_slow(SWEEP))
def test_vary_fewshot_prints_what_it_saves(finished, name):
    run = finished(name, "vary_fewshot")
    assert_ended_well(run, name, "vary_fewshot")
    lines, printed = rows_of(run), table(run.outcome.out)
    columns = {s: f"{s} shot{'s' * (s != 1)}" for s in SWEEP[name]["shots"]}
    assert list(printed["BT"]) == [*columns.values()]
    assert printed.keys() - {*lines["row"]} == {"users with at least that many shots"}
    new = lines[lines["set"] == "unseen"]
    assert_shows_means(printed, new.assign(column=new["shots"].astype(int).map(columns)), "column")
    assert set(lines["method"]) == {"reference", "bt", "own", "ridge_bt", "lore"}
    assert set(lines["control"]) == {"", *CONTROLS}


@pytest.mark.slow
@pytest.mark.usefixtures("no_plots")
def test_two_repeats_of_a_command_give_the_same_results(finished, dataset, tmp_path):
    run = finished("RedditTLDR", "vary_fewshot")
    where = {"data": dataset("RedditTLDR").data, "results": tmp_path, "run": "here"}
    again = running.invoke("RedditTLDR/vary_fewshot.py", {**where, **SWEEP["RedditTLDR"], **QUICK})
    assert again.status == 0, again.err
    assert repeats(run.folder) == repeats(tmp_path / "RedditTLDR/here")


def test_every_script_is_found():
    scripts = {f"{name}/{script}.py" for name in WORLDS for script in ("prepare", "train_basis")}
    assert scripts | {"tools/report.py", "PRISM/eval_rb2.py", "tools/export.py"} < set(SCRIPTS)


def test_settings_can_be_written_down_and_read_back(tmp_path):
    script = "PRISM/train_basis.py"
    first = running.invoke(script, {"ranks": [2, 3], "alpha": 1.5}, "--print_config")
    assert first.status == 0, first.err
    (tmp_path / "config.yaml").write_text(first.out)
    again = running.invoke(script, {"config": tmp_path / "config.yaml"}, "--print_config")
    assert again.out == first.out and "1.5" in first.out
