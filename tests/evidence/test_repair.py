"""Posteriors that are repaired, of models whose posteriors are known."""

import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import conjugate
from helpers.oracles import rows
from helpers.stopping import Stopping
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyproelbo as pe
from pyproelbo.guides.gmm import Softmax
from pyproelbo.guides.lgssm import MeanField
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.gmm import GMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA

QUIET = {"progress": False}


def assert_is(found, z, loc, covariance):
    """Draws (S, N, K) with the means and covariances given, within 4 standard errors."""
    root = torch.linalg.cholesky(covariance)
    e = torch.linalg.solve_triangular(root, (z - loc).unsqueeze(-1), upper=False).squeeze(-1)
    ess = found.effective_sample_size
    off = e.mean(0) * ess.sqrt().unsqueeze(-1)
    identity = torch.eye(e.shape[-1])
    second = torch.einsum("sni,snj->nij", e, e) / len(e) - identity
    second = second * ess.sqrt()[:, None, None] / (1 + identity).sqrt()
    for z_scores in (off, second):
        assert z_scores.abs().max() < 4
        assert z_scores.square().mean() < 1 + 4 * (2 / z_scores.numel()) ** 0.5


def correlated_ppca(num):
    model = PPCA(2, 5)
    with torch.no_grad():
        model.W[:, 1] = model.W[:, 0] + 0.5 * model.W[:, 1]
        model.W.mul_(1.5)
    return model, model(num=num).detach()


@pytest.mark.parametrize("methods", [None, ["correlated"], ["family", "annealed"]])
def test_a_spoilt_encoder_of_ppca(methods):
    """The encoder knows nothing; where its family is too poor a correlated Gaussian passes."""
    model, x = correlated_ppca(24)
    guide = Diagonal(2, 5)
    options = {"annealed": pe.Annealed(50, 5)} if methods and "annealed" in methods else {}
    found = pe.repair(model, guide, x, methods=methods, **options, **QUIET)
    assert found.passes.all() and found.is_finished.all()
    p = model.posterior(x)
    assert_is(found, found.draws["z"], p.mean.detach(), p.covariance_matrix.detach())
    expected = pe.psis(model, guide, x, **QUIET).khat
    torch.testing.assert_close(found.khat_before, expected)
    assert (expected > 0.7).any() and (found.khat_after < 0.7).all()
    kept = found.method == "guide"
    torch.testing.assert_close(found.khat_after[kept], expected[kept])


def test_what_passes_is_kept_and_costs_no_more():
    x = rows(30)
    found = pe.repair(conjugate.model, conjugate.guide_of(), x, **QUIET)
    assert (found.method == "guide").all() and set(found.seconds) == {"guide", "prior", "search"}
    assert_is(found, found.draws["z"].unsqueeze(-1), x[:, None] / 2, 0.5 * torch.eye(1))


def test_the_rows_that_are_off_are_repaired_alone():
    x = rows(20)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 8.0 * (x > cut), 0.7))

    cut = x.sort().values[-4] - 1e-6
    off = x > cut
    counted = Counting(conjugate.model)
    found = pe.repair(counted, guide, x, **QUIET)
    assert (found.method[~off] == "guide").all() and (found.method[off] == "family").all()
    assert (found.cost[off] > found.cost[~off].max()).all()
    assert sum(found.seconds.values()) == pytest.approx(float(found.cost.sum()))
    assert counted.sizes[-400:] == [4] * 400  # and not with the 16 others
    assert_is(found, found.draws["z"].unsqueeze(-1), x[:, None] / 2, 0.5 * torch.eye(1))


class Counting:
    """A program that notes how many data it is called with."""

    def __init__(self, program):
        self.program, self.sizes = program, []

    def __call__(self, x):
        self.sizes.append(len(x))
        return self.program(x)


def test_rows_that_cannot_be_had_alone_are_repaired_among_the_others():
    """The scales are of all data; of a few alone they would be those of other data."""
    x, scale = rows(12), torch.linspace(0.3, 2.0, 12)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale[: len(x)]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    found = pe.repair(model, guide, x, **QUIET)
    assert "family" in found.method and "guide" in found.method and found.passes.all()
    precision = 1 + scale**-2
    variance = (1 / precision)[:, None, None]
    loc = (x * scale**-2 / precision)[:, None]
    assert_is(found, found.draws["z"].unsqueeze(-1), loc, variance)


