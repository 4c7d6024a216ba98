"""The learning core against the plain reference, properties and bad input."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reference
import utils
from lore.common.files import InputError
from lore.learning import comparisons
from lore.learning.comparisons import Comparisons, DenseFeatures, RowFeatures
from planted import prefer

ROOT = Path(__file__).resolve().parents[2]


def users(counts, F=12, seed=0, dtype=torch.float64, scale=30.0):
    """Random comparisons: as many users as counts, one list entry each."""
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(m, F, generator=g, dtype=dtype) for m in counts]


COUNTS = [3, 1, 7, 4, 9, 2]
REFERENCE = users([1], seed=5)[0][0]


def model(K, steps, estimator=utils.LoRe, alpha=0.0, seed=1, **more):
    """A model of the users above, in double precision unless said otherwise."""
    dtype = more.setdefault("dtype", torch.float64)
    pull = REFERENCE.to(dtype) if alpha else None
    return estimator(pull, alpha, 6, 12, K, steps, 0.5, generator=seed, **more)


def close(actual, expected, tolerance=1e-9):
    """One tensor or several, within a share of their length."""
    if not isinstance(actual, torch.Tensor):
        for one, other in zip(actual, expected, strict=True):
            close(one, other, tolerance)
        return
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert torch.isfinite(actual).all()
    assert torch.linalg.norm(actual - expected) <= tolerance * torch.linalg.norm(expected)


# ------------------------------------------------------------------- Trajectories

PRECISION = [
    (torch.float64, 1e-9), pytest.param(torch.float32, 1e-3, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.fixture(params=["all in one block", "a few users a block"])
def blocks(request, monkeypatch):
    """How many users' features are worked on at a time."""
    if request.param != "all in one block":
        monkeypatch.setattr(comparisons, "PART_BYTES", 12 * 4 * 12)  # 12 rows
        assert len(list(Comparisons.from_list(users(COUNTS)).parts(2))) > 2


def weights_of(X):
    """Weights of the comparisons."""
    g = torch.Generator().manual_seed(0)
    return [torch.rand(len(x), generator=g, dtype=x.dtype) + 0.1 for x in X]


JOINT, ALTERNATING = utils.LoRe, utils.LoRe_regularized


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize(("estimator", "alpha", "K", "shrinkage", "weigh"), [
    (JOINT, 0.0, 3, 0.0, None), (JOINT, 0.02, 3, 0.0, None), (JOINT, 0.0, 1, 0.0, None),
    (JOINT, 0.0, 3, 2.5, None), (JOINT, 0.0, 3, 0.0, weights_of), (ALTERNATING, 0.0, 4, 0.0, None),
    (ALTERNATING, 100.0, 4, 0.0, None), (ALTERNATING, 10.0, 4, 0.0, weights_of),
])  # fmt: skip
def test_training_follows_the_reference(estimator, alpha, K, shrinkage, weigh, dtype, tolerance):
    X = users(COUNTS, dtype=dtype)
    c, fit = weigh and weigh(X), model(K, 25, estimator, alpha, dtype=dtype, shrinkage=shrinkage)
    given = X, fit.W0, fit.V0, 25, 0.5, REFERENCE.to(dtype), alpha, c
    joint = estimator is JOINT
    found = reference.joint(*given, shrinkage) if joint else reference.alternating(*given)
    W, V, losses = found[0].softmax(1), *found[1:]
    kept = (W.amax(0) >= 1e-2) | joint
    close(fit.train(X, c), (W[:, kept], V[:, kept]), tolerance)
    if not shrinkage:
        close(fit.losses, losses, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize(("weigh", "shrinkage"), [(None, 0), (weights_of, 0), (None, 2.5)])
def test_few_shot_follows_the_reference(weigh, shrinkage, dtype, tolerance):
    X = users(COUNTS, dtype=dtype)
    V, c = users([12], F=3, seed=3, dtype=dtype, scale=1.0)[0], weigh and weigh(X)
    pull = {"population": torch.tensor([0.5, 0.3, 0.2], dtype=dtype), "shrinkage": shrinkage}
    fit = utils.PersonalizeBatch(len(X), 12, 3, 30, 0.1, generator=2, dtype=dtype, **pull)
    expected = reference.few_shot(X, V, fit.logits, 30, 0.1, c, **pull)
    close(fit.train(X, V, c), expected, tolerance)


LBFGS = functools.partial(torch.optim.LBFGS, lr=0.5)


@pytest.mark.slow
@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("estimator", [JOINT, ALTERNATING])
@pytest.mark.parametrize(("optimizer", "steps"), [(None, 40), (LBFGS, 5)])
def test_models_trained_side_by_side_follow_their_own_trajectories(estimator, optimizer, steps):
    cases = [(1, 0.0, 0.0), (3, 0.1, 0.0), (2, 0.0, 3.0), (5, 0.1, 1.0)][: 4 if steps > 5 else 2]
    together, alone = (
        [model(K, steps, estimator, a, K, shrinkage=s, optimizer=optimizer) for K, a, s in cases]
        for _ in range(2)
    )
    results = utils.train_together(together, Comparisons.from_list(users(COUNTS)))
    for found, one, other in zip(results, together, alone, strict=True):
        close(found, other.train(users(COUNTS)))
        close(one.losses, other.losses)


def test_float32_arithmetic_on_any_float_input_and_views_are_not_copied():
    whole = torch.cat(users(COUNTS, dtype=torch.float32))
    views = list(whole.split(COUNTS))
    assert Comparisons.from_list(views).features.x.data_ptr() == whole.data_ptr()
    assert torch.equal(Comparisons.from_list(views[::-1]).features.x, torch.cat(views[::-1]))
    expected = model(2, 30, dtype=torch.float32).train([x.clone() for x in views])[1]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.float16, 1e-2),
                             (torch.bfloat16, 5e-2)):  # fmt: skip
        V = model(2, 30, dtype=torch.float32).train([x.to(dtype) for x in views])[1]
        assert V.dtype == torch.float32
        close(V, expected, tolerance)


