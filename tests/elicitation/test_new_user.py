"""A new user of a small run's mixed logit: every tool gives what the equations give."""

import io
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import without_plots
from safetensors.numpy import load_file
from scipy.optimize import minimize
from scipy.special import expit
from test_own_data import QUICK, WORDS, choices

import people
import running
from lore.embeddings import store as embeddings
from lore.experiments import splits
from made_bases import write_lines

pytestmark = pytest.mark.slow

SHOTS = (0, 1, 3)


class Run(NamedTuple):
    """A run's mixed logit, and what the equations need of it."""

    folder: Path
    model: Path
    file: Path
    mu: np.ndarray  # [F]
    directions: np.ndarray  # [F, D]
    S: np.ndarray  # [D, D]

    def embedded(self, rows: Sequence[tuple[str, str]]) -> np.ndarray:
        """Embeddings [n, F] of responses to prompts."""
        talks = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
            for prompt, text in rows
        ]
        folder = self.folder / f"rows{len(list(self.folder.glob('rows*')))}"
        store = embeddings.embed(talks, folder, model=str(self.model), progress=False)
        return store.rows(torch.arange(len(talks))).double().numpy()

    def mode(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The deviation [D] that is most probable after choices x [n, F], and its covariance."""
        a, Z, inverse = x @ self.mu, x @ self.directions, np.linalg.inv(self.S)

        def value(d: np.ndarray) -> tuple[float, np.ndarray]:
            t = a + Z @ d
            slope = inverse @ d - Z.T @ expit(-t)
            return np.logaddexp(0, -t).sum() + d @ inverse @ d / 2, slope

        d = minimize(value, np.zeros(len(self.S)), jac=True, tol=1e-12).x
        p = expit(a + Z @ d)
        return d, np.linalg.inv(inverse + Z.T @ ((p * (1 - p))[:, None] * Z))

    def rewards(self, e: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Log odds of embeddings [n, F]."""
        return e @ (self.mu + self.directions @ d)

    def next(self, x: np.ndarray, earlier: Sequence[int], signs: Sequence[float]) -> int:
        """The D-optimal question of a pool x [n, F] after answers of these signs."""
        d, cov = self.mode(np.array(signs)[:, None] * x[list(earlier)])
        p, Z = expit(self.rewards(x, d)), x @ self.directions
        gain = p * (1 - p) * ((Z @ cov) * Z).sum(1)
        gain[list(earlier)] = -1
        return int(gain.argmax())


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """train_basis.py and vary_fewshot.py --ask on thirty people's rows."""
    folder = tmp_path_factory.mktemp("run")
    given = {"source": choices(folder / "rows.jsonl"), "out": folder / "data", "model": model}
    done = running.invoke("OwnData/prepare.py", {**given, "progress": "false"})
    assert done.status == 0, done.err
    given = {"data": folder / "data", "results": folder, "methods": "mixed_logit", **QUICK}
    shots = {"shots": list(SHOTS), "trials": 1, "ask": "d_optimal"}
    with without_plots():
        for script, more in (("train_basis", {}), ("vary_fewshot", shots)):
            done = running.invoke(f"OwnData/{script}.py", {**given, "name": script, **more})
            assert done.status == 0, done.err
    [file] = (folder / "OwnData" / "train_basis").glob("mixed_logit*.safetensors")
    tensors = {name: x.astype(float) for name, x in load_file(file).items()}
    S = tensors["covariance"]
    return Run(folder, model, file, tensors["mu"], tensors["directions"], S)


def texts(seed: int, count: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size)) for size in draw.integers(3, 18, count)]


CANDIDATES = texts(1, 6)
POOL = texts(2, 24)


def candidates(folder: Path) -> Path:
    rows = [{"prompt": "Tell me", "response": text} for text in CANDIDATES]
    return write_lines(folder / "candidates.jsonl", rows)


def same_ranking(run: Run, found: dict[str, Any], x: np.ndarray) -> None:
    """A saved ranking has the rewards, deviations and probabilities after choices x [n, F]."""
    d, cov = run.mode(x)
    e = run.embedded([("Tell me", text) for text in CANDIDATES])
    rewards, Z = run.rewards(e, d), (e - e.mean(0)) @ run.directions
    deviations = np.sqrt(((Z @ cov) * Z).sum(1))
    order = rewards.argsort()[::-1]
    assert [row["response"] for row in found["ranking"]] == [CANDIDATES[i] for i in order]
    given = {"rel": 1e-3, "abs": 1e-4}
    for name, wanted in (("reward", rewards), ("deviation", deviations)):
        assert [r[name] for r in found["ranking"]] == pytest.approx(wanted[order].tolist(), **given)
    ahead = expit(-np.diff(rewards[order]))
    p = [row["p_over_next"] for row in found["ranking"][:-1]]
    assert p == pytest.approx(ahead.tolist(), **given)


