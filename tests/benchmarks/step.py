"""The time of one training step's loss and gradients: ours, Pyro's, and torch by hand.

    python tests/benchmarks/step.py [--device cpu] [--seconds 20] [--threads 1]

All are run in one process, in turns of a twentieth of a second or one step, so that a machine
whose speed drifts slows all alike, and the caches are a step's own, as in training. Printed are
medians in milliseconds and their ratio to Pyro's Trace_ELBO. Two traces are Pyro's of guide and
model, with the sum of their log-densities for a loss and nothing besides.
"""

import argparse
import platform
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.nn import functional

import pyproelbo as pe

TURN = 0.05  # seconds
SIZES = {"784-64-8, batch 32": (784, 64, 8, 32), "784-400-20, batch 128": (784, 400, 20, 128)}


class Vae(nn.Module):
    """Bernoulli VAE with one hidden layer, as a Pyro program and as a loss in torch."""

    def __init__(self, features, hidden, latents):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(features, hidden), nn.Softplus(), nn.Linear(hidden, 2 * latents)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latents, hidden), nn.Softplus(), nn.Linear(hidden, features)
        )
        self.latents = latents
        self.name = f"vae {id(self)}"  # several share the parameter store

    def encode(self, x):
        loc, raw = self.encoder(x).chunk(2, -1)
        return loc, raw.exp()

    def model(self, x):
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            zeros = x.new_zeros(len(x), self.latents)
            z = pyro.sample("z", dist.Normal(zeros, zeros + 1).to_event(1))
            logits = self.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))

    def by_hand(self, x):
        loc, scale = self.encode(x)
        z = loc + scale * torch.randn_like(loc)
        logits = self.decoder(z)
        likelihood = -functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = 0.5 * (loc**2 + scale**2 - 1).sum() - scale.log().sum()
        return kl - likelihood


def contenders(vae, x):
    """Functions that add the step's gradients to .grad and return the loss as a float."""

    def by_hand():
        loss = vae.by_hand(x)
        loss.backward()
        return loss.item()

    def two_traces():
        guide_trace = poutine.trace(vae.guide).get_trace(x)
        model_trace = poutine.trace(poutine.replay(vae.model, trace=guide_trace)).get_trace(x)
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        loss.backward()
        return loss.item()

    objectives = {
        "Trace_ELBO": Trace_ELBO(),
        "TraceMeanField_ELBO": TraceMeanField_ELBO(),
        "BetaELBO(kl='sampled')": pe.BetaELBO(kl="sampled"),
        "BetaELBO": pe.BetaELBO(),
        "BetaELBO, annealed": pe.BetaELBO(pe.schedules.Linear(0.0, 1.0, 1000)),
        "FreeBitsELBO": pe.FreeBitsELBO(1.0),
        "CapacityELBO": pe.CapacityELBO(5.0),
        "SurgeryELBO": pe.SurgeryELBO(60_000),
        "TotalCorrelationELBO": pe.TotalCorrelationELBO(beta=6.0, dataset_size=60_000),
    }
    steps = {
        name: lambda e=elbo: e.loss_and_grads(vae.model, vae.guide, x)
        for name, elbo in objectives.items()
    }
    return {**steps, "two traces": two_traces, "torch by hand": by_hand}


def measure(steps, module, seconds, synchronize):
    """Median milliseconds of each step, run in turns until the time is over."""
    in_turns(steps, 0.2 * seconds, synchronize, module.zero_grad)
    times = in_turns(steps, seconds, synchronize, module.zero_grad)
    return {name: statistics.median(t) for name, t in times.items()}


def in_turns(steps, seconds, synchronize, before_each=lambda: None):
    """Milliseconds of each step, by name; in its turn it runs as it does in a loop of its own."""
    times = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            turn_over = time.perf_counter() + TURN
            while True:
                before_each()
                synchronize()
                start = time.perf_counter()
                step()
                synchronize()
                times[name].append(1e3 * (time.perf_counter() - start))
                if time.perf_counter() > turn_over:
                    break
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    synchronize = torch.cuda.synchronize if "cuda" in options.device else lambda: None

    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{options.device}, {options.threads} thread(s); ms a step, ratio to Trace_ELBO\n"
    )
    print("| size | validation | " + " | ".join(contenders(Vae(2, 2, 2), None)) + " |")
    print("|---|---|" + "---|" * len(contenders(Vae(2, 2, 2), None)))
    for size, (features, hidden, latents, batch) in SIZES.items():
        for validation in (True, False):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            vae = Vae(features, hidden, latents).to(options.device)
            x = torch.rand(batch, features, device=options.device).round()
            with pyro.validation_enabled(validation):
                times = measure(contenders(vae, x), vae, options.seconds, synchronize)
            base = times["Trace_ELBO"]
            cells = [f"{t:.2f} ({t / base:.2f})" for t in times.values()]
            cells = [size, "on" if validation else "off", *cells]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
