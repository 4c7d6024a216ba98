"""``make gpu``, at tiny sizes on a CPU."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gpu
import gpu_checks
import gpu_speed
from lore.common.files import InputError
from lore.embeddings import prefix_trees as passes
from lore.embeddings import reward_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_part_runs_and_is_saved(tmp_path, capsys):
    page = gpu.ROOT / "docs" / "gpu.md"
    before = page.read_bytes() if page.exists() else None
    gpu.main(device="cpu", tiny=True, seconds=3600, out=tmp_path, page_file=tmp_path / "page.md")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["name"] for part in report["parts"]] == list(gpu.PARTS)
    assert all(part["rows"] and not part["ended"] for part in report["parts"])
    checks = [row for part in report["parts"] for row in part["rows"] if "deviation" in row]
    assert all(row["met"] == "yes" for row in checks if "share" not in row)
    assert not any("fell back" in row.get("note", "") for row in checks)
    text, printed = (tmp_path / "page.md").read_text(), capsys.readouterr().out
    for part in report["parts"]:
        assert f"## {part['title']}" in text and part["title"] in printed
        assert all(row["case"] in text and row["case"] in printed for row in part["rows"])
    assert (page.read_bytes() if page.exists() else None) == before


@pytest.mark.slow
def test_a_wrong_row_misses_its_aim(monkeypatch):
    right = passes.tree_mask
    monkeypatch.setattr(
        reward_model, "tree_mask", lambda ends, dtype: right(0 * ends + len(ends), dtype)
    )
    monkeypatch.setattr(reward_model.Engine, "_check", lambda *_: None)
    monkeypatch.setattr(gpu_checks, "WAYS", {"tree": ("tree", False)})
    assert [row["met"] for row in gpu_checks.rows("cpu", True)] == ["no", "no"]
    assert gpu_checks.line("nothing", float("nan"), 1.0)["met"] == "no"


def _slow(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    yield {"case": "quick"}
    for _ in range(3000):
        with contextlib.suppress(Exception):  # a fallback that must not swallow the limit
            time.sleep(0.01)
    yield {"case": "never"}


def _broken(device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    yield {"case": "before"}
    raise RuntimeError("broken\nkernel")


@pytest.mark.slow
def test_what_stops_a_part_loses_the_rest_of_it_alone(tmp_path, monkeypatch):
    slow, kept = gpu.Part("Slow", _slow, 60), []
    ended = gpu.carry_out(slow, "cpu", False, 0.3, kept.append)
    assert kept == [{"case": "quick"}] and ended.startswith("stopped after")
    assert gpu.carry_out(slow, "cpu", False, -1, kept.append).startswith("left out")
    monkeypatch.setattr(gpu, "PARTS", {"bad": gpu.Part("Bad", _broken, 9)})
    with pytest.raises(SystemExit):
        gpu.main(device="cpu", parts=("bad",), tiny=True, out=tmp_path)
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert part["rows"] == [{"case": "before"}]
    assert part["ended"] == "failed: RuntimeError: broken"


def test_the_limits_of_all_parts_are_under_nine_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) < 540


@pytest.mark.parametrize(
    ("given", "says"), [({}, "--tiny"), ({"tiny": True, "parts": ("speeed",)}, "--parts speeed")]
)
def test_full_sizes_take_a_gpu_and_parts_have_names(tmp_path, given, says):
    with pytest.raises(InputError, match=says):
        gpu.main(device="cpu", out=tmp_path, **given)


def test_operations_are_those_of_the_weights():
    sizes = {**gpu_speed.TINY, "intermediate_size": 128}
    engine = gpu_checks.random_engine("Llama", torch.float32, "cpu", 100, **sizes)
    row = gpu_speed._row("case", engine, 2.0, 8.0, 600, 200, 1e9)
    # a layer: queries and outputs 64 x 64, keys and values 64 x 32, three of 64 x 128, two norms
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)
    assert row["MFU"] == f"{2 * weights * 200 / 2 / 1e9:.1%}"
    assert (row["times"], row["token bound"], row["share"]) == ("4.00", "3.00", "1.33")
