"""Programs whose posterior and evidence are known in closed form, for reports to be right about."""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from helpers.oracles import rows
from pyro import poutine

from pyproelbo.models.ppca import PPCA


def model(x):
    """A Normal latent of each datum, seen in Normal noise: p(z | x) = N(x / 2, 1 / 2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of(scale=0.5**0.5, shift=0.0):
    """A guide of ``model``: the posterior, or one that is too wide or off."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale))

    return guide


def simulated(num):
    """A model of ``num`` data, which it simulates where it has none, and a guide with a slope.

    Pyro's store has the slope, as after a fit.
    """

    def model(x=None):
        with pyro.plate("data", num):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", num):
            pyro.sample("z", dist.Normal(slope * x, 0.7))

    guide(torch.zeros(num))
    return model, guide


def evidence(x):
    """log p(x) of each datum of ``model``."""
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def ppca(dataset_size=None):
    """A PPCA of two latents and four features, whose posterior is correlated."""
    model = PPCA(2, 4, dataset_size)
    with torch.no_grad():
        model.W.add_(torch.randn(4, 2))
    return model


def ppca_and_data(num):
    """That, and data of it."""
    model = ppca()
    return model, model(num=num).detach()


MASK = [[True, False], [True, True], [False, True]]


def groups(x, q):
    """Three data with one latent, and with one for each of two members, of which some are masked.

    The model where q is 0, a guide where it is 1.
    """
    with pyro.plate("data", 3, dim=-2):
        c = pyro.sample("c", dist.Normal(0.1 * q, 1.0))
        with pyro.plate("inner", 2, dim=-1), poutine.mask(mask=torch.tensor(MASK)):
            z = pyro.sample("z", dist.Normal(c * (1 - q), 1.0 + q))
            if not q:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def evidence_of_groups(x):
    """log p of the members that are not masked, (3,): given c each is N(c, 2)."""
    members = [row[there] for row, there in zip(x, torch.tensor(MASK), strict=True)]
    covariances = [torch.ones(len(m), len(m)) + 2 * torch.eye(len(m)) for m in members]
    return torch.stack(
        [
            dist.MultivariateNormal(torch.zeros(len(m)), covariance).log_prob(m)
            for m, covariance in zip(members, covariances, strict=True)
        ]
    )


class Hierarchy(NamedTuple):
    """mu ~ N(0, 2), z_n ~ N(mu, 1), x_n ~ N(z_n, 1/2).

    Attributes:
        x: the data, (N,).
        q: the posterior of mu.
        log_evidence: log p(x).
    """

    x: torch.Tensor
    q: dist.Normal
    log_evidence: torch.Tensor

    @classmethod
    def of(cls, num):
        x = 0.7 + math.sqrt(1.25) * rows(num)
        precision = 1 / 4 + num / 1.25
        covariance = 4 * torch.ones(num, num) + 1.25 * torch.eye(num)
        log_evidence = dist.MultivariateNormal(torch.zeros(num), covariance).log_prob(x)
        return cls(x, dist.Normal(x.sum() / 1.25 / precision, precision**-0.5), log_evidence)

    @staticmethod
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, shift=0.0, factor=1.0, local_shift=0.0, local_factor=1.0):
        """The posterior, or what is off by so many sds, and wider by a factor, at each level."""
        of_mu, sd = self.of_mu(shift, factor), 0.2**0.5

        def guide(x):
            mu = pyro.sample("mu", of_mu)
            with pyro.plate("data", len(x)):
                mean = (mu + 4 * x) / 5 + local_shift * sd
                pyro.sample("z", dist.Normal(mean, local_factor * sd))

        return guide

    def of_mu(self, shift=0.0, factor=1.0):
        """q(mu) of that guide."""
        return dist.Normal(self.q.loc + shift * self.q.scale, factor * self.q.scale)
