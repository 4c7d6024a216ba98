"""Rewards of known users, by the loaded model and by the command."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import models
import running
from lore.common.files import InputError
from lore.embeddings.reward_model import render_text
from lore.methods.saved import load_learned
from made_bases import CHATS, close, embed, make_basis, make_mixed, scorer_of, write_lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a mixed logit's file with all that it may have."""
    folder = tmp_path_factory.mktemp("world")
    model = models.tiny_qwen(folder / "model")
    return model, make_mixed(folder, model, known=True)


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
            close(rewards, mean.float(), 1e-4)
        expected = torch.stack([(row @ cov.double() @ row).sqrt() for row in z])
        close(deviations, expected.float(), 1e-4)


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
    assert scorer.score(rows)[1] is None  # a basis does not say how sure it is
    ids = scorer.tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = torch.tensor([ids[:1] + ids[-19:]])
    close(rows[0], scorer.engine.model.base_model(cut).last_hidden_state[0, -1], 1e-4)


def test_the_command_ranks_within_a_prompt_for_every_user(world, tmp_path):
    rows = [{"prompt": chat[0]["content"], "response": chat[1]["content"]} for chat in CHATS[:3]]
    lines = [*rows, *({"messages": chat} for chat in CHATS[3:])]
    given = {"basis": world[1], "texts": write_lines(tmp_path / "texts.jsonl", lines)}
    given |= {"user": ["ann", "new"], "average": "true", "dtype": "float32"}
    for out in ("out.csv", "out.jsonl"):
        for _ in range(2):  # the second time over its own file
            done = running.invoke("tools/score.py", given | {"out": tmp_path / out})
            assert done.status == 0 and not done.out, done.err
    shown = running.invoke("tools/score.py", given).out
    assert shown.count("Sing!") == 9 and " deviation " in shown
    table = pd.read_csv(tmp_path / "out.csv")
    pd.testing.assert_frame_equal(table, pd.read_json(tmp_path / "out.jsonl", lines=True))
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
