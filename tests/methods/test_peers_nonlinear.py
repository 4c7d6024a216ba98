"""PAL, VPL and LoRe on a shallow network: equalities, planted worlds, and what all must pass."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, softplus

from lore.common.files import InputError
from lore.learning.comparisons import Comparisons, DenseFeatures, Pairs, RowFeatures, Users
from lore.learning.kinds import shares_of_test
from lore.learning.method import Fitted, Task
from lore.methods import mlp, pal, vpl
from lore.methods.fitting.linear import TRIES
from lore.methods.fitting.networks import batches, blocks, row_scale, solve_weights
from lore.methods.vpl import Groups

pytestmark = pytest.mark.slow
F, ROWS, SEEN, NEW = 8, 300, 40, 16
METHODS = {
    "pal": pal.PAL(prototypes=(2, 3), width=32, epochs=12),
    "vpl": vpl.VPL(betas=(3e-6, 1e-4), hidden=32, latent=8, epochs=12),
    "mlp": mlp.MLP(ranks=(2, 3), hidden=32, epochs=24),
}
BRIEF = {
    "pal": {"epochs": 2, "prototypes": (2,)},
    "vpl": {"epochs": 2, "betas": (1e-4,)},
    "mlp": {"epochs": 2, "ranks": (2,)},
}


# ----------------------------------------------------------------------- Worlds


def taste(world: str, user: int, E: Tensor) -> Tensor:
    """What a user of a world thinks of rows [R]; users alternate between two tastes."""
    one = user % 2 == 0
    if world == "pal":  # nearness to one of two points
        points = torch.tensor([[2.0, 1.0], [-2.0, 1.0]])
        return -3 * (E[:, :2] - points[0 if one else 1]).norm(dim=1)
    if world == "vpl":  # a thing that half of them love and half of them hate
        return 3 * E[:, 0] * (1 if one else -1)
    return 3 * E[:, 0 if one else 1].abs()  # mlp: one of two non-linear rewards


def comparisons(world: str, E: Tensor, users: range, pairs: int, seed: int) -> Comparisons:
    """Random pairs of rows, each chosen by the logistic model of its user's taste."""
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = [], []
    for user in users:
        a, b = torch.stack([torch.randperm(len(E), generator=g)[:2] for _ in range(pairs)]).T
        value = taste(world, user, E)
        first = torch.rand(pairs, generator=g) < (value[a] - value[b]).sigmoid()
        chosen.append(torch.where(first, a, b))
        rejected.append(torch.where(first, b, a))
    return of_rows(E, torch.cat(chosen), torch.cat(rejected), [pairs] * len(users))


def of_rows(E: Tensor, chosen: Tensor, rejected: Tensor, counts: list[int]) -> Comparisons:
    features = RowFeatures(lambda i: E[i], E.shape[1], chosen, rejected)
    return Comparisons(features, counts)


@cache
def planted(world: str) -> Task:
    E = torch.randn(ROWS, F, generator=torch.Generator().manual_seed(5))
    seen, new = range(SEEN), range(SEEN, SEEN + NEW)
    sizes = [(seen, 60), (new, 20), (seen, 40), (new, 40)]
    sets = [comparisons(world, E, users, n, i) for i, (users, n) in enumerate(sizes)]
    train, few, seen, unseen = sets
    kinds = shares_of_test(train, few, seen, unseen)  # as a split says it
    return Task(train, few, seen, unseen, seed=3, shots=(0, 10, 20), kinds=kinds)


@cache
def fitted(name: str) -> Fitted:
    (fit,) = METHODS[name].fit(planted(name))
    return fit


def adapted(fit: Fitted, task: Task) -> Tensor:
    return fit.adapt(fit.view(task.few), task.few, 0)


def accuracy(fit: Fitted, data: Comparisons, state: Tensor) -> float:
    return float(data.accuracies(fit.logits(fit.view(data), state, data.user)).mean())


