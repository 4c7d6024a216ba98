"""RewardBench 2: the official formulae on hand-computed rows, and the script end to end."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import made_bases
import models
import running
from lore.common.files import InputError
from lore.embeddings.reward_model import ModelChoice
from lore.embeddings.store import Store, embed
from lore.methods.saved import load_learned
from PRISM import eval_rb2
from PRISM import rewardbench2 as rb2

DATA = running.ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared real data is not here")


# ------------------------------------------------------- Subsets other than Ties


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([3, 1, 2, 0], 1.0), ([1, 3, 2, 0], 0.0), ([3, 3, 2, 0], 1 / 2), ([3, 3, 3, 0], 1 / 3),
     ([3, 3, 3, 3], 1 / 4), ([2, 3, 3, 3], 0.0), ([-1, -2, -2, -2], 1.0)],
)  # fmt: skip
def test_a_row_shares_its_point_among_the_completions_at_the_maximum(scores, expected):
    assert rb2.score([("a", "Math", 1, scores)]) == {"Math": expected, "Overall": expected}


def test_subset_is_a_mean_over_rows_and_overall_an_unweighted_mean_over_subsets():
    maths = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]]
    rows = [("1", "Math", 1, scores) for scores in maths] + [("5", "Focus", 1, [2, 1, 1, 1])]
    result = rb2.score(rows)
    assert result == {"Math": 0.375, "Focus": 1.0, "Overall": 0.6875}
    assert list(rb2.score(rows[::-1])) == ["Math", "Focus", "Overall"]


# ------------------------------------------------------------------------- Ties

PERFECT = ("tied:1", [6, 5], [2]), ("ref:1", [5], [0])  # gap 3, spread 1; ref gap 5
BELOW = ("tied:2", [9, 5], [4]), ("ref:2", [9], [0])  # gap 1, spread 4; ref gap 9
OTHERS = ("tied:3", [1, 0], [9]), ("ref:4", [0], [5])  # both wrong, and without partners
REF, WRONG, BOTH = ("ref:1", [9], [0]), ("ref:1", [0], [1]), 0.3 + 0.3
TIES = {  # rows, and the score: .3 a_t + .3 a_r + .2 p + .2 h + .01 g
    "perfect": (PERFECT, 1 + 0.01 * math.tanh(2)),
    "gap below the spread": (BELOW, BOTH + 0.01 * math.tanh(-0.75)),
    "means over pairs": ([*PERFECT, *BELOW], 0.8 + 0.005 * (math.tanh(2) + math.tanh(-0.75))),
    # gap 5, spread 2; ref gap 1: p = 1, h = 0
    "small ref gap": ([("tied:1", [9, 7], [2]), ("ref:1", [1], [0])],
                      0.8 + 0.01 * math.tanh(-0.5)),
    "wrong ref row": ([("tied:1", [9, 7], [2]), WRONG], 0.3 + 0.2 + 0.01 * math.tanh(-1.5)),
    # gap 2 = spread, ref gap 0: neither is above
    "equal": ([("tied:1", [6, 4], [2]), ("ref:1", [1], [1])], 0.3 + 0.01 * math.tanh(-1)),
    # correct scores all 5: x/0 is tanh(+-inf) = +-1, and 0/0 counts as 0
    "no spread": ([("tied:1", [5, 5], [0]), REF], 1.01),
    "no spread, no gap": ([("tied:1", [5, 5], [5]), REF], 0.3),
    "no spread, wrong": ([("tied:1", [5, 5], [6]), REF], 0.3 - 0.01),
    # a_t = a_r = 1/2; only k = 1 is paired
    "some without partners": ([*PERFECT, *OTHERS], 0.15 + 0.15 + 0.4 + 0.01 * math.tanh(2)),
    "a tied row alone": (PERFECT[:1], 0.3),
    "a ref row alone": (PERFECT[1:], 0.3),
}  # fmt: skip


@pytest.mark.parametrize("case", TIES)
def test_the_score_of_ties_rows(case):
    rows, expected = TIES[case]
    scored = [(name, "Ties", len(right), [*right, *wrong]) for name, right, wrong in rows]
    assert rb2.score(scored)["Ties"] == pytest.approx(expected)


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


@pytest.mark.slow
@settings(deadline=None)
@given(benchmarks(), st.integers(-1000, 1000), st.integers(1, 1000), st.randoms())
def test_bounds_and_that_shift_scale_and_order_do_not_matter(rows, shift, scale, random):
    def mixed(values):
        return random.sample(values, len(values))

    result = rb2.score(rows)
    assert -0.01 <= result["Ties"] <= 1.01
    assert all(0 <= result[name] <= 1 for name in result if name in ("Math", "Focus"))
    # Whole numbers keep the arithmetic exact, so the scores must agree to the last digit.
    moved = [(i, s, n, [scale * x + shift for x in scores]) for i, s, n, scores in rows]
    assert rb2.score(moved) == result
    other = [(i, s, n, mixed(x[:n]) + mixed(x[n:])) for i, s, n, x in mixed(rows)]
    assert rb2.score(other) == pytest.approx(result)


# -------------------------------------------------------------------- Bad scores


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("7", "Math", 1, [1.0, math.nan, 0, 0])], "'7'.*finite"),
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

    def score(of_chosen, of_rejected):
        texts = [[*map(of_chosen, r["chosen"]), *map(of_rejected, r["rejected"])] for r in rows]
        facts = ([r[name] for r in rows] for name in ("id", "subset", "num_correct"))
        return rb2.score(zip(*facts, texts, strict=True))["Ties"]

    def graded(*pairs):
        return 0.01 * sum(math.tanh(gap / spread - 1) for gap, spread in pairs) / 4

    assert score(lambda _: 2.0, lambda _: 1.0) == pytest.approx(1.01)
    assert score(lambda _: 1.0, lambda _: 2.0) == pytest.approx(-0.01)
    # Shortest first: the tied gaps are -12, -18, -13, -16 and the spreads 10, 10, 4, 8 characters.
    expected = graded((-12, 10), (-18, 10), (-13, 4), (-16, 8))
    assert score(lambda text: -len(text), lambda text: -len(text)) == pytest.approx(expected)
    # With 20 characters of credit for a correct one all rows are right, and one gap of four
    # (tied:49, 7 against a spread of 4) is preferred; the ref gaps are 18, 11, 11, 7.
    expected = 0.3 + 0.3 + 0.2 / 4 + 0.2 / 4 + graded((8, 10), (2, 10), (7, 4), (4, 8))
    assert score(lambda text: 20 - len(text), lambda text: -len(text)) == pytest.approx(expected)


@needs_data
def test_published_overall_scores_are_the_unweighted_mean_of_six_subsets():
    table = pd.read_csv(DATA / "rewardbench2_official_scores.csv", index_col="model")
    apart = table[list(rb2.OFFICIAL)].mean(axis=1) - table["Score"]
    assert len(table) == 197 and apart.abs().max() <= 1e-4  # each is rounded to four digits


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
         "num_correct": correct, "models": ["someone"], "subset": subset}
        for subset, name, correct, wrong in shapes
    ]  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("raw") / "test.jsonl", raw_rows())


@pytest.fixture(scope="module")
def basis_file(tmp_path_factory) -> str:
    return str(made_bases.make_basis(tmp_path_factory.mktemp("basis"), None, rank=2))


def evaluate(folder: Path, model=None, any_model=False, **settings) -> pd.DataFrame:
    """The table of a run in this process, as it was saved."""
    heads = {k: settings.pop(k) for k in ("rm_head", "head_key") if k in settings}
    settings |= {"lm": ModelChoice(model, any_model=any_model), "file": rb2.HeadFile(**heads)}
    settings |= {"results": str(folder), "progress": False}
    eval_rb2.main(embeddings=str(folder / "embeddings"), **settings)
    return pd.read_csv(folder / "scores.csv", index_col="reward")


def saved(folder: Path, reward: str) -> tuple[dict, np.ndarray]:
    """What a run wrote of a reward, and its scores in one row."""
    record = json.loads((folder / "scores" / f"{reward}.json").read_text())
    return record, np.concatenate(record["scores"])


def harness_logits(model: str, max_length: int = 2048) -> np.ndarray:
    """As the official harness: text from the template, tokenized, a doubled BOS taken away."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    network.config.pad_token_id = None
    logits = []
    for talk in rb2.as_conversations(pd.DataFrame(raw_rows())):
        rendered = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(rendered, truncation=True, max_length=max_length)["input_ids"]
        ids = ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids
        with torch.inference_mode():
            logits.append(network(input_ids=torch.tensor([ids])).logits.item())
    return np.array(logits)


