"""The benchmarks: sides compute the same, and tables follow from what was timed."""

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

import core
import measure
import mixed
import running
import scaling
import side
import threads
import utils
from lore.common.files import InputError
from lore.common.flags import Flags

ROOT = running.ROOT
SIZES = {
    "features": 32, "joint": (12, 4), "ranks": (1, 2), "alternating": (9, 5, 4), "sweep": (2, 3),
    "few_shot": (2, 3, 4, 2), "steps": 3, "few_shot_iterations": 4,
}  # fmt: skip
FLAGS = running.flags({k: list(v) if isinstance(v, tuple) else v for k, v in SIZES.items()})
CASES = core.cases(**SIZES)


@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.name)
def test_plain_loops_compute_what_they_are_timed_against(case):
    ours, plain = (side.answer(case.settings, who) for who in (False, True))
    assert len(ours["seconds"]) == len(plain["seconds"]) == 2  # of three steps
    assert core._deviation({"a": [ours], "b": [plain]}) < 1e-4
    other = side.answer({**case.settings, "seed": 1}, False)
    assert core._deviation({"a": [ours], "b": [plain], "c": [other]}) > 0.1


def test_a_sweep_is_timed_as_one(monkeypatch):
    case, run, found = CASES[5].settings, utils.run_few_shot_vary_shots, []
    monkeypatch.setattr(utils, run.__name__, lambda *args, **more: found.append(run(*args, **more)))
    assert len(side.answer(case, False)["seconds"]) == 1 and found[0].unseen.shape == (3,)
    monkeypatch.setattr(side, "timed", lambda work, device: (work(), 7.0)[1])
    assert side.answer(case, True)["seconds"] == [7.0 * 2]  # of one trial to two
    many = side.answer({**case, "steps": 500}, True)["seconds"]
    assert many == [7.0 * 2 * 500 / side.PLAIN_STEPS]


def test_a_row_follows_from_what_was_timed(monkeypatch):
    first, _, _, alone, together, few = CASES
    assert first.floor_bytes() == 12 * 4 * 32 * 4
    assert few.floor_bytes() == 4 * 15 * 32 * 4 + 4 * 2 * (5 + 10 + 15) * 4 * 2 * 4
    ours = str(core.ROOT)
    medians = {together.name: {ours: 0.006, "there/old": 0.012}, alone.name: {ours: 0.004}}
    monkeypatch.setattr(core, "copy_bandwidth", lambda size, device: size / 0.003)
    row = core._row(together, {ours: [{}]}, medians, [Path("there/old")])
    assert (row["floor ms"], row["ours ms"], row["ours / floor"]) == ("3", "6", "2.0")
    assert (row["ours / alone"], row["old ms"], row["plain ms"]) == ("1.50", "12", "")
    assert core._median([{"seconds": [1, 2]}, {"seconds": [9]}]) == 2


def test_growth_is_the_exponent_over_a_decade_and_a_million_users_are_counted_by_proportion():
    values = np.multiply(20, scaling.FACTORS)
    for power in (0.5, 1.0, 2.0):
        assert scaling._exponent(values, 1e-3 * values**power) == pytest.approx(power)
    found = scaling._account(1_000_000, 50, 4096, 5, "bfloat16", 2e9)
    expected = {
        "comparisons": 50e6, "differences in bfloat16": 409.6, "differences in float32": 819.2,
        "seconds of an iteration": 409.6 / 2, "hours of 1000 iterations": 409.6 / 2 / 3.6,
        "weights and basis, with Adam's state": 60.2,
    }  # fmt: skip
    numbers = {what: float(found[what].split()[0].replace(",", "")) for what in expected}
    assert numbers == pytest.approx(expected, rel=1e-2)


def test_the_file_of_differences_repeats_no_row(tmp_path):
    x = scaling._differences(tmp_path / "x", 5000, 8, "float32")
    assert x.shape == (5000, 8) and (tmp_path / "x").stat().st_size == 5000 * 8 * 4
    assert not torch.equal(x[0], x[4096]) and np.isclose(float(x.std()), 30, rtol=0.05)
    seconds, memory = scaling._streamed(x, 100, 50, 2, "cpu", 3)
    assert seconds > 0 and memory >= 0