def shared_direction(data: Comparisons) -> Tensor:
    """Bradley-Terry's direction [F, 1]."""
    x = data.features.dense().x
    v = torch.zeros(x.shape[1], 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = softplus(-(x @ v)[:, 0]).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return v.detach()


# ---------------------------------------------------------------- What all must


every = pytest.mark.parametrize("name", METHODS)


@every
def test_a_world_of_its_own_kind_is_recovered_where_bradley_terry_fails(name: str) -> None:
    task, fit = planted(name), fitted(name)
    v = shared_direction(task.train)
    for data, state in ((task.seen, fit.users), (task.unseen, adapted(fit, task))):
        shared = float(data.accuracies(data.project(v)[:, 0]).mean())
        assert accuracy(fit, data, state) > shared + 0.1


@every
def test_own_state_beats_nobodys_and_anothers(name: str) -> None:
    task, fit = planted(name), fitted(name)
    for data, own in ((task.seen, fit.users), (task.unseen, adapted(fit, task))):
        mine = accuracy(fit, data, own)
        # a choice counts every user once, so that the few pseudo-new ones weigh less than by halves
        assert mine > accuracy(fit, data, fit.population_state.expand_as(own)) + 0.05
        assert mine > accuracy(fit, data, own.roll(1, 0)) + 0.1


@every
def test_the_same_seed_gives_the_same_fit_and_another_does_not(name: str) -> None:
    task, method = planted(name), METHODS[name]
    short = replace(method, **BRIEF[name])
    one, again = (short.fit(task)[0].users for _ in range(2))
    other = Task(task.train, task.few, task.seen, task.unseen, seed=4, shots=task.shots)
    assert torch.equal(one, again)
    different = short.fit(other)[0].users
    assert one.shape != different.shape or not torch.allclose(one, different, atol=1e-3)


@every
def test_users_without_shots_get_nobodys_state(name: str) -> None:
    task, fit = planted(name), fitted(name)
    view = fit.view(task.few)
    none = fit.adapt(view[torch.arange(0)], Users([0, 0, 0]), 0)
    assert torch.equal(none, fit.population_state.expand(3, -1))
    rows = torch.arange(20)  # the first user's
    some = fit.adapt(view[rows], Users([0, 20, 0]), 0)
    assert torch.equal(some[[0, 2]], fit.population_state.expand(2, -1))
    torch.testing.assert_close(some[1], adapted(fit, task)[0], rtol=1e-3, atol=1e-3)


@every
def test_the_order_of_users_and_comparisons_does_not_matter(name: str) -> None:
    task, fit = planted(name), fitted(name)
    own, view = adapted(fit, task), fit.view(task.few)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(NEW, generator=g)
    rows = torch.arange(len(task.few)).view(NEW, -1)[order]
    rows = torch.stack([row[torch.randperm(len(row), generator=g)] for row in rows]).flatten()
    other = fit.adapt(view[rows], task.few.pick(rows, [20] * NEW), 0)
    torch.testing.assert_close(other, own[order], rtol=0, atol=0.02)  # a step more or less
    assert not torch.allclose(own, own[order], atol=0.1)  # users do differ


@every
def test_swapped_labels_negate_the_logits_and_mirror_the_accuracy(name: str) -> None:
    task, fit = planted(name), fitted(name)
    data, own = task.unseen, adapted(fit, task)
    flipped = data.flipped(torch.ones(len(data)).bool())
    logits = fit.logits(fit.view(data), own, data.user)
    mirrored = fit.logits(fit.view(flipped), own, data.user)
    torch.testing.assert_close(mirrored, -logits)
    assert accuracy(fit, flipped, own) == pytest.approx(1 - accuracy(fit, data, own), abs=1e-6)


@every
def test_a_fit_describes_itself_and_every_method_has_as_many_tries(name: str) -> None:
    about = fitted(name).describe()
    assert len(about["losses"]) <= 400 and about["loss_step"] >= 1
    assert about["losses"][-1] < about["losses"][0]
    losses = [one["loss"] for one in about["tried"]]
    given = {"pal": pal.PAL().prototypes, "vpl": vpl.VPL().betas, "mlp": mlp.MLP().ranks}
    variants = len(losses) // 2  # two models here
    assert len(given[name]) * variants == TRIES and len(set(losses)) > 1
    assert name.upper() in about["note"] and f"{about['parameters']:,}" in about["note"]


@every
def test_differences_alone_are_refused_in_one_line(name: str) -> None:
    task = planted(name)
    dense = Comparisons(DenseFeatures(torch.randn(len(task.train), F)), task.train.counts)
    with pytest.raises(InputError, match="both embeddings"):
        METHODS[name].fit(Task(dense, task.few, task.seen, task.unseen))


@every
def test_the_faithful_setting_runs_and_knows_new_users(name: str) -> None:
    task, method = planted(name), METHODS[name]
    small = {"setting": "faithful", "epochs": 2}
    (fit,) = type(method)(**(vars(method) | small)).fit(task)
    own = adapted(fit, task)
    assert own.shape == (NEW, fit.users.shape[1])
    assert torch.isfinite(fit.logits(fit.view(task.unseen), own, task.unseen.user)).all()
    assert not torch.allclose(own, own.roll(1, 0), atol=1e-4)


# -------------------------------------------------------------------------- PAL


def test_linear_pal_with_squared_distances_is_lore_plus_a_quadratic_of_all_users() -> None:
    task, method = planted("pal"), pal.PAL(layers=1, squared=True, width=4, epochs=2)
    fit = method.train(task.train, None, 3, task, 2)
    data, state = task.unseen, torch.rand(NEW, 3).softmax(1)
    layer, E = fit.f[0], data.features.pairs()
    f = E.values / fit.scale @ layer.weight.T + layer.bias
    # ||f_r - a||^2 - ||f_c - a||^2 = 2 a.(f_c - f_r) - (||f_c||^2 - ||f_r||^2), a = A P'w + b.
    V = 2 * layer.weight.T @ (layer.weight @ fit.prototypes.T + layer.bias[:, None]) / fit.scale
    lore = (data.project(V) * state[data.user]).sum(1)
    square = f.square().sum(1)
    quadratic = square[E.chosen] - square[E.rejected]
    logits = fit.logits(fit.view(data), state, data.user)
    torch.testing.assert_close(logits, lore - quadratic, rtol=1e-4, atol=1e-4)
    other = fit.logits(fit.view(data), state.roll(1, 0), data.user)
    lore = (data.project(V) * state.roll(1, 0)[data.user]).sum(1)
    torch.testing.assert_close(other, lore - quadratic, rtol=1e-4, atol=1e-4)
    assert lore.std() > 1e-3  # the users' part is no rounding


def test_pals_published_fit_moves_a_new_users_logits_by_about_its_rate_a_step() -> None:
    task = planted("pal")
    fit = pal.PAL("faithful", prototypes=(2,), width=16).train(task.train, None, 2, task, 1)
    view = fit.view(task.few)
    drawn = torch.randn(NEW, 2, generator=torch.Generator().manual_seed(7))
    for shots in (1, 5):
        rows = torch.cat([torch.arange(20 * u, 20 * u + shots) for u in range(NEW)])
        own = fit.adapt(view[rows], task.few.pick(rows, [shots] * NEW), 7)
        margin = own.log().diff(dim=1) - drawn.diff(dim=1)  # of logits, whose level is free
        assert margin.abs().max() <= 2 * 5e-3 * 20 * shots * 1.05  # Adam
        assert margin.abs().max() > 0.01


# -------------------------------------------------------------------------- VPL


def plain_network(method: vpl.VPL, data: Comparisons, seed: int, epochs: int) -> list[Tensor]:
    """Parameters of an MLP Bradley-Terry after training, written out."""
    g = torch.Generator().manual_seed(seed)
    H, parameters = method.hidden, []
    for inputs, outputs in ((F, H), (H, H), (H, 1)):
        bound = inputs**-0.5
        for shape in ((outputs, inputs), (outputs,)):
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=g)
            parameters.append(drawn.requires_grad_())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    scale = row_scale(data)
    chosen, rejected = sides(data)
    for _ in range(epochs):
        for some in batches(len(data), 64, g):
            logits = plain_reward(parameters, chosen[some] / scale) - plain_reward(
                parameters, rejected[some] / scale
            )
            loss = softplus(-logits).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return parameters


