"""RewardBench 2: the official formulae on hand-computed rows, and the script end to end."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import models
import running
from lore.common.files import InputError
from lore.embeddings.reward_model import ModelChoice
from lore.embeddings.store import embed, open_store
from lore.learning.basis import Basis, save_basis
from lore.methods.fitting.posterior import Prior
from lore.methods.mixed_logit import MixedFit
from lore.methods.saved import load_learned
from PRISM import eval_rb2
from PRISM import rewardbench2 as rb2

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared real data is not here")


# ------------------------------------------------------- Subsets other than Ties


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 1, 2, 0], 1.0), ([1, 3, 2, 0], 0.0), ([3, 3, 2, 0], 1 / 2), ([3, 3, 3, 0], 1 / 3),
     ([3, 3, 3, 3], 1 / 4), ([2, 3, 3, 3], 0.0), ([-1, -2, -2, -2], 1.0)],
)  # fmt: skip
def test_a_row_shares_its_point_among_the_completions_at_the_maximum(scores, expected):
    assert rb2.row_result(scores) == expected
    assert rb2.score([("a", "Math", 1, scores)]) == {"Math": expected, "Overall": expected}


def test_subset_is_a_mean_over_rows_and_overall_an_unweighted_mean_over_subsets():
    maths = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]
    rows = [("1", "Math", 1, scores) for scores in maths] + [("5", "Focus", 1, [2, 1, 1, 1])]
    result = rb2.score(rows)
    assert result == {"Math": 0.375, "Focus": 1.0, "Overall": 0.6875}
    assert list(rb2.score(rows[::-1])) == ["Math", "Focus", "Overall"]


# ------------------------------------------------------------------------- Ties


def ties(*rows) -> float:
    """Ties score of (id, correct scores, incorrect scores)."""
    return rb2.score([(i, "Ties", len(c), [*c, *w]) for i, c, w in rows])["Ties"]


TIES = {  # tied row, ref row, the score: .3 + .3 + .2 p + .2 h + .01 g
    # gap 3, spread 1; ref gap 5: all four shares are 1
    "perfect": (([6, 5], [2, 0]), ([5], [0, -1]), 1 + 0.01 * math.tanh(2)),
    # gap 1, spread 4; ref gap 9
    "gap below the spread": (([9, 5], [4]), ([9], [0]), 0.6 + 0.01 * math.tanh(-0.75)),
    # gap 5, spread 2; ref gap 1: p = 1, h = 0
    "small ref gap": (([9, 7], [2]), ([1], [0]), 0.8 + 0.01 * math.tanh(-0.5)),
    # gap 5, spread 2; ref gap -1
    "wrong ref row": (([9, 7], [2]), ([0], [1]), 0.3 + 0.2 + 0.01 * math.tanh(-1.5)),
    # gap 2 = spread, ref gap 0: neither is above
    "equal": (([6, 4], [2]), ([1], [1]), 0.3 + 0.01 * math.tanh(-1)),
    # correct scores all 5: x/0 is tanh(+-inf) = +-1, and 0/0 counts as 0
    "no spread": (([5, 5], [0]), ([9], [0]), 1.01),
    "no spread, no gap": (([5, 5], [5]), ([9], [0]), 0.3),
    "no spread, wrong": (([5, 5], [6]), ([9], [0]), 0.3 - 0.01),
}


@pytest.mark.parametrize("case", TIES)
def test_a_pair_of_ties_rows(case):
    tied, ref, expected = TIES[case]
    assert ties(("tied:1", *tied), ("ref:1", *ref)) == pytest.approx(expected)


def test_rows_without_a_partner_count_for_accuracy_only():
    # a_t = 1/2 (tied:1 right, tied:2 wrong), a_r = 1/2; only k = 1 is paired: gaps 3 and 5,
    # spread 1.
    tied = [("tied:1", [6, 5], [2]), ("tied:2", [1, 0], [9])]
    got = ties(*tied, ("ref:1", [5], [0]), ("ref:3", [0], [5]))
    assert got == pytest.approx(0.15 + 0.15 + 0.4 + 0.01 * math.tanh(2))
    for alone in (("tied:1", [6, 5], [2]), ("ref:1", [6], [2])):
        assert ties(alone) == pytest.approx(0.3)


def test_terms_are_means_over_pairs():
    # k = 1 perfect (gap 3, spread 1), k = 2: gap 1, spread 4, ref gap 9.
    refs = [("ref:1", [5], [0]), ("ref:2", [9], [0])]
    got = ties(("tied:1", [6, 5], [2]), *refs, ("tied:2", [9, 5], [4]))
    graded = (math.tanh(2) + math.tanh(-0.75)) / 2
    assert got == pytest.approx(0.6 + 0.1 + 0.1 + 0.01 * graded)


# ------------------------------------------------------------------- Properties

whole = st.integers(-50, 50)


@st.composite
def benchmarks(draw) -> list[tuple]:
    """Rows of two plain subsets and Ties rows, some without a partner; whole-number scores."""
    rows = [
        (str(i), draw(st.sampled_from(["Math", "Focus"])), 1, scores)
        for i, scores in enumerate(draw(st.lists(st.lists(whole, min_size=4, max_size=4))))
    ]
    for k in range(draw(st.integers(1, 4))):
        for kind in draw(st.sampled_from([("ref",), ("tied",), ("ref", "tied")])):
            correct = 1 if kind == "ref" else draw(st.integers(1, 4))
            size = correct + draw(st.integers(1, 4))
            scores = draw(st.lists(whole, min_size=size, max_size=size))
            rows.append((f"{kind}:{k}", "Ties", correct, scores))
    return rows


@settings(deadline=None)
@given(benchmarks(), st.integers(-1000, 1000), st.integers(1, 1000), st.randoms())
def test_bounds_and_that_shift_scale_and_order_do_not_matter(rows, shift, scale, random):
    def shuffled(values):
        return random.sample(values, len(values))

    result = rb2.score(rows)
    assert -0.01 <= result["Ties"] <= 1.01
    assert all(0 <= result[name] <= 1 for name in result if name in ("Math", "Focus"))
    # Whole numbers keep the arithmetic exact, so the scores must agree to the last digit.
    moved = [(i, s, n, [scale * x + shift for x in scores]) for i, s, n, scores in rows]
    assert rb2.score(moved) == result
    mixed = [(i, s, n, shuffled(x[:n]) + shuffled(x[n:])) for i, s, n, x in shuffled(rows)]
    assert rb2.score(mixed) == pytest.approx(result)


# -------------------------------------------------------------------- Bad scores


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("7", "Math", 1, [1.0, math.nan, 0, 0])], "'7'.*finite"),
        ([("7", "Math", 1, [1.0, math.inf, 0, 0])], "'7'.*finite"),
        ([("7", "Math", 0, [1.0, 0])], "num_correct is 0"),
        ([("7", "Math", 2, [1.0, 0])], "num_correct is 2"),
        ([("7", "Ties", 1, [1.0, 0])], "'7'.*ref:k"),
        ([("tied:", "Ties", 1, [1.0, 0])], "'tied:'.*ref:k"),
        ([("ref:1", "Ties", 1, [1.0, 0])] * 2, "'ref:1'.*twice"),
        ([], "no rows"),
    ],
)
def test_bad_rows_are_named(rows, says):
    with pytest.raises(InputError, match=says):
        rb2.score(rows)


# ----------------------------------------------------------- Genuine rows and figures


@needs_data
def test_genuine_ties_rows():
    lines = (DATA / "rewardbench2_ties_slice.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def scored(of_chosen, of_rejected):
        scores = [[*map(of_chosen, r["chosen"]), *map(of_rejected, r["rejected"])] for r in rows]
        return [(r["id"], r["subset"], r["num_correct"], s)
                for r, s in zip(rows, scores, strict=True)]  # fmt: skip

    assert rb2.score(scored(lambda _: 2.0, lambda _: 1.0))["Ties"] == pytest.approx(1.01)
    assert rb2.score(scored(lambda _: 1.0, lambda _: 2.0))["Ties"] == pytest.approx(-0.01)
    def graded(*pairs):
        return 0.01 * sum(math.tanh(gap / spread - 1) for gap, spread in pairs) / 4

    # Shortest first: the tied gaps are -12, -18, -13, -16 and the spreads 10, 10, 4, 8 characters.
    short = scored(lambda text: -len(text), lambda text: -len(text))
    expected = graded((-12, 10), (-18, 10), (-13, 4), (-16, 8))
    assert rb2.score(short)["Ties"] == pytest.approx(expected)
    # With 20 characters of credit for a correct one all rows are right, and one gap of four
    # (tied:49, 7 against a spread of 4) is preferred; the ref gaps are 18, 11, 11, 7.
    helped = scored(lambda text: 20 - len(text), lambda text: -len(text))
    expected = 0.3 + 0.3 + 0.2 / 4 + 0.2 / 4 + graded((8, 10), (2, 10), (7, 4), (4, 8))
    assert rb2.score(helped)["Ties"] == pytest.approx(expected)


@needs_data
def test_published_overall_scores_are_the_unweighted_mean_of_six_subsets():
    table = pd.read_csv(DATA / "rewardbench2_official_scores.csv")
    means = table[list(rb2.OFFICIAL)].mean(axis=1)
    # Subset scores and their mean are each rounded to four digits.
    assert len(table) == 197
    assert np.abs(means - table["Score"]).max() <= 1e-4
    base = table.set_index("model").loc["Skywork/Skywork-Reward-Llama-3.1-8B-v0.2"]
    assert base["Score"] == 0.7175


# -------------------------------------------------------------------- The script

WORDS = ["a", "bee", "can", "do", "every", "fine", "great", "house", "in", "jam", "keep", "low"]


def raw_rows() -> list[dict]:
    """A small RewardBench 2: three rows of five subsets and, of Ties, two pairs and one alone."""
    random = np.random.default_rng(0)
    shapes = [(s, str(i), 1, 3) for s in rb2.OFFICIAL if s != "Ties" for i in range(3)]
    shapes += [("Ties", name, 3, 4) for name in ("tied:0", "tied:1", "tied:2")]
    shapes += [("Ties", name, 1, 4) for name in ("ref:0", "ref:1")]

    def text(words: int) -> str:
        return " ".join(random.choice(WORDS, words))

    def texts(number: int) -> list[str]:
        return [text(random.integers(2, 9)) for _ in range(number)]

    return [
        {"id": name, "prompt": text(5), "chosen": texts(correct), "rejected": texts(wrong),
         "num_correct": correct, "num_incorrect": wrong, "total_completions": correct + wrong,
         "models": ["someone"], "subset": subset, "additional_metadata": None}
        for subset, name, correct, wrong in shapes
    ]  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("raw") / "test.jsonl", raw_rows())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return str(models.tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def basis(tmp_path_factory) -> Basis:
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(32, 2, generator=generator)
    W = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    W_unseen = torch.tensor([[0.5, 0.5]])
    return Basis(V, W, V[:, 0], ["ann", "bob"], W_unseen, ["cy"], {})


@pytest.fixture(scope="module")
def basis_file(tmp_path_factory, basis) -> str:
    path = tmp_path_factory.mktemp("basis") / "basis-K02.safetensors"
    save_basis(path, basis)
    return str(path)


def evaluate(folder: Path, model=None, any_model=False, **settings) -> pd.DataFrame:
    """The table of a run in this process, as it was saved."""
    heads = {k: settings.pop(k) for k in ("rm_head", "head_key") if k in settings}
    settings |= {"lm": ModelChoice(model, any_model=any_model), "file": rb2.HeadFile(**heads)}
    settings |= {"results": str(folder), "progress": False}
    eval_rb2.main(embeddings=str(folder / "embeddings"), **settings)
    return pd.read_csv(folder / "scores.csv", index_col="reward")


def saved(folder: Path, reward: str) -> dict:
    return json.loads((folder / "scores" / f"{reward}.json").read_text())


def flat(record: dict) -> np.ndarray:
    return np.concatenate(record["scores"])


def harness_logits(model: str, max_length: int = 2048) -> np.ndarray:
    """As the official harness: text from the template, tokenized, a doubled BOS taken away."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    network.config.pad_token_id = None
    logits = []
    for row in raw_rows():
        for answer in row["chosen"] + row["rejected"]:
            talk = [{"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": answer}]  # fmt: skip
            rendered = tokenizer.apply_chat_template(talk, tokenize=False)
            ids = tokenizer(rendered, truncation=True, max_length=max_length)["input_ids"]
            ids = ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids
            with torch.inference_mode():
                logits.append(network(input_ids=torch.tensor([ids])).logits.item())
    return np.array(logits)