@pytest.mark.slow
def test_extra_memory_is_the_process_own():
    before = np.ones(50_000_000)  # 400 MB, which a process started now must not count
    code = "print(measure.extra_memory(lambda: np.ones(10_000_000), 'cpu'))"
    command = [sys.executable, "-c", f"import numpy as np, measure\n{code}"]
    done = subprocess.run(command, cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert len(before) and 70e6 < int(done.stdout) < 90e6, done.stderr


def run(script: str, *flags: str, status: int = 0) -> running.Outcome:
    done = running.invoke(f"benchmarks/{script}", {}, *flags)
    assert done.status == status, done.out + done.err
    return done


def table(printed: str) -> pd.DataFrame:
    """The Markdown table of an output."""
    return pd.DataFrame.from_dict(running.table(f"\n{printed}"), orient="index")


def test_the_flags_of_the_core_make_its_cases_and_a_checkout_has_utils(
    monkeypatch, tmp_path, capsys
):
    with pytest.raises(InputError, match=f"--against {tmp_path}: no utils.py"):
        core.measure(CASES, 1, [tmp_path])
    measure = mock.Mock(return_value=[{"case": "x"}])
    monkeypatch.setattr(core, "measure", measure)
    core.main(**Flags(core.main).read([*FLAGS, "--rounds=1"]))
    measure.assert_called_once_with(CASES, 1, ())
    assert core.note() in capsys.readouterr().out


def within(checkout: str | Path) -> mock.Mock:
    """A side in this process, which needs no imports of its own; it measures no memory."""

    def ask(settings: dict) -> dict:
        fresh = settings.pop("memory", False)
        return {"extra": 7e6} if fresh else side.answer(settings, str(checkout) == "plain")

    found = mock.Mock(ask=ask)
    found.name = str(checkout)
    return found


@pytest.mark.slow
def test_a_side_is_a_process_that_takes_one_case_after_the_other():
    one, few = CASES[0].settings, CASES[5].settings
    there = core.Side(ROOT)
    found, memory, sweep = (there.ask(s) for s in (one, one | {"memory": True}, few))
    there.close()
    here = side.answer(one, False)
    assert len(found["seconds"]) == 2 and len(sweep["seconds"]) == 1 and memory["extra"] >= 0
    assert core._deviation({"there": [found], "here": [here]}) < 1e-4


@pytest.mark.slow
def test_a_model_that_is_missing_is_named(tmp_path):
    done = run("all.py", *FLAGS, f"--model={tmp_path / 'missing'}", status=2)
    assert done.err.splitlines()[-1].startswith("error: ") and "missing" in done.err


@pytest.mark.slow
def test_one_table_holds_core_embedding_and_mixed_logit(monkeypatch, model, tmp_path):
    (tmp_path / "other").symlink_to(ROOT)
    monkeypatch.setattr(core, "Side", within)
    other = [f"--against={tmp_path / 'other'}", "--rounds=1"]
    done = run("all.py", *FLAGS, *other, f"--model={model}", "--texts", "2", "2", "2", "2")
    rows = table(done.out)
    names = [case.name for case in CASES]
    assert list(rows.index[:6]) == names and rows.index[6].startswith("embedding, six summaries")
    ways = ("with its choice", "settings given")
    assert list(rows.index[-2:]) == [f"mixed logit, 12 users x 4, {way}" for way in ways]
    assert re.search(r"^Seconds: embedding \d+, core \d+, mixed logit \d+$", done.out, re.M)
    numbers = rows.replace("", np.nan).astype(float)
    for over, under in (("ours", "floor"), ("plain", "ours")):
        ratio, said = numbers[f"{over} ms"] / numbers[f"{under} ms"], numbers[f"{over} / {under}"]
        assert np.allclose(said, ratio, rtol=0.01, atol=0.06, equal_nan=True)
    assert (numbers["ours ms"] > 0).all() and numbers["floor ms"].notna().all()
    own = numbers.loc[names]
    assert own["other ms"].notna().all() and own["extra MB"].dropna().tolist() == [7] * 5
    assert (own["deviation"].dropna() < 1e-4).all() and own["deviation"].count() == 5
    last, joint = numbers.iloc[-1], numbers.iloc[0]
    assert last["plain ms"] == pytest.approx(1000 * joint["plain ms"], rel=1e-3)


def test_the_speed_of_products_is_counted_in_operations(monkeypatch):
    monkeypatch.setattr(measure, "timed", lambda work, device: (work(), 0.5)[1])
    assert measure.product_speed(torch.float32, "cpu", 10) == 2 * 10**3 / 0.5


@pytest.mark.slow
def test_growth_is_measured_over_a_decade():
    sizes = ["--users=10", "--pairs=3", "--rank=1", "--features=12", "--steps=3"]
    rows = table(run("scaling.py", *sizes).out)
    assert list(rows.index) == ["users", "pairs", "rank", "features"]
    assert list(rows.columns) == [f"x{factor}" for factor in scaling.FACTORS] + ["exponent"]
    assert rows.loc["features", "x10"].startswith("120: ")
    assert rows["exponent"].astype(float).notna().all()


@pytest.mark.slow
def test_the_mixed_logit_is_timed_beside_lore(monkeypatch):
    monkeypatch.setattr(mixed, "MEASURED", 2)
    rows = table(run("mixed.py", "--users=30", "--pairs=8", "--features=12").out)
    assert list(rows.index) == ["F = 12"]
    numbers = rows.drop(columns="chosen").astype(float)
    assert (numbers.iloc[0, :-1] >= 0).all() and "l_mu" in rows["chosen"].iloc[0]


def test_differences_between_threads_are_the_largest_of_any_user():
    one = [{"accuracy": [0.5, 1.0], "log_loss": [0.2, 0.3], "brier": [0.1, 0.1]}]
    other = [{"accuracy": [0.75, 0.75], "log_loss": [0.2, 0.4], "brier": [0.1, 0.1]}]
    found = threads._differences(one, other)
    expected = {"mean accuracy": 0, "accuracy": 0.25, "log_loss": 0.1, "brier": 0}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