def sides(data: Comparisons) -> tuple[Tensor, Tensor]:
    E = data.features.pairs()
    return E.values[E.chosen], E.values[E.rejected]


def plain_reward(parameters: list[Tensor], e: Tensor) -> Tensor:
    A, a, B, b, c, d = parameters
    return (leaky_relu(leaky_relu(e @ A.T + a, 0.2) @ B.T + b, 0.2) @ c.T + d)[:, 0]


def test_vpl_without_a_latent_is_bradley_terry_on_a_network() -> None:
    task, method = planted("vpl"), vpl.VPL(hidden=16, latent=0)
    fit = method.train(task.train, None, 0.0, replace(task, seed=11), 3)
    parameters = plain_network(method, task.train, 11, 3)
    chosen, rejected = sides(task.unseen)
    scale = row_scale(task.train)
    wanted = plain_reward(parameters, chosen / scale) - plain_reward(parameters, rejected / scale)
    logits = fit.logits(fit.view(task.unseen), adapted(fit, task), task.unseen.user)
    torch.testing.assert_close(logits, wanted.detach(), rtol=1e-3, atol=1e-4)
    assert logits.std() > 0.01 and not fit.personal


def test_vpls_live_latent_is_seen_and_loses_by_a_swapped_context() -> None:
    about = fitted("vpl").describe()
    assert about["active_units"] > 0 and about["kl"] > 0
    own, swapped = about["accuracy_own_context"], about["accuracy_swapped_context"]
    assert own > 0.7 and swapped < 0.3  # a swapped context is that of the opposite taste


