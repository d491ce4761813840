"""pe.surgery of several latents: jointly, of some of them, and given others."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import mean_and_stderr, rows
from helpers.surgery_programs import (
    log_q_matrix,
    normal,
    standard,
)
from pyro import poutine

import pyproelbo as pe


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
        "Given a, q(z | x) is nearly the prior for every x: z carries no further information "
        "about x."
    ]


@pytest.mark.parametrize("sites, cause", [
    ({"site": "b"}, "draws 'b' given 'a'.* or condition on them by given="),
    ({"site": "a", "given": "b"}, "draws 'b' given 'a'.*: name those sites in given= as well"),
    ({"site": ["b", "c"], "given": "c"}, "let site and given name different latents"),
    ({"given": ["a", "b", "c"]}, "leaves no latent for the surgery"),
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
