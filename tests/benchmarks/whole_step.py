"""The time of whole training steps: captured, eager, Pyro's, NumPyro's, and torch by hand.

    python tests/benchmarks/whole_step.py [--device cpu] [--seconds 60] [--threads 1]

A step is a loss, its gradients, and an update by Adam. All contenders of a program are run in one
process, in turns of a twentieth of a second or one step, so that a machine whose speed drifts slows
all alike. Printed are medians in milliseconds; in brackets, how many such steps fit into one of
Pyro's SVI with Trace_ELBO and Pyro's Adam. By hand is the same loss in torch alone. Where NumPyro
is installed, its jitted SVI of the small VAEs stands beside them. The deep Markov models are
loops over time for Pyro's objectives, and sequences as sites with compiled loops for ours.
Captured steps are compiled before they are timed.

``--first`` prints instead what a user waits for in a fresh process without what torch has compiled
before: the first step, the slowest of the others, the first 1,000 together; the same in a second
process, that finds what the first has compiled; and the peak memory of the first, less what it held
before. Captured steps are then compiled while they are made, as by ``compile=True``.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import dmm
import pyro
import torch
import vamp_step
from aggregate import peak
from dmm_torch import DeepMarkovModel
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from step import Vae, in_turns
from torch import nn

import pyproelbo as pe
from pyproelbo.guides import hvae as hvae_guides
from pyproelbo.models.hvae import HVAE
from pyproelbo.models.nets import gated_mlp
from pyproelbo.models.vae import BernoulliLikelihood
from pyproelbo.sequences import lengths_mask, loops

LEARNING_RATE = 1e-3
STEPS = 1000  # which a user waits for


class Training(NamedTuple):
    """What is trained: a model and a guide on the data ``args``."""

    module: nn.Module  # with the parameters of both
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple
    by_hand: Callable[[], torch.Tensor] | None = None  # the loss in torch
    is_compiled_by_hand: bool = True
    in_loops: "Training | None" = None  # the same for Pyro's own objectives
    numpyro: tuple[int, ...] | None = None  # sizes of the same VAE there


def small_vae(features, hidden, latents, batch, device):
    """The VAE of step.py."""
    vae = Vae(features, hidden, latents).to(device)
    x = torch.rand(batch, features, device=device).round()
    sizes = (features, hidden, latents, batch)
    return Training(vae, vae.model, vae.guide, (x,), lambda: vae.by_hand(x), numpyro=sizes)


def vamp_vae(device):
    """The VAE of vamp_step.py, with 500 pseudo-inputs."""
    module, x = vamp_step.programs(500).to(device), vamp_step.data(device)
    model, guide = (WithParameters(part) for part in module)
    return Training(module, model, guide, (x,), lambda: vamp_step.by_hand(*module, x))


def vamp_hvae(device):
    """The two-level VAE of Tomczak & Welling (2018), with 500 pseudo-inputs."""
    sizes = (vamp_step.LATENTS, vamp_step.LATENTS), vamp_step.FEATURES
    nets = {"hidden": vamp_step.HIDDEN, "net": gated_mlp, "log_scale": vamp_step.LOG_SCALE}
    guide = hvae_guides.Diagonal(*sizes, **nets)
    prior = pe.VampPrior(guide.posterior, 500, lambda num: torch.rand(num, vamp_step.FEATURES))
    model = HVAE(*sizes, likelihood=BernoulliLikelihood(), prior=prior, **nets)
    module = nn.ModuleList([model, guide]).to(device)
    return Training(module, WithParameters(model), WithParameters(guide), (vamp_step.data(device),))


def deep_markov(size, device):
    """The deep Markov model of dmm.py, for ours with its sampling loop compiled."""
    x, lengths = dmm.data(dmm.STEPS, device)
    by_hand = DeepMarkovModel(dmm.SIZES[size]).to(device)
    loop, (model, guide) = dmm.Looped(by_hand), dmm.zoo(by_hand, dmm.SIZES[size])
    guide.loop = loops.compiled
    masked = x, lengths, lengths_mask(lengths, x.shape[1])
    return Training(
        nn.ModuleList([loop, model, guide]),
        WithParameters(model),
        WithParameters(guide),
        (x, lengths),
        lambda: by_hand.batched(x, lengths),
        is_compiled_by_hand=False,  # its loop of 129 steps is taken apart
        in_loops=Training(loop, loop.model, loop.guide, masked),
    )


class WithParameters:
    """A module's forward, whose parameters SVI sees."""

    def __init__(self, module):
        self.module = module

    def __call__(self, *args):
        pyro.module(f"module {id(self.module)}", self.module)
        return self.module(*args)


PROGRAMS = {
    "VAE 784-64-8, batch 32": lambda device: small_vae(784, 64, 8, 32, device),
    "VAE 784-400-20, batch 128": lambda device: small_vae(784, 400, 20, 128, device),
    "VAE 784-300-300-40, VampPrior of 500, batch 100": vamp_vae,
    "two-level VAE 784-300-300-40-40, VampPrior of 500, batch 100": vamp_hvae,
    "DMM, z 4, RNN 8, T = 129, batch 20": lambda device: deep_markov("small: z 4, RNN 8", device),
    "DMM, z 100, RNN 600, T = 129, batch 20": lambda device: deep_markov(
        "paper: z 100, RNN 600", device
    ),
}


def svi(objective, optim=pyro.optim.Adam):
    """Steps of Pyro's SVI."""

    def make(training):
        engine = SVI(training.model, training.guide, optim({"lr": LEARNING_RATE}), objective())
        return lambda: engine.step(*training.args)

    return make


