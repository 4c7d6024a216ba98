"""A learned basis outside the project: as a stock checkpoint, and ranking candidates."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import models
import running
from lore.common.files import UMASK, InputError
from lore.elicitation.choices import read_candidates, read_user_choices
from lore.elicitation.user import User, leave_one_out, load_fit
from lore.embeddings import store as embeddings
from lore.embeddings.reward_model import ModelChoice
from lore.learning.basis import Basis, load_basis, save_basis
from lore.methods.fitting.posterior import Prior
from lore.methods.lore import Lore, LoreFit
from lore.methods.mixed_logit import MixedFit
from lore.methods.ridge_bt import SharedFit
from lore.methods.saved import load_learned
from lore.preparing.own_rows import Columns
from tools import export, rank_responses
from utils import PersonalizeBatch

ROOT = Path(__file__).resolve().parents[1]
CHATS = [
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question in ("Why is the sky blue?", "Sing!")
    for answer in ("Light scatters.", "No idea, sorry", "La la la la la la la la")
]


def without_bos_in_its_template(folder: Path) -> Path:
    """The embedding engine puts in front the BOS that the tokenizer would."""
    models.tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    tokenizer.save_pretrained(folder)
    return folder


TINY = {
    "llama": models.tiny_llama,
    "llama whose pad is its end": lambda folder: models.tiny_llama(folder, pad_is_eos=True),
    "llama without BOS in its template": without_bos_in_its_template,
    "qwen": models.tiny_qwen,
    "language model": models.headless,
}


def make_basis(
    folder: Path, model: Path | None, features: int = 32, rank: int = 3, **facts: str
) -> Path:
    """A basis file with two seen users and a new one; facts are what is known of the model."""
    rng = torch.Generator().manual_seed(1)
    V = torch.randn(features, rank, generator=rng)
    W = torch.rand(3, rank, generator=rng).softmax(1)
    settings = {"rank": rank, "estimator": "LoRe"} | facts
    settings |= {"model": str(model)} if model else {}
    basis = Basis(V, W[:2], V[:, 0], ["ann", "17"], W[2:], ["new"], settings)
    save_basis(folder / "basis.safetensors", basis)
    return folder / "basis.safetensors"


def make_mixed(folder: Path, model: Path | None, features: int = 32, spread: float = 1.0) -> Path:
    """A mixed logit's file with the same people: tastes along two directions, half known."""
    rng = torch.Generator().manual_seed(2)
    directions = torch.randn(features, 3, generator=rng).double() / 100
    prior = Prior(torch.zeros(2).double(), spread**2 * torch.eye(2).double())
    states = torch.randn(3, 2, generator=rng).double()
    fit = MixedFit(directions[:, 0], directions[:, 1:], prior, {"chosen": {"rank": 2}})
    fit.users = states[:2]
    facts = {"users": ["ann", "17"], "users_unseen": ["new"]}
    facts |= {"model": str(model)} if model else {}
    fit.save(folder / "mixed_logit.safetensors", states[2:], facts)
    return folder / "mixed_logit.safetensors"


def embed(model: Path, folder: Path, chats: list = CHATS) -> torch.Tensor:
    """Embeddings as a run has them [n, F]."""
    store = embeddings.embed(chats, folder, model=str(model), progress=False)
    return store.rows(torch.arange(len(chats)))


