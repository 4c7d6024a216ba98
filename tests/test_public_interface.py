"""What scripts written for the public code's utils.py call: names, order of results, draws."""

import itertools

import numpy as np
import pytest
import torch

import reference
import utils

F, USERS = 12, 6


@pytest.fixture
def X() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [30 * torch.randn(8, F, generator=g) for _ in range(USERS)]


def _accuracies(parts, V):
    """Users' accuracies on (comparisons, weights): [parts, U]."""
    return [[reference.accuracy(x, V, w) for x, w in zip(*part, strict=True)] for part in parts]


def _one_rank_after_the_other(X, ranks, trials=(), sizes=()):
    """The plain script: for each rank W, V, then what new users need, from the global seed."""
    few, test, results = [x[:5] for x in X], [x[5:] for x in X], []
    for K in ranks:
        logits, V, _ = reference.joint(X, torch.randn(USERS, K), torch.randn(F, K), 20, 0.5)
        if not sizes:
            start = [torch.randn(K) for _ in X] if K > 1 else None
            w = reference.few_shot(few, V, start, 15, 0.1) if K > 1 else [torch.ones(1)] * USERS
            results += _accuracies([(test, w)], V)
        for size in sizes:
            means = []
            for _ in range(trials):
                some = [x[torch.randperm(len(x))[:size]] for x in few]
                start = [torch.randn(K) for _ in X]
                w = reference.few_shot(some, V, start, 15, 0.1)
                means.append(np.mean(_accuracies([(some, w), (test, w)], V), 1))
            results.append((np.mean(means, 0), np.std(means, 0)))
    return results


QUICK = {"num_iterations": 20, "few_shot_iterations": 15, "progress": False}


@pytest.mark.slow
def test_ranks_of_one_run_draw_as_if_fitted_one_after_the_other(X):
    few, test, ranks = [x[:5] for x in X], [x[5:] for x in X], [3, 1, 2, 4]
    torch.manual_seed(3)
    result = utils.run(ranks, [0.0], None, X, test, few, test, USERS, USERS, "cpu", **QUICK)
    torch.manual_seed(3)
    expected = _one_rank_after_the_other(X, ranks)
    assert result.unseen == pytest.approx(np.mean(expected, 1))
    assert result.unseen_std == pytest.approx(np.std(expected, 1))


@pytest.mark.parametrize("ranks", [[3], [3, 2]])
def test_the_sweep_returns_means_and_spreads_in_turn_from_the_draws_of_a_plain_loop(X, ranks):
    given = 3, [0.0], ranks, [2, 4], X, [x[:5] for x in X], [x[5:] for x in X], None, USERS, USERS
    torch.manual_seed(4)
    found = utils.run_few_shot_vary_shots(*given, "cpu", **QUICK)
    torch.manual_seed(4)
    results = _one_rank_after_the_other(X, ranks, 3, [2, 4])  # means, spreads of (few-shot, unseen)
    in_turn = np.reshape(results, (len(ranks), 2, 4)).transpose(2, 0, 1)[[0, 2, 1, 3]]
    np.testing.assert_allclose(list(found), in_turn.squeeze(1) if len(ranks) == 1 else in_turn,
                               rtol=1e-6, atol=1e-6)  # fmt: skip


# The public PRISM/train_basis.py on made-up embeddings: as it stands, but for iterations
PRISM = """
from utils import *

torch.manual_seed(7)
settings = {"num_iterations": 40, "few_shot_iterations": 15, "progress": False}
sets = train_features, test_features_sparse, train_features_unseen, test_features_sparse_unseen
sizes = N, N_unseen, "cpu"
result = run_regularized(K_list, alpha_list, V_final, *sets, *sizes, **settings)
few_mean, few_std, unseen_mean, unseen_std = run_few_shot_vary_shots(
    2, alpha_list, K_list[2:], [1, 3], sets[0], *sets[2:], V_final, *sizes,
    estimator=LoRe_regularized, **settings
)
W, V = solve_regularized_simplex(V_final, 0.1, train_features, 5, 40, 0.5)
w = learn_multiple_few_shot(train_features_unseen, V, 15, 0.5)
accuracies = eval_multiple(w, V, test_features_sparse_unseen)
"""


