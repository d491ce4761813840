"""from_svi of programs as other packages write them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers.oracles import rows

import pyproelbo as pe


def regression(X, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    mean = pyro.deterministic("mean", (X @ w.unsqueeze(-1)).squeeze(-1))
    with pyro.plate("data", len(X)):
        z = pyro.sample("z", dist.Normal(0.0, 0.5))
        pyro.sample("y", dist.Normal(mean + z, 0.3), obs=y)


def guide_of_regression(X, y=None):
    pyro.sample("w", dist.Normal(torch.tensor([1.0, -1.0]), 0.1).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("z", dist.Normal(5.0, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("num_new", [4, 20])
@pytest.mark.parametrize("how", ["tuple", "mapping"])
def test_predictions_at_new_covariates(num_new, how):
    """w is the posterior's draw by draw; z of new data, of which the guide says 5, is the prior's.

    Also where there are as many new data as old.
    """
    X, y, new, S = rows(20, 2), rows(20), rows(num_new, 2) - 0.5, 400
    tree = pe.from_svi(
        regression, guide_of_regression, (X, y), num_samples=S, progress=False,
        predictions=(new,) if how == "tuple" else {"X": new}, coords={"data": range(100, 120)},
    )  # fmt: skip
    w = torch.as_tensor(tree.posterior.w.values)[0]
    mean = torch.as_tensor(tree.predictions["mean"].values)[0]
    torch.testing.assert_close(mean, w @ new.mT)
    residuals = torch.as_tensor(tree.predictions.y.values)[0] - mean
    assert residuals.shape == (S, num_new)
    spread = (0.25 + 0.09) ** 0.5
    assert abs(residuals.mean()) < 5 * spread / residuals.numel() ** 0.5
    assert abs(residuals.std() - spread) < 5 * spread / (2 * residuals.numel()) ** 0.5
    assert list(tree.observed_data.data.values[:2]) == [100, 101]
    assert list(tree.predictions["data"].values[:2]) == [0, 1]
    posterior = pe.from_svi(regression, guide_of_regression, (X, y), num_samples=S, progress=False)
    xarray.testing.assert_equal(posterior.posterior.to_dataset().drop_vars("data"),
                                tree.posterior.to_dataset().drop_vars("data"))  # fmt: skip


def test_predictions_for_groups_that_were_fitted():
    """Latents of groups stay those of the fit; another number of groups is an error."""

    def model(group, num_groups=3, y=None):
        with pyro.plate("groups", num_groups):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(group)):
            pyro.sample("y", dist.Normal(a[..., group], 0.001), obs=y)

    def guide(group, num_groups=3, y=None):
        with pyro.plate("groups", num_groups):
            pyro.sample("a", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 0.1))

    args = (torch.tensor([0, 0, 1, 2]), 3, rows(4))
    options = {"num_samples": 10, "progress": False}
    new = torch.tensor([2, 0])
    tree = pe.from_svi(model, guide, args, predictions=(new,), **options)
    a = torch.as_tensor(tree.posterior.a.values)[..., new]
    torch.testing.assert_close(torch.as_tensor(tree.predictions.y.values), a, rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="predictions have 2 rows in plate 'groups'"):
        pe.from_svi(model, guide, args, predictions=(new, 2), **options)
    with pytest.raises(ValueError, match="predictions should be a tuple"):
        pe.from_svi(model, guide, args, predictions=new, **options)


def test_dims_of_no_plate():
    """A plate at dim -2, and features at its right in none: as dims of an event."""
    x, W = rows(6, 4), rows(2, 4)

    def model(x):
        with pyro.plate("obs", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 2), 1.0))
            pyro.sample("x", dist.Normal(z @ W, 1.0), obs=x)

    def guide(x):
        with pyro.plate("obs", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5))

    def in_event(x):
        with pyro.plate("obs", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ W, 1.0).to_event(1), obs=x)

    def guide_in_event(x):
        with pyro.plate("obs", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))

    trees = [
        pe.from_svi(*programs, (x,), num_samples=30, progress=False)
        for programs in ((model, guide), (in_event, guide_in_event))
    ]
    for group in ("posterior", "log_likelihood", "log_prior", "log_q", "sample_stats"):
        xarray.testing.assert_allclose(*(tree[group].to_dataset() for tree in trees))
    assert trees[0].posterior_predictive.x.dims == ("chain", "draw", "obs", "x_dim_0")
    assert trees[0].observed_data.x.shape == (6, 4)


def test_draws_of_a_prior_that_are_no_parameters():
    """The rest is there; asked for by name, the prior's error is raised."""
    x = rows(9)

    def model(x):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    def guide(x):
        pyro.sample("s", dist.Normal(1.0, 0.01))

    with pytest.warns(
        pe.SkippedWarning, match=r"groups prior, prior_predictive are left out.*scale"
    ):
        tree = pe.from_svi(model, guide, (x,), num_samples=50, progress=False)
    assert "prior" not in tree and tree.posterior_predictive.x.shape == (1, 50, 9)
    with pytest.raises(ValueError, match="scale"):
        pe.from_svi(model, guide, (x,), num_samples=50, groups=("prior",), progress=False)