def stock_rewards(folder: Path, batch: bool, chats: list = CHATS) -> torch.Tensor:
    """[n, labels], by nothing but what the model card says."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    groups = [chats] if batch else [[chat] for chat in chats]
    with torch.no_grad():
        return torch.cat([
            model(**tokenizer.apply_chat_template(
                group, return_tensors="pt", return_dict=True, padding=batch
            )).logits for group in groups
        ]).float()  # fmt: skip


# -------------------------------------------------------------------------- Export


@pytest.mark.slow
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", TINY)
def test_stock_transformers_give_the_basis_rewards(tmp_path, kind, batch):
    model = TINY[kind](tmp_path / "model")
    path = make_basis(tmp_path, model)
    export.main(path, tmp_path / "out")
    expected = embed(model, tmp_path / "rows") @ load_basis(path).V / 100  # log odds
    assert torch.allclose(stock_rewards(tmp_path / "out", batch), expected, rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out"]


@pytest.mark.parametrize(
    ("asked", "row"), [({"users": ("17",)}, 1), ({"users": ("new",)}, 2), ({"average": True}, None)]
)
def test_one_label_is_a_users_reward_or_the_averages(tmp_path, asked, row):
    model = models.tiny_llama(tmp_path / "model")
    path = make_basis(tmp_path, model)
    export.main(path, tmp_path / "out", **asked)
    learned = load_basis(path)
    w = learned.W.mean(0) if row is None else torch.cat([learned.W, learned.W_unseen])[row]
    expected = embed(model, tmp_path / "rows") @ learned.V @ w / 100
    rewards = stock_rewards(tmp_path / "out", True)
    assert rewards.shape == (len(CHATS), 1)
    assert torch.allclose(rewards[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_users_are_the_labels_and_a_pipeline_with_its_defaults_gives_rewards(tmp_path):
    model = models.tiny_llama(tmp_path / "model")
    path = make_basis(tmp_path, model)
    export.main(path, tmp_path / "two", users=("new", "ann"))
    rewards = stock_rewards(tmp_path / "two", True)
    learned, rows = load_basis(path), embed(model, tmp_path / "rows")
    W = torch.stack([learned.weights_of(user) for user in ("new", "ann")])
    assert torch.allclose(rewards, rows @ learned.V @ W.T / 100, rtol=1e-4, atol=1e-6)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["id2label"] == {"0": "new", "1": "ann"}
    export.main(path, tmp_path / "ann", users=("ann",))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ann")
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    pipe = pipeline("text-classification", str(tmp_path / "ann"))
    found = pipe(texts, add_special_tokens=False)  # the template writes the BOS
    assert {one["label"] for one in found} == {"ann"}
    torch.testing.assert_close(torch.tensor([one["score"] for one in found]), rewards[:, 1])
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "ann").iterdir()}
    assert modes == {0o666 & ~UMASK}


@pytest.mark.parametrize("biased", [False, True])
def test_the_mean_reward_is_zero_by_a_bias_or_said(tmp_path, biased):
    model = models.tiny_llama(tmp_path / "model")
    learned = load_basis(make_basis(tmp_path, model))
    rows = embed(model, tmp_path / "rows")
    learned.center = rows.mean(0)
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    loaded.score = torch.nn.Linear(32, 1, bias=biased)
    offsets = export.replace_head(loaded, learned.columns(), learned.center)
    mean = loaded.score(rows).mean(0) - torch.tensor(offsets)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    assert any(offsets) != biased
    save_basis(tmp_path / "again.safetensors", learned)
    export.main(tmp_path / "again.safetensors", tmp_path / "out", users=("ann",))
    said = json.loads((tmp_path / "out" / "config.json").read_text())["lore"]
    assert said["unit"] == "log odds"
    assert said["offset"] == pytest.approx([float(learned.direction("ann") @ learned.center)])
    assert f"{said['offset'][0]:.2f}" in (tmp_path / "out" / "README.md").read_text()


def test_an_older_basis_is_read_in_its_unit_and_another_unit_is_refused(tmp_path):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"))
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    older = {key: value for key, value in notes.items() if key != "unit"}
    save_file(tensors, path, older)
    assert torch.equal(load_basis(path).direction("ann"), tensors["V"] @ tensors["W"][0] / 100)
    export.main(path, tmp_path / "out", users=("ann",))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lore"]["offset"] is None
    save_file(tensors, path, older | {"unit": "bananas"})
    with pytest.raises(InputError, match="its unit is 'bananas', not log odds times 100"):
        load_basis(path)


def test_ridge_bt_is_exported(tmp_path):
    model = models.tiny_llama(tmp_path / "model")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3)).double()
    facts = {"users": ["ann"], "users_unseen": [], "model": str(model)}
    SharedFit(direction, 1, {}).save(tmp_path / "ridge.safetensors", torch.zeros(0, 0), facts)
    export.main(tmp_path / "ridge.safetensors", tmp_path / "out", average=True)
    expected = embed(model, tmp_path / "rows") @ direction.float()
    found = stock_rewards(tmp_path / "out", True)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_rewards_to_its_precision(tmp_path):
    model = models.tiny_llama(tmp_path / "model")
    path = make_basis(tmp_path, model)
    export.main(path, tmp_path / "out", dtype="bfloat16")
    expected = embed(model, tmp_path / "rows") @ load_basis(path).V / 100
    rewards = stock_rewards(tmp_path / "out", False)
    assert (rewards - expected).abs().max() < 0.05 * expected.abs().max()
    assert (tmp_path / "out" / "config.json").read_text().count("bfloat16")


def test_model_card_and_labels_say_what_it_is(tmp_path):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"))
    export.main(path, tmp_path / "all")
    export.main(path, tmp_path / "ann", users=("ann",))
    one, all_of_it = ((tmp_path / name / "README.md").read_text() for name in ("ann", "all"))
    assert "The reward of ann." in one and "| estimator | LoRe |" in one
    assert str(tmp_path) not in one + all_of_it  # nobody else has this machine's folders
    assert "rewards @ w" in all_of_it and "rewards @ w" not in one
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    assert config["id2label"] == {"0": "basis 1", "1": "basis 2", "2": "basis 3"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"users": ("bob",)}, "--users bob is not in the basis, which has 3 users, such as ann"),
        ({"users": ("ann",), "average": True}, "exclude each other"),
        ({"lm": ModelChoice("/nowhere/at/all")}, "cannot be loaded"),
        ({"out": None}, "--out is missing"),
    ],
)
def test_requests_that_cannot_be_met_leave_nothing(tmp_path, asked, message):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"))
    with pytest.raises(InputError, match=message):
        export.main(path, **{"out": tmp_path / "out"} | asked)
    assert not (tmp_path / "out").exists()


def test_a_basis_of_another_model_is_refused(tmp_path):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"), features=48)
    with pytest.raises(InputError, match="the basis has 48 features, the model 32"):
        export.main(path, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        export.main(path, tmp_path)
    with pytest.raises(InputError, match="name it by --model"):
        export.main(make_basis(tmp_path, None), tmp_path / "out")


@pytest.mark.slow
def test_export_from_the_command_line_names_and_lists_users(tmp_path):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"))
    listed = running.invoke("tools/export.py", {"basis": path, "list_users": "true"})
    assert listed.out.split() == ["ann", "17", "new"], listed.err
    given = {"basis": path, "users": ["17", "ann"], "out": tmp_path / "out"}
    done = running.run("tools/export.py", given)
    assert done.status == 0 and "17, ann: " in done.out, done.err


def test_another_model_of_the_same_size_is_refused_unless_it_is_insisted_on(tmp_path, caplog):
    model, other = (models.tiny_llama(tmp_path / f"{i}", seed=i) for i in (0, 1))
    manifest = embeddings.embed(CHATS, tmp_path / "rows", model=str(model), progress=False).manifest
    facts = {name: manifest[name] for name in ("weights_sha256", "template_sha256")}
    path = make_basis(tmp_path, model, **facts)
    export.main(path, tmp_path / "own")
    with pytest.raises(InputError, match="other weights than .*--any-model true"):
        export.main(path, tmp_path / "out", lm=ModelChoice(str(other)))
    path = make_basis(tmp_path, model, **facts | {"template_sha256": "0" * 64})
    with pytest.raises(InputError, match="another chat template than"):
        export.main(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export.main(path, tmp_path / "out", lm=ModelChoice(any_model=True))
    assert (tmp_path / "out").exists() and "may mean nothing" in caplog.text


def test_a_basis_of_pooled_states_is_not_exported(tmp_path):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"), pool="layer:2")
    with pytest.raises(InputError, match="layer:2 states, .* --pool last alone can be exported"):
        export.main(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_responses_are_ranked_by_the_states_that_the_basis_reads(tmp_path):
    model = models.tiny_llama(tmp_path / "model")
    path = make_basis(tmp_path, model, pool="layer:2")
    choice = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    rows = [{"prompt": "Hi", "response": text} for text in ("maybe", "yes, of course")]
    files = {"basis": path, "choices": write_lines(tmp_path / "choices.jsonl", [choice] * 2),
             "candidates": write_lines(tmp_path / "candidates.jsonl", rows)}  # fmt: skip
    rank_responses.main(**files, save=tmp_path / "found.json", progress=False)
    found = json.loads((tmp_path / "found.json").read_text())
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": row["response"]}]
             for row in rows]  # fmt: skip
    store = embeddings.embed(chats, tmp_path / "rows", model=str(model), pool="layer:2")
    weights = torch.tensor(found["weights"])
    expected = store.rows(torch.arange(2)) @ load_basis(path).V @ weights / 100  # log odds
    ranked = pd.DataFrame(found["ranking"]).sort_values("line")["reward"]
    assert ranked.to_numpy() == pytest.approx(expected.numpy(), rel=1e-3)


def test_a_full_disk_is_one_line_and_leaves_what_others_made(tmp_path, monkeypatch):
    path = make_basis(tmp_path, models.tiny_llama(tmp_path / "model"))
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.tex").write_text("mine")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(InputError, match="--out .*No space left on device"):
        export.main(path, tmp_path / "out")
    left = sorted(p.name for p in tmp_path.iterdir() if "out" in p.name)
    assert left == ["out.part"] and (tmp_path / "out.part" / "thesis.tex").exists()
    (tmp_path / f"out.{os.getpid()}.part").mkdir()
    with pytest.raises(InputError, match="File exists"):
        export.main(path, tmp_path / "out")
    assert (tmp_path / f"out.{os.getpid()}.part").exists()


@pytest.mark.slow
def test_smollm2_as_a_stock_checkpoint(tmp_path):
    model = models.smollm2(tmp_path / "model")
    path = make_basis(tmp_path, model, features=576, rank=4)
    export.main(path, tmp_path / "out")
    expected = embed(model, tmp_path / "rows") @ load_basis(path).V / 100
    for batch in (False, True):
        rewards = stock_rewards(tmp_path / "out", batch)
        assert torch.allclose(rewards, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("asked", [{"users": ("new",)}, {"average": True}, {}])
def test_a_mixed_logit_is_exported_as_a_basis_is(tmp_path, asked):
    model = models.tiny_llama(tmp_path / "model")
    path = make_mixed(tmp_path, model)
    export.main(path, tmp_path / "out", **asked)
    fit, new = load_learned(path).fit, load_learned(path).new
    state = (new[0] if "users" in asked else torch.zeros(2)).double()
    columns = fit.reward(state)[:, None]
    if not asked:
        columns = torch.cat([fit.mu[:, None], fit.tastes()], 1)
    expected = embed(model, tmp_path / "rows").double() @ columns
    rewards = stock_rewards(tmp_path / "out", True)
    assert torch.allclose(rewards, expected.float(), rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mixed logit" in card and "LoRe" not in card and "| rank | 2 |" in card


def test_users_of_a_mixed_logit_are_listed_and_unknown_ones_refused(tmp_path, capsys):
    path = make_mixed(tmp_path, models.tiny_llama(tmp_path / "model"))
    export.main(path, list_users=True)
    assert capsys.readouterr().out.split() == ["ann", "17", "new"]
    with pytest.raises(InputError, match="--users bob is not in the basis, which has 3 users"):
        export.main(path, tmp_path / "out", users=("bob",))


# ------------------------------------------------------------------ Rank responses


def write_lines(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def task(tmp_path):
    """Choices of a user who likes what the basis' second column likes, and candidates."""
    model = models.tiny_llama(tmp_path / "model")
    path = make_basis(tmp_path, model)
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(80)]
    ask = {"role": "user", "content": "Which?"}
    chats = [[ask, {"role": "assistant", "content": t}] for t in texts]
    liking = (embed(model, tmp_path / "rows", chats) @ load_basis(path).V)[:, 1].tolist()
    choices, rows = [], sorted(zip(liking, texts, strict=True))
    for (_, rejected), (_, chosen) in zip(rows[:30], rows[-30:], strict=True):
        choices.append({"prompt": "Which?", "chosen": chosen, "rejected": rejected})
    choices[3]["messages"] = [{"role": "user", "content": choices[3].pop("prompt")}]
    candidates = [{"prompt": "Which?", "response": text} for _, text in rows[30:50]]
    files = {
        "basis": path,
        "choices": write_lines(tmp_path / "choices.jsonl", choices),
        "candidates": write_lines(tmp_path / "candidates.jsonl", candidates),
    }
    return files, [row[0] for row in rows[30:50]]


