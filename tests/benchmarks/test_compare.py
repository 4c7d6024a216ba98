"""The comparison: tables from runs whose truth is known, draws of its data, a whole small one."""

import functools
from pathlib import Path

import pytest
import torch

import compare
import comparison_data
import made_results as made
import running
from comparison_data import choose, plant
from lore.common.files import InputError
from lore.experiments import splits

CPU = torch.device("cpu")
NONE = dict.fromkeys(("jokes", "ukp", "prism", "demo"), Path("nowhere"))


def cells(text: str, row: str) -> dict[str, str]:
    """The cells of a row of a Markdown table, by column, of all tables that have the row."""
    tables = [running.table("\n" + part) for part in text.split("\n\n") if part.startswith("|")]
    return dict(cell for table in tables for cell in table.get(row, {}).items())


def test_tables_say_what_finished_runs_hold_and_what_is_not_there(tmp_path, caplog):
    """LoRe's accuracy of seen users is eight points above BT's."""
    parts, sweep = made.results(seeds=2), made.results(seeds=2, sweep=True)
    for whole, more in zip(parts["seeds"], sweep["seeds"], strict=True):
        for method, part in whole["methods"].items():
            part["records"] += more["methods"][method]["records"]
            part["fits"][0] |= {"parameters": 1234, "tried": [{}] * 6}
    made.write(parts, tmp_path / "Toy" / "compare-prism")
    where = {**NONE, "results": tmp_path, "out": tmp_path}
    with caplog.at_level("INFO"):
        compare.main(**where)
    assert "ukp left out: --ukp nowhere is not there" in caplog.text
    text = (tmp_path / "comparison.md").read_text()
    bt, lore = cells(text, "BT"), cells(text, "LoRe K=5")
    assert 66 < float(bt["seen"]) < 74
    mean, gain = lore["seen"].split()[:2]
    assert float(mean) == pytest.approx(float(bt["seen"]) + float(gain.strip("(+")), abs=0.11)
    assert float(gain.strip("(+")) == pytest.approx(8, abs=1)
    assert lore["seen"].split("[")[1].startswith(("7.", "8."))  # no zero in the interval
    assert lore["repeats"] == "2"
    assert (bt["parameters"], bt["tried"], bt["processor s"]) == ("1,234", "6", "1.5")
    assert float(lore["another user's weights"].split()[1].strip("(+")) == pytest.approx(12, abs=1)
    assert (tmp_path / "comparison.svg").stat().st_size < 300_000
    with pytest.raises(InputError, match="nothing to compare"):
        compare.main(**where, only=("ukp",), tables_only=True)


def test_planted_tastes_have_the_spread_asked_for():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(300, 30, generator=g) * torch.linspace(1, 9, 30)
    alike = plant(table, 0.0, 5, torch.Generator().manual_seed(1))
    torch.testing.assert_close(alike, alike[:1].expand(5, -1))
    apart = (alike[0, :150] - alike[0, 150:]).std()
    assert apart == pytest.approx(comparison_data.SHARED, rel=0.15)
    rewards = plant(table, 3.0, 2000, torch.Generator().manual_seed(1))
    own = rewards - rewards.mean(0)
    assert (own[:, :150] - own[:, 150:]).std() == pytest.approx(3.0, rel=0.15)


def test_planted_choices_are_as_likely_as_a_logit_says():
    rows = torch.arange(40).view(10, 4)
    rewards = (torch.arange(40) % 4 * 0.5).expand(300, -1)
    chosen, rejected = choose(rewards, rows, 40, torch.Generator().manual_seed(0))
    assert (chosen // 4 == rejected // 4).all() and (chosen != rejected).all()
    won = (chosen > rejected)[(chosen - rejected).abs() == 2].double().mean()
    assert won == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.02)


@pytest.mark.slow
def test_a_redrawn_prism_is_what_prepare_draws_with_that_seed(dataset):
    data = dataset("PRISM").data
    drawn, given = comparison_data.redrawn(data).draw(0, CPU), splits.given_split(data).draw(0, CPU)
    other = comparison_data.redrawn(data).draw(1, CPU)
    assert drawn.validation is None is given.validation
    for kind in ("train", "few", "seen", "unseen"):
        ours, theirs = getattr(drawn, kind), getattr(given, kind)
        assert ours.names == theirs.names
        rows = (c.features.index[c.features.chosen] for c in (ours, theirs))
        assert torch.equal(*rows)
    assert drawn.train.names != other.train.names


@pytest.mark.slow
def test_responses_held_out_anew_are_new_and_pairs_are_not(dataset):
    data = dataset("RedditTLDR").data
    for by, shared in (("pairs", True), ("responses", False)):
        sets = comparison_data.held_out_anew(data, by).draw(0, CPU)
        known, held = (set(s.features.index.tolist()) for s in (sets.train, sets.seen))
        assert bool(known & held) is shared
        assert comparison_data.held_out_anew(data, by).draw(1, CPU).train.names != sets.train.names


@pytest.mark.slow
def test_one_command_fits_what_is_missing_and_compares(dataset, tmp_path, monkeypatch):
    quick = functools.partial(compare.Lore, iterations=30, few_shot_iterations=20)
    monkeypatch.setattr(compare, "Lore", quick)
    given = {**NONE, "prism": dataset("PRISM").data, "only": ("prism",), "results": tmp_path}
    given |= {"out": tmp_path, "repeats": 1, "methods": ("ridge_bt",)}
    compare.main(**given)
    first = (tmp_path / "PRISM" / "compare-prism" / "results.json").read_text()
    compare.main(**given, faithful=("pebs",))
    assert (tmp_path / "PRISM" / "compare-prism" / "results.json").read_text() == first
    text = (tmp_path / "comparison.md").read_text()
    for label in ("reference", "BT", "own model", "Ridge BT", "PEBS faithful"):
        row = cells(text, label)
        assert row["seen"] and row["2 shots"] and row["repeats"] == "1"
