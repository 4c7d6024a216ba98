"""RewardBench 2: the official formulae on hand-computed rows, and the script end to end."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
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

PERFECT = ("tied:1", [5, 6], [1, 2]), ("ref:1", [5], [0])  # gap 3, spread 1; ref gap 5
SMALL = ("tied:1", [-0.994, -0.995], [-0.998]), ("ref:1", [-0.995], [-1])  # the same shape
BELOW = ("tied:2", [9, 5], [4]), ("ref:2", [9], [0])  # gap 1, spread 4; ref gap 9
OTHERS = ("tied:3", [1, 0], [9]), ("ref:4", [0], [5])  # both wrong, and without partners
REF, WRONG = ("ref:1", [9], [0]), ("ref:1", [0], [1])
TIES = {  # rows, and the score: .3 a_t + .3 a_r + .2 p + .2 h + .01 g
    "perfect": (PERFECT, 1 + 0.01 * math.tanh(2)),
    "perfect by little": (SMALL, 1 + 0.01 * math.tanh(2)),
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


def test_a_row_shares_its_point_among_the_completions_at_the_maximum_and_subsets_are_means():
    points = {(3, 1, 2, 0): 1, (1, 3, 2, 0): 0, (2, 3, 3, 3): 0, (-1, -2, -2, -2): 1}
    points |= {(3, 3, 2, 0): 1 / 2, (3, 3, 3, 3): 1 / 4}
    for scores, expected in points.items():
        assert rb2.score([("a", "Math", 1, scores)]) == {"Math": expected, "Overall": expected}
    rows = [("5", "Focus", 1, [2, 1, 1, 1])]
    rows += [("1", "Math", 1, one) for one in ((1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 0))]
    assert [*rb2.score(rows).items()] == [("Math", 0.375), ("Focus", 1), ("Overall", 0.6875)]


@pytest.mark.parametrize("case", TIES)
def test_the_score_of_ties_rows(case):
    rows, expected = TIES[case]
    scored = [(name, "Ties", len(right), [*right, *wrong]) for name, right, wrong in rows]
    assert rb2.score(scored)["Ties"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("7", "Math", 1, [1.0, math.nan, 0, 0])], "'7'.*finite"),
        ([("7", "Math", 0, [1.0, 0])], "num_correct is 0"),
        ([("7", "Math", 2, [1.0, 0])], "num_correct is 2"),
        ([("tied:", "Ties", 1, [1.0, 0])], "'tied:'.*ref:k"),
        ([("ref:1", "Ties", 1, [1.0, 0])] * 2, "'ref:1'.*twice"),
        ([], "no rows"),
    ],
)
def test_bad_rows_are_named(rows, says):
    with pytest.raises(InputError, match=says):
        rb2.score(rows)


@needs_data
def test_genuine_ties_rows():
    bench = rb2.read_bench(str(DATA / "rewardbench2_ties_slice.jsonl"), "test", [], 0)
    texts = zip(bench["chosen"], bench["rejected"], strict=True)
    right = np.concatenate([[1] * len(chosen) + [0] * len(rejected) for chosen, rejected in texts])

    # Shortest first: the tied gaps are -12, -18, -13, -16 and the spreads 10, 10, 4, 8 characters.
    # With 20 characters of credit for a correct one all rows are right, and one gap of four
    # (tied:49, 7 against a spread of 4) is preferred; the ref gaps are 18, 11, 11, 7.
    for credit, gaps, score in ((0, [-12, -18, -13, -16], 0), (20, [8, 2, 7, 4], 0.6 + 0.4 / 4)):
        rows = rb2.scored_rows(bench, rb2.length_baseline(bench) + credit * right)
        graded = np.tanh(np.array(gaps) / [10, 10, 4, 8] - 1).mean()
        assert rb2.score(rows)["Ties"] == pytest.approx(score + 0.01 * graded)


@needs_data
def test_published_overall_scores_are_the_unweighted_mean_of_six_subsets():
    table = pd.read_csv(DATA / "rewardbench2_official_scores.csv", index_col="model")
    apart = table[list(rb2.OFFICIAL)].mean(axis=1) - table["Score"]
    assert len(table) == 197 and apart.abs().max() <= 1e-4  # each is rounded to four digits


WORDS = ["a", "bee", "can", "do", "every", "fine", "great", "house", "in", "jam", "keep", "low"]


def raw_rows() -> list[dict]:
    """A small RewardBench 2: three rows of five subsets and, of Ties, two pairs and one alone."""
    rng = np.random.default_rng(0)
    shapes = [(s, str(i), 1, 3) for s in rb2.OFFICIAL if s != "Ties" for i in range(3)]
    shapes += [("Ties", name, 3, 4) for name in ("tied:0", "tied:1", "tied:2")]
    shapes += [("Ties", name, 1, 4) for name in ("ref:0", "ref:1")]

    def texts(number: int, words: int = 0) -> list[str]:
        return [" ".join(rng.choice(WORDS, words or rng.integers(2, 9))) for _ in range(number)]

    return [
        {"id": name, "subset": subset, "models": ["someone"], "num_correct": correct,
         "prompt": texts(1, 5)[0], "chosen": texts(correct), "rejected": texts(wrong)}
        for subset, name, correct, wrong in shapes
    ]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("raw") / "test.jsonl"
    return str(made_bases.write_lines(path, raw_rows()))


def evaluate(folder: Path, model=None, any_model=False, **settings) -> pd.DataFrame:
    """The table of a run in this process, as it was saved."""
    settings |= {"lm": ModelChoice(model, any_model=any_model), "progress": False}
    eval_rb2.main(results=str(folder), embeddings=str(folder / "embeddings"), **settings)
    return pd.read_csv(folder / "scores.csv", index_col="reward")


def saved(folder: Path, reward: str) -> tuple[pd.DataFrame, np.ndarray]:
    """The rows that a run wrote of a reward, and their scores one after the other."""
    rows = pd.read_json(folder / "scores" / f"{reward}.json")
    return rows, np.concatenate(rows["scores"])


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
def test_script_reports_every_reward_from_one_pass(tmp_path, source, model):
    head = torch.arange(64.0).reshape(32, 2).cos()
    np.save(tmp_path / "head.npy", head.numpy())
    basis_file = made_bases.make_basis(tmp_path, None, rank=2)
    done = running.invoke("PRISM/eval_rb2.py", {
        "source": source, "model": model, "basis": basis_file, "users": ["17", "new"],
        "rm_head": tmp_path / "head.npy", "head_bias": 3, "save_csv": tmp_path / "table.csv",
        "results": tmp_path / "out", "embeddings": tmp_path / "embeddings",
        "verbose_failures": "true", "top_k": 2,
    })  # fmt: skip
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
        "head 1": rows @ head[:, 0] + 3, "head 2": rows @ head[:, 1] + 3,
        "basis 1": odds[:, 0], "basis 2": odds[:, 1], "average user": odds @ basis.W.mean(0),
        "user 17": odds @ basis.W[1], "user new": odds @ basis.W_unseen[0],
        "shortest response": -torch.tensor([*map(len, texts)]).float(),
    }  # fmt: skip
    assert list(table.index) == [*expected]
    for name, rewards in expected.items():
        rows, scores = saved(tmp_path / "out", name.replace(" ", "-"))
        np.testing.assert_allclose(scores, rewards.numpy(), rtol=1e-4, atol=1e-4)
        assert rows["id"].tolist() == [row["id"] for row in raw_rows()]
        own, official = table.loc[name], rb2.score(rows[[*rb2.Row._fields]].to_numpy())
        assert official == pytest.approx(own.rename({"Mean": "Overall"}).to_dict())
        means = rows.groupby("subset")["results"].mean().dropna()  # those of Ties are null
        assert means.to_dict() == pytest.approx(own.drop(["Mean", "Ties"]).to_dict())
        printed = next(line for line in done.out.splitlines() if line.startswith(name))
        assert printed.split()[-7:] == [f"{value:.4f}" for value in table.loc[name]]
    assert "not official" in done.out
    # The two worst rows of the last reward before the baseline.
    rows, _ = saved(tmp_path / "out", "user-new")
    scored = zip(rows["num_correct"], rows["scores"], strict=True)
    worst = sorted((max(s[n:]) - min(s[:n]) for n, s in scored), reverse=True)[:2]
    shown = [line.split()[0] for line in done.out.splitlines()[-2:]]
    assert [float(x) for x in shown] == pytest.approx(worst, abs=1e-5)


PAD_IS_EOS = partial(models.tiny_llama, pad_is_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", [models.tiny_llama, models.tiny_qwen, PAD_IS_EOS])
def test_own_forward_is_the_harness_and_the_reference_row(tmp_path, source, make):
    model = str(make(tmp_path / "model"))
    for length, side in ((2048, "right"), (60, "right"), (60, "left")):
        settings = {"source": source, "model": model, "max_length": length, "batch_size": 3}
        out = tmp_path / f"{length}-{side}"
        evaluate(out / "own", truncation_side=side, **settings)
        evaluate(out / "head", truncation_side=side, mode="lmhead", **settings)
        (_, own), (_, head) = saved(out / "own", "model"), saved(out / "head", "reference")
        np.testing.assert_allclose(own, head, rtol=1e-4, atol=1e-4)
        apart = np.abs(own - harness_logits(model, length)).max()
        assert apart < 1e-4 if side == "right" else apart > 0.01


def test_the_model_is_the_one_the_basis_was_learned_with(tmp_path, source, model):
    facts = embed(made_bases.CHATS, tmp_path / "rows", model=str(model), progress=False).manifest
    hashes = {name: facts[name] for name in ("weights_sha256", "template_sha256")}
    basis = str(made_bases.make_basis(tmp_path, model, **hashes))
    settings = {"source": source, "basis": basis, "subset": ["Math"]}
    assert "reference" in evaluate(tmp_path / "out", **settings).index
    settings["model"] = str(models.tiny_llama(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="other weights .*--any-model true"):
        evaluate(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()
    assert "basis 1" in evaluate(tmp_path / "new", any_model=True, **settings).index


def test_model_without_a_head_takes_a_mixed_logit(tmp_path, source):
    settings = {"source": source, "model": str(models.headless(tmp_path / "model"))}
    path = made_bases.make_mixed(tmp_path, None)
    table = evaluate(tmp_path / "out", basis=str(path), users=["ann"], **settings)
    rewards = ["shared reward", "taste 1", "taste 2", "average user", "user ann"]
    assert list(table.index) == [*rewards, "shortest response"]
    store = Store(tmp_path / "out" / "embeddings")
    expected = store.rows(torch.arange(len(store))) @ load_learned(path).direction("ann")
    _, scores = saved(tmp_path / "out", "user-ann")
    torch.testing.assert_close(torch.tensor(scores).float(), expected)
    for mode in ("lmhead", "seqclf"):
        with pytest.raises(InputError, match="no score head"):
            evaluate(tmp_path / "out", mode=mode, **settings)


def test_any_source_has_the_same_rows_of_which_subsets_and_the_first_are_taken(tmp_path, source):
    pd.DataFrame(raw_rows()).astype({"num_correct": float}).to_parquet(tmp_path / "rows.parquet")
    every = rb2.read_bench(source, "test", [], 0)
    for other in (str(tmp_path / "rows.parquet"), str(Path(source).parent)):
        pd.testing.assert_frame_equal(every, rb2.read_bench(other, "test", [], 0))
    some = rb2.read_bench(source, "test", ["math", "Precise IF"], 0)
    assert some["subset"].tolist() == ["Precise IF"] * 3 + ["Math"] * 3
    assert rb2.read_bench(source, "test", ["Ties"], 2)["id"].tolist() == ["tied:0", "tied:1"]


def test_only_the_official_rows_give_an_official_score(tmp_path, source, monkeypatch):
    def columns(rows):
        return list(rb2.save(tmp_path, None, rows, {"shortest": rb2.length_baseline(rows)}))

    rows, subsets = rb2.read_bench(source, "test", [], 0), list(rb2.OFFICIAL)
    assert sum(rb2.OFFICIAL.values()) == 1865 and columns(rows) == ["Mean", *subsets]
    monkeypatch.setattr(rb2, "OFFICIAL", {name: 5 if name == "Ties" else 3 for name in subsets})
    assert columns(rows) == ["Score", *subsets] and columns(rows[1:]) == ["Mean", *subsets]
    assert columns(rows[rows["subset"] == "Math"]) == ["Mean", "Math"]


WEIGHT, ONES = torch.linspace(-1, 1, 32), torch.ones(4, 1)
WRITE = {".npy": lambda v, p: np.save(p, v), ".pt": torch.save, ".safetensors": save_file}


def write(path: Path, value: object) -> str:
    """Any value as a file of heads; bytes as they are."""
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        WRITE[path.suffix](value, path)
    return str(path)


@pytest.mark.parametrize("ending", ["npy", "pt", "safetensors"])
def test_head_files(tmp_path, ending):
    two = torch.stack([WEIGHT, WEIGHT**2], 1)
    for head in (WEIGHT, WEIGHT[:, None], WEIGHT[None], two):
        kinds = {"npy": head.numpy(), "pt": head.half(), "safetensors": {"w": head.contiguous()}}
        columns = rb2.read_head(write(tmp_path / f"head.{ending}", kinds[ending]))
        assert columns.dtype == torch.float32
        expected = two if head is two else WEIGHT[:, None]
        torch.testing.assert_close(columns, expected, atol=1e-3, rtol=0)
    if ending != "npy":
        path = write(tmp_path / f"heads.{ending}", {"first": WEIGHT, "second": -WEIGHT})
        torch.testing.assert_close(rb2.read_head(path, "second"), -WEIGHT[:, None])
        for key in (None, "third"):
            with pytest.raises(InputError, match="first, second.*--head_key"):
                rb2.read_head(path, key)


def test_bias_is_a_number_or_a_file(tmp_path):
    head = write(tmp_path / "head.npy", torch.stack([WEIGHT, WEIGHT], 1).numpy())
    two, three = (write(tmp_path / f"{n}.npy", np.arange(1.0, n + 1)) for n in (2, 3))
    for bias, expected in ((None, [0, 0]), ("-0.5", [-0.5, -0.5]), (two, [1, 2])):
        assert [each.bias for each in rb2.HeadFile(head, bias).heads().values()] == expected
    for wrong, says in ((three, "3 numbers for 2 heads"), ("nan", "--head_bias nan: a finite")):
        with pytest.raises(InputError, match=says):
            rb2.HeadFile(head, wrong).heads()


class Harmful:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("trace"),)


BAD_HEADS = {  # message -> ending and what is wrong -> what the file holds
    "cannot be read": {
        "npy empty": b"", "pt garbage": b"garbage", "safetensors garbage": b"{" * 9,
        "pt pickled": Harmful(), "npy pickled": np.array([Harmful()], dtype=object),
    },
    "a head is one tensor of shape": {
        "npy three dimensions": np.ones((2, 3, 4)), "pt list": [ONES], "pt nest": {"a": {"b": ONES}}
    },
    "plain real numbers, not": {
        "npy complex": np.ones(4) * 1j, "pt complex": ONES * 1j, "pt truth": ONES > 0,
        "pt sparse": ONES.to_sparse(), "pt of no device": ONES.to("meta"),
    },
    "not finite": {"npy NaN": np.array([1, np.nan]), "pt infinite": ONES / 0},
    "no such head file": {"npy missing": None},
    "one of .npy, .pt, .safetensors": {"bin": b""},
    "choose one of 1, None with --head_key": {"pt names of other kinds": {1: ONES, None: ONES}},
    "--head_key": {"pt nothing": {}},
}  # fmt: skip


@pytest.mark.parametrize("says", BAD_HEADS)
def test_what_is_no_plain_head_is_named_in_one_line_and_never_unpickled(
    tmp_path, monkeypatch, says
):
    monkeypatch.chdir(tmp_path)
    for what, value in BAD_HEADS[says].items():
        path = tmp_path / f"head.{what.split()[0]}"
        if value is not None:
            write(path, value)
        with pytest.raises(InputError, match=f"{path.name}: .*{says}") as error:
            rb2.read_head(str(path))
        assert "\n" not in str(error.value) and not Path("trace").exists(), what


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chosen": "gone"}, "row 2 has no column chosen"),
        ({"chosen": []}, "row 2 .*chosen must be a list of one or more"),
        ({"chosen": "text"}, "row 2 .*chosen must be a list"),
        ({"rejected": ["a", None, "b"]}, "row 2 .*rejected holds something"),
        ({"prompt": None}, "row 2 .*prompt holds something that is not text"),
        ({"prompt": "\ud800"}, "row 2 .*half a surrogate"),
        ({"id": "\ud800"}, r"row 2 .*ud800.*half a surrogate"),
        ({"id": [1]}, "row 2 .*id must be text"),
        ({"subset": ""}, "row 2 .*has an empty subset"),
        ({"num_correct": True}, "row 2 .*num_correct is True"),
        ({"num_correct": 2}, "row 2 .*num_correct is 2, but 1 "),
        ({"subset": "Ties"}, "ref:k"),
        (None, "rows.jsonl has no rows"),
    ],
)
def test_bad_rows_of_a_file_are_named(tmp_path, changes, says):
    first, second, *_ = raw_rows()
    changed = {k: v for k, v in (second | (changes or {})).items() if v != "gone"}
    rows = [first, changed] if changes else []
    with pytest.raises(InputError, match=says):
        rb2.read_bench(str(made_bases.write_lines(tmp_path / "rows.jsonl", rows)), "test", [], 0)