def test_weights_find_the_column_and_candidates_come_in_its_order(task, tmp_path, capsys):
    files, liking = task
    rank_responses.main(**files, save=tmp_path / "found.json", progress=False)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["weights"]) == 3 and found["weights"][1] > 0.8
    rewards = pd.DataFrame(found["ranking"]).set_index("line")["reward"]
    assert np.corrcoef(rewards.sort_index(), liking)[0, 1] > 0.9
    assert rewards.is_monotonic_decreasing
    printed = capsys.readouterr().out
    assert f"{found['weights'][1]:.3f}" in printed and "of 30 choices predicted" in printed
    assert printed.count("Which?") == 20
    best, second = found["ranking"][:2]
    chance = 1 / (1 + math.exp(second["reward"] - best["reward"]))  # rewards are log odds
    assert best["p_over_next"] == pytest.approx(chance, rel=1e-4)
    assert found["ranking"][-1]["p_over_next"] is None
    assert f"{best['reward']:.3f}" in printed and f"{chance:.3f}" in printed


@pytest.mark.slow
def test_leave_one_out_is_the_fit_without_each_choice(tmp_path):
    fit = load_fit(make_basis(tmp_path, None)).fit
    Z = 100 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    draws, odds = torch.Generator().manual_seed(3), []
    for i in range(5):
        plain = PersonalizeBatch(1, 3, 3, 500, 0.1)
        plain.logits = torch.randn(1, 3, generator=draws)  # user by user
        w = plain.train([torch.cat([Z[:i], Z[i + 1 :]])], torch.eye(3))[0]
        odds.append((Z[i] @ w).item() / 100)
    left_out = leave_one_out(fit, Z, torch.arange(5), seed=3)
    assert left_out.tolist() == pytest.approx(odds, rel=1e-4)
    line = rank_responses.agreement(left_out)
    assert f"leave-one-out: {sum(x > 0 for x in odds)} of 5 " in line
    assert f"{sum(math.log1p(math.exp(-x)) for x in odds) / 5:.3f}" in line


