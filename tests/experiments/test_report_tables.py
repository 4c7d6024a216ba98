"""Tables, differences, verdict and plots, made from made-up runs whose truth is known."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_results as made
import running
from lore.common.files import InputError
from lore.experiments.report import intervals, plots, tables, verdict
from lore.experiments.results import Results, read_results

MEANS = {"train": 0.9, "seen": 0.8, "unseen": 0.77}
TOY = ("toy", True, {"strength": 3.0}, MEANS)
WRITE_PLOTS = plots.write_plots
OWN = ("LoRe K=5", "")
FEW = {name: made.LABELS[name] for name in ("BT", "LoRe K=5")}
Rows = dict[str, dict[str, str]]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Reports without plots and pages, which take most of the time and have their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "write_plots", lambda *_: ["no-plot"])
        patch.setattr(tables, "write_report", lambda *_: None)
        yield


class Report(NamedTuple):
    """What a report says, its tables by the line above each, and where it lies."""

    text: str
    blocks: dict[str, Rows]
    folder: Path

    def table(self, start: str) -> Rows:
        return next(rows for caption, rows in self.blocks.items() if caption.startswith(start))

    @property
    def csv(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "results.csv", keep_default_na=False, dtype=str)


def report(results: made.Made, folder: Path, *labels: str) -> Report:
    text = tables.report(made.write(results, folder), labels)
    parts = text.split("\n\n")
    pairs = zip(parts, parts[1:], strict=False)
    blocks = {above: running.table(f"\n{part}") for above, part in pairs if part.startswith("|")}
    return Report(text, blocks, folder)


def read(results: made.Made, folder: Path) -> Results:
    """A run as reports see it."""
    return read_results(made.write(results, folder))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, quick) -> Report:
    """A run of one repeat as it is made."""
    return report(made.results(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory, quick) -> Report:
    """A sweep of sixty users as it is made."""
    return report(made.results(sweep=True, users=60), tmp_path_factory.mktemp("swept"))


def figures(results: made.Made, label: str, name: str, key: str, seed: int = 0) -> np.ndarray:
    """The users' figures under a label's own states."""
    some = made.records({"seeds": [results["seeds"][seed]]})
    place = (label, "", name)
    return next(np.array(r[key]) for r in some if (r["label"], r["control"], r["set"]) == place)


def shift(
    results: made.Made, mean: float, label: str, control: str = "", measure: str = "accuracy"
) -> None:
    """Move a label's figures to a mean."""
    for r in made.records(results):
        if (r["label"], r["control"]) == (label, control):
            moved = np.array(r[measure]) + mean - np.mean(r[measure])
            r[measure] = moved.clip(0, 1 if measure == "accuracy" else None).tolist()


# ----------------------------------------------------------------------- Tables


def test_every_label_and_control_has_its_figures_in_the_order_written(plain):
    results = made.results()
    names = ["Accuracy", "Log loss", "Differences of accuracy", "Differences of log loss"]
    names += ["Accuracy by how unusual a user is"]
    assert [name.split(" (")[0] for name in plain.blocks] == names
    accuracy, log_loss, differences, losses, _ = plain.blocks.values()
    controls = [": population average", ": another user's weights", ": shuffled labels"]
    baselines = ["reference", "BT", "Ridge BT", "own model"]
    rows = baselines + [f"LoRe K={k}{c}" for k in (2, 5) for c in ("", *controls)]
    assert list(accuracy) == list(log_loss) == rows
    for name in ("seen", "unseen", "train"):
        users = [figures(results, "LoRe K=5", name, key) for key in ("accuracy", "log_loss")]
        assert accuracy["LoRe K=5"][name].startswith(f"{100 * users[0].mean():.1f} [")
        assert log_loss["LoRe K=5"][name].startswith(f"{users[1].mean():.3f} [")
    both = [figures(results, "BT", name, "accuracy").mean() for name in ("seen", "unseen")]
    assert accuracy["BT"]["overall"].startswith(f"{100 * np.mean(both):.1f} [")
    against = ("BT", "population average", "another user's weights", "reference", "Ridge BT")
    rows = [("BT", "reference"), ("Ridge BT", "BT"), ("Ridge BT", "reference")]
    rows += [("own model", "BT"), ("own model", "reference")]
    rows += [(f"LoRe K={k}", other) for k in (2, 5) for other in against]
    assert list(differences) == list(losses) == [f"{a} minus {b}" for a, b in rows]
    assert any("ln 2 = 0.693" in name for name in plain.blocks)  # the coin's log loss
    assert set(plain.csv.shots) == {""}
    found = read_results(plain.folder)
    assert [label for label in found.labels if found.is_baseline(label)] == baselines
    assert found.judged == ["LoRe K=5"] and found.title == "Toy, Tiny-Reward: LoRe"


