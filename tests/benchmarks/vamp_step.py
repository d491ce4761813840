"""The time and memory of a training step with a VampPrior, beside a standard normal prior.

    python tests/benchmarks/vamp_step.py [--device cpu] [--seconds 120] [--threads 1] [--memory]

The VAE of Tomczak & Welling (2018): 784 pixels, gated layers 300-300, 40 latents, batches of 100;
K pseudo-inputs. A step zeroes the gradients, computes the loss, goes back, and lets torch's fused
Adam step. By hand is the same in torch alone, with the densities of z at all K posteriors of
shape (B, K, 40) at once, as the authors of the paper have it. The floor is by hand without them:
the K posteriors are computed and differentiated, but z is not compared with them. Before anything
is measured it is asserted, in float64 and at one seed, that loss and gradients by hand are the
library's.

All are run in turns, in one process, so that a machine whose speed drifts slows all alike.
Printed are medians in milliseconds and their ratio to the library's with the standard
prior. ``--memory`` prints instead the peak memory of a fresh process that makes two steps, less
what it held after one with K = 1.
"""

import argparse
import math
import platform
import subprocess
import sys

import pyro
import torch
from aggregate import peak
from step import measure
from torch import nn
from torch.distributions import constraints
from torch.nn import functional

import pyproelbo as pe
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.nets import gated_mlp
from pyproelbo.models.vae import VAE, BernoulliLikelihood

FEATURES, HIDDEN, LATENTS, BATCH, LOG_SCALE = 784, (300, 300), 40, 100, (-3.0, 1.0)
COMPONENTS = (0, 10, 100, 500, 1000)  # 0 is the standard prior
PARTICLES = {"1": (1, False), "5, looped": (5, False), "5, vectorised": (5, True)}
LIBRARY, BY_HAND, FLOOR = "BetaELBO", "by hand", "floor"


def programs(components):
    """Model and guide, whose prior is a VampPrior or, without components, standard normal."""
    guide = Diagonal(LATENTS, FEATURES, HIDDEN, net=gated_mlp, log_scale=LOG_SCALE)
    prior = None
    if components:
        prior = pe.VampPrior(
            guide.posterior,
            components,
            lambda num: torch.rand(num, FEATURES),
            constraint=constraints.unit_interval,
        )
    model = VAE(LATENTS, FEATURES, HIDDEN, BernoulliLikelihood(), prior, net=gated_mlp)
    return nn.ModuleList([model, guide])


def posterior(guide, x):
    """Mean and log scale of q(z | x)."""
    loc, log_scale = guide.encoder(x).chunk(2, -1)
    return loc, log_scale.clamp(*LOG_SCALE)


