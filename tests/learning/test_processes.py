"""Several processes do what one does, by the scripts as a user runs them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import approx

import running
from lore.learning.basis import load_basis
from people import records, repeats
from running import table

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_plots")]
# Not --run, which torchrun takes for an option of its own.
QUICK = {"iterations": 40, "few_shot_iterations": 40, "progress": "false", "name": "here",
         "methods": ["lore", "mixed_logit"], "select_rank": "true", "ranks": [2, 3]}  # fmt: skip
SMALL = {"users": 7, "unseen_users": 5, "pairs_per_user": 12, "few_shot_pairs": 5,
         "mixed_logit.floor": 0.1, "mixed_logit.l_mu": 1, "mixed_logit.tau2": 1,
         "mixed_logit.pi": 10}  # fmt: skip


def assert_same(a: Path, b: Path) -> None:
    """Two runs with the same results but for rounding, which LoRe's steps enlarge."""
    for one, other in zip(repeats(a), repeats(b), strict=True):
        assert one["users"] == other["users"] and one["comparisons"] == other["comparisons"]
        assert list(one["methods"]) == list(other["methods"])
        for name in {"ridge_bt", "mixed_logit"} & set(one["methods"]):
            (fit,) = one["methods"][name]["fits"]
            assert fit["personal"] or len(fit["tried"]) > 5
            text = json.dumps([fit])
            near = json.loads(text, parse_float=lambda x: approx(float(x), rel=1e-4, abs=2e-5))
            assert other["methods"][name]["fits"] == near
    found, expected = records(a), records(b)
    assert list(found) == list(expected)
    for row, record in found.items():
        for key in ("accuracy", "log_loss"):
            pair = record[key], expected[row][key]
            assert abs(np.subtract(*map(np.mean, pair))) < 0.02, (row, key)
            if row[0] in ("Ridge BT", "Mixed logit"):
                np.testing.assert_allclose(*pair, atol=2e-5, err_msg=str(row))
    for rank in range(4):
        bases = [load_basis(f / f"basis-K0{rank}.safetensors") for f in (a, b)]
        for name in ("V", "W", "W_unseen"):
            x, y = (getattr(basis, name) for basis in bases)
            assert torch.linalg.norm(x - y) <= 1e-3 * torch.linalg.norm(x), (rank, name)


@pytest.mark.parametrize(
    ("name", "processes", "more"), [("PRISM", 3, {"stream": "true"}), ("PersonalLLM", 2, SMALL)]
)
def test_processes_and_streams_do_what_one_process_does_in_memory(
    dataset, tmp_path, name: str, processes: int, more: dict[str, Any]
):
    settings = {"data": dataset(name).data, **QUICK, **more}
    here = settings | {"stream": "false", "results": tmp_path / "one"}
    one = running.invoke(f"{name}/train_basis.py", here)
    assert one.status == 0, one.err
    settings["results"] = tmp_path / "more"
    several = running.run(f"{name}/train_basis.py", settings, processes)
    assert several.status == 0, several.err
    folders = [tmp_path / part / name / "here" for part in ("one", "more")]
    assert_same(*folders)
    assert list(table(one.out)) == list(table(several.out))
    assert several.out.count("Verdict:") == 1