def test_the_public_prism_script_gives_what_a_plain_loop_gives_where_columns_are_dropped(X):
    X = [x + 60 * X[0][0] / X[0][0].norm() for x in X]  # much alike: columns stay unused
    seen, few, unseen = ([x[some] for x in X] for some in (slice(5, 8), slice(5), slice(4, 8)))
    names = {
        "train_features": X, "test_features_sparse": seen, "N": USERS, "N_unseen": USERS,
        "train_features_unseen": few, "test_features_sparse_unseen": unseen,
        "V_final": X[0][0][:, None], "K_list": [0, 1, 5, 3], "alpha_list": [0.1, 0.01],
    }  # fmt: skip
    exec(PRISM, names)
    torch.manual_seed(7)
    expected, columns = [], []
    for alpha, K in itertools.product(names["alpha_list"], names["K_list"]):
        W, V, w = torch.ones(USERS, 1), X[0][0][:, None], torch.ones(USERS, 1)
        if K:  # columns are dropped, then new users' logits drawn
            given = torch.rand(USERS, K), torch.randn(F, K), 40, 0.5, X[0][0], alpha
            logits, V, _ = reference.alternating(X, *given)
            W = logits.softmax(1)
            kept = W.amax(0) >= 1e-2
            W, V = W[:, kept], V[:, kept]
            start = torch.randn(USERS, V.shape[1]) if K > 1 else w
            w = reference.few_shot(few, V, start, 15, 0.5)
        columns.append(V.shape[1])
        of_users = _accuracies([(X, W), (seen, W), (few, w), (unseen, w)], V)
        expected.append([*np.mean(of_users, 1), *np.std(of_users, 1)])
    assert columns[2] < 5  # or this test shows nothing
    np.testing.assert_allclose(names["result"], np.transpose(expected), rtol=1e-6)
    assert names["few_mean"].shape == names["unseen_std"].shape == (4, 2)
    assert len(names["accuracies"]) == USERS


def test_a_rank_above_the_number_of_users_warns_and_is_fitted(X, caplog):
    sets = X[:2], X[:2], X[:3], X[:3]
    quick = {"num_iterations": 5, "few_shot_iterations": 5, "progress": False, "generator": 0}
    for run in (utils.run, utils.run_regularized):
        caplog.clear()
        result = run([4], [0.1], X[0][0], *sets, 2, 3, **quick)
        assert result.unseen.shape == (1,)
        assert "rank 4 is more than 2 users and 12 features can support" in caplog.text
    assert utils.solve(X[:2], 3, 5)[1].shape == (F, 3)


def test_populations_are_on_the_simplex_and_sparser_for_small_alpha():
    peaks = []
    for alpha in (0.001, 0.1, 10.0):
        W = utils.generate_population(alpha, 400, generator=0)
        torch.testing.assert_close(W.sum(1), torch.ones(400))
        peaks.append(float(W.amax(1).mean()))
    assert peaks[0] > 0.99 > peaks[1] > peaks[2]
    same = utils.generate_population(0.1, 5, torch.Generator().manual_seed(3))
    torch.testing.assert_close(utils.generate_popupulation(0.1, 5, 3), same)
    torch.manual_seed(3)
    torch.testing.assert_close(utils.generate_population(0.1, 5), same)
    W = utils.generate_popupulation(np.array([5.0, 0.01, 0.01, 5.0]), 300)
    assert W.shape == (300, 4) and W[:, [0, 3]].sum(1).mean() > 0.95


def test_simulated_users_choose_best_and_worst_also_from_object_arrays_and_lists():
    rng = np.random.default_rng(0)
    rewards, W = rng.normal(size=(5, 4, 3)), rng.dirichlet(np.ones(3), 2)
    lists = [[torch.randn(F) for _ in range(4)] for _ in range(5)]
    scores = torch.from_numpy(rewards @ W[1])
    chosen, rejected = scores.argmax(1).tolist(), scores.argmin(1).tolist()
    expected = [own[c] - own[r] for own, c, r in zip(lists, chosen, rejected, strict=True)]
    for given in (rewards.astype(object), torch.from_numpy(rewards)):
        one = utils.simulate_user(given, lists, W[1])
        torch.testing.assert_close(one, torch.stack(expected))
        torch.testing.assert_close(utils.simulate_population(given, lists, W)[1], one)
        assert [x[1].tolist() for x in utils.simulate_choices(given, W)] == [chosen, rejected]


