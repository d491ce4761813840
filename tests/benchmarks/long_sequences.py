"""What long sequences cost: time and memory of a training step by the number of timesteps T.

    python tests/benchmarks/long_sequences.py [--seconds 5] [--threads 1]

A step is the loss and its gradients, without an optimiser; 20 sequences of T steps each, float32.
The first table is of a linear-Gaussian state space model (4 latents, 8 features) and a guide that
is linear in z_{t-1}: its samples made in a loop, as of any chain, and by a scan. The second is of
the deep Markov models of dmm.py, whose guide needs its loop: ours as it is, with steps that
are made twice to save memory, compiled, within a captured step; and NumPyro's ``scan``, jitted,
where that is installed. Each is run in a process of its own, by one after the other, and has its
first step, the median of the others, and the peak memory of the process less what it held before
the first step.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

import pyro
import torch
from aggregate import peak
from dmm_torch import Sizes

import pyproelbo as pe
from pyproelbo.guides import lgssm
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.models.dmm import DMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.vae import BernoulliLikelihood
from pyproelbo.sequences import LinearGaussianChain, MarkovChain, loops

BATCH, STEPS = 20, (100, 1000, 5000)
SMALL = Sizes(latents=4, rnn=8, emission=8, transition=8)
LARGE = Sizes(latents=100, rnn=600, emission=100, transition=200)


def step_by(objective, model, guide, x):
    """A function that makes a step of ours."""
    modules = torch.nn.ModuleList([model, guide])

    def step():
        modules.zero_grad()
        return objective.loss_and_grads(model, guide, x)

    return step


def linear(is_scanned, compile=False):
    """Of the linear model."""

    def make(num_steps):
        if not is_scanned:
            LinearGaussianChain._draw = MarkovChain._draw
        model = LGSSM(4, 8)
        with torch.no_grad():
            x = model(num=BATCH, num_steps=num_steps)
        return step_by(pe.BetaELBO(compile=compile), model, lgssm.Filtering(4, 8), x)

    return make


def notes(num_steps):
    """x (B, T, D) of notes that are on or off."""
    return (torch.rand(BATCH, num_steps, SMALL.features) < 0.1).float()


def deep(loop, compile=False, of=SMALL):
    """Of the deep Markov model."""

    def make(num_steps):
        sizes = of.latents, of.features
        likelihood = BernoulliLikelihood()
        hidden = {"hidden": (of.emission,) * 2, "transition": of.transition}
        model = DMM(*sizes, **hidden, likelihood=likelihood)
        guide = Smoothing(*sizes, hidden=of.rnn, loop=loop)
        return step_by(pe.BetaELBO(compile=compile), model, guide, notes(num_steps))

    return make


def numpyro(num_steps):
    if os.environ.get("OMP_NUM_THREADS") == "1":
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    from dmm_numpyro import step_of

    return step_of(SMALL, notes(num_steps).numpy())


EAGER = pe.Capture(backend="eager")
CONTENDERS = {
    "linear, loop": linear(is_scanned=False),
    "linear, scan": linear(is_scanned=True),
    "linear, scan, captured": linear(is_scanned=True, compile=EAGER),
    "DMM, loop": deep(loops.plain),
    "DMM, loop made twice": deep(loops.recomputed),
    "DMM, compiled loop": deep(loops.compiled),
    "DMM, compiled loop, captured": deep(loops.compiled, EAGER),
    "DMM, NumPyro's scan": numpyro,
    "large DMM, loop": deep(loops.plain, of=LARGE),
    "large DMM, loop made twice": deep(loops.recomputed, of=LARGE),
}


def measure(name, num_steps, seconds):
    """Print seconds of the first step, milliseconds of another, and MiB."""
    pyro.enable_validation(False)
    pyro.set_rng_seed(0)
    before = peak()
    start = time.perf_counter()
    step = CONTENDERS[name](num_steps)
    step()
    first, times = time.perf_counter() - start, []
    step()
    while len(times) < 3 or time.perf_counter() - start < first + seconds:
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    print(first, 1e3 * statistics.median(times), peak() - before)


def cell(name, num_steps, options):
    """What a process of its own prints, in words."""
    command = [sys.executable, __file__, "--of", name, str(num_steps)]
    command += ["--seconds", str(options.seconds), "--threads", str(options.threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    first, each, memory = map(float, run.stdout.split()[-3:])
    return f"{each:,.1f} ms, {memory:,.0f} MiB (first {first:.1f} s)"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.of:
        name, num_steps = options.of
        return measure(name, int(num_steps), options.seconds)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"cpu, {options.threads} thread(s), float32, B = {BATCH}\n"
    )
    print("| a step | " + " | ".join(f"T = {num_steps:,}" for num_steps in STEPS) + " |")
    print("|---|" + "---|" * len(STEPS))
    for name in CONTENDERS:
        if "NumPyro" in name and find_spec("numpyro") is None:
            continue
        steps = STEPS[:2] if "large" in name else STEPS
        cells = [cell(name, num_steps, options) for num_steps in steps]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
