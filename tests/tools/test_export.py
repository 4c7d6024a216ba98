"""A learned basis outside the project: as a stock checkpoint."""

import errno
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import models
import people
import running
from lore.common.files import UMASK, InputError
from lore.elicitation.scoring import load_scorer
from lore.embeddings import store as embeddings
from lore.embeddings.reward_model import ModelChoice
from lore.experiments.report.intervals import columns, level
from lore.experiments.results import read_results
from lore.learning.basis import load_basis, save_basis
from lore.methods.ridge_bt import SharedFit
from lore.methods.saved import load_learned
from made_bases import CHATS, embed, make_basis, make_mixed, stock_rewards
from tools import export


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


class Made(NamedTuple):
    """A model, a basis of it with users ann, 17 and new, and the embeddings of CHATS."""

    model: Path
    basis: Path
    rows: Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Each kind of TINY, made once."""

    @functools.cache
    def make(kind: str = "llama") -> Made:
        folder = tmp_path_factory.mktemp("made")
        model = TINY[kind](folder / "model")
        return Made(model, make_basis(folder, model), embed(model, folder / "rows"))

    return make


@pytest.fixture
def llama(made) -> Made:
    return made("llama")


def centered(llama: Made, folder: Path) -> Path:
    """The basis with the mean of the embeddings as its center."""
    learned = load_basis(llama.basis)
    learned.center = llama.rows.mean(0)
    save_basis(folder / "centered.safetensors", learned)
    return folder / "centered.safetensors"


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY)
def test_stock_transformers_give_the_basis_rewards(made, tmp_path, kind):
    _, path, rows = made(kind)
    export.main(path, tmp_path / "out")
    for batch in (False, True):
        close(stock_rewards(tmp_path / "out", batch), rows @ load_basis(path).V / 100)  # log odds
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("users", [("17",), ("new",), ("new", "ann"), ()])
def test_labels_are_users_rewards_or_the_averages(llama, tmp_path, users):
    export.main(llama.basis, tmp_path / "out", users=users, average=not users)
    learned = load_basis(llama.basis)
    W = torch.stack([learned.weights_of(user) for user in users] or [learned.W.mean(0)])
    close(stock_rewards(tmp_path / "out", True), llama.rows @ learned.V @ W.T / 100)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tuple(config["id2label"].values()) == (users or ("average user",))


def test_a_pipeline_with_its_defaults_gives_rewards(llama, tmp_path):
    from transformers import pipeline  # takes seconds, which every collection would pay

    export.main(llama.basis, tmp_path / "ann", users=("ann",))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ann")
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    found = pipeline("text-classification", str(tmp_path / "ann"))(texts)
    assert {one["label"] for one in found} == {"ann"}
    expected = llama.rows @ load_basis(llama.basis).direction("ann")
    close(torch.tensor([one["score"] for one in found]), expected)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "ann").iterdir()}
    assert modes == {0o666 & ~UMASK}


@pytest.mark.parametrize("biased", [False, True])
def test_the_mean_reward_is_zero_by_a_bias_or_said(llama, biased):
    loaded = AutoModelForSequenceClassification.from_pretrained(llama.model)
    loaded.score = torch.nn.Linear(32, 1, bias=biased)
    export.replace_head(loaded, load_basis(llama.basis).columns(), llama.rows.mean(0))
    offsets = loaded.config.lore["offset"]
    mean = loaded.score(llama.rows).mean(0) - torch.tensor(offsets)
    torch.testing.assert_close(mean, torch.zeros(3), atol=1e-5, rtol=0)
    assert any(offsets) != biased


def test_the_offset_is_in_the_config_and_on_the_card(llama, tmp_path):
    path = centered(llama, tmp_path)
    export.main(path, tmp_path / "out", users=("ann",))
    said = json.loads((tmp_path / "out" / "config.json").read_text())["lore"]
    assert said["unit"] == "log odds"
    learned = load_basis(path)
    assert said["offset"] == pytest.approx([float(learned.direction("ann") @ learned.center)])
    assert f"{said['offset'][0]:.2f}" in (tmp_path / "out" / "README.md").read_text()


def test_an_older_basis_is_read_in_its_unit_and_another_unit_is_refused(llama, tmp_path):
    with safe_open(llama.basis, "pt") as file:
        notes = file.metadata()
    tensors, path = load_file(llama.basis), tmp_path / "older.safetensors"
    older = {key: value for key, value in notes.items() if key != "unit"}
    save_file(tensors, path, older)
    assert torch.equal(load_basis(path).direction("ann"), tensors["V"] @ tensors["W"][0] / 100)
    export.main(path, tmp_path / "out", users=("ann",))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lore"]["offset"] is None
    save_file(tensors, path, older | {"unit": "bananas"})
    with pytest.raises(InputError, match="its unit is 'bananas', not log odds times 100"):
        load_basis(path)


def test_ridge_bt_is_exported(llama, tmp_path):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3)).double()
    facts = {"users": ["ann"], "users_unseen": [], "model": str(llama.model)}
    SharedFit(direction, 1, {}).save(tmp_path / "ridge.safetensors", torch.zeros(0, 0), facts)
    export.main(tmp_path / "ridge.safetensors", tmp_path / "out", average=True)
    found = stock_rewards(tmp_path / "out", True)[:, 0]
    close(found, llama.rows @ direction.float(), atol=1e-4)


@pytest.mark.parametrize("given", [{"users": ("new",)}, {"average": True}, {}])
def test_a_mixed_logit_is_exported_as_a_basis_is(llama, tmp_path, given):
    path = make_mixed(tmp_path, llama.model)
    export.main(path, tmp_path / "out", **given)
    fit, new = load_learned(path).fit, load_learned(path).new
    state = (new[0] if "users" in given else torch.zeros(2)).double()
    columns = fit.reward(state)[:, None]
    if not given:
        columns = torch.cat([fit.mu[:, None], fit.tastes()], 1)
    expected = llama.rows.double() @ columns
    close(stock_rewards(tmp_path / "out", True), expected.float(), atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mixed logit" in card and "LoRe" not in card and "| rank | 2 |" in card


def test_bfloat16_keeps_rewards_to_its_precision(llama, tmp_path):
    export.main(llama.basis, tmp_path / "out", dtype="bfloat16")
    expected = llama.rows @ load_basis(llama.basis).V / 100
    rewards = stock_rewards(tmp_path / "out", False)
    assert (rewards - expected).abs().max() < 0.05 * expected.abs().max()
    assert (tmp_path / "out" / "config.json").read_text().count("bfloat16")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"users": ("bob",)}, "--users bob is not in the basis, which has 3 users, such as ann"),
        ({"users": ("ann",), "average": True}, "exclude each other"),
        ({"lm": ModelChoice("/nowhere/at/all")}, "cannot be loaded"),
        ({"out": None}, "--out is missing"),
        ({"out": Path()}, "already exists"),
        ({"basis": {"features": 48}}, "the basis has 48 features, the model 32"),
        ({"basis": {"model": None}}, "name it by --model"),
        ({"basis": {"pool": "layer:2"}}, "layer:2 states, .* --pool last alone can be exported"),
        ({"basis": {"pool": 5}}, "--pool 5: .* has layers 1 to 3"),
    ],
)
def test_requests_that_cannot_be_met_leave_nothing(llama, tmp_path, given, message):
    path = make_basis(tmp_path, **{"model": llama.model} | given.get("basis", {}))
    with pytest.raises(InputError, match=message):
        export.main(**{"out": tmp_path / "out"} | given | {"basis": path})
    assert not (tmp_path / "out").exists()


def test_users_are_listed_and_unknown_ones_of_a_mixed_logit_refused(llama, tmp_path, capsys):
    mixed = make_mixed(tmp_path, llama.model)
    for path in (llama.basis, mixed):
        export.main(path, list_users=True)
        assert capsys.readouterr().out.split() == ["ann", "17", "new"]
    with pytest.raises(InputError, match="--users bob is not in the basis, which has 3 users"):
        export.main(mixed, tmp_path / "out", users=("bob",))


def test_export_from_the_command_line_names_users(llama, tmp_path):
    given = {"basis": llama.basis, "users": ["17", "ann"], "out": tmp_path / "out"}
    done = running.invoke("tools/export.py", given)
    assert done.status == 0 and "17, ann: " in done.out, done.err


def test_another_model_of_the_same_size_is_refused_unless_it_is_insisted_on(
    llama, tmp_path, caplog
):
    model, other = llama.model, models.tiny_llama(tmp_path / "other", seed=1)
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


def test_a_full_disk_is_one_line_and_leaves_what_others_made(llama, tmp_path, monkeypatch):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.tex").write_text("mine")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(InputError, match="--out .*No space left on device"):
        export.main(llama.basis, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out.part", "thesis.tex"]
    (tmp_path / f"out.{os.getpid()}.part").mkdir()
    with pytest.raises(InputError, match="File exists"):
        export.main(llama.basis, tmp_path / "out")
    assert (tmp_path / f"out.{os.getpid()}.part").exists()


@pytest.mark.slow
def test_smollm2_as_a_stock_checkpoint(tmp_path):
    model = models.smollm2(tmp_path / "model", layers=2)
    path = make_basis(tmp_path, model, features=576, rank=4)
    export.main(path, tmp_path / "out")
    expected = embed(model, tmp_path / "rows") @ load_basis(path).V / 100
    for batch in (False, True):
        rewards = stock_rewards(tmp_path / "out", batch)
        close(rewards, expected, atol=float(1e-4 * expected.abs().max()))


# ------------------------------------------------------------------- Beside the model


def load_reward(folder: Path) -> ModuleType:
    """The reward.py of an export, as other programs load it: by its path."""
    spec = importlib.util.spec_from_file_location(f"reward_{folder.name}", folder / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_reward_py_gives_every_users_reward_by_the_signatures_of_others(made, tmp_path, kind):
    path = centered(made(kind), tmp_path)
    export.main(path, tmp_path / "out", users=("new", "ann"))
    reward, learned = load_reward(tmp_path / "out"), load_basis(path)
    users = ["ann", "new", "new", "ann", "ann", "new"]
    directions = torch.stack([learned.direction(user) for user in users])
    expected = ((made(kind).rows - learned.center) * directions).sum(1)

    def same(found, some=slice(None)):
        close(torch.tensor(found), expected[some])

    said = [chat[1]["content"] for chat in CHATS]
    same(reward.trl_reward([chat[:1] for chat in CHATS], [chat[1:] for chat in CHATS], user=users))
    prompts = [chat[0]["content"] for chat in CHATS]
    same(reward.trl_reward(prompts, said, user=users, completion_ids=[[1]] * 6, trainer_state=None))
    texts = [reward.load()[1].apply_chat_template(chat, tokenize=False) for chat in CHATS]
    for queries in (texts, [text.rstrip() for text in texts]):
        found = reward.reward_func(queries, prompts, users)
        same(found["rewards"].tolist())
        assert found.keys() == {"rewards", "scores", "extra_logs"}
    infos = [{"prompt": c[:1], "user": user} for c, user in zip(CHATS, users, strict=True)]
    same(reward.compute_scores(["own"] * 6, said, [None] * 6, infos))
    same([reward.compute_score("own", said[1], "", infos[1], reward_router_address=None)], [1])
    scorer = load_scorer(path)
    for user in ("ann", "new"):
        places = [i for i, other in enumerate(users) if other == user]
        rows = scorer.embed([CHATS[i] for i in places])
        same(scorer.score(rows, user)[0].tolist(), places)
    for wrong in (None, ["ann"] * 5, ["bob"] * 6):
        with pytest.raises(ValueError, match="one of new, ann must be the user of each text"):
            reward.trl_reward(prompts, said, user=wrong)


def test_reward_py_needs_no_user_for_one_label_and_cuts_long_texts_as_training_does(
    llama, tmp_path
):
    export.main(llama.basis, tmp_path / "out", average=True)
    reward = load_reward(tmp_path / "out")
    reward.MAX_LENGTH = 30
    given = {"model": str(llama.model), "max_length": 30, "progress": False}
    store = embeddings.embed(CHATS, tmp_path / "short", **given)
    expected = store.rows(torch.arange(6)) @ load_basis(llama.basis).direction()
    close(torch.tensor(reward.rewards(CHATS)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen", "language model"])
def test_an_adapter_is_the_export_in_peft(made, tmp_path, kind):
    peft = pytest.importorskip("peft")
    model, path, _ = made(kind)
    small = tmp_path / "small"
    export.main(path, tmp_path / "whole", users=("new", "ann"))
    export.main(path, small, users=("new", "ann"), adapter=True)
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


def test_a_text_with_the_templates_bos_has_one_after_loading(llama, tmp_path):
    export.main(llama.basis, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    ids = tokenizer.apply_chat_template(CHATS[0], return_dict=True)["input_ids"]
    assert tokenizer(text)["input_ids"] == ids and ids.count(tokenizer.bos_token_id) == 1


# -------------------------------------------------------------------------- The card


def test_what_a_strip_costs_is_measured(made, tmp_path):
    card = {}
    for kind in ("llama", "qwen"):
        export.main(made(kind).basis, tmp_path / kind)
        card[kind] = (tmp_path / kind / "README.md").read_text()
    assert "ends in nothing that a strip takes away" in card["llama"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "qwen")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    turned = []
    for prompt, responses in export.MADE.items():
        chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
                 for said in responses]  # fmt: skip
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        with torch.no_grad():
            whole, cut = (
                torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in some])
                for some in (texts, [text.removesuffix("\n") for text in texts])
            )
        for i in range(4):
            for j in range(i):
                turned += ((whole[i] > whole[j]) != (cut[i] > cut[j])).tolist()
    cost = sum(turned) / len(turned)
    assert cost > 0 and f"changes the order of {cost:.0%} of pairs" in card["qwen"]


def test_the_card_says_what_the_labels_are_and_how_to_use_them(llama, tmp_path):
    export.main(llama.basis, tmp_path / "all")
    export.main(llama.basis, tmp_path / "ann", users=("ann",))
    one, whole = ((tmp_path / name / "README.md").read_text() for name in ("ann", "all"))
    assert "The reward of ann." in one and "| estimator | LoRe |" in one
    assert str(llama.model.parent) not in one + whole  # another machine has no such folder
    assert all(f"\n- {name}: " in one for name in ("TRL, every label", "OpenRLHF", "verl", "vLLM"))
    assert "rewards @ w" in whole and "rewards @ w" not in one
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    assert config["id2label"] == {"0": "basis 1", "1": "basis 2", "2": "basis 3"}


def test_the_card_has_the_figures_of_its_run(tmp_path, no_plots):
    _, run = people.fit(people.planted(), tmp_path / "results")
    results = read_results(run)
    file = next(run.glob("basis-K0[2-9]*.safetensors"))
    fits = [fit for part in results.repeats[0]["methods"].values() for fit in part["fits"]]
    label = next(fit["label"] for fit in fits if fit["file"] == file.name)
    about = export.held_out(file, average=False)
    for row, (name, *where) in zip(about["rows"], columns(results), strict=True):
        own = level(results, label, "", "accuracy", *where)
        assert row["name"].startswith(name)
        assert row["accuracy"].startswith(f"{100 * own.mean:.1f} [")
    shared = export.held_out(file, average=True)["rows"][0]["accuracy"]
    mean = level(results, label, "population", "accuracy", *columns(results)[0][1:]).mean
    assert shared.startswith(f"{100 * mean:.1f}")
    count = results.repeats[0]["comparisons"]["train"]
    assert f"{count:,} comparisons of" in about["learned_from"]
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
    text = (tmp_path / "free" / "README.md").read_text()
    assert "personal data" in text and "is not known here" in text
