"""Ranking candidates for a new user."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import running
from lore.common.files import InputError
from lore.elicitation.choices import read_candidates, read_user_choices
from lore.elicitation.user import User, agreement, load_fit
from lore.learning.basis import load_basis, save_basis
from lore.preparing.own_rows import Columns
from made_bases import embed, make_basis, make_mixed, stock_rewards, talk, write_lines
from tools import export, rank_responses


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[dict, list[float]]:
    """Files of a user who likes what the basis' second column likes, and how much of candidates."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    path, words = make_basis(folder, model), [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, 4)) for _ in range(40)]
    e = embed(model, folder / "rows", [talk("Which?", text) for text in texts])
    rows = sorted(zip((e @ load_basis(path).V)[:, 1].tolist(), texts, strict=True))
    choices = [
        {"prompt": "Which?", "chosen": chosen, "rejected": rejected}
        for (_, rejected), (_, chosen) in zip(rows[:15], rows[-15:], strict=True)
    ]
    choices[3]["messages"] = [{"role": "user", "content": choices[3].pop("prompt")}]
    candidates = [{"prompt": "Which?", "response": text} for _, text in rows[15:25]]
    files = {"choices": choices, "candidates": candidates}
    files = {name: write_lines(folder / f"{name}.jsonl", some) for name, some in files.items()}
    return {"basis": path, **files}, [row[0] for row in rows[15:25]]


def ranked(folder: Path, files: dict[str, Path], **changes: Any) -> dict[str, Any]:
    """What the command saves."""
    rank_responses.main(**files | changes, save=folder / "found.json", progress=False)
    return json.loads((folder / "found.json").read_text())