def test_where_nobody_is_new_a_report_is_of_seen_users_alone(tmp_path):
    results = made.results()
    for repeat in results["seeds"]:
        repeat["users"]["unseen"] = []
        for part in repeat["methods"].values():
            part["records"] = [r for r in part["records"] if r["set"] in ("train", "seen")]
    text = report(results, tmp_path).text
    assert "unseen" not in text and "overall" not in text
    run = read_results(tmp_path)
    assert [one[:2] for one in verdict.verdicts(run)] == [("LoRe K=5", "seen users")]
    assert [panel.name for panel in plots.measure_panels(run)] == ["seen users"] * 2


def test_a_sweep_has_a_column_for_each_number_of_shots(swept, plain, tmp_path):
    accuracy, differences = swept.table("Accuracy (percent)"), swept.table("Differences of acc")
    enough = {"0 shots": "60", "1 shot": "59", "5 shots": "55", "50 shots": "10"}
    assert list(accuracy["BT"]) == list(differences["LoRe K=5 minus BT"]) == list(enough)
    assert accuracy["users with at least that many shots"] == enough
    assert all(re.search(r" \[[\d.]+, [\d.]+\]$", cell) for cell in accuracy["LoRe K=5"].values())
    assert "a shot is one of a user's dialogues" in swept.text.splitlines()[0]
    assert "unseen users at 5 shots" in swept.text  # 10 of 60 users have 50
    run = read_results(plain.folder)
    of_all = [run.figures("BT", "", "unseen", "accuracy", shots)[0] for shots in (5, None)]
    assert of_all[0].equals(of_all[1])  # where shots do not vary
    results = made.results(sweep=True, seeds=2)
    for r in made.records({"seeds": results["seeds"][1:]}):
        r["users_with_that_many"] += 3
    accuracy = tables.measure_table(read(results, tmp_path), "accuracy")
    assert accuracy["users with at least that many shots"]["5 shots"] == "35 to 38"


def test_further_measures_and_kinds_have_tables_where_they_were_recorded(tmp_path, plain):
    results = made.results()
    for r in results["seeds"][0]["methods"]["lore"]["records"]:
        r["brier"], r["ece"] = [0.25] * 40, 0.0625
        if r["set"] == "seen" and not r["control"]:
            known = {"accuracy": [0.9] * 36 + [None] * 4, "log_loss": [0.25] * 36 + [None] * 4}
            new = {"accuracy": [0.6] * 3 + [None] * 37, "log_loss": [0.75] * 3 + [None] * 37}
            r["kinds"] = {"known": known, "new": new}
    found = report(results, tmp_path)
    brier = found.table("Brier score")
    assert list(brier)[0] == "LoRe K=2" and brier["LoRe K=5"]["seen"] == "0.250 [0.250, 0.250]"
    assert found.table("Expected calibration")["LoRe K=5"]["unseen"] == "0.062"
    assert not any("by kind" in name for name in plain.blocks)
    accuracy, log_loss = (table for name, table in found.blocks.items() if "by kind" in name)
    assert accuracy["LoRe K=5"] == {"seen, known": "90.0 [90.0, 90.0]", "seen, new": "60.0"}
    assert log_loss["LoRe K=5"] == {"seen, known": "0.250 [0.250, 0.250]", "seen, new": "0.750"}
    assert list(accuracy) == list(log_loss) == ["LoRe K=2", "LoRe K=5"]
    line = found.csv[found.csv.accuracy_known != ""].iloc[0]
    assert (line.accuracy_known, line.log_loss_new) == ("0.9", "0.75")
    assert list(line.index)[-2:] == ["brier", "ece"]


def twin(results: made.Made) -> made.Made:
    """A copy of the first repeat as a second one, which is returned."""
    results["seeds"].append(copy.deepcopy(results["seeds"][0]) | {"seed": 1})
    return results["seeds"][1]