@pytest.mark.parametrize("make", [make_basis, make_mixed])
def test_what_is_left_out_is_a_whole_row_with_all_its_pairs(tmp_path, make):
    fit = load_fit(make(tmp_path, None)).fit
    noise = 100 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    Z, row = noise.repeat_interleave(3, 0), torch.arange(4).repeat_interleave(3)
    left_out = leave_one_out(fit, Z, row)
    for i in range(4):
        others = User.of(fit, Z[row != i])
        assert left_out[row == i].tolist() == pytest.approx(
            [others.rewards(noise[i : i + 1]).item()] * 3, rel=0.1, abs=0.05
        )


@pytest.mark.slow
def test_pairs_of_one_row_do_not_foretell_each_other(task, tmp_path, capsys):
    files, _ = task
    rows = [{"prompt": f"{i}?", "chosen": ["a b", "a c"], "rejected": ["d", "e f"]}
            for i in range(3)]  # fmt: skip
    files["choices"] = write_lines(tmp_path / "several.jsonl", rows[:1])
    rank_responses.main(**files, progress=False)
    assert "needs two rows" in capsys.readouterr().out  # four pairs, but nothing else to learn from
    files["choices"] = write_lines(tmp_path / "several.jsonl", rows)
    rank_responses.main(**files, progress=False)
    assert "of 12 choices predicted from the other rows" in capsys.readouterr().out


