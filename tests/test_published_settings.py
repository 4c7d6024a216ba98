"""Faithfulness itself: every default and constant that a publication gives, with its source.

One row is (where, setting, value, source). Where is a script (its ``main`` or, for LoRe's settings,
its ``LORE``), a function or class of ``utils``, or a method's module or class.
"""

import importlib
import inspect
from typing import Any

import pytest

import utils
import worlds

CODE, PAPER = "public utils.py", "arXiv 2504.14439"
TABLE: list[tuple[str, str, Any, str]] = [
    ("utils.run", "num_iterations", 1000, CODE),
    ("utils.run", "learning_rate", 0.5, CODE),
    ("utils.run", "few_shot_iterations", 500, CODE),
    ("utils.run", "few_shot_learning_rate", 0.1, CODE),
    ("utils.run_regularized", "num_iterations", 20_000, CODE),
    ("utils.run_regularized", "learning_rate", 0.5, CODE),
    ("utils.run_regularized", "few_shot_iterations", 500, CODE),
    ("utils.run_regularized", "few_shot_learning_rate", 0.5, CODE),
    ("utils.run_few_shot_vary_shots", "num_iterations", 500, CODE),
    ("utils.run_few_shot_vary_shots", "learning_rate", 0.5, CODE),
    ("utils.run_few_shot_vary_shots", "few_shot_iterations", 500, CODE),
    ("utils.run_few_shot_vary_shots", "few_shot_learning_rate", 0.1, CODE),
    ("utils.LoRe", "num_iterations", 1000, CODE),
    ("utils.LoRe", "learning_rate", 0.5, CODE),
    ("utils.LoRe_regularized", "num_iterations", 20_000, CODE),
    ("utils.LoRe_regularized", "learning_rate", 0.5, CODE),
    *(
        (f"utils.{name}", setting, value, CODE)
        for name in ("solve_regularized", "learn_multiple_few_shot",
                     "learn_multiple_few_shot_weighted")
        for setting, value in (("num_iterations", 1000), ("learning_rate", 0.01))
    ),
    ("utils", "TEMPERATURE", 100.0, CODE),
    ("utils", "MIN_WEIGHT", 1e-2, CODE),
    # The scripts
    ("PersonalLLM/train_basis.py", "users", 1000, PAPER),
    ("PersonalLLM/train_basis.py", "unseen_users", 1000, PAPER),
    ("PersonalLLM/train_basis.py", "pairs_per_user", 45, PAPER),
    ("PersonalLLM/train_basis.py", "few_shot_pairs", 9, PAPER),
    ("PersonalLLM/train_basis.py", "dirichlet_alpha", 0.001, PAPER),
    ("PersonalLLM/train_basis.py", "ranks", (0, 1, 2, 3, 4, 5), "public train_basis.py"),
    ("PersonalLLM/vary_fewshot.py", "users", 1000, PAPER),
    ("PersonalLLM/vary_fewshot.py", "unseen_users", 1000, PAPER),
    ("PersonalLLM/vary_fewshot.py", "pairs_per_user", 45, PAPER),
    ("RedditTLDR/prepare.py", "min_annotations", 50, PAPER),
    ("RedditTLDR/train_basis.py", "pairs_per_user", 150, PAPER),
    ("RedditTLDR/train_basis.py", "few_shot_pairs", 50, PAPER),
    ("RedditTLDR/train_basis.py", "seen_fraction", 0.5, PAPER),
    ("RedditTLDR/train_basis.py", "ranks", (0, 1, 2, 3, 4, 5, 6), "public train_basis.py"),
    ("RedditTLDR/vary_fewshot.py", "pairs_per_user", 150, PAPER),
    ("RedditTLDR/vary_fewshot.py", "seen_fraction", 0.5, PAPER),
    ("RedditTLDR/vary_fewshot.py", "shots", tuple(range(5, 51, 5)), PAPER),
    ("RedditTLDR/vary_fewshot.py", "trials", 20, PAPER),
    ("RedditTLDR/vary_fewshot.py", "ranks", (5,), PAPER),
    ("RedditTLDR/vary_fewshot.py", "iterations", 500, CODE),
    ("PRISM/prepare.py", "min_dialogues", 6, PAPER),
    ("PRISM/prepare.py", "seen_fraction", 0.5, PAPER),
    ("PRISM/train_basis.py", "ranks", (0, 1, 5, 10, 15, 20, 25, 50), "public train_basis.py"),
    ("PRISM/train_basis.py", "alpha", (1e4,), "public train_basis.py"),
    ("PRISM/train_basis.py", "estimator", "lore_regularized", "public train_basis.py"),
    ("PRISM/vary_fewshot.py", "alpha", (1e4,), "public train_basis.py"),
    ("PRISM/vary_fewshot.py", "shots", (1, 2, 3), PAPER),
    *(
        (f"{name}/train_basis.py", setting, value, "eq. 10, public utils.py")
        for name in ("PersonalLLM", "RedditTLDR")
        for setting, value in (("alpha", (0.0,)), ("estimator", "lore"), ("shrinkage", (0.0,)),
                               ("learning_rate", 0.5), ("few_shot_iterations", 500))
    ),
    # Peers with the setting "faithful"
    *(("pal", *row, "PAL's code") for row in (
        ("WIDTH", 512), ("BATCH", 4), ("EPOCHS", 20), ("RATE", 1e-4), ("DECAY", 0.01),
        ("WEIGHT_RATE", 5e-3), ("NEW_USER_RATE", 5e-3), ("NEW_USER_EPOCHS", 20))),
    *(("vpl", *row, "VPL's code") for row in (
        ("UNITS", 512), ("CONTEXT", 8), ("BATCH", 32), ("EPOCHS", 2), ("RATE", 1e-4),
        ("DECAY", 1e-3), ("WARM_UP", 0.03), ("CYCLE", 10_000))),
    ("vpl.VPL", "betas[0]", 3e-6, "VPL's UF-P-4 script"),
    *(("mrm", *row, "MRM's code") for row in (
        ("K", 2), ("SCALE", 0.01), ("QUERY", 0.9), ("TAIL", 0.5), ("SHARPNESS", 0.5), ("USERS", 2),
        ("EPOCHS", 200), ("WARM_UP", 0.05), ("CLIP", 1.0), ("EPSILON", 1e-8))),
    ("mrm.MRM", "rate", 1e-3, "MRM's PRISM script"),
    ("mrm.MRM", "inner_rate", 1e-3, "MRM's PRISM script"),
    *(("pref", *row, "PReF's code") for row in (
        ("NORM_PENALTY", 0.02), ("STEPS", 500), ("BATCH", 64), ("RATE", 1e-3),
        ("USER_STEPS", 1000), ("USER_RATE", 0.01))),
    ("pref.PReF", "rank", 5, "PReF's code"),
    *(("rbd", *row, "RBD's code, as tuned") for row in (
        ("POPULATION", 0.01), ("DEVIATION", 10.0), ("RATE", 1e-4), ("STEPS", 3000),
        ("PATIENCE", 100), ("LEAST", 1e-5), ("START", 1e-3), ("USER_RATE", 1e-2),
        ("USER_STEPS", 1000), ("USER_PATIENCE", 50))),
    ("rbd.RBD", "rank", 8, "RBD's code, as tuned"),
]  # fmt: skip