def pyro_svi(objective):
    """Steps of Pyro's SVI with an objective of Pyro's."""
    return lambda training: svi(objective)(training.in_loops or training)


def shared_adam(arguments):
    return pe.SharedOptim(torch.optim.Adam, arguments)


def trained(loss_of):
    """Steps of torch's fused Adam on a loss, read each time as SVI does."""

    def make(training):
        loss_function = loss_of(training)
        if loss_function is None:
            return None
        adam = torch.optim.Adam(training.module.parameters(), lr=LEARNING_RATE, fused=True)

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

    def loss_of(training):
        elbo = pe.BetaELBO(**kwargs)
        return lambda: elbo.differentiable_loss(training.model, training.guide, *training.args)

    return loss_of


def compiled_by_hand(training):
    if training.by_hand is None or not training.is_compiled_by_hand:
        return None
    return torch.compile(training.by_hand)


def numpyro(training):
    if training.numpyro is None or find_spec("numpyro") is None:
        return None
    if torch.get_num_threads() == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    from vae_numpyro import step_of

    return step_of(*training.numpyro, LEARNING_RATE)


COMPILED = pe.Capture(background=False)
JIT = "SVI, JitTrace_ELBO"  # which fails on some programs
CONTENDERS = {
    "SVI, Trace_ELBO": pyro_svi(Trace_ELBO),
    "SVI, TraceMeanField_ELBO": pyro_svi(TraceMeanField_ELBO),
    JIT: pyro_svi(lambda: JitTrace_ELBO(ignore_jit_warnings=True)),
    "SVI, BetaELBO": svi(pe.BetaELBO),
    "SVI, BetaELBO, SharedOptim": svi(pe.BetaELBO, shared_adam),
    "SVI, BetaELBO captured, SharedOptim": svi(lambda: pe.BetaELBO(compile=COMPILED), shared_adam),
    "BetaELBO": trained(objective()),
    "BetaELBO captured": trained(objective(compile=COMPILED)),
    "torch by hand": trained(lambda training: training.by_hand),
    "torch by hand, torch.compile": trained(compiled_by_hand),
    "NumPyro, SVI, jitted": numpyro,
}
WAITED_FOR = {
    "SVI, Trace_ELBO": pyro_svi(Trace_ELBO),
    "SVI, BetaELBO, SharedOptim": svi(pe.BetaELBO, shared_adam),
    "SVI, BetaELBO captured, SharedOptim": svi(lambda: pe.BetaELBO(compile=True), shared_adam),
    "the same, background=False": svi(lambda: pe.BetaELBO(compile=COMPILED), shared_adam),
    "torch by hand, torch.compile": trained(compiled_by_hand),
    "NumPyro, SVI, jitted": numpyro,
}


def started(make, program, device):
    """A function that makes a step and returns its loss; None where there is none."""
    pyro.set_rng_seed(0)
    return make(PROGRAMS[program](device))


def measure(program, seconds, device):
    """Median milliseconds of each contender, run in turns until the time is over."""
    synchronize = torch.cuda.synchronize if "cuda" in device else lambda: None
    steps = {}
    for contender, make in CONTENDERS.items():
        step = started(make, program, device)
        if step is None:
            continue
        try:
            for _ in range(5):  # until all is compiled
                step()
        except (AssertionError, RuntimeError) as error:
            if contender != JIT:
                raise
            print(f"{program}: {contender} fails: {str(error)[:80]!r}", file=sys.stderr)
            continue
        steps[contender] = step
    times = in_turns(steps, seconds, synchronize)
    return {contender: statistics.median(t) for contender, t in times.items()}


def print_times(options, programs):
    columns = {name: measure(name, options.seconds, options.device) for name in programs}
    print("| ms a step | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for contender in CONTENDERS:
        cells = []
        for times in columns.values():
            if contender in times:
                ratio = times["SVI, Trace_ELBO"] / times[contender]
                cells.append(f"{times[contender]:.2f} ({ratio:.2f})")
            else:
                cells.append("-")
        print("| " + " | ".join([contender, *cells]) + " |")


def print_first_steps(contender, program, device):
    """Seconds of the first step, the slowest other, and all; the peak memory, MiB."""
    before = peak()
    step, times = started(WAITED_FOR[contender], program, device), []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(f"{times[0]:.2f} {max(times[1:]):.2f} {sum(times):.1f} {peak() - before:.0f}")


def print_first(options, programs):
    print(
        f"| program | contender | first step, s | slowest other, s | {STEPS:,} steps, s | "
        "in a second process: first, s | slowest other, s | all, s | peak memory, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for program in programs:
        for contender, make in WAITED_FOR.items():
            if started(make, program, options.device) is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "--device", options.device]
                threads = ["--threads", str(options.threads)]
                first, second = (
                    subprocess.run(
                        [*command, *threads, "--of", contender, program],
                        capture_output=True,
                        text=True,
                        check=True,
                        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder},
                    ).stdout.split()
                    for _ in range(2)
                )
            cells = [program, contender, *first[:3], *second[:3], first[3]]
            print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--validate", action="store_true", help="with Pyro's validation, its default"
    )
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--programs", default="", help="only those with this in their names")
    parser.add_argument("--of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(options.validate)
    if options.of:
        return print_first_steps(*options.of, options.device)
    programs = [name for name in PROGRAMS if options.programs in name]
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{options.device}, {options.threads} thread(s), float32, "
        f"validation {'on' if options.validate else 'off'}\n"
    )
    if options.first:
        print_first(options, programs)
    else:
        print_times(options, programs)


if __name__ == "__main__":
    main()
