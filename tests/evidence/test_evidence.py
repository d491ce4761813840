"""log p(x) by importance weighting, where it is known."""

import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate
from helpers.oracles import mean_and_stderr, rows
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal, AutoNormalMessenger
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo.guides import lgssm as guides
from pyproelbo.guides.ppca import Diagonal, Exact
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA


def ppca(size=None):
    model = PPCA(2, 4, size)
    return model, Diagonal.optimum(model)


def test_exact_posterior_needs_one_sample():
    model, _ = ppca()
    x = rows(7, 4)
    result = pe.evidence(model, Exact(model), x, num_samples=1)
    torch.testing.assert_close(result.log_evidence, model.log_evidence(x).detach().cpu())
    torch.testing.assert_close(result.elbo, result.log_evidence)
    assert (result.effective_sample_size == 1).all() and result.stderr.isnan().all()


@pytest.mark.parametrize("size", [None, 100])
def test_weights_are_unbiased(size):
    """The mean of the weights is p(x), under a plate that stands for more data too."""
    model, guide = ppca(size)
    x = 0.5 * rows(5, 4)
    result = pe.evidence(model, guide, x, num_samples=20_000, chunk=5000)
    truth = model.log_evidence(x).detach().cpu()
    error = (result.log_evidence - truth).expm1()
    assert (error.abs() < 4 * result.stderr).all() and (result.stderr < 0.05).all()
    assert (result.elbo < truth).all()
    assert (result.effective_sample_size > 100).all()


def test_bound_tightens_with_samples():
    model, guide = PPCA(2, 4), Diagonal(2, 4)
    x, truth = rows(400, 4), 0.0
    gaps, errors = [], []
    for num in (1, 4, 64):
        result = pe.evidence(model, guide, x, num_samples=num)
        truth = model.log_evidence(x).detach().cpu()
        gap, error = mean_and_stderr(truth - result.log_evidence)
        gaps.append(gap)
        errors.append(error)
    assert gaps[0] - gaps[1] > 3 * errors[0] and gaps[1] - gaps[2] > 3 * errors[1]
    assert gaps[2] > -3 * errors[2]


def test_sequences_against_kalman():
    model = LGSSM(2, 3)
    guide = guides.ExactFilter(model)
    x, lengths = model(num=3, num_steps=6).detach(), torch.tensor([6, 1, 4])
    observed = torch.arange(6) != 2
    args = (x, lengths, observed.expand(3, 6))
    truth = model.log_evidence(*args).detach().cpu()
    result = pe.evidence(model, guide, args, num_samples=4000, chunk=1000)
    error = (result.log_evidence - truth).expm1()
    assert (error.abs() < 4 * result.stderr + 1e-12).all()
    exact = pe.evidence(model, guides.Exact(model), args, num_samples=2)
    torch.testing.assert_close(exact.log_evidence, truth)


def test_batches_and_chunks():
    """Loaders, tuples and short last batches give every datum its place."""
    model, _ = ppca()
    x = rows(10, 4)
    truth = model.log_evidence(x).detach().cpu()
    for data in (x, (x,), {"x": x}, DataLoader(TensorDataset(x), 3)):
        result = pe.evidence(
            model, Exact(model), data, num_samples=5, chunk=2, batch_size=4, progress=False
        )
        torch.testing.assert_close(result.log_evidence, truth)
    assert "log p(x)" in str(result) and "10 data, samples: 5" in str(result)


def test_nothing_else_changes():
    model, guide = ppca()
    x = rows(3, 4)
    state, model.training = torch.get_rng_state(), True
    a, b = (pe.evidence(model, guide, x, num_samples=3, seed=4) for _ in range(2))
    assert torch.equal(a.log_evidence, b.log_evidence)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not pyro.get_param_store().keys()


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("method", ["importance", "annealed"])
def test_progress(method, progress, capsys, monkeypatch):
    """A bar of batches, and one of temperatures, on a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model, guide = ppca()
    method = pe.Annealed(3, 1) if method == "annealed" else method
    options = {"method": method, "num_samples": 2, "batch_size": 2, "progress": progress}
    pe.evidence(model, guide, rows(6, 4), **options)
    bars = capsys.readouterr().err
    assert ("evidence:" in bars and "/3 [" in bars) == progress
    assert ("annealing:" in bars) == (progress and method != "importance")


def test_inner_plates_masks_and_several_latents():
    """A local latent in an inner plate, masked: against a quadrature of each."""
    x, programs = rows(3, 2), [partial(conjugate.groups, q=q) for q in (0, 1)]
    result = pe.evidence(*programs, x, num_samples=20_000, plate="data")
    error = (result.log_evidence - conjugate.evidence_of_groups(x).cpu()).expm1()
    assert (error.abs() < 4 * result.stderr).all()


@pytest.mark.parametrize("auto", [AutoNormal, AutoNormalMessenger])
def test_autoguides(auto):
    """A positive latent, by an auxiliary site or at once."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    x = rows(4)
    guide = auto(model, init_scale=0.8)
    guide(x)
    result = pe.evidence(model, guide, x, num_samples=20_000, chunk=5000)
    error = (result.log_evidence - dist.Normal(0.0, 2.0**0.5).log_prob(x).cpu()).expm1()
    assert (error.abs() < 4 * result.stderr).all() and (result.stderr < 0.05).all()


@pytest.mark.parametrize("of", [pe.evidence, pe.psis, pe.decompositions, pe.check])
def test_a_point_is_no_posterior(of):
    model, _ = ppca()
    x = rows(4, 4)
    guide = AutoDelta(model)
    guide(x)
    with pytest.raises(ValueError, match="the guide has one value for the latent 'z'"):
        of(model, guide, x)


def test_bad_input():
    model, guide = ppca()
    x = rows(4, 4)

    def discrete(x, obs=True):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            if obs:
                pyro.sample("x", dist.Normal(k, 1.0), obs=x[:, 0])

    enumerated = config_enumerate(lambda x: discrete(x, False))
    for args, kwargs, message in [
        ((model, guide, x), {"num_samples": 0}, "num_samples should be a positive"),
        ((model, guide, x), {"chunk": 1.5}, "chunk should be a positive"),
        ((model, guide, x[:0]), {}, "at least one row"),
        ((discrete, enumerated, x), {}, "enumerates"),
        ((poutine.scale(model, scale=2.0), guide, x), {}, "scaled by 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.evidence(*args, **kwargs)
