"""A mixture of Gaussians as the distribution of tastes, from seen users' posteriors."""

from __future__ import annotations

import numpy as np
import torch

from lore.methods.fitting.geometry import everyones
from lore.methods.fitting.posterior import Posterior, Prior

ROUNDS = 50
LEAST_USERS = 20  # for each component


def fit_mixture(posterior: Posterior, components: int, processes: int = 1) -> Prior | None:
    """The mixture that users' tastes look drawn from; None where users are too few for it.

    Starts at scikit-learn's mixture of the posterior means, which alone would be too narrow where
    users have few comparisons; then EM with the posteriors' covariances taken into account
    (extreme deconvolution, Bovy et al. 2011, with posteriors from N(0, I) as the measurements).

    Args:
        posterior: of this process's users, given a prior N(0, I).
        components: of the mixture.
        processes: over which users are spread.
    """
    from sklearn.mixture import GaussianMixture  # slow to import, and few scripts come here

    mean, cov = everyones(posterior.mean, processes), everyones(posterior.cov, processes)
    U, K = mean.shape
    if LEAST_USERS * components > U:
        return None
    start = GaussianMixture(components, reg_covar=1e-3, random_state=0, covariance_type="full")
    start.fit(mean.cpu().numpy())
    weight, centre, spread = (
        torch.as_tensor(np.asarray(x)).to(mean)
        for x in (start.weights_, start.means_, start.covariances_)
    )
    # What the choices alone say of a user: the posterior without its prior, in natural form
    one = torch.eye(K).to(mean)
    P = torch.linalg.inv(cov)
    added, pull = P - one, (P @ mean[:, :, None])[:, :, 0]
    for _ in range(ROUNDS):
        inverse = torch.linalg.inv(spread)
        Q = added[:, None] + inverse[None]  # [U, C, K, K]
        h = pull[:, None] + (inverse @ centre[:, :, None])[:, :, 0][None]
        S = torch.linalg.inv(Q)
        m = (S @ h[..., None])[..., 0]
        quad = (h * m).sum(2) - (centre * (inverse @ centre[:, :, None])[:, :, 0]).sum(1)
        logs = weight.log() + (quad - torch.logdet(Q) - torch.logdet(spread)) / 2
        share = logs.softmax(1)  # [U, C]
        mass = share.sum(0) + 1e-9
        weight = mass / mass.sum()
        centre = (share[:, :, None] * m).sum(0) / mass[:, None]
        off = m - centre
        second = S + off[..., :, None] * off[..., None, :]
        prior_mass = 1.0  # one user's worth of a wide component keeps covariances regular
        spread = ((share[:, :, None, None] * second).sum(0) + 0.1 * prior_mass * one) / (
            mass[:, None, None] + prior_mass
        )
    return Prior(weight, centre, spread)
