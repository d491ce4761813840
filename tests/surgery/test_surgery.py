"""pe.surgery against known answers, brute force and its own laws."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import mean_and_stderr, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal, Exact, FullCovariance
from pyproelbo.models.gmm import GMM
from pyproelbo.models.ppca import PPCA

SCALARS = (
    "elbo",
    "reconstruction",
    "average_kl",
    "mutual_information",
    "marginal_kl",
    "total_correlation",
    "dimension_wise_kl",
)


def standard(size=2):
    return dist.Normal(torch.zeros(size), torch.ones(size)).to_event(1)


def programs(q, p=standard):
    """A model with the prior p() of z, and a guide with the posterior q(x)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", p())
            mean = z.flatten(1).sum(1) if z.dim() > 1 else z.to(x)
            mean = mean[:, None].expand(x.shape)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


def normal(x):
    return dist.Normal(x[:, :2], 0.3 + x[:, 2:4].sigmoid()).to_event(1)


def correlated(x):
    L = torch.diag_embed(0.3 + x[:, 2:4].sigmoid()) + torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    return dist.MultivariateNormal(x[:, :2], scale_tril=L)


def flow(x):
    base = dist.Normal(torch.zeros_like(x[:, :2]), 1.0).to_event(1)
    scale = 0.3 + x[:, 2:4].sigmoid()
    affine = dist.transforms.AffineTransform(x[:, :2], scale, event_dim=1)
    return dist.TransformedDistribution(base, [affine])


def mixture(x):
    loc = torch.stack([x[:, :2], x[:, 2:4]], 1)
    parts = dist.Normal(loc, 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=x[:, :2]), parts)


def student(x):
    return dist.StudentT(5.0, x[:, :2], 0.5).to_event(1)


def gamma(x):
    return dist.Gamma(2.0 + x[:, :2].exp(), 2.0).to_event(1)


POSTERIORS = [normal, correlated, flow, mixture, student, gamma]
PRIORS = {gamma: lambda: dist.Gamma(2.0, 2.0).expand([2]).to_event(1)}  # of others, standard


def log_q_matrix(q, z):
    """log q(z_m | x_n), one pair after the other."""
    return torch.stack([q.log_prob(value.expand(q.batch_shape + value.shape)) for value in z])


@pytest.mark.parametrize("k, log_likelihood, average_kl", [
    (2, 0.0057, 2.5137), (5, 8.9076, 6.4814), (10, 17.4519, 12.7961), (20, 27.2773, 25.4383)
])  # fmt: skip
def test_the_optimal_linear_vae_on_digits(k, log_likelihood, average_kl):
    pytest.importorskip("sklearn")
    from pyproelbo.datasets import digits

    x = digits().x
    ppca = PPCA.optimum(x, k)
    result = pe.surgery(ppca, Diagonal.optimum(ppca), x)
    assert not list(pyro.get_param_store())
    assert result.average_kl == pytest.approx(average_kl, abs=5e-5)
    assert result.elbo == pytest.approx(log_likelihood, abs=5e-5)
    assert result.elbo == pytest.approx(ppca.log_evidence(x).mean().item(), abs=1e-9)
    assert result.stderr["elbo"] < 1e-9
    assert result.log_n == pytest.approx(7.4939, abs=1e-4)
    assert result.mutual_information <= result.log_n
    assert result.marginal_kl >= result.average_kl - result.log_n
    assert result.active_units.all()


@pytest.mark.parametrize("q", POSTERIORS)
def test_against_brute_force_at_the_same_draws(q):
    """Where the KL is sampled the estimates are plain means over the draws."""
    x = rows(40, 4)
    model, guide = programs(q, PRIORS.get(q, standard))
    result = pe.surgery(model, guide, x, batch_size=17)
    z = result.codes.to(x)
    log_q = log_q_matrix(q(x), z)
    mi = (log_q.diagonal() - log_q.logsumexp(1) + math.log(40)).mean().item()
    tolerance = 1e-9 if result.stderr["average_kl"] else 6 * result.stderr["mutual_information"]
    assert result.mutual_information == pytest.approx(mi, abs=tolerance)


@pytest.mark.parametrize("q", POSTERIORS)
def test_within_its_standard_error_of_many_draws(q):
    x = rows(30, 4)
    prior = PRIORS.get(q, standard)
    model, guide = programs(q, prior)
    result = pe.surgery(model, guide, x, num_samples=50)
    z = q(x).sample((400,))
    log_q = torch.stack([log_q_matrix(q(x), draw) for draw in z])
    aggregate = log_q.logsumexp(2) - math.log(30)
    own = log_q.diagonal(dim1=1, dim2=2)
    mean = z.sum(-1)[..., None].expand(*z.shape[:2], 4)
    likelihood = dist.Normal(mean, 1.0).to_event(1).log_prob(x)
    exact = {
        "reconstruction": likelihood,
        "average_kl": own - prior().log_prob(z),
        "mutual_information": own - aggregate,
        "marginal_kl": aggregate - prior().log_prob(z),
    }
    for name, draws in exact.items():
        value, stderr = mean_and_stderr(draws.mean(1))
        error = math.hypot(stderr.item(), result.stderr[name])
        assert abs(getattr(result, name) - value.item()) < 4.5 * error + 1e-9, name


