"""Every method on a pretended second device: nothing meets a tensor of the CPU by mistake."""

import dataclasses
from typing import Any

import pytest
import torch

import elsewhere
import planted
from lore import methods
from lore.experiments import judging
from lore.learning.comparisons import draw_shots
from lore.learning.method import Task
from lore.methods import mrm, pal, pref, rbd, ridge_bt
from lore.methods.fitting import lbfgs, linear, networks

STEPS = 3  # enough for every line to run
LORE = {"ranks": (3,), "iterations": 5, "few_shot_iterations": 3}
FEW: dict[str, list[dict[str, Any]]] = {
    **{name: [quick] for name, quick in planted.QUICK.items()}, "ridge_bt": [{}],
    "lore": [LORE | {"alpha": (0.1,), "shrinkage": (1.0,), "select_rank": True},
             LORE | {"alpha": (1.0,), "estimator": "lore_regularized"}],
}  # fmt: skip
for name, few in {"pal": {"epochs": 1}, "vpl": {"epochs": 1}, "mlp": {"epochs": 1}, "mrm": {},
                  "rbd": {"rank": 2}, "pref": {}}.items():  # fmt: skip
    FEW[name].append({"setting": "faithful"} | few)


def task(device: torch.device) -> Task:
    made = planted.moved(planted.task(users=4, shots=6, held_out=3), device)
    for data in (made.train, made.few):
        data.dialogs = torch.arange(len(data)) // 2
    return dataclasses.replace(made, shots=(0, 4))


def judged(name: str, settings: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """All records of a method's fits, by both scripts' judges."""
    given, records = task(device), []
    shots = draw_shots(given.few, (0, 4), 2, 0)
    for fit in methods.METHODS[name](**settings).fit(given):
        own = fit.adapt(fit.view(given.few), given.few, 0)
        assert fit.users.device == device == own.device
        records += [*judging.evaluate(fit, given, own), *judging.sweep(fit, given, shots)]
        fit.describe()
    return records


@pytest.mark.slow
def test_the_device_refuses_what_a_gpu_refuses():
    with elsewhere.pretended() as device:
        x, here = torch.ones(3).to(device), torch.ones(3)
        for mixed in (
            lambda: x + here, lambda: here[torch.tensor([1], device=device)], lambda: x.numpy(),
            lambda: torch.rand(2, generator=torch.Generator(), device=device),
            lambda: here.index_add_(0, torch.tensor([0]), x[:1]),
        ):  # fmt: skip
            with pytest.raises(RuntimeError):
                mixed()
        assert (x + 1)[torch.tensor([0])].tolist() == [2.0]
        assert (x.cpu() + here).tolist() == [2.0, 2.0, 2.0]


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps also where no setting says how many: each operation elsewhere takes long."""
    for module in (linear, ridge_bt):
        monkeypatch.setattr(module, "minimise", lambda *a: lbfgs.minimise(*a[:-1], STEPS))
    solve, few = networks.solve_weights, {"steps": STEPS}
    monkeypatch.setattr(networks, "solve_weights", lambda *a, **k: solve(*a, **k | few))
    changes = [(peer, name, STEPS) for peer in (pref, rbd) for name in ("STEPS", "USER_STEPS")]
    changes += [(judging, name, 2) for name in ("PERMUTATIONS", "SHUFFLES")]
    for module, name, value in (*changes, (mrm, "EPOCHS", 1), (pal, "NEW_USER_EPOCHS", 1)):
        monkeypatch.setattr(module, name, value)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    ("name", "settings"), [(name, some) for name in methods.METHODS for some in FEW[name]]
)
def test_every_method_computes_where_its_comparisons_lie(name: str, settings: dict[str, Any]):
    here = judged(name, settings, torch.device("cpu"))
    with elsewhere.pretended() as device:
        there = judged(name, settings, device)
    assert [r["control"] for r in here] == [r["control"] for r in there]
    for one, other in zip(here, there, strict=True):
        assert one["log_loss"] == pytest.approx(other["log_loss"], rel=2e-2, abs=2e-2)