def test_autoguides_with_parameters_for_each_datum():
    x = rows(8)
    guide = AutoNormal(conjugate.model, init_loc_fn=init_to_value(values={"z": x + 3.0}))
    found = pe.repair(conjugate.model, guide, x, **QUIET)
    assert (found.method == "family").all() and list(found.draws) == ["z"]
    assert_is(found, found.draws["z"].unsqueeze(-1), x[:, None] / 2, 0.5 * torch.eye(1))


def regression(num=30):
    X = rows(num, 2)
    X[:, 1] += 2 * X[:, 0]
    y = X @ torch.tensor([1.0, -1.0]) + rows(num)

    def model(X, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((X * b).sum(-1), 1.0), obs=y)

    covariance = (X.mT @ X + torch.eye(2) / 4).inverse()
    return model, (X, y), covariance @ X.mT @ y, covariance


def test_global_latents():
    model, data, loc, covariance = regression()
    start = init_to_value(values={"b": torch.tensor([3.0, 3.0])})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.3)
    guide(*data)
    before = [p.detach().clone() for p in guide.parameters()]
    found = pe.repair(model, guide, data, **QUIET)
    assert found.per == "data set" and found.method.tolist() == ["correlated"]
    assert found.draws["b"].shape == (1000, 2)
    assert_is(found, found.draws["b"].unsqueeze(1), loc[None], covariance[None])
    for old, new in zip(before, guide.parameters(), strict=True):
        assert torch.equal(old, new) and new.requires_grad