def test_streamed_features_equal_dense_ones(monkeypatch):
    table = torch.randn(40, 12, dtype=torch.float64) * 20
    g = torch.Generator().manual_seed(3)
    chosen, rejected = (torch.randint(40, (26,), generator=g) for _ in range(2))
    stream = RowFeatures(lambda index: table[index], 12, chosen, rejected)
    X = list((table[chosen] - table[rejected]).split(COUNTS))
    monkeypatch.setitem(comparisons.CHUNK_BYTES, "cpu", 12 * 4 * 7)  # seven rows at a time
    torch.testing.assert_close(stream.dense(torch.float64).x, torch.cat(X))
    streamed = utils.train_together([model(3, 50)], Comparisons(stream, COUNTS))[0]
    close(streamed, model(3, 50).train(X))


@pytest.mark.parametrize(("rows", "kind"), [(9, RowFeatures), (200, DenseFeatures)])
def test_what_is_held_in_memory_is_read_once(rows, kind):
    g = torch.Generator().manual_seed(3)
    table, read = torch.randn(rows, 12, generator=g), []
    chosen, rejected = (torch.randint(rows, (26,), generator=g) for _ in range(2))
    stream = RowFeatures(lambda index: read.append(index) or table[index], 12, chosen, rejected)
    held, x = stream.held(), table[chosen] - table[rejected]
    V, G = torch.randn(12, 2, generator=g), torch.randn(26, 2, generator=g)
    read.clear()
    assert isinstance(held, kind)
    torch.testing.assert_close(held.project(V), x @ V)
    torch.testing.assert_close(held.select(torch.arange(3, 9)).project(V), x[3:9] @ V)
    torch.testing.assert_close(held.backproject(G), x.T @ G)
    assert not read


@pytest.mark.parametrize("optimizer", [
    torch.optim.AdamW, functools.partial(torch.optim.SGD, lr=20.0, momentum=0.9),
    functools.partial(torch.optim.LBFGS, lr=0.5, max_iter=4),
])  # fmt: skip
@pytest.mark.parametrize("estimator", [JOINT, ALTERNATING])
def test_other_optimisers_lower_the_loss(optimizer, estimator):
    X = users(COUNTS, dtype=torch.float32)
    fit = estimator(None, 0, 6, 12, 2, 60, 0.1, generator=0, optimizer=optimizer)
    assert torch.isfinite(fit.train(X)[1]).all()
    assert fit.losses[-1] < 0.9 * fit.losses[0]