def test_vpls_collapse_shows_where_users_are_alike() -> None:
    world = planted("mlp")
    alike = comparisons("mlp", torch.randn(100, F), range(0, 24, 2), 30, 0)
    task = Task(alike, world.few, world.seen, world.unseen, shots=(10,))
    (fit,) = vpl.VPL(betas=(1e-2, 1e-1), hidden=16, latent=8, epochs=30).fit(task)
    about = fit.describe()
    assert about["active_units"] == 0
    assert abs(about["accuracy_own_context"] - about["accuracy_another_context"]) < 0.02


def test_vpls_attention_ignores_the_padding_of_shorter_contexts() -> None:
    task, fit = planted("vpl"), fitted("vpl")
    view = fit.view(task.few)
    rows = torch.cat([torch.arange(0, 3), torch.arange(20, 40)])
    together = fit.adapt(view[rows], Users([3, 20]), 0)
    alone = fit.adapt(view[rows[:3]], Users([3]), 0)
    torch.testing.assert_close(together[:1], alone)


def test_a_context_shares_no_comparison_nor_dialogue_with_its_targets() -> None:
    E = torch.randn(40, F)
    data = comparisons("vpl", E, range(3), 20, 0)
    dialogs = torch.arange(60) // 2
    data = Comparisons(data.features, data.counts, dialogs=dialogs)
    g, targeted = torch.Generator().manual_seed(0), []
    for targets, group, contexts, counts in Groups(data, 5, (1, 8)).epoch(4, g):
        targeted.append(targets)
        for number, context in enumerate(contexts.split(counts.tolist())):
            own = targets[group == number]
            assert len(data.user[torch.cat([own, context])].unique()) == 1
            assert not set(dialogs[own].tolist()) & set(dialogs[context].tolist())
            assert 1 <= len(context) <= 8
    assert torch.equal(torch.cat(targeted).sort().values, torch.arange(60))


