"""Basis files: whose weights are whose, and which model a basis belongs to."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lore.common.files import InputError
from lore.embeddings.reward_model import ModelChoice, check_model
from lore.learning.basis import Basis, load_basis, save_basis

V = torch.arange(8.0).reshape(4, 2)
W = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
W_UNSEEN = torch.tensor([[0.5, 0.5]])


def stored(folder: Path, basis: Basis) -> Basis:
    save_basis(folder / "basis.safetensors", basis)
    return load_basis(folder / "basis.safetensors")


WEIGHTS = {"ann": W[0], "bob": W[1], "cy": W_UNSEEN[0]}


@pytest.mark.parametrize(("seen", "unseen"), [(["ann", "bob"], ["cy"]), ([], ["cy"]),
                                              (["ann", "bob"], [])])  # fmt: skip
def test_a_name_gives_the_weights_of_that_user_whichever_side_has_names(tmp_path, seen, unseen):
    basis = stored(tmp_path, Basis(V, W, None, seen, W_UNSEEN, unseen))
    assert basis.names == [*seen, *unseen]
    for name in basis.names:
        assert torch.equal(basis.weights_of(name), WEIGHTS[name])
        assert torch.equal(basis.direction(name), V @ WEIGHTS[name] / 100)  # log odds
    for name in {*WEIGHTS, "dan"} - {*basis.names}:
        with pytest.raises(InputError, match=f"^--user {name} is not in .*--list-users true"):
            basis.direction(name, "--user")


def test_without_names_there_is_the_average_user_only(tmp_path):
    basis = stored(tmp_path, Basis(V, W))
    assert torch.equal(basis.direction(), V @ torch.tensor([0.625, 0.375]) / 100)
    with pytest.raises(InputError, match="user ann .*no names of users"):
        basis.weights_of("ann")


def test_a_basis_comes_back_with_its_settings_and_without_what_is_not_its_own(tmp_path):
    path, settings = tmp_path / "basis.safetensors", {"rank": 2, "model": "some/model"}
    save_file({"V": V, "W": W, "else": V.clone()}, path, {"settings": json.dumps(settings)})
    basis = load_basis(path)
    assert torch.equal(basis.V, V) and basis.W_unseen is None and basis.users == []
    assert stored(tmp_path, basis).settings == settings


def test_wrong_numbers_of_names_are_not_written(tmp_path):
    with pytest.raises(InputError, match="1 user ids for 2 rows"):
        save_basis(tmp_path / "basis.safetensors", Basis(V, W, users=["ann"]))
    assert not list(tmp_path.iterdir())


NOTES = {"users": '["ann", "bob"]', "users_unseen": "[]", "settings": "{}"}
NO_BASIS = {
    "one dimension": {"V": V[:, 0].clone()}, "other weights": {"W": W[:, :1].clone()},
    "whole numbers": {"V": V.long()}, "half precision": {"V": V.bfloat16()},
    "NaN": {"V": V * float("nan")}, "NaN weights": {"W": W * float("nan")},
    "weights of seven": {"W": 7 * W}, "weights below zero": {"W": W.flip(1) * 2 - W},
    "new weights of seven": {"W_unseen": 7 * W_UNSEEN}, "no weights": {"W": W[:0].clone()},
    "no rows": {"V": V[:0].clone()}, "no columns": {"V": V[:, :0].clone(), "W": W[:, :0].clone()},
    "names cut": {"users": "["}, "a number of names": {"users": "5"},
    "more names": {"users": '["a", "b", "c"]'}, "a name twice": {"users": '["ann", "ann"]'},
    "names of numbers": {"users": "[1, 2]"}, "settings cut": {"settings": "{"},
    "settings as number": {"settings": "5"}, "without weights": {"W": None},
}  # fmt: skip


@pytest.mark.parametrize("what", NO_BASIS)
def test_what_no_run_has_written_is_no_basis(tmp_path, what):
    path, content = tmp_path / "basis.safetensors", {"V": V, "W": W, **NOTES, **NO_BASIS[what]}
    notes = {name: content.pop(name) for name in NOTES}
    save_file({name: x for name, x in content.items() if x is not None}, path, notes)
    with pytest.raises(InputError, match="basis.safetensors.*no basis file") as error:
        load_basis(path)
    assert "\n" not in str(error.value)


def test_junk_and_nothing_are_no_basis(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk")
    for name, said in (("junk", "damaged.*no basis file"), ("none", "no such basis file")):
        with pytest.raises(InputError, match=said):
            load_basis(tmp_path / name)


# ---------------------------------------------------------------- The basis' model


def test_a_local_model_is_found_from_any_folder(tmp_path, monkeypatch):
    model, path = tmp_path / "model", tmp_path / "run" / "basis.safetensors"
    for folder in (model, tmp_path / "run", tmp_path / "elsewhere"):
        folder.mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in (str(model), "../model"):
        found = ModelChoice().resolve({"model": name, "tokenizer": name}, path)
        assert Path(found.model).resolve() == model and found[1:] == (None, None, False, "last")


HUB = {"model": "org/model", "tokenizer": "org/tokenizer", "revision": "c0ffee"}


@pytest.mark.parametrize(("given", "settings", "found"), [
    ((), HUB, ("org/model", "org/tokenizer", "c0ffee", False, "last")),
    ((None, "org/words", "main", True), HUB, ("org/model", "org/words", "main", True, "last")),
    (("other",), HUB | {"pool": "mean"}, ("other", None, None, False, "mean")),
])  # fmt: skip
def test_what_is_given_goes_before_what_the_basis_remembers(given, settings, found):
    assert ModelChoice(*given).resolve(settings, "b") == found


@pytest.mark.parametrize(("settings", "message"), [
    *(({"model": name}, f"run/b was learned with the model in {name}.*--model")
      for name in ("/gone/model", "../gone", "a/b/c")),
    (HUB | {"tokenizer": "/gone/words"}, "tokenizer in /gone/words.*--tokenizer"),
    ({}, "run/b does not say .*--model"),
])  # fmt: skip
def test_a_local_model_that_moved_is_named_with_what_to_do(settings, message):
    with pytest.raises(InputError, match=message):
        ModelChoice().resolve(settings, "run/b")


FACTS = {"weights_sha256": "a" * 64, "template_sha256": "b" * 64, "revision": "decade"}


@pytest.mark.parametrize(("change", "what"), [
    ({"weights_sha256": "c" * 64}, "other weights than"), ({"revision": "c"}, "another commit"),
    ({"template_sha256": "c" * 64}, "another chat template than"),
    ({"weights_sha256": "c" * 64, "template_sha256": "c" * 64}, "other weights and another"),
    ({"weights_sha256": None}, None), ({"revision": None}, None),
])  # fmt: skip
def test_a_model_is_another_one_where_both_sides_know_a_fact_and_they_differ(change, what, caplog):
    found = {"model": "org/model", **FACTS, **change}
    if what is not None:
        with pytest.raises(InputError, match=what):
            check_model(FACTS, found)
    check_model(FACTS, found, any_model=what is not None)
    assert (what is not None) == ("may mean nothing" in caplog.text)
    check_model({}, found)
