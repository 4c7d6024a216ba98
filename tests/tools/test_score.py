"""Rewards of known users, by the loaded model and by the command."""

from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

import models
import running
from lore.common.files import InputError
from lore.embeddings.reward_model import ModelChoice, render_text
from lore.learning.basis import load_basis, save_basis
from lore.methods.saved import load_learned
from made_bases import CHATS, embed, make_basis, make_mixed, scorer_of, write_lines
from tools import score


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a mixed logit's file with all that it may have."""
    folder = tmp_path_factory.mktemp("world")
    model = models.tiny_qwen(folder / "model")
    return model, make_mixed(folder, model, known=True)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """CHATS in a file, as prompts and responses and as conversations."""
    rows = [{"prompt": chat[0]["content"], "response": chat[1]["content"]} for chat in CHATS[:3]]
    return write_lines(tmp_path / "texts.jsonl", [*rows, *({"messages": c} for c in CHATS[3:])])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rewards_and_deviations_are_the_equations(world, tmp_path):
    model, path = world
    scorer, fit = scorer_of(path), load_learned(path).fit
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
            close(rewards, mean.float())
        expected = torch.stack([(row @ cov.double() @ row).sqrt() for row in z])
        close(deviations, expected.float())


def test_a_text_is_scored_as_its_conversation_whatever_was_stripped_from_its_end(world):
    scorer = scorer_of(world[1])
    written = [render_text(scorer.tokenizer, chat) for chat in CHATS]
    assert written[0].endswith("<|im_end|>\n")
    expected = scorer.embed(CHATS)
    for end in ("", "\n", "<|im_end|>\n"):
        torch.testing.assert_close(scorer.embed([t.removesuffix(end) for t in written]), expected)
    with pytest.raises(InputError, match="a text is empty"):
        scorer.embed([" \n"])


def test_a_llamas_text_has_one_bos_and_a_long_one_keeps_it_and_its_end(model, tmp_path):
    scorer = scorer_of(make_basis(tmp_path, model), max_length=20)
    text = render_text(scorer.tokenizer, CHATS[0])
    rows = scorer.embed([CHATS[0], text, text.removeprefix("<|begin_of_text|>")])
    torch.testing.assert_close(rows[1:], rows[:1].expand(2, -1))
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = torch.tensor([ids[:1] + ids[-19:]])
    close(rows[0], scorer.engine.model.base_model(cut).last_hidden_state[0, -1])


def test_a_basis_has_weights_and_no_deviations_and_pooled_states_are_refused(model, tmp_path):
    path, rows = make_basis(tmp_path, model), embed(model, tmp_path / "rows")
    learned = load_basis(path)
    learned.center = rows.mean(0)
    save_basis(path, learned)
    scorer = scorer_of(path)
    rewards, deviations = scorer.score(scorer.embed(CHATS), "17")
    close(rewards, (rows - rows.mean(0)) @ learned.V @ learned.W[1] / 100)
    assert deviations is None
    with pytest.raises(InputError, match="reads layer:2 states: .*by the last token's alone"):
        scorer_of(make_basis(tmp_path, model, pool="layer:2"))


def test_the_command_ranks_within_a_prompt_for_every_user(world, texts):
    tables = []
    for ending, read in (("csv", pd.read_csv), ("jsonl", partial(pd.read_json, lines=True))):
        out = texts.with_name(f"out.{ending}")
        for _ in range(2):  # the second time over its own file
            score.main(world[1], ("ann", "new"), texts, average=True, out=out, progress=False)
        tables.append(read(out))
    table, other = tables
    pd.testing.assert_frame_equal(table, other)
    scorer = scorer_of(world[1])
    found = scorer.embed(CHATS)
    for name, user in (("ann", "ann"), ("new", "new"), ("average user", None)):
        rewards, deviations = scorer.score(found, user)
        part = table[table["user"] == name].sort_values("line")
        assert part["reward"].tolist() == pytest.approx(rewards.tolist(), rel=1e-4, abs=1e-5)
        assert part["deviation"].tolist() == pytest.approx(deviations.tolist(), rel=1e-4)
        places = [some.argsort(descending=True).argsort() + 1 for some in rewards.split(3)]
        assert part["place"].tolist() == torch.cat(places).tolist()
    assert (table.groupby(["user", "prompt"], sort=False)["place"].diff().dropna() == 1).all()


def test_score_from_the_command_line(world, texts):
    given = {"basis": world[1], "user": ["ann", "17"], "texts": texts, "dtype": "float32"}
    done = running.invoke("tools/score.py", given)
    assert done.status == 0 and done.out.count("Sing!") == 6 and " deviation " in done.out, done.err
    done = running.invoke("tools/score.py", {"basis": world[1], "list_users": "true"})
    assert done.out.split() == ["ann", "17", "new"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"user": ("bob",), "lm": ModelChoice("/nowhere/at/all")},  # before it is loaded
            "--user bob is not in the basis, which has 3 users, such as ann",
        ),
        ({"user": ()}, "--user is missing: name users, or give --average true"),
        ({"texts": None}, "--texts is missing"),
        ({"out": "found.txt"}, r"end its name in .csv or .jsonl"),
        ({"out": "texts.jsonl"}, "is what is to be read"),
        ({"out": "thesis.csv"}, "not what this writes"),
        ({"lm": ModelChoice("/nowhere/at/all")}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_replaces_nothing(
    world, texts, tmp_path, given, message
):
    (tmp_path / "thesis.csv").write_text("chapter,words\n")
    flags = {"basis": world[1], "user": ("ann",), "texts": texts} | given
    if "out" in given:
        flags["out"] = tmp_path / given["out"]
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message):
        score.main(**flags)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