def log_normal(z, loc, log_scale):
    u = (z - loc) * (-log_scale).exp()
    return (-0.5 * u.square() - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def by_hand(model, guide, x, draws=1, use=True):
    """Minus the ELBO; without ``use`` the posteriors of pseudo-inputs are computed in vain."""
    loc, log_scale = posterior(guide, x)
    z = loc + log_scale.exp() * torch.randn(draws, *loc.shape, device=x.device)
    log_likelihood = -functional.binary_cross_entropy_with_logits(
        model.decoder(z), x.expand(draws, -1, -1), reduction="sum"
    )
    kl = 0.5 * (loc.square() + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
    if isinstance(model.prior, pe.VampPrior):
        components = posterior(guide, model.prior.unconstrained.sigmoid())
        if use:
            log_densities = log_normal(z.unsqueeze(-2), *components)
            log_p = log_densities.logsumexp(-1) - math.log(log_densities.shape[-1])
            kl = (log_normal(z, loc, log_scale) - log_p).sum() / draws
        else:
            kl = kl + sum(part.sum() for part in components)
    return kl - log_likelihood / draws


def step_of(kind, modules, x, particles, vectorised):
    """A function that makes a training step and returns the loss."""
    model, guide = modules
    optimiser = torch.optim.Adam(modules.parameters(), lr=5e-4, fused=True)
    objective = pe.BetaELBO(
        num_particles=particles, vectorize_particles=vectorised, max_plate_nesting=1
    )

    def library():
        loss = objective.loss_and_grads(model, guide, x)
        optimiser.step()
        return loss

    def in_torch():
        loops, draws = (1, particles) if vectorised else (particles, 1)
        losses = [by_hand(model, guide, x, draws, kind == BY_HAND) for _ in range(loops)]
        loss = sum(losses) / loops
        loss.backward()
        optimiser.step()
        return loss.item()

    return library if kind == LIBRARY else in_torch


def data(device):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(BATCH, FEATURES, generator=generator).round().to(device)


def check(device):
    """Assert that what is by hand has the loss and the gradients of the library."""
    torch.set_default_dtype(torch.float64)
    x = data(device).double()
    for components in (0, 7):
        for particles in PARTICLES.values():
            found = []
            for kind in (LIBRARY, BY_HAND):
                pyro.set_rng_seed(0)
                modules = programs(components).to(device)
                pyro.set_rng_seed(1)
                loss = torch.tensor(step_of(kind, modules, x, *particles)())
                found.append([loss, *(p.grad for p in modules.parameters())])
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    torch.set_default_dtype(torch.float32)


def print_times(options):
    synchronize = torch.cuda.synchronize if "cuda" in options.device else lambda: None
    x = data(options.device)
    settings = [(k, "1") for k in COMPONENTS]
    settings += [(k, p) for p in list(PARTICLES)[1:] for k in (0, 500)]
    every, steps = nn.ModuleList(), {}
    for k, particles in settings:
        for kind in (LIBRARY, BY_HAND, FLOOR) if k else (LIBRARY, BY_HAND):
            pyro.set_rng_seed(0)
            every.append(programs(k).to(options.device))
            steps[k, particles, kind] = step_of(kind, every[-1], x, *PARTICLES[particles])
    times = measure(steps, every, options.seconds, synchronize)
    print(f"| prior | particles | {LIBRARY} | {BY_HAND} | {FLOOR} | {LIBRARY} to {BY_HAND} |")
    print("|---|---|---|---|---|---|")
    for k, particles in settings:
        base = times[0, particles, LIBRARY]
        found = [times[k, particles, kind] for kind in (LIBRARY, BY_HAND)]
        ratio = found[0] / found[1]
        found += [times[k, particles, FLOOR]] if k else []
        cells = [f"VampPrior, {k:,}" if k else "standard", particles]
        cells += [f"{t:.1f} ({t / base:.2f})" for t in found] + [""] * (3 - len(found))
        print("| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |")


def print_peak(kind, components, particles):
    """The peak of two steps, less that of one with a single component: MiB."""
    x = data("cpu")
    for k, times in ((1, 1), (components, 2)):
        before = peak()
        modules = programs(k)
        step = step_of(kind, modules, x, *PARTICLES[particles])
        for _ in range(times):
            modules.zero_grad()
            step()
    print(peak() - before)


def print_memory():
    print(f"| prior | particles | {LIBRARY}, MiB | {BY_HAND}, MiB |")
    print("|---|---|---|---|")
    for k, particles in ((100, "1"), (500, "1"), (1000, "1"), (1000, "5, vectorised")):
        cells = [f"VampPrior, {k:,}", particles]
        for kind in (LIBRARY, BY_HAND):
            command = [sys.executable, __file__, "--peak-of", kind, str(k), particles]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            cells.append(f"{float(run.stdout):.0f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    if options.peak_of:
        kind, components, particles = options.peak_of
        return print_peak(kind, int(components), particles)
    check(options.device)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{options.device}, {options.threads} thread(s), float32, validation off\n"
    )
    print_memory() if options.memory else print_times(options)


if __name__ == "__main__":
    main()