def test_repeats_give_a_spread_and_users_count_once(tmp_path):
    results = made.results()
    for r in made.records({"seeds": [twin(results)]}):
        r["accuracy"] = [max(0.0, a - 0.1) for a in r["accuracy"]]
        r["brier"] = [0.25] * 40
    both = np.array([figures(results, "BT", "seen", "accuracy", seed) for seed in (0, 1)])
    mean, spread = 100 * both.mean(), 100 * both.mean(1).std(ddof=1)
    low, high = intervals.bootstrap(both.mean(0))  # 40 users, not 80
    run = read(results, tmp_path)
    assert tables.measure_table(run, "brier") == {}  # which is of some of the repeats alone
    cell = tables.measure_table(run, "accuracy")["BT"]["seen"]
    assert cell == f"{mean:.1f} ± {spread:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_a_users_figures_are_matched_by_name_and_repeat_not_by_place(tmp_path, plain):
    results = made.results()
    second = twin(results)
    second["users"] = {side: names[::-1] for side, names in second["users"].items()}
    for r in made.records({"seeds": [second]}):
        r["accuracy"], r["log_loss"] = r["accuracy"][::-1], r["log_loss"][::-1]
    differences = tables.difference_table(read(results, tmp_path), "accuracy")
    assert differences == plain.table("Differences of accuracy")


def test_facts_and_warnings_come_before_the_figures_and_notes_say_how_often(tmp_path):
    results = made.results(seeds=3)
    results["settings"] |= {"warning": "made up", "reference": "last_linear", "same_tokens": 24,
                            "extra": ["log length"]}  # fmt: skip
    for part, p in zip(results["seeds"], (0.01, 0.4, 0.4), strict=True):
        part["facts"] = {"personal": f"score test: p = {p}", "overlap": "no pair is on both sides"}
    results["seeds"][2]["methods"]["lore"]["fits"][1]["note"] = "another note"
    text = report(results, tmp_path).text
    assert text.split("\n\n")[1:7] == [
        "24 comparisons are left out: the model sees the same tokens on both sides.",
        "score test: p = 0.01 (seed 0)", "no pair is on both sides",
        "score test: p = 0.4 (seed 1, 2)", "**WARNING: made up**",
        "**WARNING: the reference is the published code's mistaken one (last_linear)**",
    ]  # fmt: skip
    assert "same_tokens" not in text and "beside the embedding log length" in text
    for note in ("2: a note on LoRe K=2", "5: a note on LoRe K=5 (2 of 3 repeats)",
                 "5: another note (1 of 3 repeats)"):  # fmt: skip
        assert f"- LoRe K={note}\n" in text


def test_labels_are_free_text(tmp_path):
    """Commas, "chosen" and "asks" in a label say nothing; the fields of the fit do."""
    names = {"reference, chosen": "toy", "A, asks B": "other"}
    labels = {label: (of, True, {}, made.LABELS["LoRe K=5"][3]) for label, of in names.items()}
    results = made.results(FEW | labels, sweep=True)
    lore = results["seeds"][0]["methods"]["lore"]
    about = {"label": "ask me", "shots_chosen_by": "information", "random_label": "LoRe K=5"}
    lore["fits"].append(lore["fits"][-1] | about)
    own = [r for r in lore["records"] if (r["label"], r["control"]) == OWN]
    lore["records"] += [{**r, "label": "ask me"} for r in own]
    found = report(results, tmp_path)
    assert read_results(tmp_path).judged == ["LoRe K=5", "reference, chosen", "A, asks B"]
    row = found.table("Differences of accuracy")["ask me minus the same with random shots"]
    assert [row[column] for column in ("0 shots", "1 shot")] == ["+0.0 [0.0, 0.0]"] * 2
    lines = tables.markdown({"a|b": {"x": "1"}, "c": {}}).splitlines()
    assert lines[2].startswith("| a\\|b ") and len({len(line) for line in lines}) == 1


# -------------------------------------------------------------------- Intervals


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=50))
def test_an_interval_holds_the_mean_and_stays_within_the_values(values):
    low, high = intervals.bootstrap(np.array(values))
    assert min(values) - 1e-6 <= low <= np.mean(values) + 1e-6
    assert np.mean(values) - 1e-6 <= high <= max(values) + 1e-6


