"""Other people's models and texts: those that cannot be used end in one line that says why."""

import runpy
from pathlib import Path

import pytest

import running

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
here = pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
pytestmark = [pytest.mark.slow, here]
QUICK = {"progress": "false", "iterations": 30, "ranks": 2, "methods": "ridge_bt"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small reward models, whole and damaged, a folder each."""
    folder, patch = tmp_path_factory.mktemp("models"), pytest.MonkeyPatch()
    patch.setattr("sys.argv", ["make_models.py", str(folder)])
    runpy.run_path(str(CASES / "make_models.py"))
    patch.undo()
    return folder


def prepared(case: str, model: Path, out: Path, **more: object) -> running.Outcome:
    """What OwnData/prepare.py says of a file with a model."""
    flags = {"source": CASES / case, "model": model, "out": out, "progress": "false", **more}
    return running.invoke("OwnData/prepare.py", flags)


def train(folder: Path) -> running.Outcome:
    """What train_basis.py says of the prepared folder."""
    flags = {"data": folder / "out", "results": folder, "name": "run", **QUICK}
    return running.invoke("OwnData/train_basis.py", flags)


USED = {
    "C25-gemma2": "eager", "C28-roberta": "no reference", "C30-value-head": "no reference",
    "C31-two-outputs": "2 outputs", "P1-pad-is-eos": "", "P2-sliding-window": "",
    "P3-language-model": "no reference",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "says"),
    [("C26-small-vocabulary", "the model knows 120 tokens only"),
     ("C29-nan", "embeddings that are not finite"), ("missing", "there is no such folder")],
)  # fmt: skip
def test_a_model_that_cannot_be_used_is_one_line(tiny, tmp_path, name, says):
    done = prepared("small.jsonl", tiny / name, tmp_path / "out")
    last = done.err.strip().splitlines()[-1]
    assert done.status == 2 and last.startswith("error: ") and says in last, done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", USED)
def test_other_models_are_used_and_what_they_lack_is_said(tiny, tmp_path, caplog, name):
    done = prepared("small.jsonl", tiny / name, tmp_path / "out")
    assert done.status == 0 and USED[name] in caplog.text, done.err


@pytest.mark.parametrize(
    ("case", "model", "more"),
    [("C22-same-tail.jsonl", "llama", {"max_length": 250}),
     ("small.jsonl", "C24-template-of-users-only", {})],
)  # fmt: skip
def test_texts_that_a_model_cannot_tell_apart_leave_nothing(tiny, tmp_path, case, model, more):
    assert prepared(case, tiny / model, tmp_path / "out", **more).status == 0
    done = train(tmp_path)
    assert done.status == 2 and "no comparisons are left" in done.err, done.err
    assert "--max_length" in done.err and "chat template" in done.err


def test_those_among_others_are_left_out_and_counted(tiny, tmp_path, caplog):
    made = prepared("C23-third-same-tail.jsonl", tiny / "llama", tmp_path / "out", max_length=250)
    assert made.status == 0, made.err
    done = train(tmp_path)
    assert done.status == 0 and "left out 24 of 72 comparisons" in caplog.text, done.err
    table = (tmp_path / "OwnData" / "run" / "table.md").read_text("utf-8")
    assert "24 comparisons are left out: the model sees the same tokens on both sides." in table