def test_the_general_route_gives_the_numbers_of_the_gaussian_one():
    x = rows(50, 4)
    gaussian = pe.surgery(*programs(normal), x)

    def diagonal(x):
        q = normal(x)
        return dist.MultivariateNormal(q.mean, scale_tril=q.stddev.diag_embed())

    dense, flowing = (pe.surgery(*programs(q), x) for q in (diagonal, flow))
    for name in SCALARS:
        value = getattr(gaussian, name)
        assert getattr(dense, name) == pytest.approx(value, abs=6 * gaussian.stderr[name] + 1e-9)
    assert flowing.total_correlation is None and flowing.kl_per_dim is None
    assert flowing.mutual_information == pytest.approx(
        gaussian.mutual_information, abs=6 * flowing.stderr["mutual_information"]
    )
    torch.testing.assert_close(dense.kl_per_dim, gaussian.kl_per_dim)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(POSTERIORS), st.integers(1, 12), st.integers(1, 3), st.integers(1, 15),
    st.integers(0, 99),
)  # fmt: skip
def test_identities_and_bounds(q, num_data, num_samples, batch_size, seed):
    x = torch.randn(num_data, 4, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    x = x.to(torch.get_default_device())
    prior = PRIORS.get(q, standard)
    s = pe.surgery(
        *programs(q, prior), x, num_samples=num_samples, batch_size=batch_size, seed=seed
    )
    close = {"abs": 1e-10, "rel": 1e-10}
    assert s.reconstruction - s.mutual_information - s.marginal_kl == pytest.approx(s.elbo, **close)
    assert s.mutual_information + s.marginal_kl == pytest.approx(s.average_kl, **close)
    if s.total_correlation is not None:
        assert s.total_correlation + s.dimension_wise_kl == pytest.approx(s.marginal_kl, **close)
        assert s.marginal_kl_per_dim.sum().item() == pytest.approx(s.dimension_wise_kl, **close)
    assert s.mutual_information <= s.log_n + 1e-12
    if num_data == 1:
        assert s.mutual_information == pytest.approx(0.0, abs=1e-6)
    assert all(np.isfinite(np.asarray(error)).all() for error in s.stderr.values())


def test_kl_per_dim_sums_to_the_average_kl_of_independent_dims():
    s = pe.surgery(*programs(normal), rows(50, 4))
    assert s.kl_per_dim.sum().item() == pytest.approx(s.average_kl)


def test_identical_posteriors_have_no_information():
    x = rows(64, 4)
    s = pe.surgery(*programs(lambda x: normal(torch.ones_like(x))), x)
    assert s.mutual_information == pytest.approx(0.0, abs=1e-6)
    assert s.marginal_kl == pytest.approx(s.average_kl, abs=1e-6)
    assert not s.active_units.any()


def test_posteriors_far_apart_have_all_information():
    x = rows(64, 4)

    def q(x):
        return dist.Normal(1e3 * x[:, :2], 0.1).to_event(1)

    s = pe.surgery(*programs(q), x)
    assert s.mutual_information == pytest.approx(math.log(64), abs=1e-6)
    assert s.stderr["mutual_information"] < 1e-6


def test_an_aggregate_equal_to_the_prior_has_no_marginal_kl():
    x = rows(16, 4)
    loc = x[:, :2]

    def prior():
        parts = dist.Normal(loc, 0.5).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(16)), parts)

    model, guide = programs(lambda x: dist.Normal(x[:, :2], 0.5).to_event(1), prior)
    s = pe.surgery(model, guide, x)
    assert s.marginal_kl == pytest.approx(0.0, abs=1e-9)
    assert s.mutual_information == pytest.approx(s.average_kl, abs=1e-9)
    assert s.dimension_wise_kl is None and s.total_correlation is not None