@pytest.mark.parametrize("users", [100, intervals.MOST_RESAMPLED + 1])
def test_an_interval_reaches_two_standard_errors_to_either_side(users):
    values = np.random.default_rng(0).normal(0.6, 0.2, users)
    low, high = intervals.bootstrap(values)
    error = pytest.approx(1.96 * values.std() / users**0.5, rel=0.1)
    assert values.mean() - low == error and high - values.mean() == error


@pytest.mark.parametrize("users", [1, 4])
def test_so_few_users_have_no_interval(tmp_path, users):
    found = report(made.results(users=users), tmp_path)
    assert "[" not in found.table("Accuracy (percent)")["BT"]["seen"]
    assert "no difference detected" in found.text


def test_the_average_of_two_sets_varies_less_than_either():
    rng = np.random.default_rng(0)
    samples = [{0: pd.Series(rng.normal(mean, 0.1, 50)).add_prefix(name)}
               for name, mean in (("x", 0.8), ("y", 0.4))]  # fmt: skip
    one, two, both = (intervals.summarise(s) for s in (samples[:1], samples[1:], samples))
    assert both.mean == pytest.approx((one.mean + two.mean) / 2)
    assert both.high - both.low == pytest.approx((one.high - one.low) / 2**0.5, rel=0.15)


def test_a_user_who_is_in_more_repeats_counts_in_each():
    samples = {0: pd.Series([1.0, 0.0, *[0.5] * 5], [*"abdefgh"]),
               1: pd.Series([0.5, 0.0, *[0.5] * 5], [*"acdefgh"])}  # fmt: skip
    summary = intervals.summarise([samples])
    assert summary.repeats == pytest.approx([3.5 / 7, 3 / 7])
    assert summary.low < summary.mean < summary.high <= 0.75


# ------------------------------------------------------------------ Differences


def test_differences_are_paired_by_user_over_repeats(tmp_path):
    results = made.results(seeds=2)
    run = read(results, tmp_path)
    differences, losses = (tables.difference_table(run, key) for key in ("accuracy", "log_loss"))
    own, rest = (
        np.mean([figures(results, label, "seen", "accuracy", seed) for seed in (0, 1)], axis=0)
        for label in ("LoRe K=5", "BT")
    )
    mean, low, high = 100 * np.array([(own - rest).mean(), *intervals.bootstrap(own - rest)])
    assert differences["LoRe K=5 minus BT"]["seen"] == f"{mean:+.1f} [{low:.1f}, {high:.1f}]"
    assert high - low < 2  # while each of the two alone is uncertain by several points
    assert losses["LoRe K=5 minus BT"]["seen"].startswith("-0.0")


def test_methods_are_held_against_ridge_bt_and_lore_where_those_were_fitted(tmp_path):
    labels = made.LABELS | {"Mixed logit": ("mixed_logit", True, {}, MEANS)}
    run = read(made.results(labels, noise=0.0), tmp_path)
    differences = tables.difference_table(run, "accuracy")
    found = [(row, of["seen"].split()[0]) for row, of in differences.items() if "Mixed" in row]
    assert found[-2:] == [("Mixed logit minus Ridge BT", "+10.0"),
                          ("Mixed logit minus LoRe K=5", "+2.0")]  # fmt: skip
    assert not any(row.endswith("Mixed logit") for row in differences)


def test_no_figure_is_minus_zero(tmp_path):
    results = made.results(noise=0.0)
    shift(results, 0.69997, "LoRe K=5")
    shift(results, 0.7, "BT")
    text = report(results, tmp_path).text
    assert "+0.0 [" in text and not re.search(r"-0\.0+\b(?!\d)", text)


# ---------------------------------------------------------------------- Verdict


def verdict_of(results: made.Made, folder: Path) -> str:
    return verdict.verdict(read(results, folder))


def test_personal_weights_are_better_where_all_three_are_beaten(plain):
    _, *lines = verdict.verdict(read_results(plain.folder)).splitlines()
    starts = ["- LoRe K=5, seen users", "- LoRe K=5, unseen users"]
    assert [line.split(":")[0] for line in lines] == starts
    for line in lines:
        assert "personal weights: better: +" in line and "chance" not in line
        others = ("Ridge BT", "the population average", "another user's weights")
        assert all(f"against {other}" in line for other in others)


