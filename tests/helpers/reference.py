"""LoRe written down from its equations: loops over users, autograd, no cleverness.

X is a list of U tensors [m_u, F]; ``c`` a list of the comparisons' weights [m_u]. What the fast
code in utils.py must equal, step by step.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer

T = 100.0


def ones(X: list[Tensor]) -> list[Tensor]:
    return [x.new_ones(len(x)) for x in X]


def free(*tensors: Tensor) -> list[Tensor]:
    """Copies to be learned."""
    return [tensor.clone().requires_grad_() for tensor in tensors]


def descend(optimizer: Optimizer, loss: Tensor) -> float:
    """One step down a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def mean_of_user(x: Tensor, c: Tensor, V: Tensor, w: Tensor) -> Tensor:
    return (c * softplus(-(x @ V @ w) / T)).sum() / c.sum()


def pull(target: Tensor, w: Tensor, x: Tensor, shrinkage: float) -> Tensor:
    """Shrinkage of a user with comparisons x to the population's weights, in comparisons."""
    return shrinkage / len(x) * (target * (target / w).log()).sum()


def joint_objective(X, c, V, logits, reference=None, alpha=0.0):
    """Equation 10."""
    total = sum(mean_of_user(X[u], c[u], V, logits[u].softmax(0)) for u in range(len(X)))
    if alpha:
        for k in range(V.shape[1]):
            total = total + alpha * (V[:, k] - reference).pow(2).sum()
    return total


def pair_mean(X, c, V, logits):
    """Mean over all comparisons."""
    means = [mean_of_user(X[u], c[u], V, logits[u].softmax(0)) for u in range(len(X))]
    weights = [of_user.sum() for of_user in c]
    return sum(mean * n for mean, n in zip(means, weights, strict=True)) / sum(weights)


def cosine_penalty(V, reference):
    parts = [1 - (v @ reference) / (v.norm() * reference.norm()) for v in V.T]
    return torch.stack(parts).mean()


def schedule(alpha, t, steps):
    begin, end = int(0.2 * steps), int(0.8 * steps)
    return alpha * min(1, max(0, (t - begin) / (end - begin)))


def joint(X, logits, V, steps, lr, reference=None, alpha=0.0, c=None, shrinkage=0.0):
    """Adam on weights and basis together. Returns logits, V and the losses."""
    c, (logits, V) = c or ones(X), free(logits, V)
    optimizer, history = Adam([logits, V], lr=lr), []
    for _ in range(steps):
        loss = joint_objective(X, c, V, logits, reference, alpha)
        if shrinkage:
            W = logits.softmax(1)
            loss = loss + sum(pull(W.detach().mean(0), w, x, shrinkage)
                              for x, w in zip(X, W, strict=True))  # fmt: skip
        history.append(descend(optimizer, loss))
    return logits.detach(), V.detach(), history


def alternating(X, logits, V, steps, lr, reference, alpha, c=None):
    """A step on the weights, then one on the basis with the pull at the new weights."""
    c, (logits, V) = c or ones(X), free(logits, V)
    on_weights, on_basis, history = Adam([logits], lr=lr), Adam([V], lr=lr), []
    for t in range(steps):
        descend(on_weights, pair_mean(X, c, V.detach(), logits))
        loss = pair_mean(X, c, V, logits.detach())
        if alpha_t := schedule(alpha, t, steps):
            loss = loss + alpha_t * cosine_penalty(V, reference)
        history.append(descend(on_basis, loss))
    return logits.detach(), V.detach(), history


def few_shot(X, V, logits, steps, lr, c=None, population=None, shrinkage=0.0):
    """Each user's weights alone, the basis frozen (equation 11)."""
    weights = []
    for x, of_user, start in zip(X, c or ones(X), logits, strict=True):
        (own,) = free(start)
        optimizer = Adam([own], lr=lr)
        for _ in range(steps):
            w = own.softmax(0)
            loss = mean_of_user(x, of_user, V, w)
            if shrinkage:
                loss = loss + pull(population, w, x, shrinkage)
            descend(optimizer, loss)
        weights.append(own.softmax(0).detach())
    return weights


def own_direction(x, c, steps, lr):
    """One user's own reward, from zero."""
    (v,) = free(x.new_zeros(x.shape[1], 1))
    optimizer = Adam([v], lr=lr)
    for _ in range(steps):
        descend(optimizer, mean_of_user(x, c, v, x.new_ones(1)))
    return v.detach()


def accuracy(x, V, w):
    """Equation 15, comparison by comparison."""
    return sum(float(row @ V @ w) > 0 for row in x) / len(x)