@pytest.mark.slow
def test_script_reports_every_reward_from_one_pass(tmp_path, source, llama, basis, basis_file):
    head = torch.arange(64.0).reshape(32, 2).cos()
    np.save(tmp_path / "head.npy", head.numpy())
    done = running.invoke(
        "PRISM/eval_rb2.py", {},
        "--source", source, "--model", llama, "--basis", basis_file, "--users", "bob", "cy",
        "--rm_head", str(tmp_path / "head.npy"), "--head-bias", "3",
        "--results", str(tmp_path / "out"), "--embeddings", str(tmp_path / "embeddings"),
        "--save_csv", str(tmp_path / "table.csv"), "--verbose_failures", "--top_k", "2",
    )  # fmt: skip
    assert done.status == 0, done.err
    table = pd.read_csv(tmp_path / "out" / "scores.csv", index_col="reward")
    assert list(table.columns) == ["Mean", *rb2.OFFICIAL]
    pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "table.csv", index_col="reward"))

    store = open_store(tmp_path / "embeddings")
    rows = store.rows(torch.arange(len(store)))
    expected = {  # a basis' rewards are log odds, a hundredth of x V w
        "reference": torch.from_numpy(harness_logits(llama)).float(),
        "head 1": rows @ head[:, 0] + 3,
        "head 2": rows @ head[:, 1] + 3,
        "basis 1": rows @ basis.V[:, 0] / 100,
        "basis 2": rows @ basis.V[:, 1] / 100,
        "average user": rows @ basis.V @ torch.tensor([0.625, 0.375]) / 100,
        "user bob": rows @ basis.V @ torch.tensor([0.25, 0.75]) / 100,
        "user cy": rows @ basis.V @ torch.tensor([0.5, 0.5]) / 100,
    }
    assert list(table.index) == [*expected, "shortest response"]
    for name, rewards in expected.items():
        record = saved(tmp_path / "out", name.replace(" ", "-"))
        np.testing.assert_allclose(flat(record), rewards.numpy(), rtol=1e-4, atol=1e-4)
        assert_record_gives(record, table.loc[name])
        printed = next(line for line in done.out.splitlines() if line.startswith(name))
        assert printed.split()[-7:] == [f"{value:.4f}" for value in table.loc[name]]
    assert "not official" in done.out
    # The two worst rows of user cy, the last reward before the baseline.
    record = saved(tmp_path / "out", "user-cy")
    numbered = zip(record["num_correct"], record["scores"], strict=True)
    worst = sorted((max(s[n:]) - min(s[:n]) for n, s in numbered), reverse=True)[:2]
    shown = [line.split()[0] for line in done.out.splitlines()[-2:]]
    assert [float(x) for x in shown] == pytest.approx(worst, abs=1e-5)


