"""Faithfulness itself: every default and constant that a publication gives, with its source.

One row is (source, where, settings). Where are scripts, functions or classes of ``utils``, or a
method's module or class.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

import utils
import worlds

CODE, PAPER, EQUATION = "public utils.py", "arXiv 2504.14439", "eq. 10, public utils.py"
SCRIPT = "public train_basis.py"
PUBLISHED: list[tuple[str, str, dict[str, Any]]] = [
    (CODE, "utils.run", dict(num_iterations=1000, learning_rate=0.5, few_shot_iterations=500,
        few_shot_learning_rate=0.1)),
    (CODE, "utils.run_regularized", dict(num_iterations=20_000, learning_rate=0.5,
        few_shot_iterations=500, few_shot_learning_rate=0.5)),
    (CODE, "utils.run_few_shot_vary_shots", dict(num_iterations=500, learning_rate=0.5,
        few_shot_iterations=500, few_shot_learning_rate=0.1)),
    (CODE, "utils.LoRe", dict(num_iterations=1000, learning_rate=0.5)),
    (CODE, "utils.LoRe_regularized", dict(num_iterations=20_000, learning_rate=0.5)),
    (CODE, "utils.solve_regularized utils.learn_multiple_few_shot "
        "utils.learn_multiple_few_shot_weighted", dict(num_iterations=1000, learning_rate=1e-2)),
    (CODE, "utils", dict(TEMPERATURE=100.0, MIN_WEIGHT=1e-2)),
    (PAPER, "PersonalLLM/train_basis.py", dict(users=1000, unseen_users=1000, pairs_per_user=45,
        few_shot_pairs=9, dirichlet_alpha=1e-3)),
    (PAPER, "PersonalLLM/vary_fewshot.py", dict(users=1000, unseen_users=1000, pairs_per_user=45)),
    (PAPER, "RedditTLDR/prepare.py", dict(min_annotations=50)),
    (PAPER, "RedditTLDR/train_basis.py", dict(pairs_per_user=150, few_shot_pairs=50,
        seen_fraction=0.5)),
    (PAPER, "RedditTLDR/vary_fewshot.py", dict(pairs_per_user=150, seen_fraction=0.5,
        shots=tuple(range(5, 51, 5)), trials=20, ranks=(5,))),
    (CODE, "RedditTLDR/vary_fewshot.py", dict(iterations=500)),
    (PAPER, "PRISM/prepare.py", dict(min_dialogues=6, seen_fraction=0.5)),
    (PAPER, "PRISM/vary_fewshot.py", dict(shots=(1, 2, 3))),
    (SCRIPT, "PersonalLLM/train_basis.py", dict(ranks=(0, 1, 2, 3, 4, 5))),
    (SCRIPT, "RedditTLDR/train_basis.py", dict(ranks=(0, 1, 2, 3, 4, 5, 6))),
    (SCRIPT, "PRISM/train_basis.py", dict(ranks=(0, 1, 5, 10, 15, 20, 25, 50), alpha=(1e4,),
        estimator="lore_regularized")),
    (SCRIPT, "PRISM/vary_fewshot.py", dict(alpha=(1e4,))),
    (EQUATION, "PersonalLLM/train_basis.py RedditTLDR/train_basis.py", dict(alpha=(0.0,),
        estimator="lore", shrinkage=(0.0,), learning_rate=0.5, few_shot_iterations=500)),
    # Peers with the setting "faithful"
    ("PAL's code", "pal", dict(WIDTH=512, BATCH=4, EPOCHS=20, RATE=1e-4, DECAY=1e-2,
        WEIGHT_RATE=5e-3, NEW_USER_RATE=5e-3, NEW_USER_EPOCHS=20)),
    ("VPL's code", "vpl", dict(UNITS=512, CONTEXT=8, BATCH=32, EPOCHS=2, RATE=1e-4, DECAY=1e-3,
        WARM_UP=0.03, CYCLE=10_000)),
    ("VPL's UF-P-4 script", "vpl.VPL", {"betas": 3e-6}),  # the first of them
    ("MRM's code", "mrm", dict(K=2, SCALE=1e-2, QUERY=0.9, TAIL=0.5, SHARPNESS=0.5, USERS=2,
        EPOCHS=200, WARM_UP=0.05, CLIP=1.0, EPSILON=1e-8)),
    ("MRM's PRISM script", "mrm.MRM", dict(rate=1e-3, inner_rate=1e-3)),
    ("PReF's code", "pref", dict(NORM_PENALTY=0.02, STEPS=500, BATCH=64, RATE=1e-3, USER_STEPS=1000,
        USER_RATE=1e-2)),
    ("PReF's code", "pref.PReF", dict(rank=5)),
    ("RBD's code, as tuned", "rbd", dict(POPULATION=1e-2, DEVIATION=10.0, RATE=1e-4, STEPS=3000,
        PATIENCE=100, LEAST=1e-5, START=1e-3, USER_RATE=1e-2, USER_STEPS=1000, USER_PATIENCE=50)),
    ("RBD's code, as tuned", "rbd.RBD", dict(rank=8)),
]  # fmt: skip
TABLE = [
    pytest.param(where, setting, value, source, id=f"{where}:{setting}")
    for source, places, settings in PUBLISHED
    for where in places.split()
    for setting, value in settings.items()
]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments' defaults."""
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def default_of(where: str, setting: str) -> Any:
    """The value that a run without flags or arguments has."""
    if where.endswith(".py"):
        found = defaults(worlds.script(where).main)
        for group in [found[name] for name in ("lore", "sweep") if name in found]:
            found |= dataclasses.asdict(group)
        return found[setting]
    name, _, inside = where.partition(".")
    if name == "utils" and inside:
        given = {}
        if inside == "run_regularized":  # hands its arguments on
            with mock.patch.object(utils, "run") as run:
                utils.run_regularized()
            inside, given = "run", run.call_args.kwargs
        return (defaults(getattr(utils, inside)) | given)[setting]
    module = utils if name == "utils" else importlib.import_module(f"lore.methods.{name}")
    found = getattr(getattr(module, inside)() if inside else module, setting)
    return found[0] if setting == "betas" else found


@pytest.mark.parametrize(("where", "setting", "value", "source"), TABLE)
def test_a_published_setting_is_the_default(where: str, setting: str, value: Any, source: str):
    assert default_of(where, setting) == value, f"{source} has {value}"


@pytest.mark.parametrize(("estimator", "rate"), [("lore", 0.1), ("lore_regularized", 0.5)])
def test_new_users_are_fitted_at_the_published_rate(estimator: str, rate: float):
    lore = worlds.script("PRISM/train_basis.py").Lore(estimator=estimator)
    assert lore.few_shot()["learning_rate"] == rate  # public utils.py: run, run_regularized
