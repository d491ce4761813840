"""Masks: of latents in one program alone, of counts, of what stands where nothing is."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

import pyproelbo as pe

N = 6
SEEN = torch.tensor([1, 1, 1, 1, 0, 0]).bool()
QUIET = {"progress": False}


def imputed(y, seen):
    """A value that is missing in some data, as Pyro's obs_mask has it, and one that tells of it."""
    with pyro.plate("data", len(y)):
        v = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y, obs_mask=seen)
        pyro.sample("w", dist.Normal(v, 1.0), obs=y)


def imputing(mask):
    """Its guide, the exact posterior where y is missing."""

    def guide(y, seen):
        with pyro.plate("data", len(y)), poutine.mask(mask=mask(seen)):
            pyro.sample("y_unobserved", dist.Normal(y / 2, 0.5**0.5))

    return guide


def evidence_of_imputed(y):
    seen = dist.Normal(0.0, 1.0).log_prob(y) + dist.Normal(y, 1.0).log_prob(y)
    return torch.where(SEEN, seen, dist.Normal(0.0, 2**0.5).log_prob(y))


MASKS = {
    "by the handler": lambda m: (dist.Normal(0.0, 1.0), m),
    "by the distribution": lambda m: (dist.Normal(0.0, 1.0).mask(m), True),
    "within an event": lambda m: (
        dist.Normal(torch.zeros(N, 2), 1.0).mask(m.unsqueeze(-1)).to_event(1),
        True,
    ),
}


def latent(how, mask):
    """A latent that is masked in some way, as model and as guide."""
    fn, outer = MASKS[how](mask)
    with pyro.plate("data", N), poutine.mask(mask=outer):
        return pyro.sample("z", fn)


def padded(how, in_model, in_guide):
    everywhere = torch.ones(N, dtype=torch.bool)

    def model():
        z = latent(how, SEEN if in_model else everywhere)
        z = z.mean(-1) if z.dim() > 1 else z
        with pyro.plate("rows", N), poutine.mask(mask=SEEN):
            pyro.sample("x", dist.Normal(z, 1.0), obs=rows(N))

    return model, lambda: latent(how, SEEN if in_guide else everywhere)


@pytest.mark.parametrize("how", MASKS)
@pytest.mark.parametrize("in_model, in_guide", [(True, False), (False, True), (True, True)])
def test_a_latent_that_one_program_masks_is_named_once(how, in_model, in_guide):
    model, guide = padded(how, in_model, in_guide)
    objective = pe.BetaELBO(kl="sampled", max_plate_nesting=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [objective.loss(model, guide) for _ in range(3)]
    notes = [str(w.message) for w in caught if w.category is pe.MaskWarning]
    if in_model and in_guide:
        assert not notes
    else:
        who, other = ("model", "guide") if in_model else ("guide", "model")
        assert len(notes) == 1
        assert f"the {who} masks latent 'z' where the {other} does not" in notes[0]
    assert all(map(math.isfinite, losses))
    theirs = _at_seed(Trace_ELBO(max_plate_nesting=1), model, guide)
    assert _at_seed(objective, model, guide) == pytest.approx(theirs)


def _at_seed(elbo, model, guide):
    pyro.set_rng_seed(0)
    return elbo.loss(model, guide)


@pytest.mark.parametrize("report", ["evidence", "psis", "decompositions", "check", "inference_gap"])
def test_reports_refuse_it(report):
    y = rows(N)
    guide = imputing(lambda seen: torch.ones_like(seen))
    with pytest.raises(ValueError, match=r"masks latent 'y_unobserved'.*its mask is ~m"):
        getattr(pe, report)(imputed, guide, (y, SEEN), **QUIET)


def test_draws_are_right_and_their_weights_are_warned_of():
    y = rows(N)
    with pytest.warns(pe.MaskWarning, match="y_unobserved"):
        pe.from_svi(imputed, imputing(torch.ones_like), (y, SEEN), num_samples=3, **QUIET)


def test_evidence_of_data_that_are_missing_in_part():
    y = rows(N)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.MaskWarning)
        found = pe.evidence(imputed, imputing(lambda seen: ~seen), (y, SEEN), **QUIET)
        sampled = pe.BetaELBO(kl="sampled")
        elbo = sampled.terms(imputed, imputing(lambda seen: ~seen), y, SEEN).elbo
    exact = evidence_of_imputed(y)
    torch.testing.assert_close(found.log_evidence, exact)
    torch.testing.assert_close(elbo, exact.sum())  # of the exact posterior


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguides_of_masked_latents(auto):
    """Their sites are unmasked: only a point has no density that could rise without bound."""
    y = rows(N)
    guide = auto(imputed)
    with poutine.block():
        guide(y, SEEN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pe.BetaELBO().loss(imputed, guide, y, SEEN)
    notes = [w for w in caught if w.category is pe.MaskWarning]
    assert len(notes) == (auto is not AutoDelta)


def test_equal_masks_that_are_made_twice_are_equal():
    """All of a batch may be there: then nothing is masked, whatever the guide says."""
    y, all_seen = rows(N), torch.ones(N, dtype=torch.bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.MaskWarning)
        pe.BetaELBO().loss(imputed, imputing(lambda seen: torch.logical_not(seen)), y, SEEN)
        pe.BetaELBO().loss(imputed, imputing(lambda seen: torch.zeros_like(seen)), y, all_seen)
    objective = pe.BetaELBO()
    guide = imputing(torch.ones_like)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):  # the first batch has all; a later one has not
            objective.loss(imputed, guide, y, ~all_seen if i < 2 else SEEN)
    assert [w.category for w in caught].count(pe.MaskWarning) == 1