def test_labels_by_chance_agree_when_fitted_and_not_when_left_out():
    rng, K = torch.Generator().manual_seed(0), 20
    fit = LoreFit(Lore(), Basis(torch.eye(K), torch.full((1, K), 1 / K)), "LoRe")
    Z = 1000 * torch.randn(20, K, generator=rng)
    assert (User.of(fit, Z).rewards(Z) > 0).sum() >= 16
    assert (leave_one_out(fit, Z, torch.arange(20)) > 0).sum() <= 14


@pytest.mark.parametrize("make", [make_basis, make_mixed])
def test_a_single_choice_cannot_be_left_out(tmp_path, make):
    left_out = leave_one_out(load_fit(make(tmp_path, None)).fit, torch.ones(1, 3), torch.zeros(1))
    assert "needs two rows" in rank_responses.agreement(left_out)


def test_a_mixed_logit_ranks_with_standard_deviations(task, tmp_path, capsys):
    files, _ = task
    files["basis"] = make_mixed(tmp_path, tmp_path / "model")
    rank_responses.main(**files, save=tmp_path / "found.json", progress=False)
    found, printed = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    assert len(found["tastes"]) == len(found["standard_deviations"]) == 2
    assert min(found["standard_deviations"]) > 0 and max(found["standard_deviations"]) < 1
    assert "tastes: " in printed and "leave-one-out: " in printed and " sd " in printed
    for best, second in itertools.pairwise(found["ranking"]):
        plain = 1 / (1 + math.exp(second["reward"] - best["reward"]))
        assert best["p_over_next"] == pytest.approx(plain, abs=1e-5)  # the mode is plugged in
    assert all(row["deviation"] > 0 for row in found["ranking"])


