"""Programs that have one set of parameters by their names are told, and no others."""

import copy
import gc
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyproelbo as pe
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.vae import VAE, GaussianLikelihood

QUIET = {"progress": False, "num_samples": 30}


def warned():
    return pytest.warns(pe.SharedParametersWarning, match=r"'AutoNormal.locs.m' and 1 more")


def model(x):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def trained(guide, x, steps=1):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pe.BetaELBO())
    for _ in range(steps):
        svi.step(x)
    return guide


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.SharedParametersWarning)
        yield


def test_the_second_autoguide_of_a_class():
    x = rows(10)
    first = trained(AutoNormal(model), x)
    with warned():
        second = trained(AutoNormal(model), x)
    for guide in (first, second):
        with warned():
            pe.psis(model, guide, x, **QUIET)
    with warned():
        pe.fit(model, second, x, progress=False)


def test_a_copy():
    guide = trained(AutoNormal(model), rows(10))
    with warned():
        trained(copy.deepcopy(guide), rows(10))


def test_the_first_takes_those_of_the_second_where_the_store_was_cleared():
    x = rows(10)
    first = trained(AutoNormal(model), x)
    before = pe.moments(model, first, x, **QUIET).q_mean
    pyro.clear_param_store()
    second = trained(AutoNormal(model), x + 10, steps=50)
    with warned():
        after = pe.moments(model, first, x, **QUIET).q_mean
    assert (after - before).abs() > 1 and first.locs.m is second.locs.m


@pytest.mark.usefixtures("no_warning")
class TestWhatIsMeant:
    def test_parameters_of_modules_alone(self):
        x = rows(10)
        with pyro.settings.context(module_local_params=True):
            first = trained(AutoNormal(model), x)
            before = pe.moments(model, first, x, **QUIET).q_mean
            trained(AutoNormal(model), x + 10)
            assert torch.equal(pe.moments(model, first, x, **QUIET).q_mean, before)

    def test_a_guide_that_is_gone(self):
        trained(AutoNormal(model), rows(10))
        gc.collect()
        trained(AutoNormal(model), rows(10))

    def test_names_of_their_own(self):
        both = PyroModule("both")
        both.first, both.second = AutoNormal(model), AutoNormal(model)
        trained(both.first, rows(10))
        trained(both.second, rows(10))
        for _ in range(2):  # models and guides of the library
            program = VAE(2, 3, (4,), GaussianLikelihood()), Diagonal(2, 3, (4,))
            pe.psis(*program, rows(10, 3), **QUIET)

    def test_a_part_of_two_programs(self):
        program, encoder = VAE(2, 3, (4,), GaussianLikelihood()), Diagonal(2, 3, (4,))
        improved = pe.SemiAmortised(program, encoder)
        for guide in (encoder, improved, encoder):
            pe.psis(program, guide, rows(10, 3), **QUIET)

    def test_tied_parameters(self):
        class Tied(PyroModule):
            def __init__(self):
                super().__init__("tied")
                self.a, self.b = PyroModule[nn.Linear](1, 1), PyroModule[nn.Linear](1, 1)
                self.b.weight = self.a.weight

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    loc = self.b(self.a(x[:, None]))[:, 0]
                    pyro.sample("z", dist.Normal(loc, 1.0))

        def local(x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        guide = Tied()
        svi = SVI(local, guide, pyro.optim.Adam({"lr": 0.1}), pe.BetaELBO())
        svi.step(rows(10))
        pe.psis(local, guide, rows(10), **QUIET)