def assert_record_gives(record: dict, scores: pd.Series) -> None:
    """The saved rows give the saved scores, also as plain means of the official results."""
    rows = list(zip(*(record[k] for k in ("id", "subset", "num_correct", "scores")), strict=True))
    assert [row[0] for row in rows] == [row["id"] for row in raw_rows()]
    assert rb2.score(rows) == pytest.approx(scores.rename({"Mean": "Overall"}).to_dict())
    means = pd.DataFrame({k: record[k] for k in ("subset", "results")}).groupby("subset").results
    for subset, mean in means.mean().drop("Ties").items():
        assert mean == pytest.approx(scores[subset])
    ties = [r for r, s in zip(record["results"], record["subset"], strict=True) if s == "Ties"]
    assert ties == [None] * 5


KINDS = {
    "llama": models.tiny_llama,
    "pad is eos": lambda to: models.tiny_llama(to, pad_is_eos=True),
    "qwen": models.tiny_qwen,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_own_forward_is_the_harness_and_the_reference_row(tmp_path, source, kind):
    model = str(KINDS[kind](tmp_path / "model"))
    for length, side in ((2048, "right"), (60, "right"), (60, "left")):
        settings = {"source": source, "model": model, "max_length": length, "batch_size": 3}
        out = tmp_path / f"{length}-{side}"
        table = evaluate(out / "own", truncation_side=side, **settings)
        row = evaluate(out / "head", truncation_side=side, mode="lmhead", **settings)
        expected = harness_logits(model, length)
        own, head = flat(saved(out / "own", "model")), flat(saved(out / "head", "reference"))
        np.testing.assert_allclose(own, head, rtol=1e-4, atol=1e-4)
        assert table.loc["model"].to_dict() == pytest.approx(row.loc["reference"].to_dict(), 1e-4)
        if side == "right":
            np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)
        else:
            assert np.abs(own - expected).max() > 0.01