def test_two_gaussians_by_quadrature():
    x = torch.tensor([[-0.7], [1.1]])

    def q(x):
        return dist.Normal(x[:, 0], 0.8)

    model, guide = programs(q, lambda: dist.Normal(0.0, 1.0))
    s = pe.surgery(model, guide, x, num_samples=1500)
    z = torch.linspace(-9.0, 9.0, 20_001)
    parts = dist.Normal(x, 0.8).log_prob(z)
    aggregate = parts.logsumexp(0) - math.log(2)
    step = z[1] - z[0]
    marginal = (aggregate.exp() * (aggregate - dist.Normal(0.0, 1.0).log_prob(z))).sum() * step
    information = (parts.exp() * (parts - aggregate)).sum(1).mean() * step
    assert abs(s.mutual_information - information) < 4 * s.stderr["mutual_information"]
    assert abs(s.marginal_kl - marginal) < 4 * s.stderr["marginal_kl"]
    assert s.stderr["marginal_kl"] < 0.02
    assert s.dimension_wise_kl == pytest.approx(s.marginal_kl)
    assert s.total_correlation == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_standard_errors_are_those_of_repeated_runs(num_samples):
    x = rows(600, 4)
    model, guide = programs(normal)
    runs = [pe.surgery(model, guide, x, num_samples=num_samples, seed=seed) for seed in range(40)]
    for name in SCALARS:
        spread = torch.tensor([getattr(run, name) for run in runs]).std().item()
        stated = np.mean([run.stderr[name] for run in runs])
        # the spread of 40 runs is known to 11%
        assert spread == pytest.approx(stated, rel=0.5, abs=1e-9), name


def three_sites():
    W = rows(4, 6) / 2

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", standard())
            b = pyro.sample("b", dist.Laplace(a + 0.5, 1.0).to_event(1))
            c = pyro.sample("c", dist.Gamma(2.0, 1.0))
            mean = torch.cat([a, b[..., :1], c[..., None]], -1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def posterior(x, a=None):
        """Of a, of b given a, and of c."""
        at = x @ W
        return (
            dist.Normal(at[..., :2], 0.5).to_event(1),
            None if a is None else dist.Laplace(at[..., 2:4] + a.square(), 0.7).to_event(1),
            dist.Gamma(2.0 + at[..., 4].exp(), 1.5),
        )

    def guide(x):
        with pyro.plate("data", len(x)):
            q_a, _, q_c = posterior(x)
            a = pyro.sample("a", q_a)
            # torch.cat does not broadcast: this guide takes one z for each row, and no more
            both = torch.cat([x, a], -1)
            pyro.sample("b", posterior(both[:, :4], both[:, 4:])[1])
            pyro.sample("c", q_c)

    return model, guide, posterior


def test_three_sites_jointly_where_one_depends_on_another():
    x = rows(25, 4)
    model, guide, posterior = three_sites()
    s = pe.surgery(model, guide, x, batch_size=10)
    assert s.total_correlation is None and s.kl_per_dim is None
    assert s.dims == ("a[0]", "a[1]", "b[0]", "b[1]", "c")
    a, b, c = s.codes.to(x).split([2, 2, 1], 1)
    matrix = []
    for i in range(25):  # z of datum i at the posteriors of all data
        q_a, q_b, q_c = posterior(x, a[i])
        matrix.append(q_a.log_prob(a[i]) + q_b.log_prob(b[i]) + q_c.log_prob(c[i]))
    matrix = torch.stack(matrix)
    own = matrix.diagonal()
    p_b = dist.Laplace(a + 0.5, 1.0).to_event(1)
    log_p = standard().log_prob(a) + p_b.log_prob(b) + dist.Gamma(2.0, 1.0).log_prob(c[:, 0])
    mi = (own - matrix.logsumexp(1) + math.log(25)).mean().item()
    tolerance = 6 * s.stderr["mutual_information"]  # some sites are corrected by a closed form
    assert s.mutual_information == pytest.approx(mi, abs=tolerance)
    assert s.average_kl == pytest.approx((own - log_p).mean().item(), abs=2.0)

    many = pe.surgery(model, guide, x, num_samples=30)
    draws = []
    for _ in range(30):
        trace = poutine.trace(guide).get_trace(x)
        a, b, c = (trace.nodes[name]["value"] for name in "abc")
        pairs = [
            sum(q.log_prob(v[i]) for q, v in zip(posterior(x, a[i]), (a, b, c), strict=True))
            for i in range(25)
        ]
        pairs = torch.stack(pairs)
        draws.append((pairs.diagonal() - pairs.logsumexp(1) + math.log(25)).mean())
    value, stderr = mean_and_stderr(torch.stack(draws))
    error = math.hypot(stderr.item(), many.stderr["mutual_information"])
    assert abs(many.mutual_information - value.item()) < 4 * error


def test_chosen_sites_leave_the_kl_of_others_beside():
    x = rows(25, 4)
    model, guide, _ = three_sites()
    s = pe.surgery(model, guide, x, site="c")
    assert s.dims == ("c",) and s.other_kl > 0
    parts = s.mutual_information + s.marginal_kl + s.other_kl
    assert s.reconstruction - parts == pytest.approx(s.elbo)
    both = pe.surgery(model, guide, x, site=["a", "c"])
    assert both.total_correlation is not None
    assert both.average_kl == pytest.approx(
        s.average_kl + pe.surgery(model, guide, x, site="a").average_kl
    )


# --- given other latents -----------------------------------------------------------------------

ADDS_UP = ("average_kl", "mutual_information", "marginal_kl")
WHOLE = ("elbo", "reconstruction", "factor")


def two_levels():
    """Categorical u and, given it, v: what surgery estimates can be had by enumeration."""
    U, V = rows(4, 3), rows(2, 4, 5, 3)[1]
    prior_u, prior_v = torch.tensor([0.2, 0.3, 0.5]), rows(3, 5).softmax(-1)

    def q_u(x):
        return (2 * x @ U).softmax(-1)

    def q_v(x):
        return torch.einsum("ni,ivu->nuv", x, V).softmax(-1)

    def model(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Categorical(prior_u))
            v = pyro.sample("v", dist.Categorical(prior_v[u]))
            mean = (u + v).to(x)[:, None].expand(x.shape)
            pyro.sample("x", dist.Normal(mean, 3.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Categorical(q_u(x)))
            pyro.sample("v", dist.Categorical(q_v(x)[torch.arange(len(x)), u]))

    def exact(x):
        """Of u, of v given u, and of both, by enumeration: average KL, information, marginal KL."""
        q_of_u, q = q_u(x), q_u(x)[:, :, None] * q_v(x)
        p = prior_u[:, None] * prior_v

        def of_both(q, p):  # (N, K) and (K,)
            information = (q * (q / q.mean(0)).log()).sum(1).mean()
            marginal = (q.mean(0) * (q.mean(0) / p).log()).sum()
            return torch.stack([information + marginal, information, marginal])

        upper, both = of_both(q_of_u, prior_u), of_both(q.flatten(1), p.flatten())
        return {"u": upper, "v given u": both - upper, "both": both}

    return model, guide, exact


def test_given_another_latent_by_enumeration():
    model, guide, exact = two_levels()
    x = rows(12, 4)
    found = {
        "u": pe.surgery(model, guide, x, site="u", num_samples=100),
        "v given u": pe.surgery(model, guide, x, site="v", given="u", num_samples=100),
        "both": pe.surgery(model, guide, x, num_samples=100),
    }
    for name, truth in exact(x).items():
        s = found[name]
        assert s.average_kl > 0.1 and s.mutual_information > 0.05
        for part, value in zip(ADDS_UP, truth, strict=True):
            assert abs(getattr(s, part) - value) < 4 * s.stderr[part] + 1e-9, (name, part)
            assert s.stderr[part] < 0.06, (name, part)


def heavy(loc, scale):
    return dist.StudentT(3.0, loc, scale)


def two_normal_levels(prior=dist.Normal):
    """A Normal given another; with the prior ``heavy`` every KL is sampled."""
    W = rows(4, 6) / 2

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", prior(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", prior(a + 0.5, 1.0).to_event(1))
            mean = torch.cat([a, b], -1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x @ W[:, :2], 0.5).to_event(1))
            pyro.sample("b", q_b(x, a))

    def q_b(x, a):
        return dist.Normal(torch.cat([x, a], -1) @ W.flatten()[:12].reshape(6, 2), 0.7).to_event(1)

    return model, guide, q_b


