"""One bound in every form, on models whose evidence is known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate
from helpers.oracles import rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch.utils.data import DataLoader

import pyproelbo as pe
from pyproelbo import decompositions
from pyproelbo.guides.lgssm import ExactFilter
from pyproelbo.guides.ppca import Diagonal, Exact
from pyproelbo.models.lgssm import LGSSM


def ppca(seed=0, size=None):
    """A PPCA whose posterior is correlated, and its best diagonal guide."""
    pyro.set_rng_seed(seed)
    model = conjugate.ppca(size)
    return model, Diagonal.optimum(model)


def check(result, truth=None):
    """What holds of any result."""
    jensen, energy, reconstruction, posterior, bayes = result.forms.values()
    for form in (jensen, energy, posterior):
        assert form == pytest.approx(result.elbo.value, abs=1e-9)
    spread = result.reconstruction.stderr + result.elbo.stderr
    assert abs(reconstruction - result.elbo.value) <= 5 * spread + 1e-9
    assert bayes <= result.log_evidence.value + 1e-12
    assert result.slack.value >= 0 and result.jensen_gap.value >= -1e-12
    assert result.importance_bound.value == pytest.approx(
        result.elbo.value + result.jensen_gap.value, abs=1e-9
    )
    for name in ("elbo", "importance_bound"):
        value, stderr = getattr(result, name)
        if truth is not None:
            assert value <= truth + 4 * stderr


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), num_samples=st.integers(2, 40), size=st.sampled_from([None, 50]))
def test_forms_are_equal_or_ordered(seed, num_samples, size):
    model, guide = ppca(seed, size)
    x = rows(6, 4)
    truth = model.log_evidence(x).detach()
    result = decompositions(model, guide, x, num_samples=num_samples, evidence=truth)
    check(result, truth.mean().item())
    assert result.log_evidence == (pytest.approx(truth.mean().item()), 0.0)
    assert (result.num_data, result.num_samples) == (6, num_samples)


def test_parts_against_closed_forms():
    """Of PPCA and a diagonal guide all parts are known: the estimates are unbiased."""
    model, guide = ppca()
    x = rows(20, 4)
    truth = model.log_evidence(x).detach()
    result = decompositions(model, guide, x, num_samples=4000, evidence=truth)
    q, p = guide.posterior(x), model.posterior(x)
    full = dist.MultivariateNormal(q.mean, q.variance.diag_embed())
    posterior_kl = torch.distributions.kl_divergence(full, p).detach()
    kl = torch.distributions.kl_divergence(q.base_dist, dist.Normal(0.0, 1.0).expand([2])).sum(-1)
    expected = {
        "posterior_kl": posterior_kl.mean(),
        "slack": posterior_kl.mean(),
        "elbo": (truth - posterior_kl).mean(),
        "kl": kl.mean(),
        "entropy": q.entropy().mean() if hasattr(q, "entropy") else None,
        "energy": (truth - posterior_kl - full.entropy()).mean(),
        "reconstruction": (truth - posterior_kl + kl).mean(),
    }
    for name, value in expected.items():
        estimate, stderr = getattr(result, name)
        assert abs(estimate - value.item()) <= 4 * stderr + 1e-9, name
        assert stderr < 0.02
    assert result.kl.stderr == 0.0
    assert result.importance_bound.value == pytest.approx(truth.mean().item(), abs=0.01)


def test_half_the_variance_is_the_gap_of_normal_log_weights():
    """A wrong mean makes log w linear in z, thus normal; the gap is half its variance exactly."""
    loc, x = torch.tensor(0.7), rows(50)
    truth, guide = conjugate.evidence(x), conjugate.guide_of(shift=loc)
    result = decompositions(conjugate.model, guide, x, num_samples=2000, evidence=truth)
    gap = loc.item() ** 2  # KL between normals of one variance 1/2, loc apart
    assert result.posterior_kl.value == pytest.approx(gap, abs=4 * result.posterior_kl.stderr)
    assert result.half_variance.value == pytest.approx(gap, abs=4 * result.half_variance.stderr)


def test_an_exact_guide_has_no_gap_at_all():
    model, _ = ppca()
    x = rows(8, 4)
    result = decompositions(model, Exact(model), x, num_samples=3)
    truth = model.log_evidence(x).mean().item()
    for form in ("log mean w - Jensen gap", "energy + entropy", "log p(x) - KL to the posterior"):
        assert result.forms[form] == pytest.approx(truth)
    for name in ("posterior_kl", "slack", "jensen_gap", "half_variance"):
        assert getattr(result, name) == (pytest.approx(0.0, abs=1e-9), pytest.approx(0.0, abs=1e-9))


def test_standard_errors_are_those_of_repetitions():
    model, guide = ppca()
    x = rows(5, 4)
    truth = model.log_evidence(x).detach()
    many = [
        decompositions(model, guide, x, num_samples=50, evidence=truth, seed=s) for s in range(60)
    ]
    for name in ("elbo", "energy", "slack", "importance_bound", "jensen_gap", "half_variance"):
        values = torch.tensor([getattr(result, name).value for result in many])
        claimed = torch.tensor([getattr(result, name).stderr for result in many]).mean()
        assert 0.6 < claimed / values.std() < 1.6, name


def test_sequences_and_batches():
    model = LGSSM(2, 3)
    x = model(num=5, num_steps=4).detach()
    truth = model.log_evidence(x).detach()
    options = {"num_samples": 20, "evidence": truth, "progress": False}
    check(decompositions(model, ExactFilter(model), x, **options), truth.mean().item())
    check(decompositions(model, ExactFilter(model), x, batch_size=2, chunk=7, **options))


def test_discrete_latents_and_factors():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.factor("f", 0.1 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.6))

    x = rows(30)
    parts = [
        dist.Bernoulli(0.3).log_prob(z) + 0.1 * z + dist.Normal(z, 1.0).log_prob(x)
        for z in (torch.tensor(0.0), torch.tensor(1.0))
    ]
    truth = torch.stack(parts).logsumexp(0)
    result = decompositions(model, guide, x, num_samples=500, evidence=truth)
    check(result, truth.mean().item())
    assert "reconstruction + factor - KL to the prior" in str(result)
    # E_q[0.1 z] = 0.06, and the reconstruction has nothing of it
    assert abs(result.factor.value - 0.06) < 4 * result.factor.stderr
    expected = 0.6 * dist.Normal(1.0, 1.0).log_prob(x) + 0.4 * dist.Normal(0.0, 1.0).log_prob(x)
    error = result.reconstruction.value - expected.mean().item()
    assert abs(error) < 4 * result.reconstruction.stderr


def test_the_evidence_is_estimated_where_it_is_not_given():
    model, guide = ppca()
    x = rows(10, 4)
    own = decompositions(model, guide, x, num_samples=50)
    given = decompositions(
        model, guide, x, num_samples=50, evidence=pe.evidence(model, guide, x, seed=1)
    )
    (a, da), (b, db) = own.log_evidence, given.log_evidence
    assert abs(a - b) < 4 * (da**2 + db**2) ** 0.5 and da > 0
    check(own)
    smoothed = pe.psis(model, guide, x, seed=1)
    by_psis = decompositions(model, guide, x, num_samples=50, evidence=smoothed)
    value, stderr = by_psis.log_evidence
    assert value == pytest.approx(smoothed.log_evidence.mean().item())
    assert stderr == pytest.approx(smoothed.stderr.square().sum().sqrt().item() / 10)
    check(by_psis)


def test_a_loader_that_shuffles():
    """log p(x) is that of the rows at hand, in whichever order they come."""
    model, _ = ppca()
    x = rows(20, 4) * torch.arange(20)[:, None]
    generator = torch.Generator(torch.get_default_device())
    loader = DataLoader(x, 7, shuffle=True, generator=generator)
    result = decompositions(model, Exact(model), loader, num_samples=5)
    assert result.slack.value == pytest.approx(0.0, abs=1e-9)
    assert result.log_evidence.value == pytest.approx(model.log_evidence(x).mean().item())


def test_table_and_dataset():
    model, guide = ppca()
    result = decompositions(model, guide, rows(10, 4), num_samples=50)
    lines = str(result).splitlines()
    assert "10 data, draws: 50" in lines[0] and len(lines) == 8
    assert lines[1].endswith(f"{result.forms['log mean w - Jensen gap']:.4f}")
    dataset = result.to_xarray()
    assert float(dataset.slack) == result.slack.value
    assert float(dataset.slack_stderr) == result.slack.stderr
    assert dataset.slack.units == "nats per datum"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 1}, "num_samples should be a whole number of at least 2, got 1"),
        ({"evidence": torch.zeros(3)}, r"evidence should be of the same data, \(N,\)"),
        ({"evidence": torch.zeros(11)}, r"got shape \(11,\) for 10 data"),
        ({"evidence": torch.full((10,), torch.nan)}, "log_evidence is NaN or infinite"),
    ],
)
def test_bad_input(options, match):
    model, guide = ppca()
    with pytest.raises(ValueError, match=match):
        decompositions(model, guide, rows(10, 4), **options)


def test_scaled_programs_are_refused():
    model, guide = ppca()
    scaled = poutine.scale(model, scale=2.0)
    with pytest.raises(ValueError, match="scaled by"):
        decompositions(scaled, guide, rows(10, 4), evidence=torch.zeros(10))