@pytest.mark.slow
def test_script_reports_every_reward_from_one_pass(tmp_path, source, model, basis_file):
    head = torch.arange(64.0).reshape(32, 2).cos()
    np.save(tmp_path / "head.npy", head.numpy())
    done = running.invoke(
        "PRISM/eval_rb2.py", {},
        "--source", source, "--model", str(model), "--basis", basis_file, "--users", "17", "new",
        "--rm_head", str(tmp_path / "head.npy"), "--head-bias", "3",
        "--results", str(tmp_path / "out"), "--embeddings", str(tmp_path / "embeddings"),
        "--save_csv", str(tmp_path / "table.csv"), "--verbose_failures", "--top_k", "2",
    )  # fmt: skip
    assert done.status == 0, done.err
    table = pd.read_csv(tmp_path / "out" / "scores.csv", index_col="reward")
    assert list(table.columns) == ["Mean", *rb2.OFFICIAL]
    pd.testing.assert_frame_equal(table, pd.read_csv(tmp_path / "table.csv", index_col="reward"))

    store, basis = Store(tmp_path / "embeddings"), load_learned(basis_file)
    rows = store.rows(torch.arange(len(store)))
    texts = [text for row in raw_rows() for text in row["chosen"] + row["rejected"]]
    odds = rows @ basis.V / 100  # a basis' rewards are log odds, a hundredth of x V w
    expected = {
        "reference": torch.from_numpy(harness_logits(str(model))).float(),
        "head 1": rows @ head[:, 0] + 3,
        "head 2": rows @ head[:, 1] + 3,
        "basis 1": odds[:, 0],
        "basis 2": odds[:, 1],
        "average user": odds @ basis.W.mean(0),
        "user 17": odds @ basis.W[1],
        "user new": odds @ basis.W_unseen[0],
        "shortest response": -torch.tensor([*map(len, texts)]).float(),
    }
    assert list(table.index) == [*expected]
    for name, rewards in expected.items():
        record, scores = saved(tmp_path / "out", name.replace(" ", "-"))
        np.testing.assert_allclose(scores, rewards.numpy(), rtol=1e-4, atol=1e-4)
        assert_record_gives(record, table.loc[name])
        printed = next(line for line in done.out.splitlines() if line.startswith(name))
        assert printed.split()[-7:] == [f"{value:.4f}" for value in table.loc[name]]
    assert "not official" in done.out
    # The two worst rows of the last reward before the baseline.
    record, _ = saved(tmp_path / "out", "user-new")
    numbered = zip(record["num_correct"], record["scores"], strict=True)
    worst = sorted((max(s[n:]) - min(s[:n]) for n, s in numbered), reverse=True)[:2]
    shown = [line.split()[0] for line in done.out.splitlines()[-2:]]
    assert [float(x) for x in shown] == pytest.approx(worst, abs=1e-5)