def test_weights_find_the_column_and_candidates_come_in_its_order(world, tmp_path, capsys):
    files, liking = world
    found = ranked(tmp_path, files)
    assert len(found["weights"]) == 3 and found["weights"][1] > 0.8
    rewards = pd.DataFrame(found["ranking"]).set_index("line")["reward"]
    assert np.corrcoef(rewards.sort_index(), liking)[0, 1] > 0.9
    assert rewards.is_monotonic_decreasing
    printed = capsys.readouterr().out
    assert f"{found['weights'][1]:.3f}" in printed and "of 15 choices predicted" in printed
    assert printed.count("Which?") == 10
    best = found["ranking"][0]
    assert f"{best['reward']:.3f}" in printed and f"{best['p_over_next']:.3f}" in printed
    learned = load_basis(files["basis"])
    learned.W, learned.users = torch.tensor([found["weights"]]), ["me"]
    save_basis(tmp_path / "me.safetensors", learned)
    export.main(tmp_path / "me.safetensors", tmp_path / "out", users=("me",))
    chat = talk(best["prompt"], best["response"])
    reward = stock_rewards(tmp_path / "out", False, [chat]).item()  # of the exported user
    assert reward == pytest.approx(best["reward"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_responses_are_ranked_by_the_states_that_the_basis_reads(world, model, tmp_path):
    path = make_basis(tmp_path, model, pool="layer:2")
    found = ranked(tmp_path, world[0], basis=path)
    chats = [talk("Which?", row["response"]) for row in found["ranking"]]
    e = embed(model, tmp_path / "rows", chats, pool="layer:2")
    expected = e @ load_basis(path).V @ torch.tensor(found["weights"]) / 100  # log odds
    assert [row["reward"] for row in found["ranking"]] == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.slow
def test_a_mixed_logit_ranks_by_the_deviation_that_the_choices_say(world, model, tmp_path):
    path = make_mixed(tmp_path, model)
    chosen, rejected, *_ = read_user_choices(world[0]["choices"])
    rows = ranked(tmp_path, world[0], basis=path)["ranking"]
    chats = [*chosen, *rejected, *(talk("Which?", row["response"]) for row in rows)]
    fit = load_fit(path).fit
    view = embed(model, tmp_path / "rows", chats).double() @ fit.all_directions()
    expected = User(fit, view[:15] - view[15:30]).rewards(view[30:] - view[-1])
    found = torch.tensor([row["reward"] - rows[-1]["reward"] for row in rows]).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_files_are_taken_by_their_names_and_ranked_within_a_prompt(world, model, tmp_path):
    """The command in its own folder, by a basis of rank 1 whose model is named by its folder."""
    (tmp_path / "model").symlink_to(model)
    rows = [{"prompt": p, "response": r} for r in ("a b", "c", "d e f") for p in ("One?", "Two?")]
    given = {"basis": make_basis(tmp_path, Path("model"), rank=1), "save": tmp_path / "found.csv"}
    choices = world[0]["choices"].read_text().splitlines()
    for name, lines in (("choices", choices), ("candidates", rows)):
        given[name] = write_lines(tmp_path / f"{name}[1]*.jsonl", lines)
        (tmp_path / f"{name}1x.jsonl").write_text("not this one")
    flags = {"method": "single", "dtype": "float32"}
    done = running.invoke("tools/rank_responses.py", {**given, **flags})
    assert done.status == 0 and done.out.startswith("leave-one-out: "), done.err  # no weights
    table = pd.read_csv(tmp_path / "found.csv")
    assert table["prompt"].tolist() == ["One?"] * 3 + ["Two?"] * 3
    assert table["place"].tolist() == [1, 2, 3] * 2
    for _, part in table.groupby("prompt"):
        assert part["reward"].is_monotonic_decreasing


@pytest.mark.parametrize(("make", "size"), [(make_basis, 100), (make_mixed, 1)])
def test_what_is_left_out_is_a_whole_row_with_all_its_pairs(tmp_path, make, size):
    fit = load_fit(make(tmp_path, None)).fit
    noise = size * torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    Z, row = noise.repeat_interleave(3, 0), torch.arange(3).repeat_interleave(3)
    weight = torch.tensor([0.01, 1, 3])[row]
    left_out = User(fit, Z, weight).leave_one_out(row)
    for i in range(3):
        expected = User(fit, Z[row != i], weight[row != i]).rewards(Z[row == i])
        torch.testing.assert_close(left_out[row == i], expected, rtol=0.01, atol=0.005)
    right, loss = int((left_out > 0).sum()), np.log1p(np.exp(-left_out.numpy())).mean()
    said = f"leave-one-out: {right} of 9 choices predicted from the other rows, log loss {loss:.3f}"
    assert said in agreement(left_out) and 0 < right < 9
    one_row = User(fit, Z[:3]).leave_one_out(row[:3])  # nothing else to learn from
    assert "needs two rows" in agreement(one_row)


GOOD = {"prompt": "Which?", "chosen": "a", "rejected": "b"}
VOTE = {"prompt": "Which?", "response_a": "a", "response_b": "b", "winner": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD | {"chosen": ""}], "row 1: chosen is empty"),
        ([GOOD, GOOD | {"chosen": "b"}], "row 2: chosen and rejected are equal"),
        ([GOOD | {"prompt": ""}], "row 1: the prompt or a message is empty"),
        ([GOOD, GOOD | {"user": "bo"}, GOOD | {"user": "al"}], r"\(al, bo\) and 1 that name none"),
        ([VOTE | {"user": "al"}, VOTE | {"user": "bo", "winner": "tie"}], "of 2 users"),
        ([], "is empty"),
    ],
)
def test_choices_that_are_not_clear_are_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read_user_choices(write_lines(tmp_path / "choices.jsonl", rows))


def test_a_row_may_name_several_responses_and_columns_may_have_other_names(world, tmp_path, capsys):
    row = {"ask": "Which?", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    file, columns = write_lines(tmp_path / "rows.jsonl", [row]), Columns(prompt="ask")
    chosen, _, number, weight = read_user_choices(file, columns)
    assert chosen == [talk("Which?", text) for text in "aabb"]
    assert number.tolist() == [0] * 4 and weight.tolist() == [0.25] * 4
    drafts = tmp_path / "drafts.csv"
    drafts.write_text('ask,response\nWhich?,"[""e"", ""f""]"\n')
    assert read_candidates(drafts, columns) == [talk("Which?", text) for text in "ef"]
    write_lines(file, [row | {"ask": f"{i}?", "user": i % 2 * "al"} for i in range(3)])
    given = {"choices": file, "candidates": drafts, "columns": columns}
    rank_responses.main(**world[0] | given, progress=False)
    assert "of 12 choices predicted from the other rows" in capsys.readouterr().out


def test_candidates_may_be_whole_conversations(tmp_path):
    whole = talk("Hi", "Hello")
    lines = [{"messages": whole}, {"messages": whole[:1], "response": ["a", "b"]}]
    found = read_candidates(write_lines(tmp_path / "talks.jsonl", lines))
    assert found == [talk("Hi", text) for text in ("Hello", "a", "b")]