def test_later_runs_use_the_embeddings_that_are_there(tmp_path, source, llama, basis_file):
    settings = {"source": source, "model": llama, "mode": "lmhead"}
    evaluate(tmp_path, **settings)
    shard = next((tmp_path / "embeddings").glob("embeddings-*.safetensors"))
    before = shard.stat().st_mtime_ns
    table = evaluate(tmp_path, **settings, basis=basis_file)
    assert "basis 2" in table.index
    assert shard.stat().st_mtime_ns == before


def test_the_model_is_the_one_the_basis_was_learned_with(tmp_path, source, llama, basis, capsys):
    talk = [{"role": "user", "content": "Hi"}]
    facts = embed([talk], tmp_path / "rows", model=llama, progress=False).manifest
    path = str(tmp_path / "basis.safetensors")
    save_basis(path, replace(basis, settings=facts))
    table = evaluate(tmp_path / "out", source=source, basis=path)
    assert "reference" in table.index
    other = str(models.tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="other weights .*--any-model true"):
        evaluate(tmp_path / "new", source=source, basis=path, model=other)
    assert not (tmp_path / "new").exists()
    settings = {"source": source, "basis": path, "model": other}
    assert "basis 1" in evaluate(tmp_path / "new", any_model=True, **settings).index
    capsys.readouterr()
    eval_rb2.main(basis=path, list_users=True)
    assert capsys.readouterr().out.split() == ["ann", "bob", "cy"]


