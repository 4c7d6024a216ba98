"""Ranking candidates for a new user."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import models
import running
from lore.common.files import InputError
from lore.elicitation.choices import read_candidates, read_user_choices
from lore.elicitation.user import User, agreement, leave_one_out, load_fit
from lore.embeddings import store as embeddings
from lore.learning.basis import Basis, load_basis, save_basis
from lore.methods.lore import Lore, LoreFit
from lore.preparing.own_rows import Columns
from made_bases import embed, make_basis, make_mixed, stock_rewards, write_lines
from tools import export, rank_responses
from utils import PersonalizeBatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[float], Path]:
    """Choices of a user who likes what the basis' second column likes, candidates, the model."""
    folder = tmp_path_factory.mktemp("world")
    model = models.tiny_llama(folder / "model")
    path = make_basis(folder, model)
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(80)]
    ask = {"role": "user", "content": "Which?"}
    chats = [[ask, {"role": "assistant", "content": t}] for t in texts]
    liking = (embed(model, folder / "rows", chats) @ load_basis(path).V)[:, 1].tolist()
    rows = sorted(zip(liking, texts, strict=True))
    choices = [
        {"prompt": "Which?", "chosen": chosen, "rejected": rejected}
        for (_, rejected), (_, chosen) in zip(rows[:30], rows[-30:], strict=True)
    ]
    choices[3]["messages"] = [{"role": "user", "content": choices[3].pop("prompt")}]
    candidates = [{"prompt": "Which?", "response": text} for _, text in rows[30:50]]
    files = {
        "basis": path,
        "choices": write_lines(folder / "choices.jsonl", choices),
        "candidates": write_lines(folder / "candidates.jsonl", candidates),
    }
    return files, [row[0] for row in rows[30:50]], model


def ranked(folder: Path, files: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """What the command saves."""
    rank_responses.main(**files | changes, save=folder / "found.json", progress=False)
    return json.loads((folder / "found.json").read_text())


def test_weights_find_the_column_and_candidates_come_in_its_order(world, tmp_path, capsys):
    files, liking, _ = world
    found = ranked(tmp_path, files)
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
    learned = load_basis(files["basis"])
    learned.W, learned.users = torch.tensor([found["weights"]]), ["me"]
    save_basis(tmp_path / "me.safetensors", learned)
    export.main(tmp_path / "me.safetensors", tmp_path / "out", users=("me",))
    chat = [{"role": "user", "content": best["prompt"]}]
    chat.append({"role": "assistant", "content": best["response"]})
    reward = stock_rewards(tmp_path / "out", False, [chat]).item()  # of the exported user
    assert reward == pytest.approx(best["reward"], rel=1e-4, abs=1e-6)


def test_a_mixed_logit_ranks_with_standard_deviations(world, tmp_path, capsys):
    files, _, model = world
    found = ranked(tmp_path, files, basis=make_mixed(tmp_path, model))
    printed = capsys.readouterr().out
    assert len(found["tastes"]) == len(found["standard_deviations"]) == 2
    assert min(found["standard_deviations"]) > 0 and max(found["standard_deviations"]) < 1
    assert "tastes: " in printed and "leave-one-out: " in printed and " sd " in printed
    for best, second in itertools.pairwise(found["ranking"]):
        plain = 1 / (1 + math.exp(second["reward"] - best["reward"]))
        assert best["p_over_next"] == pytest.approx(plain, abs=1e-5)  # the mode is plugged in
    assert all(row["deviation"] > 0 for row in found["ranking"])


def test_ranking_is_within_a_prompt_and_a_rank_one_basis_has_no_weights_to_learn(world, tmp_path):
    files, _, model = world
    rows = [{"prompt": p, "response": r} for r in ("a b", "c", "d e f") for p in ("One?", "Two?")]
    given = {"basis": make_basis(tmp_path, model, rank=1),
             "candidates": write_lines(tmp_path / "two.jsonl", rows)}  # fmt: skip
    rank_responses.main(**files | given, save=tmp_path / "found.csv", progress=False)
    table = pd.read_csv(tmp_path / "found.csv")
    assert table["prompt"].tolist() == ["One?"] * 3 + ["Two?"] * 3
    assert table["place"].tolist() == [1, 2, 3] * 2
    for _, part in table.groupby("prompt"):
        assert part["reward"].is_monotonic_decreasing


def test_responses_are_ranked_by_the_states_that_the_basis_reads(world, tmp_path):
    model = world[2]
    path = make_basis(tmp_path, model, pool="layer:2")
    choice = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}
    rows = [{"prompt": "Hi", "response": text} for text in ("maybe", "yes, of course")]
    files = {"basis": path, "choices": write_lines(tmp_path / "choices.jsonl", [choice] * 2),
             "candidates": write_lines(tmp_path / "candidates.jsonl", rows)}  # fmt: skip
    found = ranked(tmp_path, files)
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": row["response"]}]
             for row in rows]  # fmt: skip
    store = embeddings.embed(chats, tmp_path / "rows", model=str(model), pool="layer:2")
    weights = torch.tensor(found["weights"])
    expected = store.rows(torch.arange(2)) @ load_basis(path).V @ weights / 100  # log odds
    rewards = pd.DataFrame(found["ranking"]).sort_values("line")["reward"]
    assert rewards.to_numpy() == pytest.approx(expected.numpy(), rel=1e-3)