def test_given_another_latent_at_the_same_draws():
    """All is sampled, so that the estimates are plain means over the draws."""
    x = rows(25, 4)
    model, guide, q_b = two_normal_levels(heavy)
    s = pe.surgery(model, guide, x, site="b", given="a", batch_size=10)
    a, b = pe.surgery(model, guide, x).codes.to(x).split(2, 1)
    assert torch.equal(s.codes.to(x), b)
    assert s.dims == ("b[0]", "b[1]") and s.given == ("a",)
    q_a = dist.Normal(x @ (rows(4, 6) / 2)[:, :2], 0.5).to_event(1)
    log_q_a = log_q_matrix(q_a, a)
    log_q_b = torch.stack([q_b(x, a[i].expand(25, 2)).log_prob(b[i]) for i in range(25)])
    aggregate = (log_q_a + log_q_b).logsumexp(1) - log_q_a.logsumexp(1)
    own, p = log_q_b.diagonal(), heavy(a + 0.5, 1.0).to_event(1)
    assert s.mutual_information == pytest.approx((own - aggregate).mean().item())
    assert s.marginal_kl == pytest.approx((aggregate - p.log_prob(b)).mean().item())
    assert s.average_kl == pytest.approx((own - p.log_prob(b)).mean().item())
    for name in ("total_correlation", "dimension_wise_kl", "kl_per_dim", "marginal_kl_per_dim"):
        assert getattr(s, name) is None
    assert s.active_units.shape == (2,)
    assert "ELBO surgery given a, nats per datum" in str(s) and "KL of other latents" in str(s)


