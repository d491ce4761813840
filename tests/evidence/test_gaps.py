"""The gap between ELBO and evidence, where its parts are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import ppca_and_data
from helpers.oracles import rows
from torch.distributions import kl_divergence

import pyproelbo as pe
from pyproelbo.guides.lgssm import ExactFilter
from pyproelbo.guides.ppca import Diagonal, Exact, FullCovariance
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.vae import VAE


def diagonal_gap(model, x):
    """KL(q* || posterior) of the best diagonal q*: 1/2 (sum_i log P_ii - log |P|)."""
    P = model.posterior(x[:1]).precision_matrix[0].detach()
    return (P.diagonal().log().sum() - P.logdet()).item() / 2


@pytest.mark.slow
@pytest.mark.parametrize("guide_type", [Diagonal, FullCovariance])
def test_both_parts_against_closed_forms(guide_type):
    model, x = ppca_and_data(12)
    guide = guide_type(2, 4)
    truth = model.log_evidence(x).detach()
    result = pe.inference_gap(model, guide, x, evidence=truth, steps=300)
    q, p = guide.posterior(x), model.posterior(x)
    if guide_type is Diagonal:
        q = dist.MultivariateNormal(q.mean, q.variance.diag_embed())
    total = kl_divergence(q, p).detach()
    approximation = diagonal_gap(model, x) if guide_type is Diagonal else 0.0
    assert diagonal_gap(model, x) > 0.1
    for value, expected, names in (
        (result.total, total, ("elbo",)),
        (result.approximation, torch.tensor(approximation), ("best_elbo",)),
        (result.amortisation, total - approximation, ("elbo", "best_elbo")),
    ):
        error = sum(result.stderr[name] ** 2 for name in names).sqrt()
        assert ((value - expected).abs() < 4.5 * error + 1e-3).all()
    if guide_type is FullCovariance:  # the posterior itself: no draw tells another bound
        assert result.approximation.abs().max() < 1e-2
        assert result.approximation.abs().median() < 1e-5
    torch.testing.assert_close(result.total, result.approximation + result.amortisation)


def test_the_best_guide_has_nothing_to_gain():
    model, x = ppca_and_data(12)
    result = pe.inference_gap(model, Diagonal.optimum(model), x, steps=100)
    error = (result.stderr["elbo"] ** 2 + result.stderr["best_elbo"] ** 2).sqrt()
    assert (result.amortisation.abs() < 4.5 * error).all()
    truth = model.log_evidence(x).detach()
    assert ((result.log_evidence - truth).abs() < 5 * result.stderr["log_evidence"]).all()
    assert (result.effective_sample_size > 100).all()


def test_other_families_and_inner_plates():
    """A positive latent and a vector in an inner plate, masked: each datum has its own q."""
    x, mask = rows(5, 3), torch.ones(5, 3).bool()
    mask[0, 1:] = False

    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            s = pyro.sample("s", dist.LogNormal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("inner", 3, dim=-1), pyro.poutine.mask(mask=mask[: len(x)]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, s), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("s", dist.LogNormal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("inner", 3, dim=-1), pyro.poutine.mask(mask=mask[: len(x)]):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    result = pe.inference_gap(model, guide, x, steps=200, num_samples=500, plate="data")
    error = (result.stderr["elbo"] ** 2 + result.stderr["best_elbo"] ** 2).sqrt()
    assert (result.amortisation > 4 * error).any()
    assert (result.amortisation > -4 * error).all()
    assert (result.approximation > -4 * result.stderr["best_elbo"] - 0.05).all()


@pytest.mark.slow
def test_a_learned_prior_and_the_programs_stay_as_they_are():
    from pyproelbo.guides.vae import Diagonal as Encoder

    guide = Encoder(2, 4, (8,))
    x = rows(9, 4)
    model = VAE(2, 4, (8,), prior=pe.VampPrior(guide.posterior, 3, pe.priors.RowsOf(x)))
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    state = torch.get_rng_state()
    result = pe.inference_gap(model, guide, x, steps=60, num_samples=300, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    after = [*model.parameters(), *guide.parameters()]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new) and new.requires_grad and new.grad is None
    assert result.amortisation.mean() > 0
    again = pe.inference_gap(model, guide, x, steps=60, num_samples=300, batch_size=4)
    torch.testing.assert_close(result.best_elbo, again.best_elbo)


def test_report():
    model, x = ppca_and_data(12)
    result = pe.inference_gap(model, Exact(model), x, steps=2, num_samples=20)
    lines = str(result).splitlines()
    assert "12 data" in lines[0] and len(lines) == 6
    dataset = result.to_xarray()
    assert dataset.sizes == {"datum": 12}
    torch.testing.assert_close(torch.as_tensor(dataset.total.values), result.total)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps should be a positive whole number, got 0"),
        ({"num_particles": 0}, "num_particles should be a positive whole number"),
        ({"lr": 0.0}, "lr should be a positive number"),
        (
            {"evidence": torch.zeros(3), "steps": 1},
            r"evidence should be of the same data, \(N,\), got shape \(3,\) for 12 data",
        ),
    ],
)
def test_bad_input(options, match):
    model, x = ppca_and_data(12)
    with pytest.raises(ValueError, match=match):
        pe.inference_gap(model, Diagonal(2, 4), x, **options)


def test_guides_that_cannot_be_fitted():
    model = LGSSM(2, 3)
    with pytest.raises(ValueError, match="no parameters"):
        pe.inference_gap(model, ExactFilter(model), model(num=3, num_steps=4).detach())

    def chained(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    def chained_model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"draws 'b' given its sample of \['a'\]"):
        pe.inference_gap(chained_model, chained, rows(5))

    def discrete(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            return pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def discrete_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="'z' has no reparameterised draws"):
        pe.inference_gap(discrete, discrete_guide, rows(5))


def test_a_global_latent_whose_guide_has_pyro_params():
    """Its own parameters are fitted, though they are no module's, and then put back."""
    x = rows(8)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: x.mean() + 0.3)
        pyro.sample("m", dist.Normal(loc, 0.6))  # of which the scale is no parameter

    guide(x)
    result = pe.inference_gap(model, guide, x, steps=100, num_samples=500)
    assert result.optimisation.item() == pytest.approx(0.3**2 / 2 * (8 + 1 / 9), abs=0.1)
    assert torch.equal(pyro.param("loc"), x.mean() + 0.3)
