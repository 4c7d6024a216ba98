"""Rewards of known users, by the loaded model and by the command."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import models
import running
from lore.common.files import InputError
from lore.elicitation.scoring import load_scorer
from lore.embeddings.reward_model import ModelChoice, render_text
from lore.learning.basis import load_basis, save_basis
from lore.methods.saved import load_learned
from made_bases import CHATS, embed, make_basis, make_mixed, write_lines
from tools import score


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a mixed logit's file with all that it may have."""
    folder = tmp_path_factory.mktemp("world")
    model = models.tiny_qwen(folder / "model")
    return model, make_mixed(folder, model, known=True)


def test_rewards_and_deviations_are_the_equations(world, tmp_path):
    model, path = world
    scorer, fit = load_scorer(path), load_learned(path).fit
    rows = embed(model, tmp_path / "rows").double() - 1  # the center
    z = fit.scale * rows @ fit.directions
    covariances = {"ann": torch.eye(2), "17": torch.tensor([[0.5, 0.1], [0.1, 0.2]])}
    covariances |= {"new": 0.3 * torch.eye(2), None: fit.prior.cov}
    states = dict(zip(("ann", "17"), fit.users, strict=True)) | {None: torch.zeros(2)}
    found = scorer.embed(CHATS)
    for user, cov in covariances.items():
        rewards, deviations = scorer.score(found, user)
        if user in states:
            mean = fit.scale * (rows @ fit.mu + rows @ fit.directions @ states[user].double())
            torch.testing.assert_close(rewards, mean.float(), atol=1e-4, rtol=1e-4)
        expected = torch.stack([(row @ cov.double() @ row).sqrt() for row in z])
        torch.testing.assert_close(deviations, expected.float(), atol=1e-4, rtol=1e-4)


def test_a_text_is_scored_as_its_conversation_whatever_was_stripped_from_its_end(world):
    scorer = load_scorer(world[1])
    texts = [render_text(scorer.tokenizer, chat) for chat in CHATS]
    assert texts[0].endswith("<|im_end|>\n")
    expected = scorer.embed(CHATS)
    for end in ("", "\n", "<|im_end|>\n"):
        torch.testing.assert_close(scorer.embed([t.removesuffix(end) for t in texts]), expected)
    with pytest.raises(InputError, match="a text is empty"):
        scorer.embed([" \n"])


def test_a_llamas_text_has_one_bos_and_a_long_one_keeps_it_and_its_end(model, tmp_path):
    scorer = load_scorer(make_basis(tmp_path, model), max_length=20)
    text = render_text(scorer.tokenizer, CHATS[0])
    rows = scorer.embed([CHATS[0], text, text.removeprefix("<|begin_of_text|>")])
    torch.testing.assert_close(rows[1:], rows[:1].expand(2, -1))
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = torch.tensor([ids[:1] + ids[-19:]])
    expected = scorer.engine.body(cut).last_hidden_state[0, -1]
    torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=1e-5)


def test_a_basis_has_weights_and_no_deviations(model, tmp_path):
    path = make_basis(tmp_path, model)
    rows = embed(model, tmp_path / "rows")
    learned = load_basis(path)
    learned.center = rows.mean(0)
    save_basis(path, learned)
    scorer = load_scorer(path)
    rewards, deviations = scorer.score(scorer.embed(CHATS), "17")
    expected = (rows - rows.mean(0)) @ learned.V @ learned.W[1] / 100
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-4)
    assert deviations is None


def test_the_command_ranks_within_a_prompt_for_every_user(world, tmp_path):
    _, path = world
    rows = [{"prompt": chat[0]["content"], "response": chat[1]["content"]} for chat in CHATS[:3]]
    rows += [{"messages": chat} for chat in CHATS[3:]]
    texts = write_lines(tmp_path / "texts.jsonl", rows)
    score.main(path, ("ann", "new"), texts, average=True, out=tmp_path / "out.csv", progress=False)
    table = pd.read_csv(tmp_path / "out.csv")
    scorer = load_scorer(path)
    found = scorer.embed(CHATS)
    for name, user in (("ann", "ann"), ("new", "new"), ("average user", None)):
        rewards, deviations = scorer.score(found, user)
        part = table[table["user"] == name].sort_values("line")
        assert part["reward"].tolist() == pytest.approx(rewards.tolist(), rel=1e-4, abs=1e-5)
        assert part["deviation"].tolist() == pytest.approx(deviations.tolist(), rel=1e-4)
        for some in (slice(3), slice(3, 6)):
            order = rewards[some].argsort(descending=True).argsort() + 1
            assert part["place"].tolist()[some] == order.tolist()
    score.main(path, ("ann",), texts, out=tmp_path / "out.jsonl", progress=False)
    score.main(path, ("ann",), texts, out=tmp_path / "out.jsonl", progress=False)  # our own file
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [1, 2, 3] * 2 and lines[0]["user"] == "ann"


def test_score_from_the_command_line(world, tmp_path, capsys):
    _, path = world
    texts = write_lines(tmp_path / "texts.jsonl", [{"messages": chat} for chat in CHATS])
    flags = {"basis": path, "user": ["ann", "17"], "texts": texts, "dtype": "float32"}
    done = running.invoke("tools/score.py", flags)
    assert done.status == 0 and done.out.count("Sing!") == 6 and " deviation " in done.out, done.err
    score.main(path, list_users=True)
    assert capsys.readouterr().out.split() == ["ann", "17", "new"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"user": ("bob",)}, "--user bob is not in the basis, which has 3 users, such as ann"),
        ({"user": ()}, "--user is missing: name users, or give --average true"),
        ({"texts": None}, "--texts is missing"),
        ({"out": Path("found.txt")}, r"end its name in .csv or .jsonl"),
        ({"lm": ModelChoice("/nowhere/at/all")}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_scored_is_one_line(world, tmp_path, given, message):
    texts = write_lines(tmp_path / "texts.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(InputError, match=message):
        score.main(**{"basis": world[1], "user": ("ann",), "texts": texts} | given)


def test_somebodys_file_and_the_input_are_not_replaced(world, tmp_path):
    texts = write_lines(tmp_path / "texts.jsonl", [{"messages": CHATS[0]}])
    (tmp_path / "thesis.csv").write_text("chapter,words\n")
    for out, message in ((texts, "is what is to be read"), (tmp_path / "thesis.csv", "not what")):
        before = out.read_bytes()
        with pytest.raises(InputError, match=message):
            score.main(world[1], ("ann",), texts, out=out)
        assert out.read_bytes() == before


def test_a_basis_of_pooled_states_is_refused(model, tmp_path):
    path = make_basis(tmp_path, model, pool="layer:2")
    with pytest.raises(InputError, match="reads layer:2 states: .*by the last token's alone"):
        load_scorer(path)