def test_files_are_taken_by_their_names_and_the_model_is_found_from_anywhere(world, tmp_path):
    """The command in its own folder; the model's name is from the basis file's folder."""
    files, _, model = world
    (tmp_path / "model").symlink_to(model)
    given = {"basis": make_basis(tmp_path, Path("model")), "save": tmp_path / "found.csv"}
    for name in ("choices", "candidates"):
        given[name] = tmp_path / f"{name}[1]*.jsonl"
        given[name].write_text(files[name].read_text())
        (tmp_path / f"{name}1x.jsonl").write_text("not this one")
    flags = {"method": "single", "dtype": "float32"}
    done = running.invoke("tools/rank_responses.py", {**given, **flags})
    assert done.status == 0 and done.out.startswith("weights: "), done.err
    assert len(pd.read_csv(tmp_path / "found.csv")) == 20


# --------------------------------------------------------------------- Leave one out


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
    line = agreement(left_out)
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
    one_row = leave_one_out(fit, Z[:3], row[:3])  # nothing else to learn from
    assert "needs two rows" in agreement(one_row)


def test_labels_by_chance_agree_when_fitted_and_not_when_left_out():
    rng, K = torch.Generator().manual_seed(0), 20
    fit = LoreFit(Lore(), Basis(torch.eye(K), torch.full((1, K), 1 / K)), "LoRe")
    Z = 1000 * torch.randn(20, K, generator=rng)
    assert (User.of(fit, Z).rewards(Z) > 0).sum() >= 16
    assert (leave_one_out(fit, Z, torch.arange(20)) > 0).sum() <= 14


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


# ----------------------------------------------------------------------------- Files

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


def test_a_row_may_name_several_responses_and_columns_may_have_other_names(
    world, tmp_path, capsys
):
    row = {"ask": "Which?", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    file, columns = write_lines(tmp_path / "rows.jsonl", [row]), Columns(prompt="ask")
    found = read_user_choices(file, columns)
    answers = [[talk[-1]["content"] for talk in side] for side in found[:2]]
    assert answers == [["a", "a", "b", "b"], ["c", "d", "c", "d"]]
    assert found.row.tolist() == [0] * 4
    assert found.chosen[0][0] == {"role": "user", "content": "Which?"}
    (tmp_path / "drafts.csv").write_text('ask,response\nWhich?,"[""e"", ""f""]"\n')
    drafts = read_candidates(tmp_path / "drafts.csv", columns)
    assert [talk[-1]["content"] for talk in drafts] == ["e", "f"]
    write_lines(file, [row | {"ask": f"{i}?"} for i in range(3)])
    given = {"choices": file, "candidates": tmp_path / "drafts.csv", "columns": columns}
    rank_responses.main(**world[0] | given, progress=False)
    assert "of 12 choices predicted from the other rows" in capsys.readouterr().out


def test_candidates_may_be_whole_conversations(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [{"messages": talk}, {"messages": talk[:1], "response": ["a", "b"]}]
    found = read_candidates(write_lines(tmp_path / "talks.jsonl", lines))
    assert found[0] == talk and [talk[-1]["content"] for talk in found] == ["Hello", "a", "b"]
    file = write_lines(tmp_path / "none.jsonl", [{"messages": talk[:1]}])
    with pytest.raises(InputError, match="messages must end with a message of the assistant"):
        read_candidates(file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": Path("absent.jsonl")}, "absent.jsonl cannot be read: .*No such file"),
        ({"save": Path("found.txt")}, r"\.csv or \.json"),
        ({"save": Path("missing/found.csv")}, "there is no folder .*missing"),
        ({"features": 31}, "32 features, the basis 31"),
    ],
)
def test_wrong_files_are_refused(world, tmp_path, given, message):
    files, _, model = world
    if "features" in given:
        given = {"basis": make_basis(tmp_path, model, **given)}
    with pytest.raises(InputError, match=message):
        rank_responses.main(**files | given, progress=False)
