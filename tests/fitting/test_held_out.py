"""Fits that end where held-out data are explained best."""

import pyro
import pytest
import torch
from helpers.conjugate import Hierarchy
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

QUIET = {
    "progress": False,
    "method": pe.Stochastic(lr=0.03, least_steps=50),
    "objective": pe.BetaELBO(num_particles=4, vectorize_particles=True),
    "tolerance": 0.1,
}


def few_and_others():
    """Of two dimensions, and noise, in twenty: few enough that ten dimensions say too much."""
    torch.manual_seed(0)
    weights = torch.randn(2, 20)
    return (torch.randn(n, 2) @ weights + 0.5 * torch.randn(n, 20) for n in (16, 60))


def fitted(x, **options):
    torch.manual_seed(1)
    programs = PPCA(10, 20), Diagonal(10, 20)
    return *programs, pe.fit(*programs, x, **{**QUIET, **options})


@pytest.mark.parametrize("kind", ["rows", "loader"])
def test_the_best_by_held_out_data_stays(kind):
    """Their ELBO is that of ``pe.evidence``, and well above the most that the whole fit has."""
    x, others = few_and_others()
    held_out = others if kind == "rows" else DataLoader(others, 25)
    *programs, result = fitted(x, held_out=held_out)
    assert result.is_converged
    best = pe.evidence(*programs, others, num_samples=500).elbo.mean().item()
    assert best > PPCA.optimum(x, 10).log_evidence(others).mean() + 3
    # of the loader's batches the last, which is smaller, counts like the others
    assert result.held_out_elbo == pytest.approx(best, abs=0.1 if kind == "rows" else 0.5)
    assert result.elbo > result.held_out_elbo + 3
    assert "of held-out data" in str(result)
    attributes = result.to_xarray().attrs
    assert attributes["held_out_elbo"] == result.held_out_elbo


def test_without_them_nothing_is_said_of_them():
    x, _ = few_and_others()
    *_, result = fitted(x, batch_size=10, tolerance=5.0)
    assert result.held_out_elbo is None and "held-out" not in str(result)
    assert "held_out_elbo" not in result.to_xarray().attrs


def test_where_others_have_no_posterior():
    x, others = few_and_others()
    with pytest.raises(ValueError, match="held-out data stop the fit"):
        fitted(x, held_out=others, method=pe.FixedDraws())
    of = Hierarchy.of(4)
    with pytest.raises(ValueError, match="a latent is global, with one posterior"):
        pe.fit(of.model, AutoNormal(of.model), of.x, held_out=of.x, **QUIET)
    pyro.clear_param_store()
    model = PPCA(2, 20)
    with pytest.raises(ValueError, match="an AutoGuide has parameters for each"):
        pe.fit(model, AutoNormal(model), x, held_out=others, **QUIET)