def assert_record_gives(record: dict, scores: pd.Series) -> None:
    """The saved rows give the saved scores, also as plain means of the official results."""
    rows = list(zip(*(record[k] for k in ("id", "subset", "num_correct", "scores")), strict=True))
    assert [row[0] for row in rows] == [row["id"] for row in raw_rows()]
    assert rb2.score(rows) == pytest.approx(scores.rename({"Mean": "Overall"}).to_dict())
    results = pd.Series(record["results"], index=record["subset"], dtype=float)
    assert results.isna().sum() == 5 and results["Ties"].isna().all()
    means = results.dropna().groupby(level=0).mean()
    assert means.to_dict() == pytest.approx(scores.drop(["Mean", "Ties"]).to_dict())


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
        (_, own), (_, head) = saved(out / "own", "model"), saved(out / "head", "reference")
        np.testing.assert_allclose(own, head, rtol=1e-4, atol=1e-4)
        assert table.loc["model"].to_dict() == pytest.approx(row.loc["reference"].to_dict(), 1e-4)
        apart = np.abs(own - harness_logits(model, length)).max()
        assert apart < 1e-4 if side == "right" else apart > 0.01


@pytest.mark.slow
def test_later_runs_use_the_embeddings_that_are_there(tmp_path, source, model, basis_file):
    settings = {"source": source, "model": str(model), "mode": "lmhead"}
    evaluate(tmp_path, **settings)
    shard = next((tmp_path / "embeddings").glob("embeddings-*.safetensors"))
    before = shard.stat().st_mtime_ns
    assert "basis 2" in evaluate(tmp_path, **settings, basis=basis_file).index
    assert shard.stat().st_mtime_ns == before