@pytest.mark.parametrize("num_data, num_samples", [(1, 1), (3, 1), (25, 1), (40, 3)])
@pytest.mark.parametrize("prior", [dist.Normal, heavy])
def test_the_chain_rule_holds_exactly(prior, num_data, num_samples):
    """In closed form or sampled, with draws in plenty or few: at one seed the parts add up."""
    x = rows(40, 4)[:num_data]
    model, guide, _ = two_normal_levels(prior)
    options = {"num_samples": num_samples, "batch_size": 9}
    a, b, both = (
        pe.surgery(model, guide, x, **sites, **options)
        for sites in ({"site": "a"}, {"site": "b", "given": "a"}, {})
    )
    for name in ADDS_UP:
        total = getattr(a, name) + getattr(b, name)
        assert total == pytest.approx(getattr(both, name), abs=1e-9), name
    for name in WHOLE:
        assert getattr(a, name) == pytest.approx(getattr(both, name), abs=1e-9), name
        assert getattr(b, name) == pytest.approx(getattr(both, name), abs=1e-9), name
    assert a.other_kl == pytest.approx(b.average_kl) and b.other_kl == pytest.approx(a.average_kl)
    for s in (a, b, both):
        assert s.average_kl == pytest.approx(s.mutual_information + s.marginal_kl)
        assert s.mutual_information <= s.log_n + 1e-9


def test_given_latents_that_it_does_not_depend_on():
    """Then the guide need not run on pairs, and information given them is what they leave of it."""
    model, guide, _ = three_sites()
    x = rows(25, 4)
    c, a, both = (
        pe.surgery(model, guide, x, **sites)
        for sites in ({"site": "c", "given": "a"}, {"site": "a"}, {"site": ["a", "c"]})
    )
    assert c.average_kl == pytest.approx(both.average_kl - a.average_kl)
    # the joint goes by another kernel, and is controlled in the same way
    assert c.mutual_information == pytest.approx(both.mutual_information - a.mutual_information)
    assert c.mutual_information < pe.surgery(model, guide, x, site="c").mutual_information


@pytest.mark.parametrize("second", [
    lambda x, a: x[:, :2] + a.square(),
    lambda x, a: torch.cat([x, a], -1)[:, :2] + torch.cat([x, a], -1)[:, 4:].square(),
    lambda x, a: x[:, :2] + a.reshape(len(x), -1)[:, :2].square(),
])  # fmt: skip
def test_however_the_guide_is_written(second):
    """For one a of each row: that broadcasts, that does not, that would be wrong if it did."""
    x = rows(25, 4)
    model, _, _ = two_normal_levels(heavy)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x[:, 2:], 0.5).to_event(1))
            pyro.sample("b", dist.Normal(second(x, a), 0.7).to_event(1))

    s = pe.surgery(model, guide, x, batch_size=10)
    a, b = s.codes.to(x).split(2, 1)
    log_q_a = log_q_matrix(dist.Normal(x[:, 2:], 0.5).to_event(1), a)
    q_b = [dist.Normal(x[:, :2] + a[i].square(), 0.7).to_event(1) for i in range(25)]
    log_q = log_q_a + torch.stack([q_b[i].log_prob(b[i].expand(25, 2)) for i in range(25)])
    information = (log_q.diagonal() - log_q.logsumexp(1) + math.log(25)).mean().item()
    assert s.mutual_information == pytest.approx(information)


