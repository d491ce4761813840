"""Which densities depend on which sites, asked of programs."""

import pyro
import pyro.distributions as dist
import torch
from helpers.oracles import rows
from pyro.infer.autoguide import AutoNormal

from pyproelbo._rows.dependencies import DATA, parents
from pyproelbo.guides.vae import FullCovariance
from pyproelbo.models.vae import VAE


def chain(x):
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(x[:, 0], 1.0))
        k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3)))
        loc = torch.zeros(len(x), 2)
        loc[:, 0] = a.detach()  # written in place, and without a gradient
        pyro.sample("b", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("c", dist.Normal(k.to(x), 1.0))
        pyro.sample("d", dist.Normal(0.0, 1.0).expand([len(x)]))


def test_each_way_to_depend():
    assert parents(chain, (rows(8, 2),), {}) == {
        "a": {DATA},
        "k": set(),
        "b": {"a"},
        "c": {"k"},
        "d": set(),
    }


def test_the_data_may_be_keywords_and_some_sites_be_asked_for():
    assert parents(chain, (), {"x": rows(8, 2)}, ["a", "b"]) == {"a": {DATA}, "b": {"a"}}


def test_models_and_guides_of_the_library():
    x = rows(8, 5)
    assert parents(VAE(2, 5, (4,)), (x,), {}) == {"z": set()}
    assert parents(FullCovariance(2, 5, (4,)), (x,), {}) == {"z": {DATA}}


def test_an_autoguide_draws_auxiliary_sites():
    def model(x):
        with pyro.plate("data", len(x)):
            scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    assert parents(AutoNormal(model), (rows(8),), {}) == {"scale_unconstrained": set()}


def test_nothing_is_left_behind():
    before = torch.get_rng_state()
    parents(chain, (rows(8, 2),), {})
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store())