def test_the_model_is_the_one_the_basis_was_learned_with(tmp_path, source, model, capsys):
    talk = [{"role": "user", "content": "Hi"}]
    facts = embed([talk], tmp_path / "rows", model=str(model), progress=False).manifest
    hashes = {name: facts[name] for name in ("weights_sha256", "template_sha256")}
    path = str(made_bases.make_basis(tmp_path, model, **hashes))
    assert "reference" in evaluate(tmp_path / "out", source=source, basis=path).index
    settings = {"source": source, "basis": path}
    settings["model"] = str(models.tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="other weights .*--any-model true"):
        evaluate(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()
    assert "basis 1" in evaluate(tmp_path / "new", any_model=True, **settings).index
    capsys.readouterr()
    eval_rb2.main(basis=path, list_users=True)
    assert capsys.readouterr().out.split() == ["ann", "17", "new"]


def test_a_mixed_logit_gives_the_population_and_its_users(tmp_path):
    learned = load_learned(made_bases.make_mixed(tmp_path, None))
    heads = eval_rb2.basis_heads(learned, ["ann"])
    assert list(heads) == ["shared reward", "taste 1", "taste 2", "average user", "user ann"]
    assert torch.equal(heads["average user"].weight, learned.direction())
    assert torch.equal(heads["user ann"].weight, learned.direction("ann"))


def test_model_without_a_head_takes_a_basis(tmp_path, source, basis_file):
    settings = {"source": source, "model": str(models.headless(tmp_path / "model"))}
    table = evaluate(tmp_path / "out", basis=basis_file, **settings)
    assert list(table.index) == ["basis 1", "basis 2", "average user", "shortest response"]
    for mode in ("lmhead", "seqclf"):
        with pytest.raises(InputError, match="no score head"):
            evaluate(tmp_path / "out", mode=mode, **settings)


def test_any_source_has_the_same_rows_of_which_subsets_and_the_first_are_taken(tmp_path, source):
    rows = pd.DataFrame(raw_rows()).astype({"num_correct": float})
    rows.to_parquet(tmp_path / "rows.parquet")
    every = rb2.read_bench(source, "test", [], 0)
    for other in (str(tmp_path / "rows.parquet"), str(Path(source).parent)):
        pd.testing.assert_frame_equal(every, rb2.read_bench(other, "test", [], 0))
    some = rb2.read_bench(source, "test", ["math", "Precise IF"], 0)
    assert some["subset"].tolist() == ["Precise IF"] * 3 + ["Math"] * 3
    assert rb2.read_bench(source, "test", ["Ties"], 2)["id"].tolist() == ["tied:0", "tied:1"]
    assert len(rb2.read_bench(source, "test", [], 4)) == 4


def test_only_the_official_rows_give_an_official_score(tmp_path, source, monkeypatch):
    def columns(rows):
        return list(rb2.save(tmp_path, None, rows, {"shortest": rb2.length_baseline(rows)}))

    rows, subsets = rb2.read_bench(source, "test", [], 0), list(rb2.OFFICIAL)
    assert sum(rb2.OFFICIAL.values()) == 1865 and columns(rows) == ["Mean", *subsets]
    monkeypatch.setattr(rb2, "OFFICIAL", {name: 5 if name == "Ties" else 3 for name in subsets})
    assert columns(rows) == ["Score", *subsets]
    assert columns(rows[1:]) == ["Mean", *subsets]
    assert columns(rows[rows["subset"] == "Math"]) == ["Mean", "Math"]


@pytest.mark.parametrize("name", ["scores.csv", "scores/reference.json"])
def test_results_of_others_are_left_as_they_are(tmp_path, source, model, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"scores": "of a match"}')
    with pytest.raises(InputError, match=f"--results .*{name}: is there and not what this"):
        evaluate(tmp_path, source=source, model=str(model), mode="lmhead")
    assert path.read_text() == '{"scores": "of a match"}'


# -------------------------------------------------------------------- Head files

WEIGHT, ONES = torch.linspace(-1, 1, 32), torch.ones(4, 1)
DAMAGED, NO_TENSOR, COMPLEX = "cannot be read", "a head is one tensor", "plain real numbers, not"


def write(path: Path, value: object) -> str:
    """Any value as a file of heads; bytes as they are."""
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif path.suffix == ".npy":
        np.save(path, value)
    elif path.suffix == ".pt":
        torch.save(value, path)
    else:
        save_file(value, path)
    return str(path)


@pytest.mark.parametrize(
    "head", [WEIGHT, WEIGHT[:, None], WEIGHT[None], torch.stack([WEIGHT, WEIGHT**2], 1)]
)
@pytest.mark.parametrize("ending", ["npy", "pt", "safetensors"])
def test_head_files(tmp_path, head, ending):
    kinds = {"npy": head.numpy(), "pt": head.half(), "safetensors": {"w": head.contiguous()}}
    columns = rb2.read_head(write(tmp_path / f"head.{ending}", kinds[ending]))
    assert columns.dtype == torch.float32
    assert columns.shape == (32, 2 if head.shape == (32, 2) else 1)
    torch.testing.assert_close(columns[:, 0], WEIGHT, atol=1e-3, rtol=0)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_head_key_chooses_the_entry(tmp_path, ending):
    path = write(tmp_path / f"heads.{ending}", {"first": WEIGHT, "second": -WEIGHT})
    torch.testing.assert_close(rb2.read_head(path, "second"), -WEIGHT[:, None])
    for key in (None, "third"):
        with pytest.raises(InputError, match="first, second.*--head_key"):
            rb2.read_head(path, key)


def test_bias_is_a_number_or_a_file(tmp_path):
    head = write(tmp_path / "head.npy", torch.stack([WEIGHT, WEIGHT], 1).numpy())
    bias = write(tmp_path / "bias.npy", np.array([1.0, 2.0]))
    for given_bias, expected in ((None, [0, 0]), ("-0.5", [-0.5, -0.5]), (bias, [1, 2])):
        heads = rb2.HeadFile(head, given_bias).heads()
        assert [h.bias for h in heads.values()] == expected
    write(tmp_path / "bias.npy", np.array([1.0, 2.0, 3.0]))
    for wrong, says in ((bias, "3 numbers for 2 heads"), ("nan", "--head_bias nan: a finite"),
                        ("inf", "--head_bias inf: a finite number")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            rb2.HeadFile(head, wrong).heads()


class Harmful:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("trace"),)


BAD_HEADS = {
    "npy garbage": (b"junk", DAMAGED),
    "npy three dimensions": (np.ones((2, 3, 4)), NO_TENSOR + " of shape"),
    "npy NaN": (np.array([1, np.nan]), "not finite"),
    "npy complex": (np.ones(4) * 1j, COMPLEX),
    "npy that promises too much": (np.ones(4, np.float32), DAMAGED),
    "npy pickled": (np.array([Harmful()], dtype=object), DAMAGED),
    "npy missing": (None, "no such head file"),
    "bin": (b"", "one of .npy, .pt, .safetensors"),
    "pt garbage": (b"garbage", DAMAGED),
    "pt empty": (b"", DAMAGED),
    "pt pickle of nothing": (b"\x80\x02.", DAMAGED),
    "pt pickled": (Harmful(), DAMAGED),
    "pt names that are numbers": ({1: ONES, 2: ONES}, "choose one of 1, 2 with --head_k"),
    "pt no names": ({None: ONES, "b": ONES}, "choose one of None, b with --head_key"),
    "pt nothing": ({}, "--head_key"),
    "pt list": ([ONES], NO_TENSOR),
    "pt nest": ({"a": {"b": ONES}}, NO_TENSOR),
    "pt sparse": (ONES.to_sparse(), COMPLEX),
    "pt of no device": (ONES.to("meta"), COMPLEX),
    "pt complex": (ONES * 1j, COMPLEX),
    "pt truth": (ONES > 0, COMPLEX),
    "pt infinite": (ONES / 0, "not finite"),
}


@pytest.mark.parametrize("what", BAD_HEADS)
def test_what_is_no_plain_head_is_named_in_one_line_and_never_unpickled(
    tmp_path, monkeypatch, what
):
    (value, says), path = BAD_HEADS[what], tmp_path / f"head.{what.split()[0]}"
    monkeypatch.chdir(tmp_path)
    if value is not None:
        write(path, value)
    if "promises" in what:
        long = b"(1000000000000,), }"
        path.write_bytes(path.read_bytes().replace(b"(4,), }" + 12 * b" ", long))
    with pytest.raises(InputError, match=f"{path.name}: .*{says}") as error:
        rb2.read_head(str(path))
    assert "\n" not in str(error.value) and not Path("trace").exists()


# --------------------------------------------------------------------- Bad input


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chosen": "gone"}, "row 2 has no column chosen"),
        ({"chosen": []}, "row 2 .*chosen must be a list of one or more"),
        ({"chosen": "text"}, "row 2 .*chosen must be a list"),
        ({"rejected": ["a", None, "b"]}, "row 2 .*rejected holds something"),
        ({"prompt": None}, "row 2 .*prompt holds something that is not text"),
        ({"prompt": "\ud800"}, "row 2 .*half a surrogate"),
        ({"rejected": ["a", "\ud800"]}, "row 2 .*half a surrogate"),
        ({"id": "\ud800"}, r"row 2 .*ud800.*half a surrogate"),
        ({"id": None}, "row 2 .*has an empty id"),
        ({"id": [1]}, "row 2 .*id must be text"),
        ({"subset": ""}, "row 2 .*has an empty subset"),
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


@pytest.mark.parametrize(
    ("text", "says"),
    [(json.dumps(raw_rows()[0]) + "\n{]\n", "rows.jsonl row 2 .*JSON"), ("", "no rows"),
     (None, "no such file")],
)  # fmt: skip
def test_malformed_empty_and_missing_sources(tmp_path, text, says):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=says):
        rb2.read_bench(str(path), "test", [], 0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"subset": ["Maths"]}, "--subset Maths.*Factuality, Focus, Math, Precise IF"),
        ({"basis": "{basis}", "users": ["dan"]}, "--users dan.*3 users, such as ann, 17, new"),
        ({"list_users": True}, "--users and --list-users belong to --basis"),
        ({"users": ["ann"]}, "--users and --list-users belong to --basis"),
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
def test_bad_settings_stop_before_any_work(tmp_path, source, model, basis_file, settings, says):
    np.save(tmp_path / "wide.npy", np.ones(33))
    files = {"basis": basis_file, "folder": tmp_path}
    files |= {"wide": tmp_path / "wide.npy", "missing": tmp_path / "missing"}
    filled = {k: v.format(**files) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(InputError, match=says):
        evaluate(tmp_path / "out", **{"source": source, "model": str(model), **filled})
    assert not (tmp_path / "out").exists()