def test_nothing_more_is_told():
    x = rows(30, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", standard())
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([a, b], -1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(x))
            pyro.sample("b", dist.Normal(a, 1.0).to_event(1))

    s = pe.surgery(model, guide, x, site="b", given="a")
    assert s.mutual_information == pytest.approx(0.0, abs=1e-9)
    assert s.notes == [
        "Given a, q(z | x) is nearly the prior for every x: z tells nothing more about x."
    ]


@pytest.mark.parametrize("sites, cause", [
    ({"site": "b"}, "draws 'b' given 'a'.* or take it given them, by given="),
    ({"site": "a", "given": "b"}, "draws 'b' given 'a'.*: name those sites in given= as well"),
    ({"site": ["b", "c"], "given": "c"}, "let site and given name different latents"),
    ({"given": ["a", "b", "c"]}, "leaves nothing to take apart"),
    ({"given": "y"}, "names 'y', but the latent sites are .'a', 'b', 'c'."),
])  # fmt: skip
def test_given_latents_that_are_not_known(sites, cause):
    model, guide, _ = three_sites()
    with pytest.raises(ValueError, match=cause):
        pe.surgery(model, guide, rows(5, 4), **sites)


def test_all_others_given_one():
    model, guide, _ = three_sites()
    s = pe.surgery(model, guide, rows(25, 4), given="a")
    assert s.dims == ("b[0]", "b[1]", "c")
    assert s.other_kl > 0


@pytest.mark.parametrize("site, cause", [
    ("b", "draws 'b' given 'a'"), (["b", "c"], "'a'"), ("y", "latent sites are .'a', 'b', 'c'."),
])  # fmt: skip
def test_sites_whose_posterior_is_not_known(site, cause):
    model, guide, _ = three_sites()
    with pytest.raises(ValueError, match=cause):
        pe.surgery(model, guide, rows(5, 4), site=site)


@pytest.mark.parametrize("q", POSTERIORS)
def test_the_answer_does_not_depend_on_the_batch(q):
    x = rows(530, 4)
    prior = PRIORS.get(q, standard)
    model, guide = programs(q, prior)
    expected = pe.surgery(model, guide, x, batch_size=530)
    loader = DataLoader(TensorDataset(x), batch_size=300)
    others = [
        pe.surgery(model, guide, x, batch_size=7),
        pe.surgery(model, guide, loader),
        pe.surgery(model, guide, {"x": x}, batch_size=100),
        pe.surgery(model, guide, (x,), batch_size=529),
    ]
    for other in others:
        torch.testing.assert_close(other.codes, expected.codes)
        for name in (*SCALARS, "kl_per_dim", "marginal_kl_per_dim"):
            ours, theirs = getattr(expected, name), getattr(other, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
                error = torch.as_tensor(other.stderr[name])
                torch.testing.assert_close(torch.as_tensor(expected.stderr[name]), error)


def test_seeds_and_nothing_random_outside():
    x = rows(50, 4)
    model, guide = programs(normal)
    before = torch.get_rng_state()
    first, again, other = (pe.surgery(model, guide, x, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.mutual_information == again.mutual_information
    assert first.mutual_information != other.mutual_information


def test_rows_that_stand_for_more_data():
    """With ``size`` Pyro scales the terms; per datum they are the same."""
    x = rows(60, 5)
    small, whole = PPCA(2, 5, size=60), PPCA(2, 5)
    whole.load_state_dict(small.state_dict())
    sized = FullCovariance(2, 5, size=60)
    free = FullCovariance(2, 5)
    free.load_state_dict(sized.state_dict())
    a = pe.surgery(small, sized, x, batch_size=20)
    b = pe.surgery(whole, free, x, batch_size=20)
    for name in SCALARS:
        assert getattr(a, name) == pytest.approx(getattr(b, name))


def test_posteriors_of_different_support():
    x = rows(40, 4)

    def q(x):
        return dist.Uniform(x[:, :2], x[:, :2] + 1.0).to_event(1)

    s = pe.surgery(*programs(q), x)
    z = s.codes.to(x)
    inside = ((z[:, None] >= x[:, :2]) & (z[:, None] <= x[:, :2] + 1)).all(-1)
    mi = -(inside.double().mean(1)).log().mean().item()
    assert s.mutual_information == pytest.approx(mi, abs=6 * s.stderr["mutual_information"])


def test_flows():
    transforms = dist.transforms
    x = rows(30, 4)
    torch.manual_seed(0)
    conditional = transforms.conditional_affine_autoregressive(2, 4)
    found = {
        "autoregressive": lambda x: transforms.affine_autoregressive(2),
        "coupling": lambda x: transforms.affine_coupling(2),
        # its context has one row for each z: it is evaluated pair by pair
        "conditional": lambda x: conditional.condition(x),
    }
    made = {}
    for name, make in found.items():

        def q(x, name=name, make=make):
            flow = made.setdefault(name, make(x)) if name != "conditional" else make(x)
            return dist.TransformedDistribution(dist.Normal(x[:, :2], 0.5).to_event(1), [flow])

        s = pe.surgery(*programs(q), x, batch_size=7)
        z = s.codes.to(x)
        pairs = [
            [q(x[j : j + 1]).log_prob(z[i : i + 1]).item() for j in range(30)] for i in range(30)
        ]
        matrix = torch.tensor(pairs)
        mi = (matrix.diagonal() - matrix.logsumexp(1) + math.log(30)).mean().item()
        assert s.mutual_information == pytest.approx(mi, abs=1e-6), name

    planar = transforms.planar(2)

    def without_inverse(x):
        return dist.TransformedDistribution(dist.Normal(x[:, :2], 0.5).to_event(1), [planar])

    with pytest.raises(ValueError, match="transforms of a flow have no inverse"):
        pe.surgery(*programs(without_inverse), x)


def test_inner_plates_are_dims_of_a_datum():
    x = rows(30, 4)

    def model(x):
        with pyro.plate("features", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def guide(x):
        with pyro.plate("features", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mT, 0.5))

    def flat(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(4))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    s = pe.surgery(model, guide, x)
    q = programs(lambda x: dist.Normal(x, 0.5).to_event(1))[1]
    expected = pe.surgery(flat, q, x)
    assert s.dims == ("z[0]", "z[1]", "z[2]", "z[3]")
    for name in ("elbo", "average_kl"):
        assert getattr(s, name) == pytest.approx(getattr(expected, name), abs=0.5)
    torch.testing.assert_close(s.kl_per_dim, expected.kl_per_dim)
    # two plates as large as a batch: which are the data?
    with pytest.raises(ValueError, match="name the one over the data by plate="):
        pe.surgery(model, guide, x[:4])
    assert pe.surgery(model, guide, x[:4], plate="data").dims == s.dims


def test_active_units_and_a_collapsed_dim():
    x = rows(200, 4)

    def q(x):
        loc = torch.stack([2 * x[:, 0], torch.zeros(len(x)), 0.05 * x[:, 1]], 1)
        scale = torch.stack([torch.full((len(x),), s) for s in (0.5, 1.0, 1.0)], 1)
        return dist.Normal(loc, scale).to_event(1)

    s = pe.surgery(*programs(q, lambda: standard(3)), x)
    assert s.active_units.tolist() == [True, False, False]
    assert s.kl_per_dim[1] == 0 and abs(s.marginal_kl_per_dim[1]) < 1e-9
    assert "2 of 3 dimensions are inactive (z[1], z[2])" in str(s)


def test_active_units_of_a_posterior_that_does_not_know_its_mean():
    x = rows(400, 4)

    def q(x):
        base = dist.Normal(x[:, :2] * torch.tensor([1.0, 0.0]), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(0.0, 2.0)])

    s = pe.surgery(*programs(q), x, num_samples=40)
    assert s.active_units.tolist() == [True, False]


def test_the_report_tells_what_is_wrong():
    x = rows(64, 4)
    collapsed = pe.surgery(*programs(lambda x: standard().expand([len(x)])), x)
    assert "Posterior collapse" in str(collapsed) and len(collapsed.notes) == 1
    apart = pe.surgery(*programs(lambda x: dist.Normal(9 * x[:, :2], 0.01).to_event(1)), x)
    assert "at its bound log N" in str(apart)
    assert "Most of the KL is marginal" in str(apart)
    fine = pe.surgery(*programs(lambda x: dist.Normal(x[:, :2] / 2, 0.8).to_event(1)), x)
    assert fine.notes == []
    for word in ("ELBO", "mutual information", "log N = 4.1589", "±", "active units: 2 of 2"):
        assert word in str(fine)


def test_to_xarray():
    s = pe.surgery(*programs(normal), rows(20, 4))
    data = s.to_xarray()
    assert float(data.mutual_information) == s.mutual_information
    assert float(data.mutual_information_stderr) == s.stderr["mutual_information"]
    assert data.kl_per_dim.dims == ("latent_dim",)
    assert data.latent_dim.values.tolist() == ["z[0]", "z[1]"]
    assert data.elbo.attrs["units"] == "nats per datum" and data.attrs["num_data"] == 20
    flowing = pe.surgery(*programs(flow), rows(20, 4)).to_xarray()
    assert "kl_per_dim" not in flowing


def test_a_discrete_latent():
    torch.manual_seed(0)
    x = rows(30, 3)
    gmm = GMM(4, 3)
    s = pe.surgery(gmm, Exact(gmm), x, num_samples=200)
    q = gmm.posterior(x).probs
    aggregate = q.mean(0)
    mi = (q * (q / aggregate).log()).sum(1).mean().item()
    assert abs(s.mutual_information - mi) < 4 * s.stderr["mutual_information"]
    assert s.elbo == pytest.approx(gmm.log_evidence(x).mean().item(), abs=1e-9)
    with pytest.raises(ValueError, match="enumerates its discrete latents"):
        pe.surgery(gmm, config_enumerate(Exact(gmm)), x)


def test_a_posterior_with_a_parameter_for_every_row():
    x = rows(30, 4)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None], 1.0).expand([len(x), 4]).to_event(1), obs=x)

    guide = AutoNormal(model)
    guide(x)
    with torch.no_grad():
        guide.locs.z.copy_(x[:, 0])
    s = pe.surgery(model, guide, x)
    z = s.codes[:, 0].to(x)  # of the auxiliary variable: the Jacobian of its map cancels
    matrix = dist.Normal(guide.locs.z, guide.scales.z).log_prob(z[:, None])
    mi = (matrix.diagonal() - matrix.logsumexp(1) + math.log(30)).mean().item()
    assert s.mutual_information == pytest.approx(mi)
    assert s.dimension_wise_kl is None
    with pytest.raises(ValueError, match="let batch_size be at least"):
        pe.surgery(model, guide, x, batch_size=10)
    with pytest.raises(ValueError, match="is in no plate"):
        pe.surgery(model, AutoDiagonalNormal(model), x)
    with pytest.raises(ValueError, match="guide messenger"):
        pe.surgery(model, AutoNormalMessenger(model), x)


