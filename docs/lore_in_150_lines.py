"""LoRe, few-shot weights, ridge Bradley-Terry and the personal part, in one file to copy.

    python docs/lore_in_150_lines.py OwnData/data

reads a folder that prepare.py wrote and prints accuracy and log loss of held-out comparisons, a
row x = e(chosen) - e(rejected) each; a method gives their log odds, above 0 is right. Letters: U
users, N comparisons, F features, K rank, D leading directions, m comparisons of one user.
"""

import sys
from pathlib import Path

import torch
from scipy.optimize import minimize
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lore.embeddings.store import Store
from lore.preparing.tables import read_comparisons


def read(folder):
    """(split, seen) -> the differences x [N, F], whose they are [N], and how many users."""
    store = Store(folder / "embeddings")
    e, table = store.rows(torch.arange(len(store))).float(), read_comparisons(folder, len(store))
    table = table.sort_values(["user_id", "dialog_id", "turn", "rejected"], kind="stable")
    sets = {}
    for key, rows in table.groupby(["split", "seen"]):
        user, users = rows.user_id.factorize()
        chosen, rejected = (torch.tensor(rows[c].to_numpy()) for c in ("chosen", "rejected"))
        sets[key] = e[chosen] - e[rejected], torch.tensor(user), len(users)
    return sets


def lore(x, user, users, K=5, seed=0):
    """W [U, K] on the simplex and V [F, K]: sum_u mean_i -log sigmoid(x V w / 100), by Adam."""
    generator = torch.Generator().manual_seed(seed)
    W, V = (torch.randn(n, K, generator=generator) for n in (users, x.shape[1]))
    descend(lambda: lore_odds(x @ V, W.softmax(1), user), user, [W, V], 1000, 0.5)
    return W.softmax(1).detach(), V.detach()


def few_shot(z, user, users, seed=0):
    """New users' weights [U, K] with the basis frozen; z = x V [N, K]."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.stack([torch.randn(z.shape[1], generator=generator) for _ in range(users)])
    descend(lambda: lore_odds(z, W.softmax(1), user), user, [W], 500, 0.1)
    return W.softmax(1).detach()


def descend(odds, user, parameters, steps, rate):
    """Adam on the sum over users of their mean losses."""
    adam = torch.optim.Adam([p.requires_grad_() for p in parameters], rate)
    for _ in range(steps):
        adam.zero_grad()
        per_user(odds(), user).sum().backward()
        adam.step()


def lore_odds(z, W, user):
    """Log odds [N] of comparisons projected on the basis, z = x V [N, K]."""
    return (z * W[user]).sum(1) / 100


def whiten(x, floor):
    """The matrix [F, F] to features y of root mean square norm 1, leading directions first."""
    values, vectors = (z.flip(-1) for z in torch.linalg.eigh((x.T @ x).double() / len(x)))
    A = vectors * (values + floor * values[0]).rsqrt() if floor else vectors
    return A / (x.double() @ A).square().sum(1).mean().sqrt()


def ridge_bt(y, strength):
    """The shared reward mu [F] of least sum_i -log sigmoid(y mu) + strength / 2 |mu|^2."""

    def objective(mu):
        odds = y @ torch.from_numpy(mu)
        slope = strength * mu - (y.T @ torch.sigmoid(-odds)).numpy()
        return float(-logsigmoid(odds).sum()) + strength / 2 * mu @ mu, slope

    start, fine = torch.zeros(y.shape[1]).double(), {"ftol": 1e-12, "gtol": 1e-6}
    return torch.from_numpy(minimize(objective, start, (), "L-BFGS-B", True, options=fine).x)


def mode(P, offset, S):
    """The mode [D] of a user's deviation d ~ N(0, S), and its covariance, by Newton in the dual
    (Rasmussen and Williams 2006, algorithm 3.1); P [m, D] are the user's comparisons."""
    K, a = P @ S @ P.T, torch.zeros(len(P), dtype=torch.double)

    def height(a):
        return logsigmoid(offset + K @ a).sum() - a @ (K @ a) / 2

    for _ in range(50):
        p = torch.sigmoid(offset + K @ a)
        root = (p * (1 - p)).sqrt()
        B = torch.eye(len(P)) + root[:, None] * K * root
        b = root**2 * (K @ a) + 1 - p
        step = b - root * torch.linalg.solve(B, root * (K @ b)) - a
        while height(a + step) < height(a) - 1e-9:
            step = step / 2
        a = a + step
        if (K @ step).abs().max() < 1e-7:
            break
    Q = root[:, None] * (P @ S)
    return S @ (P.T @ a), S - Q.T @ torch.linalg.solve(B, Q)


def personal_part(P, offset, user, users, tau2, pi, rounds=8):
    """The covariance S [D, D] of the users' deviations, by EM; pi users of prior say tau2 I."""
    S = prior = tau2 * torch.eye(P.shape[1], dtype=torch.double)
    for _ in range(rounds):
        found = [mode(P[user == u], offset[user == u], S) for u in range(users)]
        S = (sum(torch.outer(d, d) + cov for d, cov in found) + pi * prior) / (users + pi)
    return S


def per_user(odds, user):
    """Mean of -log sigmoid [U]."""
    count = torch.bincount(user)
    return torch.zeros(len(count)).to(odds).index_add(0, user, -logsigmoid(odds)) / count


def judge(odds, user):
    """Accuracy and log loss, means over users."""
    right = torch.bincount(user, (odds.sign() + 1) / 2) / torch.bincount(user)
    return float(right.mean()), float(per_user(odds, user).mean())


def fit_and_judge(sets, floor=0.01, l_mu=0.3, tau2=3.0, pi=10.0, D=100):
    """Every method's accuracy and log loss on the seen and the unseen users."""
    (x, user, users), (x_new, new, news) = sets["train", True], sets["train", False]
    W, V = lore(x, user, users)
    W_new, A = few_shot(x_new @ V, new, news), whiten(x, floor)
    mu, table = ridge_bt(x.double() @ A, l_mu), {}
    y = x.double() @ A
    S = personal_part(y[:, :D], y @ mu, user, users, tau2, pi)
    known = {True: (W, x, user, users), False: (W_new, x_new, new, news)}
    for seen, (weights, own, owner, count) in known.items():
        y, (x, whose, _) = own.double() @ A, sets["test", seen]
        theirs = [y[owner == u] for u in range(count)]
        d = torch.stack([mode(rows[:, :D], rows @ mu, S)[0] for rows in theirs])
        z, name = x.double() @ A, "seen" if seen else "unseen"
        table["LoRe", name] = judge(lore_odds(x @ V, weights, whose), whose)
        table["ridge BT", name] = judge(z @ mu, whose)
        table["mixed logit", name] = judge(z @ mu + (z[:, :D] * d[whose]).sum(1), whose)
    return table


if __name__ == "__main__":
    for (method, users), (accuracy, loss) in fit_and_judge(read(Path(sys.argv[1]))).items():
        sys.stdout.write(f"{method:12} {users:7} accuracy {accuracy:.3f}  log loss {loss:.3f}\n")
