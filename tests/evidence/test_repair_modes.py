"""Posteriors of several modes: no way that knows one of them passes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value

import pyproelbo as pe

QUIET = {"progress": False}


def squares(num, mean=0.0, side=1.0, scale=None):
    """x_1 tells of the square of z_1, and each other x_k of z_k; a guide at one of the two modes.

    Returns:
        Model and guide, the data, and the probability that z_1 is positive, by quadrature.
    """
    x = torch.cat([torch.tensor([[3.0], [4.0], [6.0]]), rows(3, num - 1)], -1)
    noise = torch.tensor([0.5] + [0.1] * (num - 1))
    means = torch.tensor([mean] + [0.0] * (num - 1))
    precision = 1.5**-2 + 0.1**-2

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(means, 1.5).to_event(1))
            loc = torch.cat([z[..., :1].square(), z[..., 1:]], -1)
            pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)

    def guide(x):
        root = x[:, :1].sqrt()
        sd = 0.25 / root if scale is None else torch.full_like(root, scale)
        loc = torch.cat([side * root, x[:, 1:] * 100 / precision], -1)
        others = torch.full((len(x), num - 1), precision**-0.5)
        with pyro.plate("data", len(x)):
            q = dist.Normal(loc, torch.cat([sd, others], -1)).to_event(1)
            pyro.sample("z", q)

    grid = torch.linspace(-6, 6, 20_001)[:, None]
    log_p = dist.Normal(mean, 1.5).log_prob(grid)
    log_p = log_p + dist.Normal(grid.square(), 0.5).log_prob(x[:, 0])
    return model, guide, x, (log_p.softmax(0) * (grid > 0)).sum(0)


def assert_has_both_modes(found, share):
    """Within 4 standard errors, where a way passes."""
    z = found.draws["z"][..., 0]
    error = (share * (1 - share) / found.effective_sample_size).sqrt()
    assert (((z > 0).double().mean(0) - share).abs() < 4 * error + 2e-3)[found.passes].all()


@pytest.mark.parametrize("num, mean", [(1, 0.0), (1, 1.0), (4, 0.0), (4, 1.0)])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_both_modes_are_found_with_their_weights(num, mean, side):
    """Where half of the mass is missing, less, or more; also where the prior does not tell."""
    model, guide, x, share = squares(num, mean, side)
    weights = pe.psis(model, guide, x, **QUIET)
    assert (weights.khat < 0.7).all()  # so that weights alone would not tell
    found = pe.repair(model, guide, x, steps=240, **QUIET)
    assert (found.method == "modes").all() and found.num_ascents == 16
    assert "family" not in found.seconds  # which would find one mode as well
    assert found.sees_modes.all() == (num == 1)
    assert_has_both_modes(found, share)


@pytest.mark.parametrize("methods", [["family"], ["correlated"], ["annealed"]])
@pytest.mark.parametrize("num", [1, 4])
def test_one_of_two_modes_is_no_posterior(methods, num):
    """No way of one mode passes: what log p(x, z) ascends to tells, or draws of the prior."""
    model, guide, x, share = squares(num, 0.4, scale=0.1)
    found = pe.repair(model, guide, x, methods=methods, annealed=pe.Annealed(20, 5), **QUIET)
    assert not (found.method == methods[0]).any() or methods == ["annealed"]
    assert_has_both_modes(found, share)
    assert "no way passes" in found.notes[0]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_labels_that_may_be_exchanged(seed):
    """The means of two clusters, of which a guide knows one order."""
    x = torch.cat([rows(4, 8) - 2.0, rows(4, 8) + 2.0], -1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
            parts = dist.Normal(z.unsqueeze(-2), 1.0)
            half = dist.Categorical(torch.full((2,), 0.5))
            of_one = dist.MixtureSameFamily(half, parts).expand((*z.shape[:-1], 16))
            pyro.sample("x", of_one.to_event(1), obs=x)

    def guide(x):
        loc = torch.stack([x[:, :8].mean(1), x[:, 8:].mean(1)], -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.45).to_event(1))

    options = {"steps": 240, "annealed": pe.Annealed(20, 5)}
    found = pe.repair(model, guide, x, seed=seed, **options, **QUIET)
    assert found.passes.double().mean() >= 0.75
    z = found.draws["z"][:, found.passes]
    is_above = (z[..., 0] > z[..., 1]).double().mean(0)
    assert ((is_above - 0.5).abs() < 2 / found.effective_sample_size[found.passes].sqrt()).all()


def test_a_needle_cannot_be_seen():
    """Half of the mass where no draw of the prior comes, and no ascent: what passes is the rest.

    As the docstring says.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            log_ratio = dist.Normal(3.0, 1e-5).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
            pyro.factor("needle", torch.logaddexp(torch.zeros_like(z), log_ratio + 0 * x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    found = pe.repair(model, guide, torch.zeros(2), **QUIET)
    assert (found.method == "guide").all() and ((found.draws["z"] - 3.0).abs() > 1e-4).all()


def test_no_ascents_from_a_prior_that_cannot_be_drawn():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(torch.distributions.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    found = pe.repair(model, guide, rows(4), **QUIET)
    assert found.passes.all() and found.num_ascents == 0
    assert any("cannot be seen" in note for note in found.notes)


def test_a_mode_that_is_not_quite_come_to_is_no_other_mode():
    """A posterior ten thousand times narrower than its prior: ascents end some sds away."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1e-4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-4))

    found = pe.repair(model, guide, rows(4), **QUIET)
    assert (found.method == "guide").all() and not found.sees_modes.any()


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_an_autoguide_at_one_mode(kind):
    """z^2 = 4 or so: what an AutoGuide draws are the same numbers as the model's latents."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0].square(), 0.5), obs=torch.tensor(4.0))

    start = init_to_value(values={"z": torch.tensor([2.0, 0.0])})
    guide = kind(model, init_loc_fn=start, init_scale=0.13)
    guide()
    found = pe.repair(model, guide, None, steps=240, **QUIET)
    assert found.method.tolist() == ["modes"] and found.num_ascents == 16
    assert abs((found.draws["z"][:, 0] > 0).double().mean() - 0.5) < 0.1


def test_a_guide_of_both_modes_passes():
    """By nothing but its weights."""
    _, _, x, _ = squares(1)
    model = squares(1)[0]

    def guide(x):
        root = x.sqrt()
        loc, sd = torch.stack([root, -root], -1), 0.27 / root.unsqueeze(-1).expand(-1, -1, 2)
        with pyro.plate("data", len(x)):
            half = dist.Categorical(torch.full(loc.shape, 0.5))
            pyro.sample("z", dist.MixtureSameFamily(half, dist.Normal(loc, sd)).to_event(1))

    found = pe.repair(model, guide, x, **QUIET)
    assert (found.method == "guide").all() and found.num_ascents == 16


def test_a_mixture_of_positive_numbers_is_moved_on_the_real_line():
    """Its support is that of its parts: annealing and repair know it."""
    shape = torch.tensor([2.0, 30.0])

    def model(x):
        with pyro.plate("data", len(x)):
            parts = dist.Gamma(shape, 1.0).expand((len(x), 2))
            half = dist.Categorical(torch.full((len(x), 2), 0.5))
            z = pyro.sample("z", dist.MixtureSameFamily(half, parts))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            parts = dist.Gamma(shape + x.unsqueeze(-1), 2.0)
            half = dist.Categorical(torch.full((len(x), 2), 0.5))
            pyro.sample("z", dist.MixtureSameFamily(half, parts))

    x = torch.tensor([3.0, 10.0, 25.0])
    part = dist.NegativeBinomial(shape, probs=torch.tensor(0.5)).log_prob(x[:, None])
    truth = (part - math.log(2)).logsumexp(-1)
    found = pe.evidence(model, guide, x, method="annealed", num_samples=200, **QUIET)
    assert ((found.log_evidence - truth).abs() < 4 * found.stderr + 1e-3).all()
    assert (pe.repair(model, guide, x, **QUIET).method == "guide").all()