# -------------------------------------------------------------------------- MLP


def test_mlp_with_the_identity_is_lore() -> None:
    task, g = planted("mlp"), torch.Generator().manual_seed(0)
    method = mlp.MLP("faithful", hidden=F, activation="identity")
    fit = mlp.FittedMLP(method, task.train, 3, g)
    V, W = torch.randn(F, 3, generator=g), torch.rand(NEW, 3, generator=g).softmax(1)
    fit.layers[0].weight.data, fit.layers[2].weight.data = torch.eye(F), V.T.contiguous()
    lore = (task.unseen.project(V) * W[task.unseen.user]).sum(1) / 100
    fit.finish(fit.layers)
    logits = fit.logits(fit.view(task.unseen), W, task.unseen.user)
    torch.testing.assert_close(logits, lore)


# ---------------------------------------------------------------- Users' weights


def test_weights_are_solved_to_the_minimum_that_a_grid_finds() -> None:
    g = torch.Generator().manual_seed(0)
    Z, counts = 2 * torch.randn(90, 2, generator=g), [10, 30, 50]
    users = Users(counts)
    found = solve_weights(
        lambda rows, w, user: softplus(-(Z[rows] * w[user]).sum(1)), users, torch.zeros(3, 2)
    )
    grid = torch.linspace(0, 1, 1001)
    for z, w in zip(Z.split(counts), found, strict=True):
        losses = softplus(-(z[:, :1] * grid + z[:, 1:] * (1 - grid))).mean(0)
        here = softplus(-(z @ w)).mean()
        assert here - losses.min() < 2e-3
    assert found.std() > 0.05


def test_a_ridge_holds_weights_at_the_start_and_fades_with_shots() -> None:
    Z = torch.tensor([[2.0, -2.0]])
    moved = []
    for shots in (1, 100):
        rows = Z.expand(shots, 2)
        weights = solve_weights(
            lambda part, w, user, rows=rows: softplus(-(rows[part] * w[user]).sum(1)),
            Users([shots]), torch.zeros(1, 2), ridge=1.0,
        )  # fmt: skip
        moved.append(float(weights[0, 0] - 0.5))
    assert 0.05 < moved[0] < moved[1] - 0.1


def test_blocks_hold_every_user_once_in_order() -> None:
    users = Users([0, 40_000, 3, 0, 20_000, 20_000, 1])
    who, rows = zip(*blocks(users), strict=True)
    assert [w.start for w in who] == [0, *(w.stop for w in who[:-1])] and who[-1].stop == 7
    for w, r in zip(who, rows, strict=True):
        assert r.stop - r.start == int(users.counts[w].sum())
    assert len(who) > 2 and rows[-1].stop == len(users)


def test_a_view_of_pairs_swaps_by_its_places() -> None:
    view = fitted("pal").view(planted("pal").few)
    assert isinstance(view, Pairs)
    assert len(view.values) <= ROWS < len(view)  # distinct rows only


# ------------------------------------------------------------------- Losses and processes


def test_pal_has_the_hinge_loss_of_margin_1_and_the_mlp_the_log_loss() -> None:
    task = planted("pal")
    for name, loss in (("pal", lambda x: (1 - x).clamp(min=0)), ("mlp", lambda x: softplus(-x))):
        (fit,) = replace(METHODS[name], setting="faithful", epochs=1).fit(task)
        view, rows = fit.view(task.few), slice(0, 20)  # the first user's
        logits = fit.logits(view[rows], fit.users[:1], torch.zeros(20, dtype=torch.long))
        found = fit.losses(view, rows, fit.users[:1], torch.zeros(20, dtype=torch.long))
        torch.testing.assert_close(found, loss(logits))
        assert found.std() > 1e-4


@every
def test_the_first_process_judges_alone(name: str) -> None:
    assert METHODS[name].fit(replace(planted(name), process=1, processes=2)) == []