def test_rank_responses_gives_the_mode_of_the_users_deviation(run, tmp_path):
    chosen, rejected = texts(3, 5), texts(4, 5)
    rows = [{"prompt": "Why?", "chosen": a, "rejected": b}
            for a, b in zip(chosen, rejected, strict=True)]  # fmt: skip
    given = {"basis": run.file, "choices": write_lines(tmp_path / "ann.jsonl", rows),
             "candidates": candidates(tmp_path), "progress": "false"}  # fmt: skip
    done = running.invoke("tools/rank_responses.py", {**given, "save": tmp_path / "found.json"})
    assert done.status == 0, done.err
    e = run.embedded([("Why?", text) for text in chosen + rejected])
    x = e[:5] - e[5:]
    found = json.loads((tmp_path / "found.json").read_text())
    same_ranking(run, found, x)
    odds = []
    for i in range(5):
        others = np.delete(x, i, 0)
        odds.append(float(run.rewards(x[i], run.mode(others)[0])))
    assert f"{sum(o > 0 for o in odds)} of 5 choices" in done.out
    loss = float(re.search(r"log loss ([\d.]+)", done.out)[1])
    assert loss == pytest.approx(np.logaddexp(0, -np.array(odds)).mean(), abs=1e-3)
    assert len(found["tastes"]) == len(found["standard_deviations"]) == 8


def questions(folder: Path) -> Path:
    rows = [{"prompt": f"Q{i}", "responses": sorted(POOL[2 * i : 2 * i + 2])} for i in range(12)]
    return write_lines(folder / "pool.jsonl", rows)


def asked_as_planned(run: Run, folder: Path) -> None:
    """The questions were the D-optimal ones given the answers; the profile is that after all."""
    pairs = [(f"Q{i}", *sorted(POOL[2 * i : 2 * i + 2])) for i in range(12)]
    e = run.embedded([(q, text) for q, *both in pairs for text in both])
    x = e[::2] - e[1::2]
    answers = [json.loads(line) for line in (folder / "ann.jsonl").read_text().splitlines()]
    earlier, signs = [], []
    for row in answers:
        place = run.next(x, earlier, signs)
        assert row["prompt"] == pairs[place][0]
        earlier.append(place)
        signs.append(1.0 if row["chosen"] == pairs[place][1] else -1.0)
    assert len(answers) == 4
    chosen = np.array(signs)[:, None] * x[earlier]
    profile = json.loads((folder / "ann.profile.json").read_text())
    assert profile["weights"] == pytest.approx(run.mode(chosen)[0].tolist(), rel=1e-3, abs=1e-4)
    same_ranking(run, profile, chosen)


def flags(run: Run, folder: Path) -> dict[str, Any]:
    return {
        "basis": run.file, "pool": questions(folder), "candidates": candidates(folder),
        "answers": folder / "ann.jsonl", "user": "ann", "tolerance": 0, "most": 4,
        "progress": "false",
    }  # fmt: skip


def test_ask_in_the_terminal_puts_the_d_optimal_questions(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nb\na\n\n"))
    done = running.invoke("tools/ask.py", flags(run, tmp_path))
    assert done.status == 0, done.err
    asked_as_planned(run, tmp_path)


def test_ask_on_the_page_puts_the_d_optimal_questions(run, tmp_path):
    process = running.start("tools/ask.py", {**flags(run, tmp_path), "page": "true"})
    try:
        said = iter(process.stderr.readline, "")
        url = next(line.split()[1] for line in said if line.startswith("open http"))
        page = urllib.request.urlopen(url, timeout=60).read().decode()
        for word in ("b", "a", "a", "b", "quit"):
            key = re.search('name="question" value="(.*?)"', page)[1]
            form = urllib.parse.urlencode({"do": word, "question": key}).encode()
            page = urllib.request.urlopen(url, form, timeout=60).read().decode()
        assert "You may close this page" in page and "Tastes:" in page
        assert process.wait(60) == 0
    finally:
        process.kill()
    asked_as_planned(run, tmp_path)


def test_vary_fewshot_asks_the_d_optimal_questions(run):
    tasks = splits.given_split(run.folder / "data", "OwnData")
    task = tasks.task(0, torch.device("cpu"), None, False, (0, 1))
    x, test = (data.in_memory().features.x.double().numpy() for data in (task.few, task.unseen))
    losses: dict[int, list[float]] = {size: [] for size in SHOTS}
    for u in range(task.few.num_users):
        own = x[(task.few.user == u).numpy()]
        order: list[int] = []
        for number in range(max(SHOTS) + 1):
            if number in SHOTS:
                d, _ = run.mode(own[order])
                t = run.rewards(test[(task.unseen.user == u).numpy()], d)
                losses[number].append(np.logaddexp(0, -t).mean())
            order.append(run.next(own, order, np.ones(number)))
    records = people.records(run.folder / "OwnData" / "vary_fewshot")
    for size in SHOTS:
        found = records["Mixed logit, shots by d_optimal", "", "unseen", size]["log_loss"]
        assert found == pytest.approx(losses[size], abs=2e-4)
    assert np.mean(losses[3]) < np.mean(losses[0])