def test_a_basis_that_names_only_its_new_users_gives_them_their_own_weights(basis):
    heads = eval_rb2.basis_heads(replace(basis, users=[]), ["cy"])
    torch.testing.assert_close(heads["user cy"].weight, basis.V @ basis.W_unseen[0] / 100)
    with pytest.raises(InputError, match="--users ann is not in the basis"):
        eval_rb2.basis_heads(replace(basis, users=[]), ["ann"])


def test_a_mixed_logit_gives_the_population_and_its_users(tmp_path):
    directions = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)).double()
    prior = Prior(torch.zeros(2).double(), torch.eye(2).double())
    fit = MixedFit(directions[:, 0], directions[:, 1:], prior, {})
    fit.users = torch.tensor([[0.5, -1.0]]).double()
    fit.save(tmp_path / "mixed_logit.safetensors", fit.users[:0], {"users": ["ann"]})
    heads = eval_rb2.basis_heads(load_learned(tmp_path / "mixed_logit.safetensors"), ["ann"])
    assert list(heads) == ["shared reward", "taste 1", "taste 2", "average user", "user ann"]
    for name, mixing in (("average user", [1.0, 0.0, 0.0]), ("user ann", [1.0, 0.5, -1.0])):
        expected = directions @ torch.tensor(mixing).double()  # log odds
        torch.testing.assert_close(heads[name].weight, expected.float())