def test_a_global_latent():
    def model(x):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard())
            mean = z.sum(-1, keepdim=True).expand(x.shape)
            pyro.sample("x", dist.Normal(mean, scale).to_event(1), obs=x)

    def guide(x):
        pyro.sample("scale", dist.Gamma(5.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(x))

    x = rows(10, 4)
    with pytest.raises(ValueError, match="a global latent has one posterior for all data"):
        pe.surgery(model, guide, x)
    with pytest.raises(ValueError, match="'scale' is outside of the plate 'data'"):
        pe.surgery(model, guide, x, site="z")


def test_a_prior_that_depends_on_the_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))
            mean = z.sum(-1, keepdim=True).expand(x.shape)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="the prior of 'z' depends on the data"):
        pe.surgery(model, programs(normal)[1], rows(10, 4))


@pytest.mark.parametrize("change, cause", [
    (lambda p: poutine.scale(p, scale=2.0), "scaled by 2.0, where plate 'data' gives 1.0"),
    (lambda p: poutine.mask(p, mask=torch.arange(10) < 5), "'z' is masked"),
])  # fmt: skip
def test_densities_that_are_not_of_one_datum(change, cause):
    model, guide = programs(normal)
    with pytest.raises(ValueError, match=cause):
        pe.surgery(change(model), change(guide), rows(10, 4))


