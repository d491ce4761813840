"""Programs for objectives of the aggregate posterior, and what holds of their parts."""

import pyro
import pyro.distributions as dist
import torch
from helpers import programs


def assert_adds_up(surgery):
    assert all(value.dim() == 0 and not value.requires_grad for value in surgery)
    close = torch.testing.assert_close
    close(surgery.average_kl, surgery.mutual_information + surgery.marginal_kl)
    close(surgery.marginal_kl, surgery.total_correlation + surgery.dimension_wise_kl)


def nested(guide_of_y=None):
    """Two latents for each of 4 of 12 data, one in an inner plate of 3 with 2 dims."""

    def data():
        return pyro.plate("data", 12, subsample_size=4, dim=-2)

    def model():
        with data():
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(y[..., None], torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=programs.noise(4, 3))

    def guide():
        loc, scale = programs.real("loc", 4, 1), programs.positive("scale", 4, 1)
        with data():
            y = pyro.sample("y", dist.Normal(loc, scale))
            with pyro.plate("inner", 3, dim=-1):
                loc, scale = programs.real("lz", 4, 3, 2), programs.positive("sz", 4, 3, 2)
                loc = loc if guide_of_y is None else guide_of_y(loc, y[..., None])
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def discrete():
    """A latent of each datum that cannot be reparameterised, and one of unknown marginals."""
    probs = programs.noise(4).sigmoid()

    def model():
        with pyro.plate("data", 4):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1) + b, 1.0), obs=programs.noise(4))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("b", dist.Bernoulli(probs))
            mixed = dist.Categorical(torch.ones(4, 2) / 2)
            normals = dist.Normal(programs.real("l", 4, 2, 2), 1.0).to_event(1)
            pyro.sample("z", dist.MixtureSameFamily(mixed, normals))

    return model, guide
