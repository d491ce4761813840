"""What pe.surgery tells: active units, notes, tables."""

import re

import pyro.distributions as dist
import torch
from helpers.oracles import rows
from helpers.surgery_programs import (
    flow,
    normal,
    programs,
    standard,
)

import pyproelbo as pe


def test_active_units_and_a_collapsed_dim():
    x = rows(200, 4)

    def q(x):
        loc = torch.stack([2 * x[:, 0], torch.zeros(len(x)), 0.05 * x[:, 1]], 1)
        scale = torch.stack([torch.full((len(x),), s) for s in (0.5, 1.0, 1.0)], 1)
        return dist.Normal(loc, scale).to_event(1)

    s = pe.surgery(*programs(q, lambda: standard(3)), x)
    assert s.active_units.tolist() == [True, False, False]
    assert s.kl_per_dim[1] == 0 and abs(s.marginal_kl_per_dim[1]) < 1e-9
    assert "2 of 3 dimensions are inactive (z[1], z[2])" in str(s)


def test_active_units_of_a_posterior_that_does_not_know_its_mean():
    x = rows(400, 4)

    def q(x):
        base = dist.Normal(x[:, :2] * torch.tensor([1.0, 0.0]), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(0.0, 2.0)])

    s = pe.surgery(*programs(q), x, num_samples=40)
    assert s.active_units.tolist() == [True, False]


def test_the_report_tells_what_is_wrong():
    x = rows(64, 4)
    collapsed = pe.surgery(*programs(lambda x: standard().expand([len(x)])), x)
    assert "Posterior collapse" in str(collapsed) and len(collapsed.notes) == 1
    apart = pe.surgery(*programs(lambda x: dist.Normal(9 * x[:, :2], 0.01).to_event(1)), x)
    assert "at its bound log N" in str(apart)
    assert "Most of the KL is marginal" in str(apart)
    fine = pe.surgery(*programs(lambda x: dist.Normal(x[:, :2] / 2, 0.8).to_event(1)), x)
    assert fine.notes == []
    for word in ("ELBO", "mutual information", "log N = 4.1589", "±"):
        assert word in str(fine)
    assert re.search("^active units +2 of 2$", str(fine), re.MULTILINE)


def test_to_xarray():
    s = pe.surgery(*programs(normal), rows(20, 4))
    data = s.to_xarray()
    assert float(data.mutual_information) == s.mutual_information
    assert float(data.mutual_information_stderr) == s.stderr["mutual_information"]
    assert data.kl_per_dim.dims == ("latent_dim",)
    assert data.latent_dim.values.tolist() == ["z[0]", "z[1]"]
    assert data.elbo.attrs["units"] == "nats per datum" and data.attrs["num_data"] == 20
    flowing = pe.surgery(*programs(flow), rows(20, 4)).to_xarray()
    assert "kl_per_dim" not in flowing