def test_names_with_slashes_and_half_precision():
    """A tree takes "/" as a path, and NumPy has no bfloat16."""
    x = rows(5).bfloat16()
    zero, one = torch.zeros((), dtype=x.dtype), torch.ones((), dtype=x.dtype)

    def model(x):
        with pyro.plate("all/data", len(x)):
            z = pyro.sample("local/z", dist.Normal(zero, one))
            pyro.sample("local/x", dist.Normal(z, one), obs=x)

    def guide(x):
        with pyro.plate("all/data", len(x)):
            pyro.sample("local/z", dist.Normal(x / 2, one))

    tree = pe.from_svi(model, guide, (x,), num_samples=3, progress=False,
                       coords={"all/data": list("abcde")})  # fmt: skip
    assert tree.posterior["local.z"].dims == ("chain", "draw", "all.data")
    assert list(tree.observed_data["all.data"].values) == list("abcde")
    torch.testing.assert_close(torch.as_tensor(tree.observed_data["local.x"].values), x.float())

    def clash(x):
        model(x)
        pyro.sample("local.x", dist.Normal(zero, one), obs=zero)

    with pytest.raises(ValueError, match=r"several variables have the name 'local\.x'"):
        pe.from_svi(clash, guide, (x,), num_samples=3, progress=False)


def test_discrete_latents_of_nested_plates():
    """Their joint posterior, by all values: within five standard errors."""
    x, S = rows(3, 2), 3000
    v = torch.arange(3.0)

    def model():
        infer = {"enumerate": "parallel"}
        with pyro.plate("group", 2, dim=-1):
            g = pyro.sample("g", dist.Categorical(torch.ones(3)), infer=infer)
            with pyro.plate("individual", 3, dim=-2):
                i = pyro.sample("i", dist.Categorical(torch.ones(3)), infer=infer)
                pyro.deterministic("sum", g + i, event_dim=0)
                pyro.sample("x", dist.Normal(g + i.double(), 1.0), obs=x)

    tree = pe.from_svi(model, lambda: None, num_samples=S, progress=False)
    assert tree.posterior.g.dims == ("chain", "draw", "group")
    assert tree.posterior.i.dims == ("chain", "draw", "individual", "group")
    assert (tree.posterior["sum"] == tree.posterior.g + tree.posterior.i).all()
    log_p = dist.Normal(v[:, None] + v, 1.0).log_prob(x[..., None, None])
    exact = log_p.logsumexp(-1).sum(0).softmax(-1)
    found = torch.as_tensor(tree.posterior.g.values)[0]
    shares = torch.stack([(found == k).double().mean(0) for k in range(3)], -1)
    assert ((shares - exact).abs() < 5 * (exact * (1 - exact) / S).sqrt() + 1e-9).all()


@pytest.mark.parametrize("steps", [pyro.markov, lambda n: n])
def test_discrete_latents_beside_continuous_ones_in_a_loop(steps):
    """Capture and recapture: a probability is drawn, and states are summed out, at each step."""
    y = (rows(6, 3) > 0).double()

    def model(y):
        z, plate = torch.ones(6), pyro.plate("animals", 6, dim=-1)
        for t in steps(range(3)):
            p = pyro.sample(f"p_{t}", dist.Beta(2.0, 2.0))
            with plate:
                infer = {"enumerate": "parallel"}
                z = pyro.sample(f"z_{t}", dist.Bernoulli(p * z), infer=infer)
                pyro.sample(f"y_{t}", dist.Bernoulli(0.1 + 0.8 * z), obs=y[:, t])

    def guide(y):
        for t in range(3):
            pyro.sample(f"p_{t}", dist.Beta(3.0, 2.0))

    tree = pe.from_svi(model, guide, (y,), num_samples=8, progress=False)
    assert tree.posterior.z.dims == ("chain", "draw", "animals", "time")
    z = tree.posterior.z.values
    assert (z[..., 1:] <= z[..., :-1]).all()  # what is gone stays away