@pytest.mark.parametrize("options, cause", [
    ({"num_samples": 0}, "num_samples"), ({"batch_size": 0}, "batch_size"), ({"seed": -1}, "seed"),
    ({"plate": "rows"}, "in plates .'data'., not in 'rows'"),
])  # fmt: skip
def test_wrong_options(options, cause):
    with pytest.raises(ValueError, match=cause):
        pe.surgery(*programs(normal), rows(10, 4), **options)


def test_wrong_data():
    model, guide = programs(normal)
    x = rows(10, 4)
    for data in (
        x[:0],
        [],
        iter([x]),
        np.zeros((3, 4)),
        DataLoader([]),
        torch.ones(()),
    ):
        with pytest.raises(ValueError, match="data should"):
            pe.surgery(model, guide, data)
    x[3, 1] = math.nan
    with pytest.raises(ValueError, match="data hold NaN in rows 2 to 3"):
        pe.surgery(model, guide, x, batch_size=2)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="the first of them row 3"):
        pe.surgery(model, guide, x, batch_size=2)


class Interrupting(nn.Module):
    """A guide that stops at its n-th run, as Ctrl-C would."""

    def __init__(self, at):
        super().__init__()
        self.at, self.dropout = at, nn.Dropout(0.9)

    def forward(self, x):
        self.at -= 1
        if self.at == 0:
            raise KeyboardInterrupt
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(self.dropout(x)))


def test_modules_are_evaluated_without_dropout_and_left_as_they_were():
    x = rows(20, 4)
    model, guide = programs(normal)
    module = Interrupting(at=-1)
    expected = pe.surgery(model, guide, x)
    assert pe.surgery(model, module, x).elbo == expected.elbo
    assert module.training and module.dropout.training


def test_ctrl_c_leaves_nothing_behind():
    x = rows(20, 4)
    module = Interrupting(at=12)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        pe.surgery(programs(normal)[0], module, x, batch_size=2)
    assert module.training and module.dropout.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


class Noisy(torch.utils.data.Dataset):
    """Rows that are others each time they are asked for, as augmentation makes them."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 3 * torch.randn(self.x.shape[1])


class Once:
    """Batches that can be gone through only once, though they do not say so."""

    def __init__(self, x):
        self.batches = iter(x.split(8))

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("make, num", [
    (lambda x: DataLoader(x, 8, shuffle=True, drop_last=True), 24),
    (lambda x: DataLoader(x, 8, shuffle=True), 30), (Once, 30),
    (lambda x: DataLoader(Noisy(x), 8, shuffle=True), 30),
    (lambda x: DataLoader(x, 8, sampler=torch.utils.data.RandomSampler(x, True, 40)), 40),
])  # fmt: skip
@pytest.mark.parametrize("family", [normal, correlated])
def test_loaders_whose_passes_differ(make, num, family):
    """All is of one pass: mutual information keeps its bound, and every row that came counts."""
    result = pe.surgery(*programs(family), make(rows(30, 4)), progress=False)
    assert result.num_data == num
    assert 0 < result.mutual_information <= result.log_n + 1e-9


def test_a_guide_that_is_another_each_time():
    """Dropout that eval mode does not switch off: log q(z | x_n) is not that of the draw."""
    model, guide = programs(correlated)

    def dropping(x):
        return guide(torch.nn.functional.dropout(100 * x, 0.5, training=True))

    with pytest.raises(ValueError, match=r"mutual information comes out at .* above its bound"):
        pe.surgery(model, dropping, rows(30, 4), progress=False)


def test_evidence_beside_a_loader_that_shuffles():
    model, guide = programs(normal)
    x = rows(10, 4)
    for report in (pe.decompositions, pe.inference_gap):
        with pytest.raises(ValueError, match="another order in each pass"):
            report(model, guide, DataLoader(x, 5, shuffle=True), evidence=torch.zeros(10))


def test_half_precision():
    """Draws and densities are of bfloat16, sums are not: near those of float64."""
    model, guide = programs(normal)
    x = rows(40, 4)
    expected = pe.surgery(model, guide, x, progress=False)

    def half(program):
        return lambda x: program(x.bfloat16())

    found = pe.surgery(half(model), half(guide), x, progress=False)
    assert found.mutual_information == pytest.approx(expected.mutual_information, abs=0.1)
    assert found.average_kl == pytest.approx(expected.average_kl, abs=0.1)
