"""Kinds of programs under pe.surgery: families, plates, enumeration, what cannot be taken apart."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from helpers.surgery_programs import (
    SCALARS,
    correlated,
    normal,
    programs,
    standard,
)
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger

import pyproelbo as pe
from pyproelbo.guides.ppca import Exact, FullCovariance
from pyproelbo.models.gmm import GMM
from pyproelbo.models.ppca import PPCA


def test_rows_that_stand_for_more_data():
    """With ``dataset_size`` Pyro scales the terms; per datum they are the same."""
    x = rows(60, 5)
    small, whole = PPCA(2, 5, dataset_size=60), PPCA(2, 5)
    whole.load_state_dict(small.state_dict())
    sized = FullCovariance(2, 5, dataset_size=60)
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
    transforms, num = dist.transforms, 12
    x = rows(num, 4)
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
            [q(x[j : j + 1]).log_prob(z[i : i + 1]).item() for j in range(num)] for i in range(num)
        ]
        matrix = torch.tensor(pairs)
        mi = (matrix.diagonal() - matrix.logsumexp(1) + math.log(num)).mean().item()
        assert s.mutual_information == pytest.approx(mi, abs=1e-6), name

    planar = transforms.planar(2)

    def without_inverse(x):
        return dist.TransformedDistribution(dist.Normal(x[:, :2], 0.5).to_event(1), [planar])

    with pytest.raises(ValueError, match="flow whose transforms have no inverse"):
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
    again = pe.surgery(model, guide, x, batch_size=10)  # it sees all rows at once
    assert again.mutual_information == pytest.approx(mi)
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
    found = pe.surgery(model, guide, x, site="z", num_nested=2)  # over draws of the scale
    assert found.num_globals == 2 and found.global_kl > 0


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


def test_a_guide_that_is_another_each_time():
    """Dropout that eval mode does not switch off: log q(z | x_n) is not that of the draw."""
    model, guide = programs(correlated)

    def dropping(x):
        return guide(torch.nn.functional.dropout(100 * x, 0.5, training=True))

    with pytest.raises(ValueError, match=r"mutual information comes out at .* above its bound"):
        pe.surgery(model, dropping, rows(30, 4), progress=False)


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
