"""Data of any size: fitted alike, and told in their own units and nats."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.command import TINY, fit, refused, summary_of, surgery, trace_of

import pyproelbo as pe
from pyproelbo.cli import load_run, training
from pyproelbo.cli.standardising import Scaling

pytestmark = pytest.mark.slow

SHIFT, SCALE = np.array([1e4, -3.0, 0.0, 7.0]), np.array([1e3, 1e-3, 1.0, 40.0])


@pytest.fixture
def data(tmp_path):
    """Standard data, and the same in other units."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(60, 4))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", SHIFT + SCALE * x)
    return tmp_path


def test_units_shift_the_elbo_by_the_jacobian_alone(data, capsys):
    for name in "xy":
        options = [data / f"{name}.npy", *TINY, "--epochs", 6, "--out", data / name]
        assert fit(*options) == 0
        assert "the nets see each feature standardised" in capsys.readouterr().err
    x, y = (summary_of(data / name) for name in "xy")
    jacobian = np.log(SCALE).sum()
    for part in ("train", "held_out"):
        assert y[part]["elbo"] == pytest.approx(x[part]["elbo"] - jacobian, abs=1e-5)
        assert y[part]["kl"] == pytest.approx(x[part]["kl"], abs=1e-5)
    for a, b in zip(trace_of(data / "x"), trace_of(data / "y"), strict=True):
        gap = float(a["train_elbo"]) - float(b["train_elbo"])
        assert gap == pytest.approx(jacobian, abs=1e-5)


def test_a_loaded_run_takes_and_gives_data_as_they_are(data):
    options = ["--epochs", 100, "--lr", 0.03, "--batch-size", 54, "--out", data / "y"]
    assert fit(data / "y.npy", *TINY, *options) == 0
    run = load_run(data / "y")
    assert run.config.standardise is True
    train, _ = run.config.split(run.config.read().x)
    p = run.model.decode(run.guide.posterior(train).mean)
    error = ((p.mean - train) / torch.as_tensor(SCALE)).pow(2).mean().sqrt()
    assert error < 0.5
    result = pe.surgery(run.model, run.guide, train, progress=False)
    assert result.elbo == pytest.approx(summary_of(data / "y")["train"]["elbo"])
    assert surgery(data / "y") == 0
    density = torch.distributions.Normal(p.mean, p.base_dist.scale).log_prob(train).sum(-1)
    torch.testing.assert_close(p.log_prob(train), density)


@pytest.mark.parametrize("options", [[], ["--prior", "vamp:5"]])
def test_it_resumes_to_the_same_numbers(data, options):
    options = [data / "x.npy", *TINY, *options]
    assert fit(*options, "--epochs", 3, "--out", data / "whole") == 0
    assert fit(*options, "--epochs", 1, "--out", data / "parts") == 0
    assert fit("--resume", data / "parts", "--epochs", 3) == 0
    assert trace_of(data / "whole") == trace_of(data / "parts")


def test_pseudo_inputs_are_in_the_units_of_the_data(data):
    assert fit(data / "y.npy", *TINY, "--epochs", 20, "--prior", "vamp:9", "--out", data / "y") == 0
    run = load_run(data / "y")
    u = run.model.prior.pseudo_inputs.detach().numpy()
    assert np.abs((u - SHIFT) / SCALE).max() < 5
    assert u.std(0) == pytest.approx(np.load(data / "y.npy").std(0), rel=0.8)


def test_older_runs_and_those_without_it_see_data_as_they_are(data):
    assert fit(data / "x.npy", *TINY, "--epochs", 1, "--no-standardise", "--out", data / "x") == 0
    run = load_run(data / "x")
    config = json.loads((data / "x" / "config.json").read_text())
    assert config.pop("standardise") is False
    (data / "x" / "config.json").write_text(json.dumps(config))
    x = torch.as_tensor(np.load(data / "x.npy"))
    old = load_run(data / "x")
    torch.testing.assert_close(old.guide.posterior(x).mean, run.guide.posterior(x).mean)
    assert fit("--resume", data / "x", "--epochs", 2) == 0


def test_images_are_not_standardised(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((30, 4)))
    assert fit(tmp_path / "x.npy", *TINY, "--epochs", 1, "--out", tmp_path / "out") == 0
    assert load_run(tmp_path / "out").config.standardise is False
    out = ["--out", tmp_path / "more"]
    message = refused(capsys, tmp_path / "x.npy", *TINY, "--standardise", *out)
    assert "--standardise is for --likelihood gaussian" in message
    more = ["--likelihood", "gaussian", "--epochs", 1]
    assert fit(tmp_path / "x.npy", *TINY, *more, *out) == 0
    assert load_run(tmp_path / "more").config.standardise is True


