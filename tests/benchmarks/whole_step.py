"""The time of whole training steps: captured, eager, Pyro's, and torch by hand.

    python tests/benchmarks/whole_step.py [--device cpu] [--seconds 60] [--threads 1]

A step is a loss, its gradients, and an update by Adam. All contenders of a program are run in
turn, one step each, in one process, so that a machine whose speed drifts slows all alike. Printed
are medians in milliseconds; in brackets, how many such steps fit into one of Pyro's SVI with
Trace_ELBO and Pyro's Adam. By hand is the same loss in torch alone. ``--first`` prints instead
the seconds of the first steps, and the peak memory of a fresh process without torch's caches, less
what it held before.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import pyro
import torch
import vamp_step
from aggregate import peak
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from step import Vae

import pyproelbo as pe

LEARNING_RATE = 1e-3


class SmallVae:
    """The VAE of step.py."""

    def __init__(self, features, hidden, latents, batch, device):
        self.module = Vae(features, hidden, latents).to(device)
        self.model, self.guide = self.module.model, self.module.guide
        self.x = torch.rand(batch, features, device=device).round()

    def by_hand(self):
        return self.module.by_hand(self.x)


class VaeWithVampPrior:
    """The VAE of vamp_step.py, with 500 pseudo-inputs."""

    def __init__(self, device):
        self.module = vamp_step.programs(500).to(device)
        model, guide = self.module
        self.model, self.guide = WithParameters(model), WithParameters(guide)
        self.x = vamp_step.data(device)

    def by_hand(self):
        return vamp_step.by_hand(*self.module, self.x)


class WithParameters:
    """A module's forward, whose parameters SVI sees."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        pyro.module(f"module {id(self.module)}", self.module)
        return self.module(x)


PROGRAMS = {
    "VAE 784-64-8, batch 32": lambda device: SmallVae(784, 64, 8, 32, device),
    "VAE 784-400-20, batch 128": lambda device: SmallVae(784, 400, 20, 128, device),
    "VAE 784-300-300-40, VampPrior of 500, batch 100": VaeWithVampPrior,
}


def svi(objective, optim=None):
    """Steps of Pyro's SVI."""

    def make(program):
        pyro_adam = optim or pyro.optim.Adam
        engine = SVI(program.model, program.guide, pyro_adam({"lr": LEARNING_RATE}), objective())
        return lambda: engine.step(program.x)

    return make


def shared_adam(arguments):
    return pe.SharedOptim(torch.optim.Adam, arguments)


def trained(loss_of):
    """Steps of torch's fused Adam on a loss, read each time as SVI does."""

    def make(program):
        adam = torch.optim.Adam(program.module.parameters(), lr=LEARNING_RATE, fused=True)
        loss_function = loss_of(program)

        def step():
            loss = loss_function()
            adam.zero_grad()
            loss.backward()
            adam.step()
            return loss.item()

        return step

    return make


def objective(**kwargs):
    """The loss of BetaELBO, without SVI."""

    def loss_of(program):
        elbo = pe.BetaELBO(**kwargs)
        return lambda: elbo.differentiable_loss(program.model, program.guide, program.x)

    return loss_of


CONTENDERS = {
    "SVI, Trace_ELBO": svi(Trace_ELBO),
    "SVI, TraceMeanField_ELBO": svi(TraceMeanField_ELBO),
    "SVI, JitTrace_ELBO": svi(lambda: JitTrace_ELBO(ignore_jit_warnings=True)),
    "SVI, BetaELBO": svi(pe.BetaELBO),
    "SVI, BetaELBO, SharedOptim": svi(pe.BetaELBO, shared_adam),
    "SVI, BetaELBO captured, SharedOptim": svi(lambda: pe.BetaELBO(compile=True), shared_adam),
    "BetaELBO": trained(objective()),
    "BetaELBO captured": trained(objective(compile=True)),
    "torch by hand": trained(lambda program: program.by_hand),
    "torch by hand, torch.compile": trained(lambda program: torch.compile(program.by_hand)),
}


def started(contender, program, device):
    """A function that makes a step and returns its loss."""
    pyro.set_rng_seed(0)
    return CONTENDERS[contender](PROGRAMS[program](device))


def measure(program, seconds, device):
    """Median milliseconds of each contender, run in turn until the time is over."""
    synchronize = torch.cuda.synchronize if "cuda" in device else lambda: None
    steps, times = {}, {}
    for contender in CONTENDERS:
        step = started(contender, program, device)
        try:
            for _ in range(5):  # until all is compiled
                step()
        except AssertionError:  # of JitTrace_ELBO, where two modules share parameters
            continue
        steps[contender], times[contender] = step, []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for contender, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            times[contender].append(1e3 * (time.perf_counter() - start))
    return {contender: statistics.median(t) for contender, t in times.items()}


def print_times(options):
    columns = {name: measure(name, options.seconds, options.device) for name in PROGRAMS}
    print("| ms a step | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for contender in CONTENDERS:
        cells = []
        for times in columns.values():
            if contender in times:
                ratio = times["SVI, Trace_ELBO"] / times[contender]
                cells.append(f"{times[contender]:.2f} ({ratio:.2f})")
            else:
                cells.append("fails")
        print("| " + " | ".join([contender, *cells]) + " |")


def print_first_steps(contender, program, device):
    """Seconds of the first two steps, and the peak memory of five, MiB."""
    before = peak()
    step, times = started(contender, program, device), []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(f"{times[0]:.2f} {times[1]:.2f} {peak() - before:.0f}")


def print_first(options):
    print("| program | contender | first step, s | second step, s | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for program in PROGRAMS:
        for contender in ("BetaELBO", "BetaELBO captured", "torch by hand, torch.compile"):
            run = subprocess.run(
                [sys.executable, __file__, "--device", options.device, "--of", contender, program],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
            )
            print("| " + " | ".join([program, contender, *run.stdout.split()]) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--validate", action="store_true", help="with Pyro's validation, its default"
    )
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(options.validate)
    if options.of:
        return print_first_steps(*options.of, options.device)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{options.device}, {options.threads} thread(s), float32, "
        f"validation {'on' if options.validate else 'off'}\n"
    )
    if options.first:
        print_first(options)
    else:
        print_times(options)


if __name__ == "__main__":
    main()
