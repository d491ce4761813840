"""The noise of the gradients of multi-sample objectives, and what a training step costs.

    python tests/benchmarks/importance_weighted.py [--draws 1000] [--seconds 10]

The noise is the variance of the gradient of the guide's parameters, summed over them, with the
square of its mean beside it: PPCA with 5 latents and 20 features, 20 rows of data, and three
guides with a full covariance: the posterior itself, and two whose parameters are 0.02 N(0, 1) and
0.1 N(0, 1) away from it.
"""

import argparse
import platform
import statistics
import time

import pyro
import torch

import pyproelbo as pe
from pyproelbo.guides.ppca import FullCovariance
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE, BernoulliLikelihood

OBJECTIVES = {
    "standard": lambda k: pe.ImportanceWeightedELBO(k, **MANY),
    "path": lambda k: pe.ImportanceWeightedELBO(k, "path", **MANY),
    "doubly_reparameterised": lambda k: pe.ImportanceWeightedELBO(
        k, "doubly_reparameterised", **MANY
    ),
    "wake-sleep": lambda k: pe.ReweightedWakeSleepELBO(k, **MANY),
    "wake-sleep, doubly_reparameterised": lambda k: pe.ReweightedWakeSleepELBO(
        k, "doubly_reparameterised", **MANY
    ),
}
MANY = {"vectorize_particles": True, "max_plate_nesting": 1}
KS = (1, 5, 50)
DISTANCES = (0.0, 0.02, 0.1)


def away(guide, distance):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += distance * torch.randn_like(parameter)
    return guide


def noise(objective, model, guide, x, draws):
    """Summed variance of the gradient, and the square of its mean without bias."""
    grads = []
    for _ in range(draws):
        loss = objective.differentiable_loss(model, guide, x)
        grad = torch.autograd.grad(loss, list(guide.parameters()))
        grads.append(torch.cat([g.flatten() for g in grad]))
    grads = torch.stack(grads)
    variance = grads.var(0).sum()
    return variance.item(), (grads.mean(0).square().sum() - variance / draws).item()


def noise_table(draws):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = PPCA(5, 20)
    x = model(num=20).detach()
    columns = [f"{d} away, K = {k}" for d in DISTANCES for k in KS]
    print(f"| variance (squared mean) | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    guides = [away(FullCovariance.optimum(model), d) for d in DISTANCES]
    for name, make in OBJECTIVES.items():
        cells = []
        for guide in guides:
            for k in KS:
                if name.startswith("wake") and k == 1:
                    cells.append("-")
                    continue
                torch.manual_seed(1)
                variance, signal = noise(make(k), model, guide, x, draws)
                cells.append(f"{variance:.3g} ({max(signal, 0.0):.3g})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    torch.set_default_dtype(torch.float32)


def time_table(seconds):
    torch.manual_seed(0)
    model, guide = VAE(8, 784, (64,), BernoulliLikelihood()), Diagonal(8, 784, (64,))
    x = (torch.rand(32, 784) < 0.3).float()
    contenders = {
        f"{name}, K = {k}": (make(k), [])
        for k in (5, 50)
        for name, make in {
            "ELBO": lambda k: pe.BetaELBO(num_particles=k, kl="sampled", **MANY),
            **OBJECTIVES,
        }.items()
    }
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for objective, times in contenders.values():
            start = time.perf_counter()
            objective.loss_and_grads(model, guide, x)
            times.append(time.perf_counter() - start)
    print("\n| VAE 784-64-8, batch 32 | ms a step | ratio to the ELBO |")
    print("|---|---|---|")
    for name, (_, times) in contenders.items():
        base = statistics.median(contenders[f"ELBO, {name.split(', ')[-1]}"][1][2:])
        ms = statistics.median(times[2:])
        print(f"| {name} | {1e3 * ms:.2f} | {ms / base:.2f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"cpu, 1 thread, {options.draws} draws\n"
    )
    noise_table(options.draws)
    time_table(options.seconds)


if __name__ == "__main__":
    main()