def test_a_mixed_logit_knows_less_with_fewer_choices(tmp_path):
    fit = load_fit(make_mixed(tmp_path, None)).fit
    Z = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    user, left_out = User.of(fit, Z), leave_one_out(fit, Z, torch.arange(6))
    for i in range(6):
        others = User.of(fit, torch.cat([Z[:i], Z[i + 1 :]]))
        torch.testing.assert_close(others.rewards(Z[i : i + 1])[0], left_out[i])
        assert others.deviations(Z).mean() > user.deviations(Z).mean()
    sure = User.of(load_fit(make_mixed(tmp_path, None, spread=1e-4)).fit, Z)
    assert sure.deviations(Z).max() < 1e-3
    assert torch.allclose(sure.rewards(Z), Z[:, 0].double(), atol=1e-2)


def test_rewards_are_those_of_the_exported_user(task, tmp_path):
    files, _ = task
    rank_responses.main(**files, save=tmp_path / "found.json", progress=False)
    found = json.loads((tmp_path / "found.json").read_text())
    learned = load_basis(files["basis"])
    learned.W, learned.users = torch.tensor([found["weights"]]), ["me"]
    save_basis(tmp_path / "me.safetensors", learned)
    export.main(tmp_path / "me.safetensors", tmp_path / "out", users=("me",))
    row = found["ranking"][0]
    chat = [{"role": "user", "content": row["prompt"]}]
    chat.append({"role": "assistant", "content": row["response"]})
    reward = stock_rewards(tmp_path / "out", False, [chat]).item()
    assert reward == pytest.approx(row["reward"], rel=1e-4, abs=1e-6)


def test_ranking_is_within_a_prompt_and_a_rank_one_basis_has_no_weights_to_learn(task, tmp_path):
    files, _ = task
    files["basis"] = make_basis(tmp_path, tmp_path / "model", rank=1)
    rows = [{"prompt": p, "response": r} for r in ("a b", "c", "d e f") for p in ("One?", "Two?")]
    files["candidates"] = write_lines(tmp_path / "two.jsonl", rows)
    rank_responses.main(**files, save=tmp_path / "found.csv", progress=False)
    table = pd.read_csv(tmp_path / "found.csv")
    assert table["prompt"].tolist() == ["One?"] * 3 + ["Two?"] * 3
    assert table["place"].tolist() == [1, 2, 3] * 2
    for _, part in table.groupby("prompt"):
        assert part["reward"].is_monotonic_decreasing


