"""LoRe written down from its equations: loops over users, autograd, no cleverness.

X is a list of U tensors [m_u, F]; ``c`` a list of the comparisons' weights [m_u]. What the fast
code in utils.py must equal, step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

T = 100.0


def ones(X: list[Tensor]) -> list[Tensor]:
    return [x.new_ones(len(x)) for x in X]


def losses_of_user(x: Tensor, V: Tensor, w: Tensor) -> Tensor:
    """softplus(-logit) of every comparison of one user."""
    return torch.stack([softplus(-(row @ V @ w) / T) for row in x])


def mean_of_user(x: Tensor, c: Tensor, V: Tensor, w: Tensor) -> Tensor:
    return (c * softplus(-(x @ V @ w) / T)).sum() / c.sum()


def joint_objective(X, c, V, logits, reference=None, alpha=0.0):
    """Equation 10."""
    total = 0.0
    for u in range(len(X)):
        total = total + mean_of_user(X[u], c[u], V, torch.softmax(logits[u], 0))
    if alpha:
        for k in range(V.shape[1]):
            total = total + alpha * (V[:, k] - reference).pow(2).sum()
    return total


def pair_mean(X, c, V, logits):
    """Mean over all comparisons."""
    total, weight = 0.0, 0.0
    for u in range(len(X)):
        w = torch.softmax(logits[u], 0)
        total = total + (c[u] * softplus(-(X[u] @ V @ w) / T)).sum()
        weight = weight + c[u].sum()
    return total / weight


def cosine_penalty(V, reference):
    parts = []
    for k in range(V.shape[1]):
        v = V[:, k]
        parts.append(1 - (v @ reference) / (v.norm() * reference.norm()))
    return torch.stack(parts).mean()


def schedule(alpha, t, steps):
    begin, end = int(0.2 * steps), int(0.8 * steps)
    if t < begin:
        return 0.0
    if t >= end:
        return alpha
    return alpha * (t - begin) / (end - begin)


def joint(X, logits, V, steps, lr, reference=None, alpha=0.0, c=None):
    """Adam on weights and basis together. Returns logits, V and the losses."""
    c = c or ones(X)
    logits, V = (p.clone().requires_grad_() for p in (logits, V))
    optimizer, history = torch.optim.Adam([logits, V], lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = joint_objective(X, c, V, logits, reference, alpha)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return logits.detach(), V.detach(), history


def alternating(X, logits, V, steps, lr, reference, alpha, c=None):
    """A step on the weights, then one on the basis with the pull at the new weights."""
    c = c or ones(X)
    logits, V = (p.clone().requires_grad_() for p in (logits, V))
    on_weights = torch.optim.Adam([logits], lr=lr)
    on_basis = torch.optim.Adam([V], lr=lr)
    history = []
    for t in range(steps):
        on_weights.zero_grad()
        pair_mean(X, c, V.detach(), logits).backward()
        on_weights.step()
        on_basis.zero_grad()
        loss = pair_mean(X, c, V, logits.detach())
        alpha_t = schedule(alpha, t, steps)
        if alpha_t:
            loss = loss + alpha_t * cosine_penalty(V, reference)
        loss.backward()
        on_basis.step()
        history.append(loss.item())
    return logits.detach(), V.detach(), history


def few_shot(X, V, logits, steps, lr, c=None):
    """Each user's weights alone, the basis frozen (equation 11)."""
    c, weights = c or ones(X), []
    for u in range(len(X)):
        free = logits[u].clone().requires_grad_()
        optimizer = torch.optim.Adam([free], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            mean_of_user(X[u], c[u], V, torch.softmax(free, 0)).backward()
            optimizer.step()
        weights.append(torch.softmax(free, 0).detach())
    return weights


def accuracy(x, V, w):
    """Equation 15, comparison by comparison."""
    return sum(float(row @ V @ w) > 0 for row in x) / len(x)
