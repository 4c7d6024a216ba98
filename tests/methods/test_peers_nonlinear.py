"""PAL, VPL and LoRe on a shallow network: equalities, and worlds of their own kind."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lore.common.files import InputError
from lore.learning.comparisons import Comparisons, DenseFeatures, Users
from lore.learning.kinds import shares_of_test
from lore.learning.method import Fitted, Task
from lore.methods import mlp, pal, vpl
from lore.methods.fitting import networks
from lore.methods.fitting.geometry import measure
from lore.methods.fitting.networks import BLOCK, row_scale, solve_weights
from lore.methods.fitting.validation import hold_out
from lore.methods.ridge_bt import fit_shared
from planted import accuracy, adapted, choices

pytestmark = pytest.mark.slow
F, ROWS, SEEN, NEW = 8, 300, 40, 16
METHODS = {
    "pal": pal.PAL(prototypes=(2,), width=32, epochs=12),
    "vpl": vpl.VPL(betas=(1e-4,), hidden=32, latent=8, epochs=12),
    "mlp": mlp.MLP(ranks=(2,), hidden=32, epochs=24),
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
    values = torch.stack([taste(world, user, E) for user in users])
    return choices(E, values, pairs, torch.Generator().manual_seed(seed))


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


# ---------------------------------------------------------------- What all must


every = pytest.mark.parametrize("name", METHODS)


@every
def test_a_world_of_its_own_kind_is_recovered_where_bradley_terry_fails(name: str) -> None:
    task, fit = planted(name), fitted(name)
    geometry = measure(task.train)
    v = geometry.raw(fit_shared(task.train, geometry, 1e-3).x).float()
    for data, own in ((task.seen, fit.users), (task.unseen, adapted(fit, task.few))):
        mine = accuracy(fit, data, own)
        assert mine > float(data.accuracies(data.project(v)[:, 0]).mean()) + 0.1
        # a choice counts every user once, so that the few pseudo-new ones weigh less than by halves
        assert mine > accuracy(fit, data, fit.population_state.expand_as(own)) + 0.05
        assert mine > accuracy(fit, data, own.roll(1, 0)) + 0.1


@every
def test_differences_alone_are_refused_in_one_line(name: str) -> None:
    task = planted(name)
    dense = Comparisons(DenseFeatures(torch.randn(len(task.train), F)), task.train.counts)
    with pytest.raises(InputError, match="both embeddings"):
        METHODS[name].fit(Task(dense, task.few, task.seen, task.unseen))


# -------------------------------------------------------------------------- PAL


@pytest.mark.parametrize(("setting", "passes"), [("faithful", 4), ("converged", 2)])
def test_a_published_budget_is_spent_whole(setting, passes, monkeypatch) -> None:
    """Where no pass is an improvement that counts."""
    for name, value in {"PLATEAU": 0, "PATIENCE": 1, "TOLERANCE": 10.0}.items():
        monkeypatch.setattr(networks, name, value)
    method = pal.PAL(setting, prototypes=(2,), width=4, epochs=4)
    task = planted("pal")
    fit = method.train(task.few, hold_out(task.few, 0), 2, task)
    assert len(fit.losses) == passes * math.ceil(len(task.few) / fit.batch)


def test_linear_pal_with_squared_distances_is_lore_plus_a_quadratic_of_all_users() -> None:
    task, method = planted("pal"), pal.PAL(layers=1, squared=True, width=4, epochs=2)
    fit = method.train(task.train, None, 3, task, 2)
    data, state = task.unseen, torch.rand(NEW, 3).softmax(1)
    layer, E = fit.f[0], data.features.pairs()
    f = E.values / fit.scale @ layer.weight.T + layer.bias
    # ||f_r - a||^2 - ||f_c - a||^2 = 2 a.(f_c - f_r) - (||f_c||^2 - ||f_r||^2), a = A P'w + b.
    V = 2 * layer.weight.T @ (layer.weight @ fit.prototypes.T + layer.bias[:, None]) / fit.scale
    square = f.square().sum(1)
    quadratic = square[E.chosen] - square[E.rejected]
    for some in (state, state.roll(1, 0)):
        lore = (data.project(V) * some[data.user]).sum(1)
        logits = fit.logits(fit.view(data), some, data.user)
        torch.testing.assert_close(logits, lore - quadratic, rtol=1e-4, atol=1e-4)
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


def test_vpl_without_a_latent_is_bradley_terry_on_a_network() -> None:
    task, method = planted("vpl"), vpl.VPL(hidden=16, latent=0)
    fit = method.train(task.train, None, 0.0, replace(task, seed=11), 3)
    g, scale = torch.Generator().manual_seed(11), row_scale(task.train)
    layers = [nn.Linear(F, 16), nn.Linear(16, 16), nn.Linear(16, 1)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(layer.in_features**-0.5), layer.in_features**-0.5, g)
    net = nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])

    def plain(data: Comparisons) -> Tensor:
        E = data.features.pairs()
        reward = net(E.values / scale)[:, 0]
        return reward[E.chosen] - reward[E.rejected]

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(3):
        for some in torch.randperm(len(task.train), generator=g).split(64):
            optimizer.zero_grad()
            softplus(-plain(task.train)[some]).mean().backward()
            optimizer.step()
    logits = fit.logits(fit.view(task.unseen), adapted(fit, task.few), task.unseen.user)
    torch.testing.assert_close(logits, plain(task.unseen).detach(), rtol=1e-3, atol=1e-4)
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
    about = vpl.VPL(hidden=16, latent=8).train(alike, None, 0.1, task, 20).describe()
    assert about["active_units"] == 0
    assert abs(about["accuracy_own_context"] - about["accuracy_another_context"]) < 0.02


def test_a_context_shares_no_comparison_nor_dialogue_with_its_targets() -> None:
    data = comparisons("vpl", torch.randn(40, F), range(3), 20, 0)
    dialogs = data.dialogs = torch.arange(60) // 2
    g, targeted = torch.Generator().manual_seed(0), []
    for targets, group, contexts, counts in vpl.grouped(data, 5, (1, 8), 4, g):
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
    fit = mlp.FittedMLP(method, task.train, 3, task)
    V, W = torch.randn(F, 3, generator=g), torch.rand(NEW, 3, generator=g).softmax(1)
    fit.layers[0].weight.data, fit.layers[2].weight.data = torch.eye(F), V.T.contiguous()
    lore = (task.unseen.project(V) * W[task.unseen.user]).sum(1) / 100
    logits = fit.logits(fit.view(task.unseen), W, task.unseen.user)
    torch.testing.assert_close(logits, lore)


# ---------------------------------------------------------------- Users' weights


def mixed(Z: Tensor, counts: list[int], ridge: float = 0.0) -> Tensor:
    """Users' weights of comparisons Z [N, 2], from equal ones."""
    return solve_weights(
        lambda rows, w, user: softplus(-(Z[rows] * w[user]).sum(1)),
        Users(counts), torch.zeros(len(counts), 2), ridge,
    )  # fmt: skip


