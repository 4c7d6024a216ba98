"""A learned basis outside the project: as a stock checkpoint."""

import errno
import functools
import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import models
import people
import running
from lore.common.files import UMASK, InputError
from lore.experiments.report.intervals import columns, level
from lore.experiments.results import read_results
from lore.learning.basis import load_basis, save_basis
from lore.methods.ridge_bt import SharedFit
from lore.methods.saved import load_learned
from made_bases import CHATS, close, embed, make_basis, make_mixed, stock_rewards
from tools import export


def without_bos_in_its_template(folder: Path) -> Path:
    """The embedding engine puts in front the BOS that the tokenizer would."""
    models.tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    tokenizer.save_pretrained(folder)
    return folder


KINDS = {
    "llama": models.tiny_llama,
    "llama whose pad is its end": functools.partial(models.tiny_llama, pad_is_eos=True),
    "llama without BOS in its template": without_bos_in_its_template,
    "qwen": models.tiny_qwen,
    "language model": models.headless,
    "SmolLM2": functools.partial(models.smollm2, layers=2),
}


class Made(NamedTuple):
    """A model, a basis of it with users ann, 17 and new, and the embeddings of CHATS."""

    model: Path
    basis: Path
    rows: Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Each of KINDS, made once."""

    @functools.cache
    def make(kind: str) -> Made:
        folder = tmp_path_factory.mktemp("made")
        model = KINDS[kind](folder / "model")
        rows = embed(model, folder / "rows")
        return Made(model, make_basis(folder, model, rows.shape[1]), rows)

    return make


@pytest.fixture
def llama(made) -> Made:
    return made("llama")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_give_the_basis_rewards(made, tmp_path, kind):
    _, path, rows = made(kind)
    export.main(path, tmp_path / "out")
    expected = rows @ load_basis(path).V / 100  # log odds
    for batch in (False, True):
        close(stock_rewards(tmp_path / "out", batch), expected, 1e-4 * float(expected.abs().max()))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    ids = tokenizer.apply_chat_template(CHATS[0], return_dict=True)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids  # a BOS stands once, whatever is given
    bos = tokenizer.bos_token_id
    assert ids.count(bos) == (bos is not None) or kind == "SmolLM2"  # it begins each message there


@pytest.mark.parametrize("make", [make_basis, make_mixed])
@pytest.mark.parametrize("given", [("17",), ("new", "ann"), (None,), ()])
def test_labels_are_users_rewards_or_the_averages_or_what_they_are_mixed_from(
    llama, tmp_path, make, given
):
    path, average = make(tmp_path, llama.model), given == (None,)
    export.main(path, tmp_path / "out", users=() if average else given, average=average)
    learned = load_learned(path)
    directions = [learned.direction(user) for user in given]
    if not given and make is make_mixed:
        directions = [learned.fit.mu, *learned.fit.tastes().T]
    elif not given:
        directions = [*learned.V.T / 100]
    expected = llama.rows @ torch.stack(directions, 1).float()
    close(stock_rewards(tmp_path / "out", True), expected, atol=1e-4)
    labels = tuple(config_of(tmp_path / "out")["id2label"].values())
    assert labels == (("average user",) if average else given or tuple(learned.columns()))
    card, of_users = card_of(tmp_path / "out"), f"\n\nThe reward of {', '.join(labels)}."
    assert ("LoRe (" in card, "mixed logit" in card) == (make is make_basis, make is make_mixed)
    assert f"| rank | {learned.settings['rank']} |" in card
    assert (learned.use in card, of_users in card) == (given == (), given != ())
    assert all(f"\n- {name}: " in card for name in ("TRL, every label", "OpenRLHF", "verl", "vLLM"))
    assert str(llama.model.parent) not in card  # another machine has no such folder


def test_one_label_needs_no_user_in_a_pipeline_nor_in_reward_py_which_cuts_as_training_does(
    llama, tmp_path
):
    from transformers import pipeline  # takes seconds, which every collection would pay

    export.main(llama.basis, tmp_path / "ann", users=("ann",))
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "ann").iterdir()}
    assert modes == {0o666 & ~UMASK}
    direction, reward = load_basis(llama.basis).direction("ann"), load_reward(tmp_path / "ann")
    texts = [reward.load()[1].apply_chat_template(chat, tokenize=False) for chat in CHATS]
    found = pipeline("text-classification", str(tmp_path / "ann"))(texts)
    assert {one["label"] for one in found} == {"ann"}
    close(torch.tensor([one["score"] for one in found]), llama.rows @ direction)
    reward.MAX_LENGTH = 30
    rows = embed(llama.model, tmp_path / "short", max_length=30)
    close(torch.tensor(reward.rewards(CHATS)), rows @ direction)


def test_the_mean_reward_is_zero_where_the_head_has_a_bias(llama):
    loaded = AutoModelForSequenceClassification.from_pretrained(llama.model)
    loaded.score = torch.nn.Linear(32, 1)
    export.replace_head(loaded, load_basis(llama.basis).columns(), llama.rows.mean(0))
    assert loaded.config.lore["offset"] == [0, 0, 0]
    close(loaded.score(llama.rows).mean(0), torch.zeros(3))


def test_ridge_bt_is_exported_and_bfloat16_keeps_rewards_to_its_precision(llama, tmp_path):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3)).double()
    facts = {"users": ["ann"], "users_unseen": [], "model": str(llama.model)}
    SharedFit(direction, 1, {}).save(tmp_path / "ridge.safetensors", torch.zeros(0, 0), facts)
    expected = llama.rows @ direction.float()[:, None]
    for dtype, atol in (("auto", 1e-4), ("bfloat16", 0.05 * float(expected.abs().max()))):
        out = tmp_path / dtype
        export.main(tmp_path / "ridge.safetensors", out, average=True, dtype=dtype)
        close(stock_rewards(out, False), expected, atol)
        assert config_of(out)["dtype"] == ("float32" if dtype == "auto" else dtype)


def test_export_from_the_command_line_names_users(llama, tmp_path, caplog):
    other = make_basis(tmp_path, llama.model, template_sha256="0" * 64)  # taken all the same
    given = {"basis": other, "users": ["17", "ann"], "out": tmp_path / "out", "any_model": "true"}
    done = running.invoke("tools/export.py", given)
    assert done.status == 0 and "17, ann: " in done.out and "may mean nothing" in caplog.text


def test_a_full_disk_is_one_line_and_leaves_what_others_made(llama, tmp_path, monkeypatch):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.tex").write_text("mine")

    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(InputError, match="--out .*No space left on device"):
        export.main(llama.basis, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out.part", "thesis.tex"]
    with pytest.raises(InputError, match="--out .*thesis.*cannot be written .*File exists"):
        export.main(llama.basis, tmp_path / "out.part" / "thesis.tex" / "out")


def load_reward(folder: Path) -> ModuleType:
    """The reward.py of an export, as other programs load it: by its path."""
    spec = importlib.util.spec_from_file_location(f"reward_{folder.name}", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_reward_py_gives_every_users_reward_by_the_signatures_of_others(made, tmp_path, kind):
    learned, path = load_basis(made(kind).basis), tmp_path / "centered.safetensors"
    learned.center = made(kind).rows.mean(0)
    save_basis(path, learned)
    export.main(path, tmp_path / "out", users=("new", "ann"))
    reward, said = load_reward(tmp_path / "out"), config_of(tmp_path / "out")["lore"]
    offsets = [float(learned.direction(user) @ learned.center) for user in ("new", "ann")]
    assert said == {"unit": "log odds", "offset": pytest.approx(offsets, rel=1e-4)}
    assert ", ".join(f"{offset:.2f}" for offset in said["offset"]) in card_of(tmp_path / "out")
    users = ["ann", "new", "new", "ann", "ann", "new"]
    directions = torch.stack([learned.direction(user) for user in users])
    expected = ((made(kind).rows - learned.center) * directions).sum(1)
    prompts, said = ([chat[i]["content"] for chat in CHATS] for i in range(2))
    texts = [reward.load()[1].apply_chat_template(chat, tokenize=False) for chat in CHATS]
    infos = [{"prompt": c[:1], "user": user} for c, user in zip(CHATS, users, strict=True)]
    more = {"completion_ids": [[1]] * 6, "trainer_state": None}
    found = [
        reward.trl_reward([chat[:1] for chat in CHATS], [chat[1:] for chat in CHATS], user=users),
        reward.trl_reward(prompts, said, user=users, **more),
        reward.reward_func(texts, prompts, users)["rewards"],
        reward.reward_func([text.rstrip() for text in texts], prompts, users)["scores"],
        reward.compute_scores(["own"] * 6, said, [None] * 6, infos),
        [reward.compute_score("own", said[i], "", infos[i], router=None) for i in range(6)],
    ]
    for rewards in found:
        close(torch.as_tensor(rewards), expected)
    assert reward.reward_func(texts, prompts, users).keys() == {"rewards", "scores", "extra_logs"}
    for wrong in (None, ["ann"] * 5, ["bob"] * 6):
        with pytest.raises(ValueError, match="one of new, ann must be the user of each text"):
            reward.trl_reward(prompts, said, user=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen", "language model"])
def test_an_adapter_is_the_export_in_peft(made, tmp_path, kind):
    peft, small, (model, path, _) = pytest.importorskip("peft"), tmp_path / "small", made(kind)
    for out, adapter in ((tmp_path / "whole", False), (small, True)):
        export.main(path, out, users=("new", "ann"), adapter=adapter)
    options = {"num_labels": 2, "ignore_mismatched_sizes": True}
    base = AutoModelForSequenceClassification.from_pretrained(model, **options)
    tokenizer = AutoTokenizer.from_pretrained(small)
    base.config.pad_token_id = tokenizer.pad_token_id
    loaded = peft.PeftModel.from_pretrained(base, small).eval()
    options = {"return_tensors": "pt", "return_dict": True, "padding": True}
    with torch.no_grad():
        found = loaded(**tokenizer.apply_chat_template(CHATS, **options)).logits
    expected = stock_rewards(tmp_path / "whole", True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    said = json.loads((small / "lore.json").read_text())
    assert said == {"labels": ["new", "ann"], "unit": "log odds", "offset": None}
    assert sum(f.stat().st_size for f in small.glob("*.safetensors")) < 4000
    written = [file.read_text() for file in small.glob("*.[jm]*")]
    assert not any(str(model.parent) in text for text in written)


def test_what_a_strip_costs_is_measured(made, tmp_path):
    for kind in ("llama", "qwen"):
        export.main(made(kind).basis, tmp_path / kind)
    assert "ends in nothing that a strip takes away" in card_of(tmp_path / "llama")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "qwen")
    tokenizer, turned = AutoTokenizer.from_pretrained(tmp_path / "qwen"), []

    @torch.no_grad()
    def logits(text: str) -> Tensor:
        return model(**tokenizer(text, return_tensors="pt")).logits

    for chats in export.CHATS:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        both = [(logits(text), logits(text.removesuffix("\n"))) for text in texts]
        for (whole, cut), (whole_j, cut_j) in itertools.combinations(both, 2):
            turned += ((whole > whole_j) != (cut > cut_j)).flatten().tolist()
    cost = sum(turned) / len(turned)
    assert cost > 0 and f"changes the order of {cost:.0%} of pairs" in card_of(tmp_path / "qwen")


def test_the_card_has_the_figures_of_its_run(tmp_path, no_plots):
    _, run = people.fit(people.planted(), tmp_path / "results")
    results = read_results(run)
    file = next(run.glob("basis-K0[2-9]*.safetensors"))
    label = next(la for la in results.labels if results.says(la, "file") == file.name)
    about = export.held_out(file, average=False)
    for row, (name, *where) in zip(about["rows"], columns(results), strict=True):
        own = level(results, label, "", "accuracy", *where)
        assert row["name"].startswith(name)
        assert row["accuracy"].startswith(f"{100 * own.mean:.1f} [")
    shared = export.held_out(file, average=True)["rows"][0]["accuracy"]
    mean = level(results, label, "population", "accuracy", *columns(results)[0][1:]).mean
    assert shared.startswith(f"{100 * mean:.1f}")
    assert f"{results.repeats[0]['comparisons']['train']:,} comparisons of" in about["learned_from"]
    assert export.held_out(tmp_path / "alone.safetensors", average=False) == {}


def test_the_cards_head_is_what_the_hub_reads(tmp_path):
    model = models.tiny_llama(tmp_path / "model")
    path = make_basis(tmp_path, model, dataset="PRISM")
    export.main(path, tmp_path / "bare", users=("ann",))
    head = ModelCard.load(tmp_path / "bare" / "README.md").data
    assert head.license == "other" and head.base_model is None
    assert head.datasets == ["HannahRoseKirk/prism-alignment"] and "reward-model" in head.tags
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    export.main(path, tmp_path / "free", users=("ann",), adapter=True)
    head = ModelCard.load(tmp_path / "free" / "README.md").data
    assert head.license == "apache-2.0" and head.library_name == "peft"
    assert all(words in card_of(tmp_path / "free") for words in ("personal data", "is not known"))
