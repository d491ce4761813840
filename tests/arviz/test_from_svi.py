"""from_svi: what the groups hold, that they agree with the ELBO, and what is refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from helpers import check_arviz, programs
from helpers.oracles import mean_and_stderr, rows
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide, config_enumerate
from torch import nn

import pyproelbo as pe
from pyproelbo._arviz.from_svi import GROUPS
from pyproelbo.guides.ppca import Exact
from pyproelbo.models.ppca import PPCA
from pyproelbo.sequences import IndependentSteps, MarkovChain

REFUSED = {"subsampled", "huge_plate", "scaled_and_masked", "both_enumerated"}
PROGRAMS = {**programs.REPARAMETERISED, **programs.SCORE_FUNCTION, **programs.ENUMERATED}
LATENT_STATS = ("posterior", "log_likelihood", "log_prior", "log_q", "sample_stats")


def values(array):
    """The draws of a variable, without the chain, as a tensor on the CPU."""
    return torch.as_tensor(array.values[0], device="cpu")


def total(group):
    """The sum of all variables for each draw."""
    parts = [v.sum([d for d in v.dims if d not in ("chain", "draw")]) for v in group.values()]
    return sum(values(part) for part in parts) if parts else torch.zeros((), device="cpu")


def assert_densities_add_up(tree):
    stats = tree.sample_stats
    lp, log_q = values(stats.lp), values(stats.log_q)
    joint = sum(total(tree[name]) for name in ("log_likelihood", "log_prior") if name in tree)
    joint = joint + (values(stats.log_factor) if "log_factor" in stats else 0.0)
    torch.testing.assert_close(joint.expand_as(lp), lp)
    if "log_q" in tree:
        torch.testing.assert_close(total(tree["log_q"]).expand_as(log_q), log_q)
    torch.testing.assert_close(values(stats.log_weight), lp - log_q)


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - REFUSED))
def test_weights_are_the_elbo(name):
    model, guide = PROGRAMS[name]()
    num, exact = 30 if name in programs.AUTO else 150, name in programs.ENUMERATED
    tree = pe.from_svi(model, guide, num_samples=num, groups=LATENT_STATS, progress=False)
    assert_densities_add_up(tree)
    assert not {"chain", "draw"} - set(tree.sample_stats.dims)

    weights = values(tree.sample_stats.log_weight)
    objective = pe.BetaELBO(kl="sampled")
    elbos = torch.tensor(
        [-objective.loss(model, guide) for _ in range(20 if exact else num)],
        device="cpu",
        dtype=weights.dtype,
    )
    (a, da), (b, db) = mean_and_stderr(weights), mean_and_stderr(elbos)
    if name not in ("AutoIAFNormal", "multiply_sampled"):  # heavy tails; several samples in one
        assert abs(a - b) < 4 * math.hypot(da, db) + 1e-9


def nested(x):
    """Global, outer and inner latents, a deterministic site, an event of two dims."""

    def model(x):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            with pyro.plate("inner", 4, dim=-2):
                c = pyro.sample("c", dist.Normal(b[..., None] + torch.zeros(2), 0.5).to_event(1))
                m = pyro.deterministic("m", 2 * c, event_dim=1)
                pyro.deterministic("s", c.sum(-1))
                pyro.sample("x", dist.Normal(m, 0.7).to_event(1), obs=x)

    def guide(x):
        a = pyro.sample("a", dist.LogNormal(0.1, 0.5))
        with pyro.plate("outer", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(0.2 * a, 0.3))
            with pyro.plate("inner", 4, dim=-2):
                loc = b[..., None] + torch.zeros(2)
                return pyro.sample("c", dist.Normal(loc, 0.4).to_event(1))

    return model, guide


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_nested_plates_by_hand(chunk):
    x = rows(4, 3, 2)
    model, guide = nested(x)
    tree = pe.from_svi(
        model,
        guide,
        (x,),
        num_samples=20,
        chunk=chunk,
        seed=3,
        dims={"x": ["feature"], "c": ["feature"], "m": ["feature"]},
        coords={"outer": ["u", "v", "w"]},
    )
    dims = {name: v.dims[2:] for name, v in tree.posterior.items()}
    plates = ("inner", "outer")
    assert dims == {
        "a": (),
        "b": ("outer",),
        "c": (*plates, "feature"),
        "m": (*plates, "feature"),
        "s": plates,
    }
    assert tree.log_likelihood.x.dims == ("chain", "draw", *plates)
    assert tree.posterior_predictive.x.dims == ("chain", "draw", *plates, "feature")
    assert tree.observed_data.x.dims == (*plates, "feature")
    assert list(tree.posterior.outer.values) == ["u", "v", "w"]
    assert set(tree.children) == set(GROUPS)

    post = tree.posterior
    a, b, c = (values(post[name]) for name in "abc")
    x = x.cpu()
    torch.testing.assert_close(values(post.m), 2 * c)
    torch.testing.assert_close(values(post.s), c.sum(-1))
    torch.testing.assert_close(
        values(tree.log_likelihood.x), dist.Normal(2 * c, 0.7).log_prob(x).sum(-1)
    )
    log_prior = {
        "a": dist.LogNormal(torch.zeros_like(a), 1.0).log_prob(a),
        "b": dist.Normal(a[:, None], 1.0).log_prob(b),
        "c": dist.Normal(b[:, None, :, None], 0.5).log_prob(c).sum(-1),
    }
    log_q = {
        "a": dist.LogNormal(0.1 + torch.zeros_like(a), 0.5).log_prob(a),
        "b": dist.Normal(0.2 * a[:, None], 0.3).log_prob(b),
        "c": dist.Normal(b[:, None, :, None], 0.4).log_prob(c).sum(-1),
    }
    for name in "abc":
        torch.testing.assert_close(values(tree["log_prior"][name]), log_prior[name])
        torch.testing.assert_close(values(tree["log_q"][name]), log_q[name])
    assert_densities_add_up(tree)


def test_draws_are_the_guides_whatever_is_made_with_them():
    x = rows(4, 3, 2)
    model, guide = nested(x)
    options = {"num_samples": 400, "seed": 8, "progress": False}
    tree = pe.from_svi(model, guide, (x,), **options)
    few = pe.from_svi(model, guide, (x,), groups=["posterior"], chunk=7, **options)
    assert set(few.children) == {"posterior"}
    for name in "abc":
        ours = values(tree.posterior[name])
        assert torch.equal(ours, values(few.posterior[name]))
        theirs = torch.stack(
            [poutine.trace(guide).get_trace(x).nodes[name]["value"].squeeze() for _ in range(400)]
        ).cpu()
        for power in (1, 2):
            (a, b), num = (z.reshape(400, -1) ** power for z in (ours, theirs)), 400**0.5
            error = (a.var(0) + b.var(0)).sqrt() / num
            assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


def test_predictions_belong_to_their_draws():
    """The residual of each prediction at its own draw has the noise's scale; so has the prior's."""

    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(3.0, 2.0))
            w = pyro.deterministic("w", 10 * z)
            pyro.sample("x", dist.Normal(w, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = rows(5)
    for chunk in (1, None):
        tree = pe.from_svi(model, guide, (x,), num_samples=400, chunk=chunk)
        for z, group in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
            error = values(tree[group].x - 10 * tree[z].z) / 0.1
            mean, stderr = mean_and_stderr(error.flatten())
            assert abs(mean) < 4 * stderr
            mean, stderr = mean_and_stderr(error.flatten().square())
            assert abs(mean - 1) < 4 * stderr
            torch.testing.assert_close(values(tree[z].w), 10 * values(tree[z].z))
        mean, stderr = mean_and_stderr(values(tree.prior.z))
        assert ((mean - 3.0).abs() < 4 * stderr).all()
        mean, stderr = mean_and_stderr(values(tree.posterior.z))
        assert ((mean - x.cpu()).abs() < 4 * stderr).all()


AUTOGUIDES = {
    autoguide.AutoDelta: (),
    autoguide.AutoNormal: ("scale_unconstrained", "w_unconstrained", "p_unconstrained"),
    autoguide.AutoMultivariateNormal: ("_AutoMultivariateNormal_latent",),
    autoguide.AutoNormalMessenger: (),
}


@pytest.mark.parametrize("auto", AUTOGUIDES)
def test_autoguides(auto):
    """Latents are constrained; the joint density is on an auxiliary site, which is none."""
    model, guide = programs.of_autoguide(auto)()
    tree = pe.from_svi(model, guide, num_samples=60)
    assert set(tree.posterior.data_vars) == {"scale", "w", "p"}
    assert tree.posterior.p.dims == ("chain", "draw", "data")
    assert set(tree["log_q"].data_vars) == {"scale", "w", "p", *AUTOGUIDES[auto]}
    p, s = values(tree.posterior.p), values(tree.posterior.scale)
    assert (p > 0).all() and (p < 1).all() and (s > 0).all()
    assert_densities_add_up(tree)

    elbo = Trace_ELBO(num_particles=60, max_plate_nesting=1)
    mean, stderr = mean_and_stderr(values(tree.sample_stats.log_weight))
    assert abs(mean + elbo.loss(model, guide)) < 4 * math.sqrt(2) * stderr + 1e-9


def test_a_program_that_mixes_draws_has_them_one_by_one():
    """w.sum() would sum over all draws that are made at once, without an error."""
    x, seen = rows(3), []

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    def guide():
        w = pyro.sample("w", dist.Normal(0.5, 1.0).expand([2]).to_event(1))
        seen.append(w.numel() // 2)

    tree = pe.from_svi(model, guide, num_samples=20, chunk=10)
    w = values(tree.posterior.w).sum(-1, keepdim=True)
    torch.testing.assert_close(values(tree.log_likelihood.x), dist.Normal(w, 1.0).log_prob(x.cpu()))
    assert seen[-1] == 1

    model, guide = nested(rows(4, 3, 2))
    sizes = []

    def recorded(x):
        sizes.append(guide(x).numel() // (4 * 3 * 2))

    pe.from_svi(model, recorded, (rows(4, 3, 2),), num_samples=20, chunk=6)
    assert max(sizes) == 6 and sizes[-4:] == [6, 6, 6, 2]


def test_loops_over_time_become_one_variable():
    model, guide = programs.sequential()
    tree = pe.from_svi(model, guide, num_samples=12)
    assert tree.posterior.z.dims == tree["log_q"].z.dims == ("chain", "draw", "time")
    assert tree.observed_data.x.dims == ("time",)
    assert tree.posterior.y.dims == ("chain", "draw", "rest")  # a plate as a loop
    apart = pe.from_svi(model, guide, num_samples=12, time=None)
    assert set(apart.posterior.data_vars) == {"z_0", "z_1", "z_2", "y_0", "y_1"}
    for t in range(3):
        for group in ("posterior", "log_prior", "log_q", "prior"):
            np.testing.assert_array_equal(tree[group].z[..., t], apart[group][f"z_{t}"])
        np.testing.assert_array_equal(tree.log_likelihood.x[..., t], apart.log_likelihood[f"x_{t}"])
    assert_densities_add_up(tree)


def test_steps_with_gaps_and_names_that_are_taken():
    def model():
        a, data = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.plate("data", 3)
        for t in (2, 5):
            with data:
                z = pyro.sample(f"z_{t}", dist.Normal(a, 1.0).expand([2]).to_event(1))
        pyro.sample("a_0", dist.Normal(a, 1.0))
        pyro.sample("a_1", dist.Normal(a, 1.0))
        pyro.sample("k_0", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("k_1", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.0))

    guide = poutine.block(model, hide=["x"])
    tree = pe.from_svi(model, guide, num_samples=3, groups=["posterior"], dims={"z": ["unit"]})
    assert tree.posterior.z.dims == ("chain", "draw", "data", "time", "unit")
    assert list(tree.posterior.time.values) == [2, 5]
    assert {"a", "a_0", "a_1", "k_0", "k_1"} <= set(tree.posterior.data_vars)


def test_whole_sequences():
    x = rows(3, 5, 2)

    def model(x):
        with pyro.plate("data", 3):
            initial = dist.Normal(torch.zeros(2), 1.0).to_event(1)
            z = pyro.sample(
                "z",
                MarkovChain(initial, lambda z: dist.Normal(0.5 * z, 1.0).to_event(1), num_steps=5),
            )
            pyro.sample("x", IndependentSteps(dist.Normal(z, 0.3).to_event(1)), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", IndependentSteps(dist.Normal(x, 0.5).to_event(1)))

    tree = pe.from_svi(model, guide, (x,), num_samples=30, dims={"z": ["unit"]})
    assert tree.posterior.z.dims == ("chain", "draw", "data", "time", "unit")
    assert tree.observed_data.x.dims == ("data", "time", "x_dim_0")
    assert tree.log_likelihood.x.dims == ("chain", "draw", "data")
    z = values(tree.posterior.z)
    by_hand = dist.Normal(z, 0.3).log_prob(x.cpu()).sum((-2, -1))
    torch.testing.assert_close(values(tree.log_likelihood.x), by_hand)
    assert_densities_add_up(tree)


def mixture(enumerate_in_guide):
    x, loc = rows(4), torch.tensor([-1.0, 1.5])

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            marks = {} if enumerate_in_guide else {"enumerate": "parallel"}
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer=marks)
            pyro.sample("x", dist.Normal(loc[k] + g, 1.0), obs=x)

    def guide():
        pyro.sample("g", dist.Normal(0.2, 0.5))
        if enumerate_in_guide:
            with pyro.plate("data", 4):
                pyro.sample("k", dist.Categorical(torch.tensor([0.6, 0.4])))

    def joint(g):
        """log p(x, k | g), (..., 4, 2)."""
        likelihood = [dist.Normal(m + g, 1.0).log_prob(x.cpu()) for m in loc.tolist()]
        return torch.stack(likelihood, -1) + torch.tensor([0.3, 0.7], device="cpu").log()

    return model, config_enumerate(guide) if enumerate_in_guide else guide, joint


def test_discrete_latents_that_the_guide_enumerates_are_drawn():
    model, guide, joint = mixture(True)
    tree = pe.from_svi(model, guide, num_samples=1000)
    k = values(tree.posterior.k)
    mean, stderr = mean_and_stderr(k.double())
    assert ((mean - 0.4).abs() < 4 * stderr).all()
    log_p = joint(values(tree.posterior.g)[:, None]).gather(-1, k[..., None]).squeeze(-1)
    found = values(tree.log_likelihood.x) + values(tree["log_prior"].k)
    torch.testing.assert_close(found, log_p)
    assert_densities_add_up(tree)


@pytest.mark.parametrize("chunk", [1, None])
def test_discrete_latents_that_the_model_enumerates(chunk):
    """They are summed out of the likelihood, and drawn given the others."""
    model, guide, joint = mixture(False)
    num = 100 if chunk == 1 else 3000
    tree = pe.from_svi(model, guide, num_samples=num, chunk=chunk)
    log_p = joint(values(tree.posterior.g)[:, None])
    torch.testing.assert_close(values(tree.log_likelihood.x), log_p.logsumexp(-1))
    assert set(tree["log_prior"].data_vars) == {"g"}
    error = values(tree.posterior.k) - log_p.softmax(-1)[..., 1]
    mean, stderr = mean_and_stderr(error)
    assert (mean.abs() < 4 * stderr).all()
    mean, stderr = mean_and_stderr(values(tree.prior.k).double())
    assert ((mean - 0.7).abs() < 4 * stderr).all()
    assert_densities_add_up(tree)


def test_masked_data_are_nan():
    x, mask = rows(5), torch.tensor([True, False, True, True, False])

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(m, 1.0), obs=x)
            pyro.sample("y", dist.Normal(m, 1.0).mask(~mask), obs=x)
            pyro.sample("w", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(0.0, 1.0))

    tree = pe.from_svi(model, guide, (x,), num_samples=8)
    m, log_p = values(tree.posterior.m)[:, None], tree.log_likelihood
    expected = dist.Normal(m, 1.0).log_prob(x.cpu())
    for name, there in (("x", mask.cpu()), ("y", ~mask.cpu())):
        found = values(log_p[name])
        assert torch.equal(found.isnan(), ~there.expand(8, 5))
        torch.testing.assert_close(found[:, there], expected[:, there])
    assert not values(log_p.w).isnan().any()
    assert_densities_add_up(tree)


def test_sums_are_float64():
    """float32 is spaced by 0.06 nats where the sum of these is."""
    x = 100 * rows(3000).float()

    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))

    tree = pe.from_svi(model, guide, (x,), num_samples=4)
    assert tree.posterior.m.dtype == np.float32 and tree.log_likelihood.x.dtype == np.float64
    assert abs(values(tree.sample_stats.lp)).min() > 1e6
    assert_densities_add_up(tree)


def test_what_the_user_adds():
    model, x = PPCA(2, 4), rows(6, 4)
    tree = pe.from_svi(
        model,
        Exact(model),
        (),
        {"x": x},
        num_samples=5,
        constant_data={"x_scaled": 2 * x, "year": 1999},
        dims={"x_scaled": ["data", "feature"], "x": ["feature"]},
        elbo_trace=[-3.0, -2.0],
    )
    assert tree["constant_data"].x_scaled.dims == ("data", "feature")
    assert tree["constant_data"].year == 1999
    assert tree["elbo_trace"].elbo.dims == ("step",)
    for attrs in (tree.attrs, tree.posterior.attrs):
        assert attrs["creation_library_version"] == pe.__version__
        assert attrs["creation_library"] == "pyproelbo" and attrs["inference_library"] == "pyro"
        assert attrs["inference_library_version"] == pyro.__version__ and attrs["created_at"]
    # the exact posterior: every weight is the evidence
    evidence = model.log_evidence(x).sum().detach().cpu()
    torch.testing.assert_close(values(tree.sample_stats.log_weight), evidence.expand(5))


def test_nothing_else_changes():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample(
                    "z", dist.Normal(self.net(x), pyro.param("s", torch.ones(()))).to_event(1)
                )

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide, x = Guide(), rows(3, 2)
    state = torch.get_rng_state()
    a, b = (pe.from_svi(model, guide, (x,), num_samples=3, seed=4) for _ in range(2))
    assert a.posterior.z.identical(b.posterior.z) or np.array_equal(a.posterior.z, b.posterior.z)
    assert torch.equal(torch.get_rng_state(), state)
    assert guide.net.training and not pyro.get_param_store().keys()


@pytest.mark.slow
def test_arviz(tmp_path):
    check_arviz.check(check_arviz.fitted(50), tmp_path)
    check_arviz.check_diagnostics()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_part_of_the_data_and_scales_are_refused(name):
    model, guide = PROGRAMS[name]()
    message = "scaled by 3.0" if name == "scaled_and_masked" else "call from_svi with all rows"
    with pytest.raises(ValueError, match=message):
        pe.from_svi(model, guide)


def test_bad_input():
    model, x = PPCA(2, 4), rows(6, 4)
    guide, few = Exact(model), {"num_samples": 2}
    for args, kwargs, message in [
        (x, {}, r"args should be a tuple"),
        ((x,), {"num_samples": 0}, "num_samples should be a positive"),
        ((x,), {"chunk": 1.5}, "chunk should be a positive"),
        ((x,), {"seed": -1}, "seed should be a whole number"),
        ((x,), {"groups": "posterior"}, "groups should name some of"),
        ((x,), {"groups": ["postirior"]}, "groups should name some of"),
        ((x,), {"dims": {"z": ["data", "unit"]}}, r"dims\['z'\] should name 1 dims"),
        ((x,), {"dims": {"w": ["unit"]}}, r"dims names \['w'\], but there are only"),
        ((x,), {"coords": {"data": [1, 2]}}, r"coords\['data'\] should have 6 labels"),
        ((x,), {"coords": {"rows": [1, 2]}}, r"coords names \['rows'\]"),
        ((x,), {"dims": {"z": ["draw"]}}, "all names should differ"),
        ((x,), {"constant_data": {"c": x}, "dims": {"c": ["c", "d"]}}, "all names should differ"),
        ((x,), {"elbo_trace": [[1.0]]}, "elbo_trace should be a sequence of numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            pe.from_svi(model, guide, args, **(few | kwargs))

    with pytest.raises(ValueError, match="the guide has no such site"):
        pe.from_svi(model, lambda x: None, (x,))

    def varying(x):
        guide(x)
        if torch.rand(()) < 0.5:
            pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with pytest.raises(ValueError, match="some draws have the sites"):
        pe.from_svi(model, varying, (x,), num_samples=50)

    def improper():
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(m, 1.0), obs=torch.tensor(0.0))

    start = autoguide.init_to_value(values={"m": torch.zeros(())})
    auto = autoguide.AutoNormal(improper, init_loc_fn=start)
    with pytest.raises(NotImplementedError) as info:
        pe.from_svi(improper, auto, num_samples=2, groups=("posterior", "prior"))
    assert any("out of groups=" in note for note in info.value.__notes__)
    assert "posterior" in info.value.from_svi.children  # which was drawn before
    with pytest.warns(pe.SkippedWarning, match="the groups prior, prior_predictive are left out"):
        tree = pe.from_svi(improper, auto, num_samples=2)
    assert isinstance(tree, xarray.DataTree)
    assert "posterior_predictive" in tree and "prior" not in tree