@pytest.mark.slow
def test_what_is_planted_is_recovered_as_comparisons_grow_also_for_new_users():
    """120 users' m comparisons each are ordered by V* w* with logistic noise."""
    angles = []
    for m in (10, 60, 360):
        g = torch.Generator().manual_seed(0)
        V = torch.linalg.qr(torch.randn(16, 3, generator=g))[0] * 4
        W = utils.generate_population([0.3] * 3, 120, g)
        X = torch.randn(120, m, 16, generator=g)
        X = list(prefer((X @ V @ W[:, :, None])[..., 0], X, -X, g)[0])
        learned = utils.solve_regularized(None, 0, X[:80], 3, 600, 0.5, generator=0)[1]
        cosines = torch.linalg.svdvals(torch.linalg.qr(learned)[0].T @ torch.linalg.qr(V)[0])
        angles.append(float(cosines.clamp(max=1).acos().max()))  # the largest principal angle
    assert angles[0] > angles[1] > angles[2]
    assert angles[2] < 0.35
    alone = utils.learn_single_reward(X[:80], 600, generator=0)
    few, test = zip(*(x.split(m // 2) for x in X[80:]), strict=True)
    fitted = utils.learn_multiple_few_shot(few, learned, 500, 0.1, generator=1)
    ours = utils.eval_multiple(fitted, learned, test).mean()
    assert ours > utils.eval_multiple(W[80:], V, test).mean() - 0.02
    assert ours > utils.eval_multiple(torch.ones(40, 1), alone, test).mean() + 0.02


@pytest.mark.usefixtures("blocks")
def test_own_rewards_follow_each_users_plain_fit():
    X = users(COUNTS, dtype=torch.float32)
    c = [torch.arange(1.0, len(x) + 1) for x in X]
    expected = [reference.own_direction(x, w, 30, 0.5) for x, w in zip(X, c, strict=True)]
    close(utils.learn_multiple(X, 30, weights=c), expected, 1e-4)


# ---------------------------------------------------------------------- Bad input

GOOD = users([3, 4], dtype=torch.float32)
GOOD_OF_FIVE = users([3, 4], F=5)


def bad(u, row, value):
    X = [x.clone() for x in GOOD]
    X[u][row, 3] = value
    return X


ON_META = torch.ones(12, 2, device="meta")
BAD = [
    (lambda: utils.solve_regularized(None, 0, [], 1), "no users"),
    (lambda: Comparisons.from_list([]), "no users"),
    (lambda: Comparisons.from_list([GOOD[0], GOOD[1][:0]]), "user 1 has no comparisons"),
    (lambda: Comparisons.from_list([GOOD[0], GOOD[1][:, :5]]), "user 1: 5 features"),
    (lambda: Comparisons.from_list(bad(1, 2, math.nan)), "user 1, row 2: NaN"),
    (lambda: Comparisons.from_list(bad(0, 1, math.inf)), "user 0, row 1: NaN or inf"),
    (lambda: Comparisons.from_list(GOOD, [torch.ones(3), torch.ones(2)]), "2 weights"),
    (lambda: utils.LoRe(torch.ones(5), 1, 2, 12, 2), r"reference has shape \(5,\)"),
    (lambda: utils.LoRe(torch.ones(12, 2), 1, 2, 12, 2), r"reference has shape \(12, 2\)"),
    (lambda: utils.LoRe(None, 1, 2, 12, 2), "there is none"),
    (lambda: utils.LoRe(None, 0, 2, 12, -1), "ranks start at 0"),
    (lambda: utils.LoRe(None, 0, 3, 12, 2).train(GOOD), "2 users given, the model expects 3"),
    (lambda: utils.LoRe(None, 0, 2, 11, 2).train(GOOD), "12 wide, the model expects 11"),
    (lambda: utils.sample_shots(GOOD, 0), "at least 1"),
    (lambda: utils.generate_population(0.0, 3), "must be positive"),
    (lambda: utils.evaluate_model(GOOD[0], torch.ones(5, 2), torch.ones(2)), "basis has shape"),
    (lambda: utils.evaluate_model(GOOD[0], ON_META, torch.ones(2)), "move them to one device"),
    (lambda: utils.run([0], [0], None, *[GOOD] * 4, 2, 2, progress=False), "there is none"),
    (lambda: utils.run([1], [0], None, *[GOOD] * 4, 3, 2), "2 users' features given where 3"),
    (lambda: utils.run([1], [0], None, *[GOOD] * 3, GOOD_OF_FIVE, 2, 2), r"of \[5, 12\] features"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.slow
def test_importing_the_module_draws_nothing_and_picks_no_device():
    code = """import torch; before = torch.get_rng_state(); import utils
assert torch.equal(before, torch.get_rng_state()) and not torch.cuda.is_initialized()"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
