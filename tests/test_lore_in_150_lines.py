"""docs/lore_in_150_lines.py gives what the scripts give."""

from pathlib import Path

import numpy as np
import pytest
import torch

import running
import worlds
from lore.experiments.judging import judge
from lore.experiments.splits import given_split
from lore.methods.lore import Lore
from lore.methods.mixed_logit import MixedLogit
from lore.methods.ridge_bt import RidgeBT

FILE = "docs/lore_in_150_lines.py"
STRENGTHS = {"floor": 0.01, "l_mu": 0.3, "tau2": 3.0, "pi": 10.0}


def test_it_has_150_lines_and_imports_the_readers_alone():
    lines = (running.ROOT / FILE).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    ours = [line.split()[1] for line in lines if line.startswith(("from lore", "import lore"))]
    assert ours == ["lore.embeddings.store", "lore.preparing.tables"]


@pytest.mark.slow
def test_its_figures_are_those_of_the_scripts(model: Path, tmp_path: Path):
    source = running.ROOT / "OwnData" / "example.jsonl"
    flags = {"source": source, "model": model, "out": tmp_path / "data", "split": "pairs"}
    prepared = running.invoke("OwnData/prepare.py", flags)
    assert prepared.status == 0, prepared.err
    script = worlds.script(FILE)
    data = script.read(tmp_path / "data")
    found = script.fit_and_judge(data, **STRENGTHS)
    plain = script.fit_and_judge(data, **STRENGTHS | {"floor": 0})  # of plain features
    task = given_split(tmp_path / "data").task(0, torch.device("cpu"), None, False, (0, 1))
    methods = {"LoRe": Lore(), "mixed logit": MixedLogit(**STRENGTHS),
               "ridge BT": RidgeBT(strength=STRENGTHS["l_mu"])}  # fmt: skip
    for name, method in methods.items():
        for record in judge(method.fit(task), task):
            if record["control"] == "" and record["set"] in ("seen", "unseen"):
                mine = (plain if name == "ridge BT" else found)[name, record["set"]]
                theirs = [np.mean(record[measure]) for measure in ("accuracy", "log_loss")]
                assert mine == pytest.approx(theirs, abs=1e-3), (name, record["set"])