GOOD = {"prompt": "Which?", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "row 1 is not valid JSON"),
        ([GOOD, {"prompt": "Which?", "chosen": "a"}], "row 2 has no column rejected"),
        ([GOOD | {"chosen": [5]}], "row 1: each chosen must be text, not a int"),
        ([GOOD | {"chosen": ""}], "row 1: chosen is empty"),
        ([GOOD, GOOD | {"chosen": "b"}], "row 2: chosen and rejected are equal"),
        ([GOOD | {"prompt": ["a"]}], "row 1: prompt must be text, not a list"),
        ([GOOD | {"prompt": ""}], "row 1: the prompt or a message is empty"),
        ([GOOD | {"messages": [{"role": "user", "content": "a"}]}], "row 1 has both prompt and"),
        ([{"chosen": "a", "rejected": "b"}], "row 1 has neither prompt nor messages"),
        ([GOOD | {"user": "al"}, GOOD | {"user": "bo"}], r"the choices of 2 users \(al, bo\)"),
        ([], "is empty"),
    ],
)
def test_a_bad_line_is_named_before_a_model_is_loaded(tmp_path, lines, message):
    basis = make_basis(tmp_path, tmp_path / "no-model")
    choices = write_lines(tmp_path / "choices.jsonl", lines)
    with pytest.raises(InputError, match=message):
        rank_responses.main(basis, choices, choices)


def test_a_choice_may_name_several_responses_and_columns_may_have_other_names(tmp_path):
    row = {"ask": "Which?", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    columns = Columns(prompt="ask")
    found = read_user_choices(tmp_path / "rows.jsonl", columns)
    answers = [[talk[-1]["content"] for talk in side] for side in found[:2]]
    assert answers == [["a", "a", "b", "b"], ["c", "d", "c", "d"]]
    assert found.row.tolist() == [0] * 4
    assert found.chosen[0][0] == {"role": "user", "content": "Which?"}
    (tmp_path / "drafts.csv").write_text('ask,response\nWhich?,"[""e"", ""f""]"\n')
    drafts = read_candidates(tmp_path / "drafts.csv", columns)
    assert [talk[-1]["content"] for talk in drafts] == ["e", "f"]


def test_candidates_may_be_whole_conversations(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [{"messages": talk}, {"messages": talk[:1], "response": ["a", "b"]}]
    found = read_candidates(write_lines(tmp_path / "talks.jsonl", lines))
    assert found[0] == talk and [talk[-1]["content"] for talk in found] == ["Hello", "a", "b"]
    file = write_lines(tmp_path / "none.jsonl", [{"messages": talk[:1]}])
    with pytest.raises(InputError, match="messages must end with a message of the assistant"):
        read_candidates(file)


def test_wrong_files_are_refused(task, tmp_path):
    files, _ = task
    with pytest.raises(InputError, match="absent.jsonl cannot be read: .*No such file"):
        rank_responses.main(**files | {"candidates": tmp_path / "absent.jsonl"})
    with pytest.raises(InputError, match=r"\.csv or \.json"):
        rank_responses.main(**files, save=tmp_path / "found.txt")
    with pytest.raises(InputError, match="there is no folder .*missing"):
        rank_responses.main(**files, save=tmp_path / "missing" / "found.csv")
    basis = make_basis(tmp_path, tmp_path / "model", features=31)
    with pytest.raises(InputError, match="32 features, the basis 31"):
        rank_responses.main(**files | {"basis": basis}, progress=False)


def test_file_names_are_taken_as_they_are_and_the_model_is_found_from_anywhere(
    task, tmp_path, monkeypatch
):
    files, _ = task
    for name in ("choices", "candidates"):
        odd = tmp_path / f"{name}[1]*.jsonl"
        files[name] = files[name].rename(odd)
        (tmp_path / f"{name}1x.jsonl").write_text("not this one")
    files["basis"] = make_basis(tmp_path, Path("model"))  # from the basis file's folder
    monkeypatch.chdir(ROOT)
    rank_responses.main(**files, save=tmp_path / "found.csv", progress=False)
    assert len(pd.read_csv(tmp_path / "found.csv")) == 20


def test_ranking_from_the_command_line_takes_the_embedding_flags(task):
    files, _ = task
    flags = {**files, "method": "single", "dtype": "float32"}
    done = running.invoke("tools/rank_responses.py", flags)
    assert done.status == 0 and done.out.startswith("weights: "), done.err