def test_sequences_are_standardised_by_the_steps_that_count(tmp_path):
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=(24, 6, 2)), rng.integers(1, 7, 24)
    x[np.arange(6) >= lengths[:, None]] = np.nan
    scale = np.array([100.0, 0.01])
    options = ["--model", "dmm", *TINY, "--epochs", 4]
    for name, values in (("x", x), ("y", 5.0 + scale * x)):
        np.savez(tmp_path / f"{name}.npz", x=values, lengths=lengths)
        assert fit(tmp_path / f"{name}.npz", *options, "--out", tmp_path / name) == 0
    run = load_run(tmp_path / "y")
    train, _ = run.config.split(run.config.read().x)
    steps = torch.arange(train["x"].shape[1]) < train["lengths"][:, None]
    own = train["x"][steps]
    torch.testing.assert_close(run.guide.data_shift, own.mean(0))
    torch.testing.assert_close(run.guide.data_scale, own.std(0, correction=0))
    ours, theirs = (summary_of(tmp_path / name)["train"] for name in "yx")
    jacobian = np.log(scale).sum()
    gap = theirs["elbo_per_frame"] - ours["elbo_per_frame"]
    assert gap == pytest.approx(jacobian, abs=1e-5)


def test_compiled_steps_see_them_standardised_too(data):
    options = [data / "y.npy", *TINY, "--epochs", 3, "--batch-size", 54]
    assert fit(*options, "--compile", "--out", data / "a") == 0
    assert fit(*options, "--out", data / "b") == 0
    for ours, theirs in zip(trace_of(data / "a"), trace_of(data / "b"), strict=True):
        assert float(ours["train_elbo"]) == pytest.approx(float(theirs["train_elbo"]), rel=1e-5)


def test_constant_features_stay_as_they_are_and_lost_ones_are_refused():
    x = torch.randn(50, 3, dtype=torch.float32)
    x[:, 1] = 0.1
    scaling = Scaling.of(x)
    assert scaling.scale[1] == 1 and scaling.shift[1] == x[0, 1]
    x[:, 1] = 1.6e9 + 128 * torch.arange(50).fmod(2)
    with pytest.raises(
        ValueError, match=r"feature 1 .* varies by 64 about 1\.6.*subtract its mean"
    ):
        Scaling.of(x)
    x[:, 1] = 1e-20 * torch.arange(50)
    with pytest.raises(ValueError, match=r"feature 1 .* standard deviation of .* another unit"):
        Scaling.of(x)


# Fits that come to nothing


def test_a_finite_fit_that_has_diverged_is_an_error(data, capsys, monkeypatch):
    """Its numbers are finite, but far worse than those of the untrained model."""
    out, check = data / "out", training._check_fit

    def spoilt(config, task, train):
        with torch.no_grad():
            task.model.likelihood.log_scale.fill_(-20.0)
        check(config, task, train)

    monkeypatch.setattr(training, "_check_fit", spoilt)
    message = refused(capsys, data / "x.npy", *TINY, "--epochs", 2, "--out", out)
    assert "the ELBO is -" in message and "e+" in message and "try a smaller --lr" in message
    assert not (out / "state.pt").exists()


@pytest.mark.parametrize("options", [[], ["--model", "dmm"]])
@pytest.mark.parametrize("lr", [3e-3, 0.1])
def test_raw_data_end_well_or_as_an_error(tmp_path, capsys, options, lr):
    shape = (40, 6, 3) if options else (40, 3)
    np.save(tmp_path / "x.npy", 1e6 * np.random.default_rng(0).normal(size=shape))
    options = [tmp_path / "x.npy", *TINY, *options, "--epochs", 3, "--lr", lr]
    assert fit(*options, "--out", tmp_path / "a") == 0
    worst = -math.prod(shape[1:]) * (math.log(1e6) + 10)
    assert worst < summary_of(tmp_path / "a")["train"]["elbo"]
    status = fit(*options, "--no-standardise", "--out", tmp_path / "b")
    said = capsys.readouterr().err
    if status == 2:
        assert "leave out --no-standardise" in said and not (tmp_path / "b").exists()
    else:
        assert status == 0 and summary_of(tmp_path / "b")["train"]["elbo"] > -1e14


def test_an_untrained_fit_has_not_diverged(data):
    for beta in ("0", "100"):
        options = ["--max-steps", 1, "--beta", beta, "--out", data / beta]
        assert fit(data / "x.npy", *TINY, *options) == 0
