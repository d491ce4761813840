"""Draw what each figure and each result looks like: pictures for the pages of their names.

python tutorials/site/gallery.py     # into tutorials/api/pictures, about a minute
"""

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from pyro.infer.autoguide import AutoNormal

import pyproelbo as pe
from pyproelbo.datasets import digits
from pyproelbo.guides import lgssm as lgssm_guides
from pyproelbo.guides import vae
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.vae import VAE, BernoulliLikelihood

FOLDER = Path(__file__).parent.parent / "api" / "pictures"
QUIET = {"progress": False}
LATENTS = 8


@cache
def images() -> torch.Tensor:
    """Digits of zeros and ones, in an order that has nothing to do with their classes."""
    pyro.set_rng_seed(0)
    x = digits().x.round()
    return x[torch.randperm(len(x))]


@cache
def fitted() -> tuple[VAE, vae.Diagonal, pe.Fit]:
    """A VAE of the digits, its encoder and its fit."""
    pyro.set_rng_seed(1)
    model = VAE(LATENTS, 64, (64,), BernoulliLikelihood())
    guide = vae.Diagonal(LATENTS, 64, (64,))
    options = {"held_out": images()[:200], "batch_size": 100, "max_time": 30}
    fit = pe.fit(model, guide, images()[200:], **options, **QUIET)
    return model, guide, fit


def held_out() -> tuple[VAE, vae.Diagonal, torch.Tensor]:
    """What a report takes."""
    return *fitted()[:2], images()[:200]


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """Latents that all data share, two of which are correlated."""
    slope, level = pyro.sample("slope", dist.Normal(0, 2)), pyro.sample("level", dist.Normal(0, 2))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(level + slope * x, noise), obs=y)


@cache
def shared() -> tuple[Callable, AutoNormal, tuple[torch.Tensor, torch.Tensor]]:
    """A regression, with a guide that is too narrow."""
    pyro.set_rng_seed(2)
    x = 2 + torch.rand(30)
    data = x, 0.5 * x + 0.3 * torch.randn(30)
    guide = AutoNormal(regression)
    pe.fit(regression, guide, data, **QUIET)
    return regression, guide, data


@cache
def surgery() -> pe.Surgery:
    """That of the VAE."""
    return pe.surgery(*fitted()[:2], images()[200:], **QUIET)


@cache
def sequences() -> pe.Terms:
    """The terms of a linear-Gaussian model under a filter."""
    pyro.set_rng_seed(3)
    model = LGSSM(num_latents=2, num_features=3)
    x = model(num=40, num_steps=12).detach()
    objective = pe.SequentialELBO(num_particles=20, vectorize_particles=True)
    return objective.terms(model, lgssm_guides.ExactFilter(model), x)


def reconstructions() -> Axes:
    """Data beside what the decoder makes of their codes."""
    model, guide, x = held_out()
    with torch.no_grad():
        again = model.decode(guide.posterior(x[:10]).mean).mean
    return pe.plot_reconstructions(x[:10], again, shape=(8, 8))


def rate_distortion() -> Axes:
    """Fits at three betas."""
    fits = {1.0: surgery()}
    for beta in (0.3, 4.0):
        pyro.set_rng_seed(1)
        model = VAE(LATENTS, 64, (64,), BernoulliLikelihood())
        guide = vae.Diagonal(LATENTS, 64, (64,))
        options = {"objective": pe.BetaELBO(beta), "batch_size": 100, "max_time": 15}
        pe.fit(model, guide, images()[200:], **options, **QUIET)
        fits[beta] = pe.surgery(model, guide, images()[200:], **QUIET)
    return pe.plot_rate_distortion(fits)


def trace() -> Axes:
    """The ELBO at the steps of a fit."""
    history = fitted()[2].history
    return pe.plot_elbo_trace(history.step, {"ELBO": history.elbo})


PICTURES: dict[str, Callable[[], Axes]] = {
    "plot_surgery": lambda: pe.plot_surgery(surgery()),
    "plot_kl_per_dim": lambda: pe.plot_kl_per_dim(surgery()),
    "plot_aggregate_posterior": lambda: pe.plot_aggregate_posterior(
        surgery(), dims=tuple(surgery().kl_per_dim.argsort(descending=True)[:2].tolist())
    ),
    "plot_khat": lambda: pe.plot_khat(pe.psis(*held_out(), **QUIET)),
    "plot_evidence_gap": lambda: pe.plot_evidence_gap(
        pe.inference_gap(*fitted()[:2], images()[:50], **QUIET)
    ),
    "plot_calibration": lambda: pe.plot_calibration(
        pe.calibration(*fitted()[:2], lambda: fitted()[0](num=500), **QUIET)
    ),
    "plot_gradient_noise": lambda: pe.plot_gradient_noise(pe.gradient_noise(*shared(), **QUIET)),
    "plot_elbo_trace": trace,
    "plot_kl_by_time": lambda: pe.plot_kl_by_time(sequences()),
    "plot_reconstruction_by_time": lambda: pe.plot_reconstruction_by_time(sequences()),
    "plot_pseudo_inputs": lambda: pe.plot_pseudo_inputs(images()[:20], shape=(8, 8)),
    "plot_reconstructions": reconstructions,
    "plot_rate_distortion": rate_distortion,
    "Evidence": lambda: pe.evidence(*held_out(), **QUIET).plot(),
    "Decompositions": lambda: pe.decompositions(*held_out(), **QUIET).plot(),
    "Moments": lambda: pe.moments(*shared(), **QUIET).plot(),
    "FisherDivergence": lambda: pe.fisher_divergence(*shared(), **QUIET).plot(),
    "LinearResponse": lambda: pe.linear_response(*shared(), **QUIET).plot(),
    "Sensitivity": lambda: pe.sensitivity(*shared(), **QUIET).plot(),
    "SurgeryPart": lambda: pe.surgery_part(
        *fitted()[:2], images()[200:], range(100), **QUIET
    ).plot(),
    "Repair": lambda: pe.repair(
        *fitted()[:2], images()[:60], methods=["family"], steps=100, num_samples=300, **QUIET
    ).plot(),
    "Convergence": lambda: pe.convergence(np.random.default_rng(0).normal(size=(200, 6))).plot(),
}
SAME = {  # results whose figure is that of a function
    "Surgery": "plot_surgery",
    "Psis": "plot_khat",
    "Check": "plot_khat",
    "Loo": "plot_khat",
    "InferenceGap": "plot_evidence_gap",
    "Calibration": "plot_calibration",
    "GradientNoise": "plot_gradient_noise",
    "History": "plot_elbo_trace",
    "Fit": "plot_elbo_trace",
}


def picture_of(name: str) -> Path:
    """Where the picture of a name is, or would be."""
    return FOLDER / f"{SAME.get(name, name)}.png"


def draw() -> None:
    """Draw those that are not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        if picture_of(name).exists():
            continue
        with warnings.catch_warnings(), matplotlib.rc_context({"backend": "Agg"}):
            warnings.simplefilter("ignore")
            make().figure.savefig(picture_of(name), dpi=110, bbox_inches="tight")  # type: ignore[union-attr]
            plt.close("all")


if __name__ == "__main__":
    draw()