def test_shots_are_drawn_without_replacement_from_a_seed(caplog):
    X = [torch.arange(6.0)[:, None], torch.arange(3.0)[:, None]]
    drawn = utils.sample_shots(X, 4, generator=0)
    assert len(caplog.records) == 1 and "a user has only 3" in caplog.text
    assert [len(x.unique()) for x in drawn] == [4, 3]
    torch.testing.assert_close(drawn[0], utils.sample_shots(X, 4, generator=0)[0])


def test_prism_dialogues_become_differences():
    pairs = [(torch.randn(4), torch.randn(4)) for _ in range(6)]
    world = {"a": {"d1": pairs[:2], "d2": pairs[2:3]}, "b": {"d3": pairs[3:]}}
    X = utils.create_dataset_prism(world)
    torch.testing.assert_close(X[0][2], pairs[2][0] - pairs[2][1])
    assert [len(x) for x in X] == [3, 3]
    sizes = set()
    for seed in range(6):
        some = utils.create_dataset_prism_shots(world, 1, generator=seed)
        torch.manual_seed(seed)
        kept = X[0][:2] if torch.randperm(2)[0] == 0 else X[0][2:]
        assert torch.equal(some[0], kept) and torch.equal(some[1], X[1])
        sizes.add(len(kept))
    assert sizes == {1, 2}


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, 3), (0.01, 1), (1.0, 7)])
def test_a_sparse_tensor_has_the_whole_number_of_rows(fraction, rows):
    dense = torch.randn(2, 7, F, dtype=torch.float64)
    sparse = utils.create_sparse_tensor(dense, fraction)
    assert [x.shape for x in sparse] == [(rows, F)] * 2
    assert {x.dtype for x in sparse} == {torch.float32}


def test_the_current_dialogue_counts_alpha_times(X):
    V, how = torch.randn(F, 3), {"num_iterations": 40, "learning_rate": 0.1, "generator": 5}
    earlier, now = [x[:5] for x in X], [x[5:] for x in X]
    thrice = [torch.cat([a, b, b, b]) for a, b in zip(earlier, now, strict=True)]
    for alpha, plain in ((3.0, thrice), (0.0, earlier)):
        weighted = utils.learn_multiple_few_shot_weighted(alpha, earlier, now, V, **how)
        expected = utils.learn_multiple_few_shot(plain, V, **how)
        torch.testing.assert_close(weighted, expected, rtol=0, atol=1e-4 if alpha else 1e-6)


def test_single_functions_are_fits_of_the_classes(X):
    how, alike = (10, 0.5), torch.testing.assert_close
    W, V = utils.solve(X, 2, *how, generator=6)
    alike((W, V), utils.LoRe(None, 0, USERS, F, 2, *how, generator=6).train(X))
    shared = utils.learn_single_reward(X, *how, generator=6)
    alike(shared, utils.solve_regularized(None, 0, X, 1, *how, generator=6)[1])
    pulled = utils.learn_single_reward_regularized(torch.ones(F), 1e4, X, 100, generator=0)
    assert torch.nn.functional.cosine_similarity(pulled[:, 0], torch.ones(F), dim=0) > 0.95
    few = utils.PersonalizeBatch(USERS, F, 2, 10, 0.1).train(X, V)
    assert isinstance(few, list) and few[4].shape == W[4].shape == (2,)
    own = utils.solve_multi_reward(X, 20, 0.5)
    alike(own[2], utils.learn_multiple([X[2]], 20, 0.5)[0])
    accuracies = [reference.accuracy(x, v, torch.ones(1)) for x, v in zip(X, own, strict=True)]
    assert utils.eval_multiple(torch.ones(USERS, 1), own, X) == pytest.approx(accuracies)
    assert utils.evaluate_model(0 * X[0], V, W[0]) == 0  # a tie is not right