@pytest.mark.parametrize(("noise", "means", "words"), [
    (0.1, {OWN: 0.75, ("LoRe K=5", "population"): 0.745}, "no difference detected: +"),
    (0.1, {OWN: 0.75, ("LoRe K=5", "another"): 0.745}, "no difference detected: +"),
    (0.02, {OWN: 0.65}, "worse: -"),
    (0.2, {OWN: 0.7, ("Ridge BT",): 0.71}, "no difference detected: -"),
    (0.02, {(*OWN, "log_loss"): 0.95}, "worse: +"),  # though accuracy is better
    (0.02, {(*OWN, "log_loss"): 1.95}, "worse: +.*worse than chance \\(ln 2 = 0.693\\)"),
])  # fmt: skip
def test_what_is_not_beaten_leaves_it_open_and_what_is_worse_is_the_headline(
    tmp_path, noise, means, words
):
    results = made.results(noise=noise)
    for place, value in means.items():
        shift(results, value, *place)
    text = verdict_of(results, tmp_path)
    words = words if "\\" in words else re.escape(words)
    assert len(re.findall(f"personal weights: {words}", text)) == 2 and "better" not in text


def test_the_first_sentence_of_the_verdict_says_the_kind(tmp_path):
    results = made.results(seeds=2)
    for part, known in zip(results["seeds"], (0.7, 0.9), strict=True):
        shares = {"known": known, "met": 0.0, "new": 1 - known}
        part["kinds"] = {"seen": shares, "unseen": shares}
    first = verdict_of(results, tmp_path).split(".")[0]
    assert first.startswith("Verdict: Of the held-out comparisons 80% are known (between")
    assert "20% are new (with at least one response that nobody had judged" in first
    for part in results["seeds"]:
        part["kinds"]["unseen"] = {"known": 0.0, "met": 0.25, "new": 0.75}
    first = verdict_of(results, tmp_path).split(".")[0]
    assert "80% of seen users' are known" in first and "25% of unseen users' are met" in first
    assert "20% of seen users' and 75% of unseen users' are new" in first


def chosen(ranks: list[int]) -> made.Made:
    """A run with a chosen fit in every repeat: of rank 1 it is BT, else LoRe K=2."""
    results = made.results(seeds=len(ranks))
    for repeat, rank in zip(results["seeds"], ranks, strict=True):
        methods = repeat["methods"]
        source, label = (("bt", "BT"), ("lore", "LoRe K=2"))[rank > 1]
        copies = [r for r in methods[source]["records"] if r["label"] == label]
        methods["lore"]["fits"].append(made.fit("best", rank > 1, rank=rank) | {"chosen": True})
        methods["lore"]["records"] += [{**r, "label": "best"} for r in copies]
    return results


def test_the_chosen_fit_is_judged_and_rank_one_is_not_personal(tmp_path):
    text = verdict_of(chosen([1]), tmp_path)
    assert text == "Verdict: best: rank 1 was chosen: no personal weights to judge."
    text = verdict_of(chosen([2]), tmp_path)
    assert text.count("best, ") == 2 and "K=5" not in text
    labels = {name: made.LABELS[name] for name in ("reference", "BT", "own model")}
    assert "no personal method was fitted" in verdict_of(made.results(labels), tmp_path)


def test_repeats_in_which_rank_one_was_chosen_count_as_no_difference(tmp_path):
    both, alone = chosen([2, 1]), chosen([2, 2])
    del alone["seeds"][1]
    given = "best", ("best", "population"), "accuracy", ("seen",)
    half, whole = (intervals.difference(read(r, tmp_path), *given).mean for r in (both, alone))
    assert half == pytest.approx(whole / 2, abs=0.001)


# -------------------------------------------------------------------------- CSV


def test_unusual_users_are_those_whose_training_choices_bt_predicts_badly(tmp_path):
    results = made.results(seeds=2)
    for r in made.records(results):
        if (r["label"], r["set"]) == ("BT", "train"):
            r["log_loss"] = [0.1 * (i % 3) for i in range(40)]  # every third user is unusual
        if (r["label"], r["control"], r["set"]) == (*OWN, "seen"):
            r["accuracy"] = [0.9 - 0.2 * (i % 3) for i in range(40)]
    found = read(results, tmp_path)
    row = tables.unusual_table(found)["LoRe K=5"]  # the made-up runs have no few_shot set
    assert list(row) == ["seen, usual", "seen, between", "seen, unusual"]
    assert [cell.split()[0] for cell in row.values()] == ["90.0", "70.0", "50.0"]
    assert tables.unusual_table(found.only(["LoRe K=5"])) == {}


