"""Steps that are too long to be captured."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

import pyproelbo as pe
from pyproelbo.capture import graph


def test_a_step_of_too_many_operations_runs_eagerly(monkeypatch):
    monkeypatch.setattr(graph, "_MOST", 200)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for _ in range(100):
            z = (z + 1).cos()
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    objective = pe.BetaELBO(compile=pe.Capture(backend="eager"))
    guide = pyro.infer.autoguide.AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    svi.step()
    with pytest.warns(pe.CaptureWarning, match="more than 200 operations"):
        svi.step()
    svi.step()