def default_of(where: str, setting: str) -> Any:
    """The value that a run without flags or arguments has."""
    if where.endswith(".py"):
        module = worlds.script(where)
        parameters = inspect.signature(module.main).parameters
        if setting in parameters and setting != "alpha":
            return parameters[setting].default
        group = "sweep" if hasattr(getattr(module, "SWEEP", None), setting) else "lore"
        settings = parameters[group].default
        assert settings is getattr(module, group.upper())
        return getattr(settings, setting)
    if where == "utils":
        return getattr(utils, setting)
    if where.startswith("utils."):
        return _default_of_function(where.removeprefix("utils."), setting)
    name, _, inside = where.partition(".")
    module = importlib.import_module(f"lore.methods.{name}")
    if setting == "betas[0]":
        return getattr(module, inside)().betas[0]
    return getattr(getattr(module, inside)() if inside else module, setting)


def _default_of_function(name: str, setting: str) -> Any:
    if name == "run_regularized":  # hands its arguments on: what reaches ``run``
        given: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "run", lambda *args, **settings: given.update(settings))
            utils.run_regularized()
        return given.get(setting, _default_of_function("run", setting))
    return inspect.signature(getattr(utils, name)).parameters[setting].default


@pytest.mark.parametrize(
    ("where", "setting", "value", "source"), TABLE, ids=[f"{row[0]}:{row[1]}" for row in TABLE]
)
def test_a_published_setting_is_the_default(where: str, setting: str, value: Any, source: str):
    assert default_of(where, setting) == value, f"{source} has {value}"


@pytest.mark.parametrize(("estimator", "rate"), [("lore", 0.1), ("lore_regularized", 0.5)])
def test_new_users_are_fitted_at_the_published_rate(estimator: str, rate: float):
    lore = worlds.script("PRISM/train_basis.py").Lore(estimator=estimator)
    assert lore.few_shot()["learning_rate"] == rate  # public utils.py: run, run_regularized