def test_the_csv_has_one_row_for_each_record(tmp_path):
    results = made.results(FEW, seeds=2, sweep=True)
    found = report(results, tmp_path).csv
    keys = ["label", "control", "set", "shots"]
    measured = [f"{m}{end}" for m in ("accuracy", "log_loss") for end in ("", "_low", "_high")]
    more = ["num_users", "users_with_that_many", "trials_sd"]
    assert list(found) == ["seed", "method", *keys, *measured, *more]
    assert found.groupby("seed").method.unique().map(list).to_dict() == {
        "0": ["bt", "lore"], "1": ["bt", "lore"]
    }  # fmt: skip
    for (_, line), r in zip(found.iterrows(), made.records(results), strict=True):
        assert line[keys].tolist() == [str(r[key]) for key in keys] and line.num_users == "40"
        for measure in ("accuracy", "log_loss"):
            assert float(line[measure]) == pytest.approx(np.mean(r[measure]))
        assert float(line.accuracy_low) < float(line.accuracy) < float(line.accuracy_high)
        assert float(line.trials_sd) == pytest.approx(0.02 / 2**0.5)


# ------------------------------------------------------------ Any method; plots


def drawn(results: made.Made, folder: Path) -> set[str]:
    """Names in the legends and along the axes of the main plot."""
    figure = plots.figure(plots.measure_panels(read(results, folder)), "a title", "a note", (9, 7))
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    return names | {tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()}


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [False, True])
def test_a_method_that_is_new_appears_in_every_plot(tmp_path, sweep):
    """Its name, and the dataset's, may have dollars, which are no formulas."""
    results = made.results({"BT": made.LABELS["BT"], "a $x^ label": TOY}, sweep=sweep)
    results["settings"]["dataset"] = "$\\nothing$"
    assert "a $x^ label" in drawn(results, tmp_path)
    names = ["shots" if sweep else "accuracy", "training", "spectrum", "weights-of-a-x-label"]
    assert WRITE_PLOTS(tmp_path, read_results(tmp_path)) == names
    found = sorted(file.name for file in tmp_path.glob("*.p*"))
    assert found == sorted(f"{name}.{suffix}" for name in names for suffix in ("png", "pdf"))


@pytest.mark.parametrize(("labels", "setting", "names"), [
    (made.LABELS, "rank", {"2", "5", "LoRe", "LoRe: population average", "BT"}),
    (made.LABELS | {"LoRe K=5 again": ("lore", True, {"rank": 5}, MEANS)}, None,
     {"LoRe K=5 again", "population average"}),
    ({label: made.LABELS[label] for label in ("reference", "BT", "LoRe K=5")}, None, {"BT"}),
])  # fmt: skip
def test_the_axis_is_the_one_setting_that_varies(tmp_path, labels, setting, names):
    assert names <= drawn(made.results(labels), tmp_path)
    assert plots.varying_setting(read_results(tmp_path)) == setting


def test_a_method_keeps_its_colour_whatever_else_is_drawn(tmp_path):
    crowd = {"Toy model": TOY, **made.LABELS, "Other": ("other", True, {}, MEANS)}
    alone = {label: made.LABELS[label] for label in ("reference", "LoRe K=5")}
    found = [read(made.results(some), tmp_path) for some in (crowd, alone)]
    first, second = (plots.colour(results, "LoRe K=5") for results in found)
    assert first == second == pytest.approx((1.0, 0.498, 0.055), abs=0.002)  # orange
    assert plots.colour(found[0], "Toy model") != first
    assert plots.marker(found[0], "LoRe K=5") == plots.marker(found[1], "LoRe K=5")


