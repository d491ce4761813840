"""Posteriors of held-out digits by ``pe.repair``, beside a loop that is tuned by hand.

    python tests/benchmarks/repair.py [--seeds 3] [--out rows.json]

A VAE of scikit-learn's digits is trained by ``pe.fit``, as in tutorial 11, on data and from
parameters of several seeds; 200 data are held out. ``pe.repair`` as it is goes on from its encoder.

The loop is what one would write in its place: a guide of the same family with parameters for each
datum, that begins where the encoder is, by Pyro's SVI with Adam for as many steps and draws a step
as a way of ``pe.repair`` takes, at each of four rates, that fall to a hundredth. The rate is taken
with which most data pass, by what ``pe.repair`` asks of weights.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

import pyproelbo as pe
from pyproelbo.datasets import digits
from pyproelbo.guides import vae
from pyproelbo.models.vae import VAE, BernoulliLikelihood

RATES = (0.3, 0.1, 0.03, 0.01)
STEPS, DRAWS = 500, 10  # the defaults of pe.repair
HELD_OUT = 200
STEP = ("guide", "family", "correlated", "modes", "annealed", "failed")


class Tuned(NamedTuple):
    """The loop at one rate.

    Attributes:
        passes: how many data do.
        elbo: in nats per datum.
        seconds: of the loop.
        khat: of each datum.
    """

    rate: float
    passes: int
    elbo: float
    seconds: float
    khat: list[float]


class Run(NamedTuple):
    """All of one seed.

    Attributes:
        method, khat_before, khat_after: of each datum.
        seconds: by way.
        is_blind: of how many data that pass draws of the prior do not tell whether a mode is
            missed.
        tuned: by rate.
    """

    seed: int
    method: list[str]
    khat_before: list[float]
    khat_after: list[float]
    seconds: dict[str, float]
    is_blind: int
    tuned: list[Tuned]


def trained(seed: int) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Model, encoder, and held-out data."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x = (digits().x > 0.5).float()
    x = x[torch.randperm(len(x))]
    model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
    encoder = vae.Diagonal(10, 64, hidden=(64,))
    held_out = x[:HELD_OUT]
    options = {"held_out": held_out, "batch_size": 100, "tolerance": 0.05, "max_time": 240}
    pe.fit(model, encoder, x[HELD_OUT:], seed=seed, progress=False, **options)
    return model, encoder, held_out


def tuned(model: torch.nn.Module, encoder: torch.nn.Module, x: torch.Tensor, rate: float) -> Tuned:
    """The loop, from the encoder's posteriors on."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with torch.no_grad():
        q = pyro.poutine.trace(encoder).get_trace(x).nodes["z"]["fn"].base_dist
    begin = time.monotonic()

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", q.loc.clone())
        scale = pyro.param("scale", q.scale.clone(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    only = pyro.poutine.block(model, hide_types=["param"])  # the decoder stays
    loss = Trace_ELBO(num_particles=DRAWS, vectorize_particles=True, max_plate_nesting=1)
    adam = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / STEPS)})
    svi = SVI(only, guide, adam, loss)
    for _ in range(STEPS):
        svi.step(x)
    seconds = time.monotonic() - begin
    judged = pe.repair(model, guide, x, methods=[], batch_size=len(x), progress=False)
    elbo = pe.evidence(model, guide, x, batch_size=len(x), progress=False).elbo.mean().item()
    return Tuned(rate, int(judged.passes.sum()), elbo, seconds, judged.khat_after.tolist())


def run(seed: int) -> Run:
    """Train a VAE, and repair its posteriors in both ways."""
    model, encoder, x = trained(seed)
    found = pe.repair(model, encoder, x, progress=False)
    khat = found.khat_before.tolist(), found.khat_after.tolist()
    blind = int((found.passes & ~found.sees_modes).sum())
    loops = [tuned(model, encoder, x, rate) for rate in RATES]
    return Run(seed, found.method.tolist(), *khat, dict(found.seconds), blind, loops)


def report(runs: list[Run]) -> None:
    """Print how many pass after each step, and beside it the loop."""
    print(
        "| seed | after | pass | median k-hat of these | largest | s |\n|---|---|---|---|---|---|"
    )
    for r in runs:
        method, khat = np.array(r.method), np.array(r.khat_after)
        before, num = np.array(r.khat_before), len(method)
        print(f"| {r.seed} | k-hat of the encoder below 0.7 | {(before < 0.7).sum()} | | | |")
        spent = 0.0
        for i, name in enumerate(STEP[:-1]):
            spent += r.seconds.get(name, 0.0)
            if name == "guide":
                spent += r.seconds.get("prior", 0.0) + r.seconds.get("search", 0.0)
            at = np.isin(method, STEP[: i + 1])
            numbers = f"{np.median(khat[at]):.2f} | {khat[at].max():.2f} | {spent:.1f}"
            print(f"| {r.seed} | {name} | {at.sum()} of {num} | {numbers} |")
        best = max(r.tuned, key=lambda t: t.passes)
        k = np.array(best.khat)
        all_rates = sum(t.seconds for t in r.tuned)
        numbers = f"{np.median(k):.2f} | {k.max():.2f} | {best.seconds:.1f} (all: {all_rates:.1f})"
        print(
            f"| {r.seed} | the loop, at rate {best.rate:g} | {best.passes} of {num} | {numbers} |"
        )
    print("\npass, by rate of the loop:")
    for r in runs:
        print(
            f"seed {r.seed}:",
            ", ".join(f"{t.rate:g}: {t.passes} ({t.elbo:.2f} nats)" for t in r.tuned),
        )
    for r in runs:
        print(f"seed {r.seed}: of {r.is_blind} that pass draws of the prior do not tell")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    runs = []
    for seed in range(options.seeds):
        runs.append(run(seed))
        if options.out is not None:
            options.out.write_text(json.dumps([r._asdict() for r in runs], indent=1))
    report(runs)


if __name__ == "__main__":
    main()