@pytest.mark.parametrize("how", MASKS)
def test_counts_know_every_mask(how):
    """Free bits and capacity are per datum that is there."""
    model, guide = padded(how, True, True)
    terms = pe.BetaELBO().terms(model, guide)
    assert terms.counts["z"] == pytest.approx(SEEN.sum().item())
    assert terms.num_data == pytest.approx(SEEN.sum().item())


def test_free_bits_and_capacity_are_the_same_by_handler_and_by_distribution():
    losses = []
    for how in ("by the handler", "by the distribution"):
        model, guide = padded(how, True, True)
        pyro.set_rng_seed(0)
        free = pe.FreeBitsELBO(1.0).loss(model, guide)
        pyro.set_rng_seed(0)
        capacity = pe.CapacityELBO(0.5, 10.0).loss(model, guide)
        losses.append((free, capacity))
    torch.testing.assert_close(*map(torch.tensor, losses))


@pytest.mark.parametrize("fn, filler", [
    (lambda s: dist.Normal(s, 1.0), math.nan),
    (lambda s: dist.Gamma(s, 1.0), math.nan),
    (lambda s: dist.Gamma(s, 1.0), -3.0),
    (lambda s: dist.Beta(s, 2.0), math.inf),
    (lambda s: dist.Poisson(s), math.nan),
])  # fmt: skip
@pytest.mark.parametrize("validated", [True, False])
def test_what_stands_under_a_mask_has_no_gradient(fn, filler, validated):
    """NaN there, or what the likelihood does not take, is as good as any other number."""
    x = torch.tensor([0.5, 0.25, filler, 1.0 if fn(1.0).support.is_discrete else 0.75])
    x = x.round() if fn(1.0).support.is_discrete else x
    seen = torch.tensor([1, 1, 0, 1]).bool()
    log_s = torch.tensor(0.3, requires_grad=True)

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", fn((log_s + 0 * z).exp()), obs=x)

    def guide(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    gradients = []
    for value in (x, x.masked_fill(~seen, 0.5).round() if x[0] == 0 else x.masked_fill(~seen, 0.5)):
        with pyro.validation_enabled(validated):
            loss = pe.BetaELBO().differentiable_loss(model, guide, value, seen)
        gradients.append((loss.detach(), *torch.autograd.grad(loss, [log_s])))
    torch.testing.assert_close(*gradients)
    assert gradients[0][1].isfinite() and gradients[0][1] != 0


def test_nan_that_nothing_masks_is_told_without_the_tensor():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = rows(400)
    x[7] = math.nan
    with pytest.raises(ValueError, match=r"NaN in 1 of 400 elements.*poutine\.mask") as info:
        pe.BetaELBO().loss(model, lambda x: None, x)
    assert len(str(info.value)) < 700


def test_observed_data_are_nan_where_there_are_none():
    """Fillers are no data: a predictive check would compare with them."""
    x, seen = rows(N, 2), torch.tensor([[1, 1], [1, 0], [1, 1], [0, 0], [1, 1], [1, 1]]).bool()
    counts = x.abs().round()

    def model(x, counts):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, dim=-2), pyro.plate("d", 2, dim=-1), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)
            pyro.sample("n", dist.Poisson(m.exp()), obs=counts)
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(m, 1.0).expand([N]).mask(seen[:, 0]), obs=x[:, 0])
            whole = dist.Normal(m.expand(N, 2), 1.0).mask(seen).to_event(1)
            pyro.sample("v", whole, obs=x)

    def guide(*_):
        pyro.sample("m", dist.Normal(0.0, 1.0))

    tree = pe.from_svi(model, guide, (x.masked_fill(~seen, 9.0), counts), num_samples=2, **QUIET)
    expected = {"x": seen, "n": seen, "y": seen[:, 0], "v": seen}
    for name, there in expected.items():
        found = torch.as_tensor(tree.observed_data[name].values)
        assert torch.equal(~found.isnan(), there), name
    assert torch.equal(torch.as_tensor(tree.log_likelihood.x.values).isnan().all(1)[0], ~seen)