def test_model_without_a_head_takes_a_basis(tmp_path, source, basis_file):
    settings = {"source": source, "model": str(models.headless(tmp_path / "model"))}
    table = evaluate(tmp_path / "out", basis=basis_file, **settings)
    assert list(table.index) == ["basis 1", "basis 2", "average user", "shortest response"]
    for mode in ("lmhead", "seqclf"):
        with pytest.raises(InputError, match="no score head"):
            evaluate(tmp_path / "out", mode=mode, **settings)


def test_parquet_and_a_folder_hold_the_same_rows(tmp_path, source):
    pd.DataFrame(raw_rows()).to_parquet(tmp_path / "rows.parquet")
    from_file = rb2.read_bench(source, "test", [], 0)
    for other in (str(tmp_path / "rows.parquet"), str(Path(source).parent)):
        pd.testing.assert_frame_equal(from_file, rb2.read_bench(other, "test", [], 0))


def test_subset_and_limit(source):
    math = rb2.read_bench(source, "test", ["math", "Precise IF"], 0)
    assert math["subset"].tolist() == ["Precise IF"] * 3 + ["Math"] * 3
    assert rb2.read_bench(source, "test", ["Ties"], 2)["id"].tolist() == ["tied:0", "tied:1"]
    assert len(rb2.read_bench(source, "test", [], 4)) == 4


def bench(*rows: tuple[str, str, list[str]]) -> pd.DataFrame:
    """Rows of (subset, the chosen text, the rejected ones)."""
    texts = {"prompt": "p", "num_correct": 1}
    return pd.DataFrame([
        {"id": f"ref:{i}", "subset": subset, "chosen": [chosen], "rejected": rejected, **texts}
        for i, (subset, chosen, rejected) in enumerate(rows)
    ])  # fmt: skip


def short_table(rows: pd.DataFrame) -> pd.DataFrame:
    return rb2.score_table(rows, {"shortest response": rb2.length_baseline(rows)})


def test_shortest_response_baseline():
    lengths = [("ab", ["abc", "abcd"]), ("ab", ["xy", "abcd"]), ("abc", ["ab", "abcd"])]
    table = short_table(bench(*(("Focus", *texts) for texts in lengths)))
    assert table["Focus"].item() == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_only_the_official_rows_give_an_official_score():
    def columns(counts):
        rows = [(name, "a", ["bb"]) for name, n in counts.items() for _ in range(n)]
        return list(short_table(bench(*rows)))

    assert sum(rb2.OFFICIAL.values()) == 1865
    assert columns(rb2.OFFICIAL) == ["Score", *rb2.OFFICIAL]
    assert columns({**rb2.OFFICIAL, "Math": 182})[0] == "Mean"
    assert columns({"Math": 183}) == ["Mean", "Math"]


@pytest.mark.parametrize("name", ["scores.csv", "scores/reference.json"])
def test_results_of_others_are_left_as_they_are(tmp_path, source, llama, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"scores": "of a match"}')
    with pytest.raises(InputError, match=f"--results .*{name}: is there and not what this"):
        evaluate(tmp_path, source=source, model=llama, mode="lmhead")
    assert path.read_text() == '{"scores": "of a match"}'


# -------------------------------------------------------------------- Head files

WEIGHT = torch.linspace(-1, 1, 32)


@pytest.mark.parametrize(
    "head", [WEIGHT, WEIGHT[:, None], WEIGHT[None], torch.stack([WEIGHT, WEIGHT**2], 1)]
)
@pytest.mark.parametrize("ending", [".npy", ".pt", ".safetensors"])
def test_head_files(tmp_path, head, ending):
    path = tmp_path / f"head{ending}"
    if ending == ".npy":
        np.save(path, head.numpy())
    elif ending == ".pt":
        torch.save(head.half(), path)
    else:
        save_file({"score.weight": head.contiguous()}, path)
    columns = rb2.read_head(str(path))
    assert columns.dtype == torch.float32
    assert columns.shape == (32, 2 if head.shape == (32, 2) else 1)
    torch.testing.assert_close(columns[:, 0], WEIGHT, atol=1e-3, rtol=0)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_head_key_chooses_the_entry(tmp_path, ending):
    path = str(tmp_path / f"heads{ending}")
    entries = {"first": WEIGHT, "second": -WEIGHT}
    (torch.save if ending == ".pt" else save_file)(entries, path)
    torch.testing.assert_close(rb2.read_head(path, "second"), -WEIGHT[:, None])
    for key in (None, "third"):
        with pytest.raises(InputError, match="first, second.*--head_key"):
            rb2.read_head(path, key)


