"""Fits by several processes together."""

import json
import subprocess
import sys
from itertools import islice

import pytest
import torch
from helpers.oracles import rows
from lightning.fabric import Fabric

import pyproelbo as pe
from pyproelbo._rows.batches import Batches
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

QUICK = {"progress": False, "tolerance": 0.1, "method": pe.Stochastic(lr=0.05, least_steps=50)}

TWO = """
import json
import sys
import warnings
import torch
from lightning.fabric import Fabric
import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA


def fit(fabric):
    torch.manual_seed(0)
    x = torch.randn(201, 4) @ torch.randn(4, 4)
    torch.manual_seed(fabric.global_rank)  # the parameters to begin with are those of the first
    programs = PPCA(2, 4), Diagonal(2, 4)
    objective = pe.BetaELBO(num_particles=4, vectorize_particles=True)
    method = pe.Stochastic(lr=0.05, least_steps=50)
    options = dict(batch_size=20, progress=False, tolerance=0.1, fabric=fabric)
    result = pe.fit(*programs, x, objective=objective, method=method, **options)
    best = PPCA.optimum(x, 2).log_evidence(x).mean().item()
    vector = torch.cat([p.detach().reshape(-1) for m in programs for p in m.parameters()])
    every = fabric.all_gather(vector)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pe.NotConvergedWarning)
        # the time of one process is over before that of the other
        options |= dict(tolerance=1e-9, max_time=1.0 + 600 * fabric.global_rank)
        ends = pe.fit(*programs, x, **options)
    found = {
        "reason": result.reason,
        "lacks": best - result.elbo,
        "stderr": result.elbo_stderr,
        "apart": (every[0] - every[1]).abs().max().item(),
        "elbos": fabric.all_gather(torch.tensor(result.elbo)).tolist(),
        "ends": ends.reason,
    }
    if fabric.global_rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(fit)
"""


def test_two_processes(tmp_path):
    """They come to the optimum, with the same parameters and the same words."""
    script, out = tmp_path / "two.py", tmp_path / "found.json"
    script.write_text(TWO)
    command = [sys.executable, str(script), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["reason"] == "converged" and found["ends"] == "time"
    assert found["apart"] == 0.0 and found["elbos"][0] == found["elbos"][1]
    assert abs(found["lacks"]) < 0.1 + 4 * found["stderr"]


def test_one_process_of_a_fabric_is_none_at_all():
    x, found = rows(60, 4), []
    for fabric in (None, Fabric(accelerator="cpu", devices=1)):
        torch.manual_seed(0)
        programs = PPCA(2, 4), Diagonal(2, 4)
        found.append(pe.fit(*programs, x, batch_size=20, fabric=fabric, **QUICK))
    assert found[0].elbo == found[1].elbo and found[0].num_steps == found[1].num_steps


def test_parts_of_a_pass_share_no_rows():
    x = torch.arange(23)
    parts = [list(islice(Batches(x, 4).shuffled(3, rank, 2), 3)) for rank in (0, 1)]
    seen = [torch.cat([batch.args[0] for batch in part]) for part in parts]
    assert [len(part) for part in seen] == [11, 11] and len(torch.cat(seen).unique()) == 22
    with pytest.raises(ValueError, match="23 rows, too few for 24 processes"):
        next(Batches(x, 4).shuffled(3, 0, 24))


def test_what_is_no_fabric():
    with pytest.raises(ValueError, match="should be a lightning"):
        pe.fit(PPCA(2, 4), Diagonal(2, 4), rows(9, 4), fabric="ddp", **QUICK)