def test_weights_are_solved_to_the_minimum_that_a_grid_finds() -> None:
    Z, counts = 2 * torch.randn(90, 2, generator=torch.Generator().manual_seed(0)), [10, 30, 50]
    found, grid = mixed(Z, counts), torch.linspace(0, 1, 1001)
    for z, w in zip(Z.split(counts), found, strict=True):
        losses = softplus(-(z[:, :1] * grid + z[:, 1:] * (1 - grid))).mean(0)
        assert softplus(-(z @ w)).mean() - losses.min() < 2e-3
    assert found.std() > 0.05


def test_a_ridge_holds_weights_at_the_start_and_fades_with_shots() -> None:
    moved = mixed(torch.tensor([[2.0, -2.0]]).expand(101, 2), [1, 100], ridge=1.0)[:, 0] - 0.5
    assert 0.05 < moved[0] < moved[1] - 0.1


def test_blocks_hold_every_user_once_in_order() -> None:
    users = Users([0, 40_000, 3, 0, 20_000, 20_000, 1])
    who, rows = zip(*users.user_blocks(BLOCK, padded=True), strict=True)
    assert [w.start for w in who] == [0, *(w.stop for w in who[:-1])] and who[-1].stop == 7
    for w, r in zip(who, rows, strict=True):
        assert r.stop - r.start == int(users.counts[w].sum())
    assert len(who) > 2 and rows[-1].stop == len(users)


def test_pal_has_the_hinge_loss_of_margin_1_and_the_mlp_the_log_loss() -> None:
    task = planted("pal")
    rows, user = slice(0, 20), torch.zeros(20, dtype=torch.long)  # the first one's
    for name, loss in (("pal", lambda x: (1 - x).clamp(min=0)), ("mlp", lambda x: softplus(-x))):
        fit = fitted(name)
        view = fit.view(task.few)
        assert len(view.values) <= ROWS < len(view)  # distinct rows only
        logits = fit.logits(view[rows], fit.users[:1], user)
        found = fit.losses_of(view, rows, fit.users[:1], user)
        torch.testing.assert_close(found, loss(logits))
        assert found.std() > 1e-4
