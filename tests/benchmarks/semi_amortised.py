"""What steps of their own do for an encoder's posteriors: at the end, and while it is trained.

    python tests/benchmarks/semi_amortised.py [--seeds 3] [--steps 3] [--out rows.json]

A VAE of scikit-learn's digits is trained by ``pe.fit`` with its encoder alone, and with
``pe.SemiAmortised`` around it, from the same start, on the same data; 200 data are held out. Of
these are the ELBO and log p(x), in nats per datum, by importance weighting. The first model also
has its posteriors improved once it is trained.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import pyro
import torch

import pyproelbo as pe
from pyproelbo.datasets import digits
from pyproelbo.guides import vae
from pyproelbo.models.vae import VAE, BernoulliLikelihood

HELD_OUT = 200
WAYS = ("encoder", "improved at the end", "semi-amortised")


class Row(NamedTuple):
    """One model with one guide.

    Attributes:
        elbo, log_evidence: of the held-out data, in nats per datum.
        khat: the share of data with k-hat above 0.7.
        reason, seconds: of the fit.
    """

    seed: int
    way: str
    elbo: float
    log_evidence: float
    khat: float
    reason: str
    seconds: float


def rows(seed: int, steps: int) -> list[Row]:
    """The three of a seed."""
    pyro.set_rng_seed(seed)
    x = (digits().x > 0.5).float()
    x = x[torch.randperm(len(x))]
    held_out, x = x[:HELD_OUT], x[HELD_OUT:]
    found = []
    for is_semi in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
        encoder = vae.Diagonal(10, 64, hidden=(64,))
        improved = pe.SemiAmortised(model, encoder, num_steps=steps)
        guides = {WAYS[2]: improved} if is_semi else {WAYS[0]: encoder, WAYS[1]: improved}
        guide = next(iter(guides.values()))
        options = {"held_out": held_out, "batch_size": 100, "tolerance": 0.05, "max_time": 900}
        start = time.monotonic()
        fit = pe.fit(model, guide, x, seed=seed, progress=False, **options)
        seconds = time.monotonic() - start
        for way, guide in guides.items():
            weights = pe.evidence(model, guide, held_out, num_samples=2000, progress=False)
            elbo, log_evidence = weights.elbo.mean().item(), weights.log_evidence.mean().item()
            khat = (weights.khat > 0.7).double().mean().item()
            found.append(Row(seed, way, elbo, log_evidence, khat, fit.reason, seconds))
            print(found[-1], flush=True)
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    found = [row for seed in range(given.seeds) for row in rows(seed, given.steps)]
    if given.out:
        given.out.write_text(json.dumps([row._asdict() for row in found], indent=1))
    print("| guide | ELBO | log p(x) | gap | k-hat > 0.7 | s |\n" + "|---|" + "---|" * 5)
    for way in WAYS:
        columns = zip(*[r[2:5] for r in found if r.way == way], strict=True)
        elbo, log_evidence, khat = (torch.tensor(column) for column in columns)
        values = (elbo, log_evidence, log_evidence - elbo)
        cells = [f"{v.mean():.2f} ± {v.std() / len(v) ** 0.5:.2f}" for v in values]
        seconds = torch.tensor([r.seconds for r in found if r.way == way]).mean()
        print("| " + " | ".join([way, *cells, f"{khat.mean():.1%}", f"{seconds:.0f}"]) + " |")


if __name__ == "__main__":
    main()