def test_bias_is_a_number_or_a_file(tmp_path):
    head, bias = str(tmp_path / "head.npy"), str(tmp_path / "bias.npy")
    np.save(head, torch.stack([WEIGHT, WEIGHT], 1).numpy())
    np.save(bias, np.array([1.0, 2.0]))
    for given_bias, expected in ((None, [0, 0]), ("-0.5", [-0.5, -0.5]), (bias, [1, 2])):
        heads = rb2.HeadFile(head, given_bias).heads()
        assert [h.bias for h in heads.values()] == expected
    np.save(bias, np.array([1.0, 2.0, 3.0]))
    for wrong, says in ((bias, "3 numbers for 2 heads"), ("nan", "--head_bias nan: a finite"),
                        ("inf", "--head_bias inf: a finite number")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            rb2.HeadFile(head, wrong).heads()


class Harmful:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("ending", [".pt", ".npy"])
def test_nothing_is_unpickled(tmp_path, ending):
    trace, path = tmp_path / "trace", tmp_path / f"head{ending}"
    if ending == ".pt":
        torch.save(Harmful(trace), path)
    else:
        np.save(path, np.array([Harmful(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        rb2.read_head(str(path))
    assert not trace.exists()


def pickled(value: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save(value, path)


def array(value: np.ndarray) -> Callable[[Path], Any]:
    return lambda path: np.save(path, value)


def too_long(path: Path) -> None:
    np.save(path, np.ones(4, np.float32))
    path.write_bytes(path.read_bytes().replace(b"(4,), }" + 12 * b" ", b"(1000000000000,), }"))


ONES, DAMAGED, COMPLEX = torch.ones(4, 1), "cannot be read", "plain real numbers, not"
BAD_HEADS = {
    "npy garbage": (lambda path: path.write_bytes(b"junk"), DAMAGED),
    "npy three dimensions": (array(np.ones((2, 3, 4))), "a head is one tensor of shape"),
    "npy NaN": (array(np.array([1, np.nan])), "not finite"),
    "npy complex": (array(np.ones(4) * 1j), COMPLEX),
    "npy that promises too much": (too_long, DAMAGED),
    "npy missing": (lambda path: None, "no such head file"),
    "bin": (Path.touch, "one of .npy, .pt, .safetensors"),
    "pt garbage": (lambda path: path.write_bytes(b"garbage"), DAMAGED),
    "pt empty": (lambda path: path.write_bytes(b""), DAMAGED),
    "pt pickle of nothing": (lambda path: path.write_bytes(b"\x80\x02."), DAMAGED),
    "pt names that are numbers": (pickled({1: ONES, 2: ONES}), "choose one of 1, 2 with --head_k"),
    "pt no names": (pickled({None: ONES, "b": ONES}), "choose one of None, b with --head_key"),
    "pt nothing": (pickled({}), "--head_key"),
    "pt list": (pickled([ONES]), "a head is one tensor"),
    "pt nest": (pickled({"a": {"b": ONES}}), "a head is one tensor"),
    "pt sparse": (pickled(ONES.to_sparse()), COMPLEX),
    "pt of no device": (pickled(ONES.to("meta")), COMPLEX),
    "pt complex": (pickled(ONES * 1j), COMPLEX),
    "pt truth": (pickled(ONES > 0), COMPLEX),
    "pt infinite": (pickled(ONES / 0), "not finite"),
}


@pytest.mark.parametrize("what", BAD_HEADS)
def test_what_is_no_plain_head_is_named_in_one_line(tmp_path, what):
    write, says = BAD_HEADS[what]
    path = tmp_path / f"head.{what.split()[0]}"
    write(path)
    with pytest.raises(InputError, match=f"{path.name}: .*{says}") as error:
        rb2.read_head(str(path))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------- Bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chosen": "gone"}, "row 2 has no column chosen"),
        ({"chosen": []}, "row 2 .*chosen must be a list of one or more"),
        ({"rejected": []}, "row 2 .*rejected must be a list of one or more"),
        ({"chosen": "text"}, "row 2 .*chosen must be a list"),
        ({"rejected": ["a", None, "b"]}, "row 2 .*rejected holds something"),
        ({"prompt": None}, "row 2 .*prompt must be text"),
        ({"prompt": "\ud800"}, "row 2 .*half a surrogate"),
        ({"chosen": ["\udfff"]}, "row 2 .*half a surrogate"),
        ({"rejected": ["a", "\ud800"]}, "row 2 .*half a surrogate"),
        ({"subset": "\ud800"}, "row 2 .*half a surrogate"),
        ({"id": "\ud800"}, r"row 2 .*ud800.*half a surrogate"),
        ({"id": None}, "row 2 .*id must be text or a whole number"),
        ({"id": [1]}, "row 2 .*id must be text or a whole number"),
        ({"subset": ""}, "row 2 .*subset is empty"),
        ({"num_correct": True}, "row 2 .*num_correct is True"),
        ({"num_correct": 2}, "row 2 .*num_correct is 2, but 1 "),
        ({"subset": "Ties"}, "ref:k"),
    ],
)
def test_bad_rows_in_the_source(tmp_path, changes, says):
    rows = raw_rows()
    rows[1] = {k: v for k, v in (rows[1] | changes).items() if v != "gone"}
    with pytest.raises(InputError, match=says):
        rb2.read_bench(write_rows(tmp_path / "rows.jsonl", rows), "test", [], 0)


def test_malformed_empty_and_missing_sources(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(raw_rows()[0]) + "\n{]\n")
    with pytest.raises(InputError, match="rows.jsonl row 2 .*JSON"):
        rb2.read_bench(str(path), "test", [], 0)
    path.write_text("")
    with pytest.raises(InputError, match="no rows"):
        rb2.read_bench(str(path), "test", [], 0)
    with pytest.raises(InputError, match="no such file"):
        rb2.read_bench(str(tmp_path / "other.jsonl"), "test", [], 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"subset": ["Maths"]}, "--subset Maths.*Factuality, Focus, Math, Precise IF"),
        ({"basis": "{basis}", "users": ["dan"]}, "--users dan.*3 users, such as ann, bob, cy"),
        ({"users": ["ann"]}, "--users belongs to --basis"),
        ({"head_key": "a"}, "belong to --rm_head"),
        ({"save_csv": "{folder}"}, "--save-csv .* is a folder"),
        ({"save_csv": "{wide}"}, "--save-csv .*wide.npy: is there and not what this writes"),
        ({"save_csv": "{wide}", "rm_head": "{wide}"}, "--save-csv .*wide.npy: is what is to be"),
        ({"save_csv": "{wide}/x.csv"}, "--save-csv .*nothing can be written in .*wide.npy"),
        ({"save_csv": "{basis}", "basis": "{basis}"}, "--save-csv .*is what is to be read"),
        ({"mode": "seqclf", "basis": "{basis}"}, "--mode seqclf"),
        ({"rm_head": "{wide}"}, "head 1 has 33 features.*have 32"),
        ({"basis": "nowhere.safetensors"}, "nowhere.safetensors.*no such basis"),
        ({"model": "{missing}"}, "missing cannot be loaded"),
    ],
)
def test_bad_settings_stop_before_any_work(tmp_path, source, llama, basis_file, settings, says):
    np.save(tmp_path / "wide.npy", np.ones(33))
    files = {"basis": basis_file, "folder": tmp_path}
    files |= {"wide": tmp_path / "wide.npy", "missing": tmp_path / "missing"}
    filled = {k: v.format(**files) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(InputError, match=says):
        evaluate(tmp_path / "out", **{"source": source, "model": llama, **filled})
    assert not (tmp_path / "out").exists()
