"""The verdict on posteriors that are known to be good or bad."""

import dataclasses
import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.conjugate import Hierarchy, ppca_and_data
from helpers.oracles import rows

import pyproelbo as pe
from pyproelbo.__main__ import main
from pyproelbo.guides.lgssm import Exact as ExactSmoother
from pyproelbo.guides.lgssm import ExactFilter
from pyproelbo.guides.ppca import Diagonal, Exact
from pyproelbo.models.lgssm import LGSSM


def test_an_exact_guide_is_fine():
    model, x = ppca_and_data(60)
    result = pe.check(model, Exact(model), x, num_samples=100, progress=False)
    assert result.verdict == "fine" and str(result).count("Verdict: fine") == 1
    assert result.surgery is not None and not result.skipped


def test_a_guide_that_is_too_narrow_is_bad():
    model, x = ppca_and_data(60)
    guide = Diagonal.optimum(model)
    with torch.no_grad():
        guide.raw.sub_(1.5)
    result = pe.check(model, guide, x, progress=False)
    assert result.verdict == "bad"
    assert result.findings[0].verdict == "bad" and "Pareto k-hat" in result.findings[0].text
    saved = json.loads(json.dumps(result.as_json()))
    assert saved["verdict"] == "bad" and len(saved["khat"]) == 60


def test_a_guide_that_is_off_lacks_nats():
    model, x = ppca_and_data(60)
    guide = Exact(model)

    def off(x):
        q = guide.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(q.mean + 2.5 * q.stddev, q.covariance_matrix))

    result = pe.check(model, off, x, progress=False)
    assert result.verdict == "bad"
    assert any(f.verdict == "bad" and "nats per datum" in f.text for f in result.findings)


def test_a_discrete_latent_can_be_fine():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(4 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=4 * x - 8.8))  # -8.847 is exact

    x = 2.2 + 0.3 * rows(40)  # both states are drawn often
    result = pe.check(model, guide, x, progress=False)
    assert [finding.verdict for finding in result.findings[:2]] == ["fine", "fine"], result
    assert result.surgery is not None or result.skipped


def test_collapse_is_doubtful():
    model, x = ppca_and_data(60)
    with torch.no_grad():
        model.W.mul_(1e-3)
    result = pe.check(model, Exact(model), x, num_samples=100, progress=False)
    assert result.verdict == "doubtful" and "collapse" in result.findings[-1].text


@pytest.mark.parametrize(
    ("large", "gap", "ess", "verdicts"),
    [
        (1, 0.4, 50.0, ["fine", "fine"]),
        (2, 0.6, 50.0, ["doubtful", "doubtful"]),
        (10, 2.9, 49.0, ["doubtful", "doubtful", "doubtful"]),
        (11, 3.1, 49.0, ["bad", "bad", "doubtful"]),
    ],
)
def test_thresholds(large, gap, ess, verdicts):
    """Of 100 data so many with a large k-hat, and an ELBO that lacks so much."""
    model, x = ppca_and_data(60)
    found = pe.check(model, Exact(model), x, num_samples=1000, progress=False)
    khat = torch.where(torch.arange(100, device="cpu") < large, 0.71, 0.1)
    result = dataclasses.replace(
        found,
        psis=dataclasses.replace(
            found.psis, khat=khat, effective_sample_size=torch.full((100,), ess, device="cpu")
        ),
        decompositions=dataclasses.replace(
            found.decompositions, posterior_kl=found.decompositions.posterior_kl._replace(value=gap)
        ),
        surgery=None,
        fisher=None,
    )
    of_moments = [finding for finding in result.findings if "weighted draws" in finding.text]
    assert len(of_moments) == 1
    assert [f.verdict for f in result.findings if f not in of_moments] == verdicts
    assert result.verdict == verdicts[0]
    assert result.findings[0].text.startswith("Pareto k-hat is above 0.67 for")


@pytest.mark.parametrize("guide_type", [ExactSmoother, ExactFilter])
def test_sequences_have_a_verdict(guide_type):
    model = LGSSM(2, 3)
    x = model(num=6, num_steps=3).detach()
    result = pe.check(model, guide_type(model), x, num_samples=100, progress=False)
    assert result.findings and (result.surgery is not None or result.skipped)