@pytest.mark.parametrize("of", ["plain", "swept"])
def test_lines_differ_by_marker_as_well_as_colour_and_one_has_a_band(request, of):
    for panel in plots.measure_panels(read_results(request.getfixturevalue(of).folder)):
        axes = plots.figure([panel], "", "", (5, 4)).axes[0]
        labels = ("BT", "Ridge BT", "own model", "LoRe K=5" if of == "swept" else "LoRe")
        found = {line.get_label(): line.get_marker() for line in axes.lines}
        assert len({found[label] for label in labels}) == len(labels)
        assert len(axes.collections) == 1
        levels = {line.get_label(): set(line.get_ydata()) for line in axes.lines}
        assert len(levels["reference"]) == len(levels["chance"]) == 1
        if panel.caption.startswith("accuracy"):
            assert levels["chance"] == {50} and axes.get_ylim()[0] > 52  # axis is not stretched


# -------------------------------------------------------------- Damage, command


def refused(folder: Path) -> str:
    """The one line by which a report refuses a folder."""
    with pytest.raises(InputError) as error:
        tables.report(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    folder = made.write(made.results(FEW, users=3), tmp_path_factory.mktemp("written"))
    return (folder / "results.json").read_bytes()


@settings(deadline=None, max_examples=40)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_byte_that_changed_is_one_clear_line_and_the_file_is_kept(
    tmp_path_factory, written, place, byte
):
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(written)
    damaged[int(place * len(damaged))] = byte
    (folder / "results.json").write_bytes(damaged)
    with contextlib.suppress(ValueError):
        if json.loads(damaged.decode()) == json.loads(written):
            return  # says the same
    assert re.search("checksum|JSON|format|no object", refused(folder))
    assert (folder / "results.json").read_bytes() == damaged


@pytest.mark.parametrize(("change", "words"), [
    (lambda text: "", "not readable as JSON"), (lambda text: text[:-1], "not readable as JSON"),
    (lambda text: text.replace('"accuracy": [', '"accuracy": [0.5, ', 1), "checksum does not"),
    (lambda text: "[1, 2]", "is no object"), (lambda text: "null", "holds nothing"),
    (lambda text: '{"format": "2"}', "has format '2'"),
    (lambda text: text.replace('{"format": 2, ', "{"),
     "has format 1, this version of the project reads format 2.*another --name"),
])  # fmt: skip
def test_a_file_that_no_run_wrote_is_one_clear_line(
    tmp_path, written, change: Callable[[str], str], words
):
    (tmp_path / "results.json").write_text(change(written.decode()))
    assert re.search(words, refused(tmp_path))


def test_without_a_finished_seed_there_is_nothing_to_report(tmp_path):
    words = "no seed of this run has finished; start the script again"
    assert words in refused(tmp_path)
    assert words in refused(made.write(made.results(seeds=0), tmp_path))


def test_the_command_makes_everything_again_and_puts_runs_side_by_side(tmp_path):
    names = {"run": "run", "one/here": f"{tmp_path}/one/here", "two/here": f"{tmp_path}/two/here"}
    runs = [made.write(made.results(FEW, s), tmp_path / n) for s, n in enumerate(names, 1)]
    text = tables.report(runs[0])
    before = {path.name: path.read_bytes() for path in runs[0].iterdir()}
    for path in runs[0].glob("*.[!j]*"):
        path.unlink()
    outcome = running.invoke("tools/report.py", {}, *map(str, runs))
    assert outcome.status == 0, outcome.err
    assert {path.name: path.read_bytes() for path in runs[0].iterdir()} == before
    assert outcome.out.startswith(text)
    together = running.table("\n" + outcome.out.strip().split("\n\n")[-1])
    for folder, name in zip(runs, names.values(), strict=True):  # short where that is enough
        alone = running.table((folder / "table.md").read_text())
        for part in ("seen", "unseen"):
            cells = {row: cells[f"{name} {part}"] for row, cells in together.items()}
            assert cells == {row: cells[part].split(" [")[0] for row, cells in alone.items()}


def test_the_command_shows_only_the_labels_that_are_named(plain):
    run = str(plain.folder)
    shown = running.invoke("tools/report.py", {}, run, "--only", "LoRe K=2").out
    assert "LoRe K=2" in shown and "LoRe K=5" not in shown
    assert "LoRe K=5" in (plain.folder / "table.md").read_text()  # the files have all
    for given_, words in (((run, "--only", "LoRa"), ("LoRa", "LoRe K=5")),
                          ((), ("name at least one run's folder",))):  # fmt: skip
        outcome = running.invoke("tools/report.py", {}, *given_)
        assert outcome.status == 2 and all(word in outcome.err for word in words)
