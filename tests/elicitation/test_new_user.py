"""A new user of a small run's mixed logit is asked and learned from as the equations say."""

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import without_plots
from safetensors.numpy import load_file
from scipy.optimize import minimize
from scipy.special import expit
from test_own_data import WORDS, carried_out, choices

import people
import running
from lore.experiments import splits
from made_bases import embed, write_lines

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
        talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                 for prompt, text in rows]  # fmt: skip
        return embed(self.model, Path(tempfile.mkdtemp(dir=self.folder)), talks).double().numpy()

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
    fit = {"methods": "mixed_logit"}
    shots = {**fit, "shots": list(SHOTS), "trials": 1, "ask": "d_optimal"}
    with without_plots():
        rows = choices(folder / "rows.jsonl")
        carried_out(rows, model, folder, train_basis=fit, vary_fewshot=shots)
    [file] = (folder / "OwnData" / "fit").glob("mixed_logit*.safetensors")
    read = (load_file(file)[name].astype(float) for name in ("mu", "directions", "covariance"))
    drafts = [{"prompt": "Tell me", "response": text} for text in CANDIDATES]
    write_lines(folder / "candidates.jsonl", drafts)
    return Run(folder, model, file, *read)


DRAW = np.random.default_rng(2)
TEXTS = [" ".join(DRAW.choice(WORDS, size)) for size in DRAW.integers(3, 18, 30)]
POOL = [(f"Q{i}", sorted(TEXTS[2 * i : 2 * i + 2])) for i in range(12)]
CANDIDATES = TEXTS[24:]


def same(run: Run, found: dict[str, Any], x: np.ndarray) -> None:
    """What is saved are tastes, rewards, deviations and probabilities after choices x [n, F]."""
    d, cov = run.mode(x)
    spread = run.directions @ np.linalg.cholesky(run.S)
    axes, sizes, _ = np.linalg.svd(spread, full_matrices=False)
    along = (axes.T @ run.directions / sizes[:, None])[:8]  # standardised, whichever their signs
    e = run.embedded([("Tell me", text) for text in CANDIDATES])
    rewards, within = run.rewards(e, d), (e - e.mean(0)) @ run.directions
    sds, own = (np.sqrt(((Z @ cov) * Z).sum(1)) for Z in (along, within))
    for name, values in (("tastes", along @ d), ("standard_deviations", sds)):
        np.testing.assert_allclose(np.abs(found[name]), np.abs(values), 0.01, 0.05, err_msg=name)
    order, ranking = rewards.argsort()[::-1], pd.DataFrame(found["ranking"])
    assert ranking["response"].tolist() == [CANDIDATES[i] for i in order]
    wanted = {"reward": rewards[order], "deviation": own[order],
              "p_over_next": [*expit(-np.diff(rewards[order])), np.nan]}  # fmt: skip
    for name, values in wanted.items():
        np.testing.assert_allclose(ranking[name].astype(float), values, 1e-3, 1e-4, err_msg=name)


def test_ask_puts_the_d_optimal_questions(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nb\na\n\n"))
    pool = [{"prompt": prompt, "responses": both} for prompt, both in POOL]
    done = running.invoke("tools/ask.py", {
        "basis": run.file, "pool": write_lines(tmp_path / "pool.jsonl", pool), "user": "ann",
        "candidates": run.folder / "candidates.jsonl", "answers": tmp_path / "ann.jsonl",
        "tolerance": 0, "most": 4, "progress": "false",
    })  # fmt: skip
    assert done.status == 0 and "tastes: " in done.out and " sd " in done.out, done.err
    e = run.embedded([(prompt, text) for prompt, both in POOL for text in both])
    x, earlier, signs = e[::2] - e[1::2], [], []
    answers = [json.loads(line) for line in (tmp_path / "ann.jsonl").read_text().splitlines()]
    for row in answers:
        place = run.next(x, earlier, signs)
        prompt, (first, _) = POOL[place]
        assert row["prompt"] == prompt
        earlier.append(place)
        signs.append(1.0 if row["chosen"] == first else -1.0)
    assert len(answers) == 4
    chosen = np.array(signs)[:, None] * x[earlier]
    profile = json.loads((tmp_path / "ann.profile.json").read_text())
    assert profile["weights"] == pytest.approx(run.mode(chosen)[0].tolist(), rel=1e-3, abs=1e-4)
    same(run, profile, chosen)


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
    records = people.records(run.folder / "OwnData" / "shots")
    for size in SHOTS:
        found = records["Mixed logit, shots by d_optimal", "", "unseen", size]["log_loss"]
        assert found == pytest.approx(losses[size], abs=2e-4)
    assert np.mean(losses[3]) < np.mean(losses[0])