def test_a_positive_latent_under_an_autoguide():
    """log s ~ N(0, 1) and y ~ N(log s, 1): log s is N(1, 1/2) given y = 2."""

    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(s.log(), 1.0), obs=torch.tensor(2.0))

    start = init_to_value(values={"s": torch.tensor(0.3)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.3)
    guide()
    for methods in (["family"], ["correlated"], ["annealed"]):
        options = {"lr": 0.1, "annealed": pe.Annealed(60, 5)}
        found = pe.repair(model, guide, None, methods=methods, **options, **QUIET)
        assert found.method.tolist() == methods
        log_s = found.draws["s"].log()[:, None, None]
        assert_is(found, log_s, torch.ones(1, 1), 0.5 * torch.eye(1))


def test_a_mixture_whose_components_are_summed_up():
    """Discrete latents: the mixture with the prior, for the guide never draws what it thinks 0."""
    model, guide = GMM(4, 2), Softmax(4, 2)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.mul_(8)
    x = model.decode(torch.arange(48) % 4).sample()
    found = pe.repair(model, guide, x, **QUIET)
    assert (found.method == "mixture").all()
    p = model.posterior(x).probs.detach()
    shares = torch.nn.functional.one_hot(found.draws["z"], 4).double().mean(0)
    error = (p * (1 - p) / found.effective_sample_size.unsqueeze(-1)).sqrt() + 1e-3
    assert ((shares - p).abs() < 4 * error).all()


def test_sequences():
    model = LGSSM(2, 3)
    x = model(num=6, num_steps=4).detach()
    found = pe.repair(model, MeanField(2, 3), x, **QUIET)
    assert found.passes.all() and "IndependentSteps" in found.left_out["family"]
    exact = model.posterior(x).sample((20_000,)).flatten(2)
    centred = exact - exact.mean(0)
    covariance = torch.einsum("sni,snj->nij", centred, centred) / len(exact)
    assert_is(found, found.draws["z"].flatten(2), exact.mean(0), covariance)


def test_the_same_for_any_batch_size_and_chunk():
    model, x = correlated_ppca(10)
    guide = Diagonal(2, 5)
    options = {"steps": 150, "annealed": pe.Annealed(4, 2), "chunk": 300, **QUIET}
    one = pe.repair(model, guide, x, **options)
    other = pe.repair(model, guide, x, batch_size=3, **options)
    assert len(set(one.method)) > 1 and (one.method == other.method).all()
    torch.testing.assert_close(one.draws["z"], other.draws["z"])
    torch.testing.assert_close(one.khat_after, other.khat_after)


def test_time_runs_out():
    """What is left is said; the guide's draws are weighed for all."""
    model, x = correlated_ppca(12)
    found = pe.repair(model, Diagonal(2, 5), x, max_time=1e-6, **QUIET)
    kept = found.method == "guide"
    assert not kept.all() and (found.method[~kept] == "failed").all()
    assert (found.is_finished.numpy() == kept).all()
    assert "Time ran out" in " ".join(found.notes) and set(found.seconds) == {
        "guide",
        "prior",
        "search",
    }
    begin = time.monotonic()
    pe.repair(model, Diagonal(2, 5), x, max_time=0.5, batch_size=2, **QUIET)
    assert time.monotonic() - begin < 10


def test_ctrl_c_leaves_what_is_finished():
    x = rows(12)
    guide = conjugate.guide_of(shift=6.0)
    counting = Stopping(conjugate.model, 0)
    options = {"batch_size": 4, "steps": 20, "methods": ["family", "correlated"], **QUIET}
    whole = pe.repair(counting, guide, x, **options)
    seen = set()
    for at in range(counting.calls // 4, counting.calls, 100):
        with pytest.warns(pe.UnfinishedWarning, match="the repair covers only the first"):
            part = pe.repair(Stopping(conjugate.model, at), guide, x, **options)
        num = len(part.method)
        assert part.draws["z"].shape == (1000, num)
        torch.testing.assert_close(part.khat_before, whole.khat_before[:num])
        assert not part.is_finished[~part.passes].any()
        seen.add((num, int(part.passes.sum())))
    assert len(seen) > 2


def test_nothing_changes_outside():
    model, x = correlated_ppca(6)
    guide, state = Diagonal(2, 5), torch.get_rng_state()
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pe.repair(model, guide, x, steps=30, annealed=pe.Annealed(3, 2), **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    for old, new in zip(before, (*model.parameters(), *guide.parameters()), strict=True):
        assert torch.equal(old, new) and new.requires_grad and new.grad is None


@pytest.mark.parametrize(
    "options, match",
    [
        ({"max_time": 0}, "max_time should be a positive number, got 0"),
        ({"max_time": -1.0}, "max_time should be a positive number"),
        ({"methods": ["Laplace"]}, r"methods should be some of \['family', 'correlated'"),
        ({"methods": "family"}, "methods should be some of"),
        ({"num_samples": 10}, "num_samples should be a whole number of at least 25"),
        ({"steps": 0}, "steps should be a positive whole number"),
        ({"annealed": "annealed"}, r"annealed should be pe\.Annealed\(\.\.\.\), got 'annealed'"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        pe.repair(conjugate.model, conjugate.guide_of(), rows(6), **options)


def test_a_guide_that_draws_nothing():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="draws no latent"):
        pe.repair(model, lambda x: None, rows(4), **QUIET)


def test_repaired_draws_go_to_arviz():
    x = rows(10)
    guide = conjugate.guide_of(shift=6.0)
    found = pe.repair(conjugate.model, guide, x, num_samples=400, **QUIET)
    tree = pe.from_svi(
        conjugate.model, guide, (x,), num_samples=300, repaired=found, dims={}, **QUIET
    )
    z = torch.as_tensor(tree.posterior.z.values[0])
    assert torch.equal(z, found.draws["z"][:300])
    lp = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    torch.testing.assert_close(torch.as_tensor(tree.sample_stats.lp.values[0]), lp.sum(1))
    assert tree.sample_stats.attrs["corrected"] == 1


def test_repaired_draws_of_an_autoguide_go_to_arviz():
    model, data, *_ = regression()
    guide = AutoNormal(model, init_scale=0.3)
    guide(*data)
    found = pe.repair(model, guide, data, **QUIET)
    tree = pe.from_svi(model, guide, data, repaired=found, **QUIET)
    assert torch.equal(torch.as_tensor(tree.posterior.b.values[0]), found.draws["b"])


def test_repaired_draws_that_are_none_of_these_data():
    x = rows(10)
    guide = conjugate.guide_of()
    found = pe.repair(conjugate.model, guide, x, num_samples=50, **QUIET)
    options = {"num_samples": 50, **QUIET}
    with pytest.raises(ValueError, match="repaired should be for the same data"):
        pe.from_svi(conjugate.model, guide, (rows(4),), repaired=found, **options)
    with pytest.raises(ValueError, match="num_samples should be at most the 50 repaired draws"):
        pe.from_svi(conjugate.model, guide, (x,), repaired=found, **QUIET)
    with pytest.raises(ValueError, match="repaired should be a result of"):
        pe.from_svi(conjugate.model, guide, (x,), repaired=True, **options)
    with pytest.raises(ValueError, match="leave corrected= out"):
        pe.from_svi(conjugate.model, guide, (x,), repaired=found, corrected=True, **options)
    failed = pe.repair(
        conjugate.model, conjugate.guide_of(shift=9.0), x, num_samples=50, methods=[], **QUIET
    )
    with pytest.warns(pe.CorrectionWarning, match="no method of pe.repair passes"):
        pe.from_svi(conjugate.model, guide, (x,), repaired=failed, **options)