def of_two_latents(correlation):
    """A posterior that is normal, with unit variances and a correlation."""
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]])

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    return model


@pytest.mark.parametrize(
    ("shift", "factor", "verdict", "said"),
    [
        (0.0, 1.0, "fine", "is off by 0"),
        (0.0, 1.5, "bad", "times that of the posterior"),
        (0.0, 1.2, "doubtful", "times that of the posterior"),
        (0.4, 1.0, "bad", "of z[0] is off by"),
        (0.0, 0.4, "bad", "q misses important parts"),
    ],
)
def test_global_latents_by_weights_means_and_sds(shift, factor, verdict, said):
    """k-hat tells if weights can be used; the moments by these, if q is good."""

    def guide():
        mean = torch.tensor([shift, 0.0])
        pyro.sample("z", dist.Normal(mean, factor).to_event(1))

    result = pe.check(of_two_latents(0.0), guide, None, num_samples=4000, progress=False)
    assert result.per == "data set" and result.surgery is None and "no aggregate" in result.skipped
    assert result.verdict == verdict
    assert said in str(result)
    assert json.loads(json.dumps(result.as_json()))["per"] == "data set"
    assert set(result.to_xarray().children) == {
        "decompositions",
        "psis",
        "moments",
        "fisher",
    }
    assert "nats (all data together" in str(result) and "per datum" not in str(result)


def test_levels_have_each_their_own():
    """The joint weights of many data are bad; by level they are good, and so is the verdict."""
    of = Hierarchy.of(200)
    guide = of.guide(local_factor=1.1)
    result = pe.check(of.model, guide, of.x, num_samples=300, progress=False)
    assert result.psis.effective_sample_size.item() < 50
    assert set(result.levels) == {"global", "local"}
    assert "k-hat of the global latents" in result.notes[0]
    assert "mean of mu is off by" in result.notes[1]
    assert "given the global latents is above" in result.notes[2]
    assert "given the global latents for 0.0% of the data" in result.notes[3]
    assert result.verdict == "fine"
    wide = of.guide(factor=1.6, local_factor=1.5)
    result = pe.check(of.model, wide, of.x, num_samples=500, progress=False)
    assert [finding.verdict for finding in result.findings[:4]] == ["fine", "bad", "fine", "bad"]


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((60, 4, 4)))
    options = ["--latent", "3", "--hidden", "8", "--epochs", "1", "--device", "cpu"]
    out = str(tmp_path / "out")
    assert main(["fit", str(tmp_path / "x.npy"), *options, "--out", out]) == 0
    capsys.readouterr()
    assert main(["check", out, "--on", "train", "--max-data", "20", "--num-samples", "50"]) == 0
    printed = capsys.readouterr().out
    assert "Verdict: " in printed and "khat.png" in printed
    saved = json.loads((tmp_path / "out" / "check" / "check.json").read_text())
    assert saved["num_data"] == 20 and saved["data"] == "training data of x.npy"
    assert saved["findings"][0]["verdict"] in ("fine", "doubtful", "bad")
    assert (tmp_path / "out" / "check" / "khat.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["check", out, "--on", "both"]) == 2
    assert "--on should be train or held-out" in capsys.readouterr().err


def test_gradients_see_what_weights_cannot_say():
    """A q that misses the posterior: its weights are useless, its gradients say where it is off."""

    def guide():
        pyro.sample("z", dist.Normal(torch.tensor([0.0, 3.0]), 0.3).to_event(1))

    result = pe.check(of_two_latents(0.0), guide, None, progress=False)
    of_gradients = [f for f in result.findings if "gradients of log q" in f.text]
    assert len(of_gradients) == 1 and "most in z[1]" in of_gradients[0].text
    # (s^2 - 1)^2 + s^2 m^2 in the second coordinate
    expected = torch.tensor([0.91**2, 0.91**2 + 0.09 * 9])
    assert ((result.fisher.scaled[0] - expected).abs() < 4 * result.fisher.scaled_stderr[0]).all()
