"""Covariances by linear response, against those that are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from torch.distributions import constraints

import pyproelbo as pe
from pyproelbo._evidence import curvature, linear_response

QUIET = {"progress": False}


def gaussian(precision, loc):
    """A target that is normal: no data."""

    def model():
        pyro.sample("z", dist.MultivariateNormal(loc.clone(), precision_matrix=precision))

    return model


def correlated():
    """Two latents of sd 0.326, which the best independent q has as 0.115."""
    rho = (1 - (0.115 / 0.326) ** 2) ** 0.5
    covariance = 0.326**2 * torch.tensor([[1.0, rho], [rho, 1.0]])
    return covariance, gaussian(covariance.inverse(), torch.tensor([1.0, -2.0]))


def test_what_mean_field_takes_for_a_third():
    covariance, model = correlated()
    found = pe.linear_response(model, autoguide.AutoNormal(model), None, **QUIET)
    assert torch.allclose(found.covariance, covariance, rtol=1e-9)
    assert torch.allclose(found.sd, torch.tensor(0.326), rtol=1e-9)
    assert torch.allclose(found.q_sd, torch.tensor(0.115), rtol=0.15)  # as of its 100 draws
    assert torch.allclose(found.mean, torch.tensor([1.0, -2.0]), rtol=1e-6)
    assert found.stderr.max() < 1e-9 and found.distance < 1e-4
    assert found.names == ("z[0]", "z[1]")
    assert "too small by up to a factor of 2." in found.notes[0] or "of 3." in found.notes[0]


class Module(pyro.nn.PyroModule):
    """A guide whose parameters are of a module."""

    def __init__(self, size):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(size))
        self.log_scale = torch.nn.Parameter(torch.zeros(size))
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


def by_hand():
    loc = pyro.param("loc", lambda: torch.zeros(4))
    scale = pyro.param("scale", lambda: torch.ones(4), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale).to_event(1))


GUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": lambda model: autoguide.AutoLowRankMultivariateNormal(
        model, rank=1
    ),
    "AutoStructured": autoguide.AutoStructured,  # with parameters to spare
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "module": lambda _: Module(4),
    "by_hand": lambda _: by_hand,
}


SINGLE = [("AutoNormal", torch.float32), ("AutoMultivariateNormal", torch.float32)]


@pytest.mark.parametrize("name, dtype", [*((n, torch.float64) for n in GUIDES), *SINGLE])
def test_exact_of_a_normal_target_by_each_guide(name, dtype):
    torch.set_default_dtype(dtype)
    A, loc = rows(4, 4).to(dtype), rows(4).to(dtype)
    precision = A @ A.mT + 0.3 * torch.eye(4)
    model = gaussian(precision, loc)
    found = pe.linear_response(model, GUIDES[name](model), None, **QUIET)
    exact = precision.double().inverse()
    tolerance = {"rtol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found.covariance, exact, **{"atol": 1e-8, **tolerance})
    torch.testing.assert_close(found.mean, loc.double(), rtol=1e-2, atol=1e-2)
    assert found.covariance.dtype == torch.float64
    assert any("float32" in note for note in found.notes) == (dtype == torch.float32)


N = 40


def regression(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal((w * X).sum(-1), 0.7), obs=y)


def regression_data():
    X = rows(N, 3)
    X[:, 1] = X[:, 0] + 0.3 * X[:, 1]
    return X, X @ torch.tensor([1.0, -0.5, 0.2]) + 0.7 * rows(N)


def regression_covariance(X):
    return (X.mT @ X / 0.49 + torch.eye(3) / 4).inverse()


def trained(model, guide, *args, steps=200):
    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


def test_regression_and_nothing_changes():
    data = regression_data()
    guide = trained(regression, autoguide.AutoNormal(regression), *data)
    store = {name: value.clone() for name, value in pyro.get_param_store().items()}
    before = {
        name: (value.detach().clone(), value.grad) for name, value in guide.named_parameters()
    }
    state = torch.get_rng_state()
    found = pe.linear_response(regression, guide, data, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(store) == set(pyro.get_param_store())
    for name, value in guide.named_parameters():
        old, gradient = before[name]
        assert torch.equal(value, old) and value.requires_grad and value.grad is gradient
    assert all(torch.equal(pyro.param(name), value) for name, value in store.items())
    torch.testing.assert_close(found.covariance, regression_covariance(data[0]), rtol=1e-8, atol=0)
    assert found.names == ("w[0]", "w[1]", "w[2]")
    assert found.moved > 0.5 and "train it longer" in str(found)


def test_ctrl_c_once_the_covariance_is_there(monkeypatch):
    data, groups = regression_data(), linear_response._without
    full = pe.linear_response(regression, autoguide.AutoNormal(regression), data, **QUIET)

    def interrupted(objective, optimum, j):
        if j == 5:
            raise KeyboardInterrupt
        return groups(objective, optimum, j)

    monkeypatch.setattr(linear_response, "_without", interrupted)
    with pytest.warns(pe.UnfinishedWarning, match="first 5 of 20 groups of draws"):
        found = pe.linear_response(regression, autoguide.AutoNormal(regression), data, **QUIET)
    assert torch.equal(found.covariance, full.covariance) and found.stderr.isfinite().all()


def test_a_guide_that_begins_at_a_parameter_of_the_model():
    """Pyro's messenger begins in the memory of the prior's mean, which stays where it is."""

    def model(x):
        loc = pyro.param("loc", lambda: torch.tensor([0.3, -0.2]))
        m = pyro.sample("m", dist.Normal(loc, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

    x = rows(5, 2) + 3
    found = pe.linear_response(model, autoguide.AutoNormalMessenger(model), x, **QUIET)
    exact = (torch.tensor([0.3, -0.2]) + x.sum(0)) / 6
    torch.testing.assert_close(found.mean, exact, rtol=1e-7, atol=1e-9)


def test_chunks_and_the_same_again():
    data = regression_data()
    guide = autoguide.AutoNormal(regression)
    one, other = (
        pe.linear_response(regression, guide, data, num_samples=40, chunk=chunk, **QUIET)
        for chunk in (None, 7)
    )
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.q_sd, other.q_sd)


def groups(y):
    """m of all, b_j of each of J groups, y_ji: all normal, so that all covariances are known."""
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    x = torch.linspace(-1, 1, y.shape[1])
    with pyro.plate("groups", len(y), dim=-2):
        b = pyro.sample("b", dist.Normal(m, 0.8))
        with pyro.plate("members", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(b + slope * x, 0.5), obs=y)


def covariance_of_groups(y):
    """Of (m, slope, b_1, ..., b_J), from the precision of the joint density."""
    J, n = y.shape
    x = torch.linspace(-1, 1, n)
    P = torch.zeros(J + 2, J + 2)
    P[0, 0], P[1, 1] = 1 / 9, 1.0
    for j in range(2, J + 2):
        v = torch.zeros(J + 2)
        v[0], v[j] = 1.0, -1.0
        P += torch.outer(v, v) / 0.64
        for i in range(n):
            v = torch.zeros(J + 2)
            v[1], v[j] = x[i], 1.0
            P += torch.outer(v, v) / 0.25
    return P.inverse()


@pytest.mark.parametrize("is_dense", [True, False])
def test_global_latents_beside_local_ones(is_dense, monkeypatch):
    if not is_dense:
        monkeypatch.setattr(curvature, "DENSE", 1)
    y = rows(6, 2) + rows(6, 1)
    guide = autoguide.AutoNormal(groups)
    options = {"num_samples": 20, **QUIET}
    exact = covariance_of_groups(y)
    if is_dense:
        found = pe.linear_response(groups, guide, y, **options)
        assert found.names == ("m", "slope")
        torch.testing.assert_close(found.covariance, exact[:2, :2], rtol=1e-6, atol=1e-8)
        assert found.q_sd[0] < found.sd[0]  # mean field's m is that given the groups
    both = pe.linear_response(groups, guide, y, site=["b", "m"], **options)
    assert both.names[:2] == ("m", "b[0,0]") and len(both.names) == 7
    kept = [0, *range(2, 8)]
    torch.testing.assert_close(both.covariance, exact[kept][:, kept], rtol=1e-6, atol=1e-8)


def exponential(x):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(rate), obs=x)


def test_exact_where_a_mean_is_conjugate():
    """With a posterior Gamma(a, b), and q normal in its logarithm, E_q[rate] = a / b at the
    optimum, whatever the draws are, so that its response to b is that of the posterior, a / b^2.
    """
    x = rows(10).abs()
    found = pe.linear_response(exponential, autoguide.AutoNormal(exponential), x, **QUIET)
    posterior = dist.Gamma(12.0, 1 + x.sum())
    assert found.mean.item() == pytest.approx(float(posterior.mean), rel=1e-6)
    assert found.covariance.item() == pytest.approx(float(posterior.variance), rel=1e-6)
    assert found.sd_stderr[0] < 0.002 * found.sd[0]


def logistic(X, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=(w * X).sum(-1)), obs=y)


def logistic_data():
    X = rows(30, 2)
    X[:, 1] = X[:, 0] + 0.5 * X[:, 1]
    return X, (X @ torch.tensor([1.0, -0.5]) + rows(30) > 0).to(X)


def logistic_covariance(X, y):
    """By quadrature on a grid."""
    grid = torch.linspace(-8, 10, 400)
    w = torch.cartesian_prod(grid, grid)
    logits = w @ X.mT
    log_p = dist.Bernoulli(logits=logits).log_prob(y).sum(1) - (w**2).sum(1) / 8
    p = (log_p - log_p.logsumexp(0)).exp()
    mean = p @ w
    return (w - mean).mT @ ((w - mean) * p[:, None])


def test_a_logistic_regression_is_closer_than_mean_field():
    data = logistic_data()
    exact = logistic_covariance(*data)
    found = pe.linear_response(
        logistic, autoguide.AutoNormal(logistic), data, num_samples=1000, **QUIET
    )
    off = (found.sd / exact.diagonal().sqrt() - 1).abs()
    of_q = (found.q_sd / exact.diagonal().sqrt() - 1).abs()
    assert (off < 0.1).all() and (of_q > 2 * off).all(), (off, of_q)
    correlation = exact[0, 1] / (exact[0, 0] * exact[1, 1]).sqrt()
    assert abs(found.correlation[0, 1] - correlation) < 0.1


def location_and_scale(y):
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(3.0, m, s), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"num_samples": 40}, {"num_samples": 128, "draws": "sobol"}])
def test_errors_are_those_of_repeated_runs(options):
    """Those of sds, means and covariances, within a factor of 1.6 of the spread over 24 seeds,
    which is itself known to 15 %.
    """
    guide, y = autoguide.AutoNormal(location_and_scale), 1 + rows(9)
    runs = [
        pe.linear_response(location_and_scale, guide, y, seed=i, **options, **QUIET)
        for i in range(24)
    ]
    of = (("sd", "sd_stderr"), ("mean", "mean_stderr"), ("covariance", "stderr"))
    for name, error in of:
        spread = torch.stack([getattr(run, name) for run in runs]).std(0)
        said = torch.stack([getattr(run, error) for run in runs]).square().mean(0).sqrt()
        assert ((said / spread).log().abs() < torch.tensor(1.6).log()).all(), (name, said / spread)


def test_sobol_draws():
    """Errors are by 8 replicates, and half as large."""
    guide, y = autoguide.AutoNormal(location_and_scale), 1 + rows(9)

    def found(seed, **options):
        return pe.linear_response(location_and_scale, guide, y, seed=seed, **options, **QUIET)

    plain, sobol = ([found(i, num_samples=128, draws=kind) for i in range(3)] for kind in KINDS)
    for name in ("mean_stderr", "sd_stderr"):
        of = [torch.stack([getattr(r, name) for r in runs]).norm() for runs in (plain, sobol)]
        assert of[1] < 0.75 * of[0]
    by_default = found(0, draws="sobol")
    assert by_default.num_samples == 128
    torch.testing.assert_close(by_default.covariance, sobol[0].covariance)
    with pytest.raises(ValueError, match=r"8 times a power of two.* got 100: take 64 or 128"):
        found(0, num_samples=100, draws="sobol")


KINDS = ("independent", "sobol")


def test_a_mixture_that_the_model_enumerates():
    """The latents that are left are those of the component means, far apart: nearly normal."""
    x = torch.cat([rows(20) - 6, rows(15) + 6])

    def model(x):
        with pyro.plate("components", 2):
            m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            loc = torch.where(k == 0, m[..., :1], m[..., 1:])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.tensor([-5.0, 5.0]))
        scale = pyro.param("scale", lambda: torch.ones(2), constraint=constraints.positive)
        with pyro.plate("components", 2):
            pyro.sample("m", dist.Normal(loc, scale))

    found = pe.linear_response(model, guide, x, **QUIET)
    exact = torch.tensor([1 / (20 + 0.01), 1 / (15 + 0.01)])
    assert found.names == ("m[0]", "m[1]")
    torch.testing.assert_close(found.covariance, exact.diag(), rtol=1e-3, atol=1e-4)


def test_what_is_printed_and_handed_on():
    covariance, model = correlated()
    found = pe.linear_response(model, autoguide.AutoNormal(model), None, **QUIET)
    lines = str(found).splitlines()
    assert lines[0] == "Posterior sds by linear response (100 fixed draws)"
    data = found.to_xarray()
    assert data.covariance.sel(latent_dim="z[0]", latent_dim_2="z[1]").item() == pytest.approx(
        float(covariance[0, 1])
    )
    assert data.sizes == {"latent_dim": 2, "latent_dim_2": 2}


# What it cannot take


def flat_guide():
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_programs_that_have_none():
    _, model = correlated()
    with pytest.raises(ValueError, match="the guide should have parameters"):
        pe.linear_response(model, flat_guide, None, **QUIET)
    with pytest.raises(ValueError, match="AutoDelta"):
        pe.linear_response(model, autoguide.AutoDelta(model), None, **QUIET)

    def discrete():
        pyro.sample("k", dist.Bernoulli(0.5))

    def of_k():
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))

    with pytest.raises(ValueError, match=r"'k' has no reparameterised draws.*let the model enum"):
        pe.linear_response(discrete, of_k, None, **QUIET)

    def gamma():
        a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, 1.0))

    def model_of_gamma():
        pyro.sample("rate", dist.Gamma(3.0, 1.0))

    with pytest.raises(ValueError, match="should have second derivatives"):
        pe.linear_response(model_of_gamma, gamma, None, **QUIET)


def test_data_in_batches():
    X, y = regression_data()
    guide = autoguide.AutoNormal(regression)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=10)
    with pytest.raises(ValueError, match="data are given in several batches"):
        pe.linear_response(regression, guide, loader, **QUIET)

    def subsampled(X, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        with pyro.plate("data", N, subsample_size=10) as i:
            pyro.sample("y", dist.Normal((w * X[i]).sum(-1), 0.7), obs=y[i])

    with pytest.raises(ValueError, match="cannot be subsampled"):
        pe.linear_response(subsampled, autoguide.AutoNormal(subsampled), (X, y), **QUIET)


def bimodal():
    """The log-density of two modes, and a guide that rests between them."""
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    pyro.factor("modes", torch.logaddexp(-((z - 3) ** 2) / 2, -((z + 3) ** 2) / 2) + z**2 / 200)


@pytest.mark.parametrize("is_dense", [True, False])
def test_what_is_no_optimum(is_dense, monkeypatch):
    if not is_dense:
        monkeypatch.setattr(curvature, "DENSE", 0)

    def between():
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    with pytest.raises(ValueError, match="not at an optimum"):
        pe.linear_response(bimodal, between, None, polish=False, **QUIET)
    pyro.clear_param_store()
    _, model = correlated()
    guide = autoguide.AutoNormal(model, init_loc_fn=autoguide.init_to_value(values={
        "z": torch.tensor([1.5, -2.0])
    }))  # fmt: skip
    with pytest.raises(ValueError, match="not at an optimum"):
        pe.linear_response(model, guide, None, polish=False, **QUIET)


@pytest.mark.slow
def test_too_few_draws_for_a_joint_one():
    model = gaussian(torch.eye(21), torch.zeros(21))
    guide = autoguide.AutoMultivariateNormal(model)
    with pytest.raises(ValueError, match=r"not at an optimum.*well above D"):
        pe.linear_response(model, guide, None, num_samples=20, **QUIET)


def test_a_density_with_kinks():
    def laplace(x):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Laplace(m, 1.0), obs=x)

    with pytest.raises(ValueError, match="densities with kinks"):
        pe.linear_response(laplace, autoguide.AutoNormal(laplace), rows(50), **QUIET)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 19}, "num_samples should be a whole number of at least 20, got 19"),
        ({"num_samples": True}, "num_samples should be a whole number"),
        ({"seed": -1}, "seed should be a whole number"),
        ({"chunk": 0}, "chunk should be a positive whole number"),
        ({"arguments": "x"}, "arguments should be a function"),
        ({"polish": 1}, "polish should be True or False, got 1"),
        ({"site": 3}, "site should be a name"),
        ({"site": "v"}, r"site names 'v', but the latents are \['w'\]"),
        ({"site": ["w", "y"]}, r"site names 'y', but the latents are \['w'\]"),
    ],
)
def test_bad_input(options, match):
    guide = autoguide.AutoNormal(regression)
    with pytest.raises(ValueError, match=match):
        pe.linear_response(regression, guide, regression_data(), **{**QUIET, **options})


def test_latents_that_are_all_local():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = autoguide.AutoNormal(model), rows(5)
    with pytest.raises(ValueError, match="no latent is global"):
        pe.linear_response(model, guide, x, **QUIET)
    found = pe.linear_response(model, guide, x, site="z", **QUIET)
    torch.testing.assert_close(found.covariance, torch.eye(5) / 2, rtol=1e-8, atol=1e-8)


def test_it_goes_on_to_the_verdict_and_to_arviz():
    """A mean-field q of correlated latents: its sds are too small, and all that has it says so."""
    covariance = torch.full((3, 3), 0.9) + 0.1 * torch.eye(3)

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), covariance))

    guide = autoguide.AutoNormal(model, init_scale=0.2)
    found = pe.linear_response(model, guide, None, progress=False)
    options = {"num_samples": 100, "progress": False}
    result = pe.check(model, guide, None, linear_response=found, **options)
    said = [f for f in result.findings if "By linear response" in f.text]
    assert [f.verdict for f in said] == ["doubtful"] and result.response is found
    ratio = float((found.q_sd / found.sd).min())
    assert ratio < 0.5 and f"is {ratio:.2f}" in said[0].text
    assert "linear_response" in result.to_xarray().children
    tree = pe.from_svi(model, guide, linear_response=found, groups=["posterior"], **options)
    kept = tree["linear_response"]["covariance"].values
    assert torch.allclose(torch.as_tensor(kept), covariance, atol=1e-6)
    for report in (pe.check, pe.from_svi):
        arguments = (model, guide, None) if report is pe.check else (model, guide)
        with pytest.raises(ValueError, match=r"a result of pe\.linear_response"):
            report(*arguments, linear_response=covariance, **options)
