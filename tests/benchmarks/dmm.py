"""The time and memory of a deep Markov model's step: loops over time, and sequences as sites.

    python tests/benchmarks/dmm.py [--device cpu] [--seconds 30] [--threads 1] [--memory]

The model and the guide are those of Pyro's example ``dmm.py`` (Krishnan, Shalit & Sontag 2017),
B = 20 padded sequences of T = 129 steps and D = 88 features, at two sizes. A step zeroes the
gradients, computes the loss and goes back; there is no optimiser. All contenders have the same
parameters, and before anything is measured it is asserted, in float64 and at one seed, that they
have the same loss and the same gradients.

All are run in turns, in one process, so that a machine whose speed drifts slows all alike.
Printed are medians in milliseconds and their ratio to Pyro's Trace_ELBO.

``--memory`` prints instead, for several T, the peak memory of a fresh process that makes two
steps, less what it held after a step with T = 2; not of the compiled loop, where the compiler's
is larger. ``--compile`` prints the time of the compiled loop's first step in a fresh process,
without torch's caches.
"""

import argparse
import copy
import os
import platform
import subprocess
import sys
import time

import pyro
import pyro.distributions as dist
import torch
from aggregate import peak
from dmm_torch import DeepMarkovModel, Sizes, log_ratio
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from step import measure
from torch import nn

import pyproelbo as pe
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.models.dmm import DMM
from pyproelbo.sequences import lengths_mask, loops

COMPILED = "SequentialELBO, sequences, compiled loop"
BATCH, STEPS, LENGTHS = 20, 129, (32, 64, 129, 256)
SIZES = {
    "paper: z 100, RNN 600": Sizes(latents=100, rnn=600, emission=100, transition=200),
    "small: z 4, RNN 8": Sizes(latents=4, rnn=8, emission=8, transition=8),
}


def data(num_steps, device="cpu"):
    """Sequences x (B, T, D) of notes that are on or off, and their lengths, T/2 to T."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(BATCH, num_steps, 88, generator=generator) < 0.1).to(torch.get_default_dtype())
    lengths = torch.linspace((num_steps + 1) // 2, num_steps, BATCH).long()
    x[torch.arange(num_steps) >= lengths[:, None]] = 0
    return x.to(device), lengths.to(device)


class Looped(nn.Module):
    """Model and guide as Pyro's example has them: a site for each step, in a loop.

    The mask (B, T) of what is no padding is an argument of both.
    """

    def __init__(self, dmm):
        super().__init__()
        self.dmm = dmm

    def model(self, x, lengths, mask):
        pyro.module("dmm", self)
        z = self.dmm.z_0.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                p, here = self.dmm.transition(z), mask[:, t, None]
                z = pyro.sample(f"z_{t}", dist.Normal(p.loc, p.scale).mask(here).to_event(1))
                likelihood = dist.Bernoulli(logits=self.dmm.emitter(z)).mask(here).to_event(1)
                pyro.sample(f"x_{t}", likelihood, obs=x[:, t])

    def guide(self, x, lengths, mask):
        pyro.module("dmm", self)
        _, h = self.dmm.read(x, lengths)
        z = self.dmm.z_q_0.expand(len(x), -1)
        with pyro.plate("data", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                q = self.dmm.combiner(z, h[:, t])
                z = dist.Normal(q.loc, q.scale).mask(mask[:, t, None]).to_event(1)
                z = pyro.sample(f"z_{t}", z)


def zoo(dmm, sizes):
    """The same model and guide in pyproelbo, where the whole sequence is one site.

    They share the parameters of ``dmm``; those of two parts that are laid out differently are
    copies. The RNN starts at zero, and also reads whether x_t is there.
    """
    hidden = (sizes.emission, sizes.emission)
    model = DMM(sizes.latents, sizes.features, hidden, sizes.transition)
    guide = Smoothing(sizes.latents, sizes.features, sizes.rnn, rnn=relu_rnn)
    emitter, transition, combiner = dmm.emitter, dmm.transition, dmm.combiner
    model.start, guide.start = dmm.z_0, dmm.z_q_0
    model.emission[0], model.emission[2] = emitter.first, emitter.second
    model.emission[4] = emitter.logits
    model.transition.gate, model.transition.proposal = transition.gate, transition.proposal
    model.transition.linear, model.transition.raw_scale = transition.linear, transition.scale
    guide.combine.past = combiner.past
    to_normal, rnn = guide.combine.to_normal.linear, guide.read_sequence[0].rnn
    with torch.no_grad():
        to_normal.weight.copy_(torch.cat([combiner.loc.weight, combiner.scale.weight]))
        to_normal.bias.copy_(torch.cat([combiner.loc.bias, combiner.scale.bias]))
        weights = dmm.rnn.state_dict()
        there = torch.zeros_like(weights["weight_ih_l0"][:, :1])
        weights["weight_ih_l0"] = torch.cat([weights["weight_ih_l0"], there], 1)
        rnn.load_state_dict(weights)
    return model.to(dmm.z_0.device), guide.to(dmm.z_0.device)


def relu_rnn(num_inputs, num_hidden):
    return nn.RNN(num_inputs, num_hidden, nonlinearity="relu", batch_first=True)


def contenders(sizes, x, lengths):
    """All parameters, and functions that add a step's gradients to .grad and return the loss."""
    dmm = DeepMarkovModel(sizes).to(x.device)
    loop, (model, guide) = Looped(dmm), zoo(dmm, sizes)
    compiled_guide = copy.copy(guide)  # with the same parameters
    compiled_guide.loop = loops.compiled
    looped = (loop.model, loop.guide, x, lengths, lengths_mask(lengths, x.shape[1]))

    def evaluated(elbo, *programs_and_args):
        objective = elbo(max_plate_nesting=1)
        return lambda: objective.loss_and_grads(*programs_and_args)

    steps = {
        "Trace_ELBO, loop": evaluated(Trace_ELBO, *looped),
        "TraceMeanField_ELBO, loop": evaluated(TraceMeanField_ELBO, *looped),
        "SequentialELBO, loop": evaluated(pe.SequentialELBO, *looped),
        "SequentialELBO, sequences": evaluated(pe.SequentialELBO, model, guide, x, lengths),
        COMPILED: evaluated(pe.SequentialELBO, model, compiled_guide, x, lengths),
    }
    steps["torch by hand, loop"] = by_hand(dmm.looped, x, lengths)
    steps["torch by hand, batched over time"] = by_hand(dmm.batched, x, lengths)
    return nn.ModuleDict({"dmm": dmm, "model": model, "guide": guide}), steps


def by_hand(loss, *args):
    def step():
        value = loss(*args)
        value.backward()
        return value.item()

    return step


def check(device):
    """Assert, in float64 and at one seed, that all have the same loss and gradients."""
    torch.set_default_dtype(torch.float64)
    x, lengths = data(12, device)
    modules, steps = contenders(Sizes(5, 7, 6, 8), x, lengths)
    dmm, guide = modules["dmm"], modules["guide"]
    for start in (dmm.z_0, dmm.z_q_0):
        nn.init.normal_(start)

    def run(step, seed=0):
        """The loss, and the gradients: those of the guide's copies stand for the originals'."""
        modules.zero_grad()
        pyro.set_rng_seed(seed)
        loss = step()
        if dmm.rnn.weight_hh_l0.grad is None:
            weight = guide.combine.to_normal.linear.weight.grad
            recurrent = guide.read_sequence[0].rnn.weight_hh_l0.grad
        else:
            weight = torch.cat([dmm.combiner.loc.weight.grad, dmm.combiner.scale.weight.grad])
            recurrent = dmm.rnn.weight_hh_l0.grad
        parts = (dmm.emitter, dmm.transition, dmm.combiner.past)
        grads = [p.grad.clone() for part in parts for p in part.parameters()]
        starts = [dmm.z_0.grad.clone(), dmm.z_q_0.grad.clone()]
        return [torch.tensor(loss), weight, recurrent, *grads, *starts]

    sampled = run(by_hand(dmm.looped, x, lengths, log_ratio))
    exact = run(steps["torch by hand, loop"])
    assert not torch.equal(sampled[0], exact[0])
    batched = run(by_hand(dmm.batched, x, lengths, log_ratio))
    torch.testing.assert_close(batched, sampled, rtol=1e-11, atol=1e-11)
    for name, step in steps.items():
        expected = sampled if name == "Trace_ELBO, loop" else exact  # the only one that samples KL
        message = f"{name} differs from torch by hand: {{}}".format
        torch.testing.assert_close(run(step), expected, rtol=1e-11, atol=1e-11, msg=message)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)


def print_times(options):
    synchronize = torch.cuda.synchronize if "cuda" in options.device else lambda: None
    x, lengths = data(STEPS, options.device)
    names = contenders(Sizes(2, 2, 2, 2), x, lengths)[1]
    print("| size | validation | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for size, sizes in SIZES.items():
        for validation in (True, False):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            with pyro.validation_enabled(validation):
                modules, steps = contenders(sizes, x, lengths)
                times = measure(steps, modules, options.seconds, synchronize)
            base = times["Trace_ELBO, loop"]
            cells = [f"{t:.1f} ({t / base:.2f})" for t in times.values()]
            cells = [size, "on" if validation else "off", *cells]
            print("| " + " | ".join(cells) + " |", flush=True)


def print_peak(name, size, num_steps):
    """The peak of two steps of ``num_steps``, less that of one of two: MiB."""
    for steps, times in ((2, 1), (num_steps, 2)):
        before = peak()
        pyro.clear_param_store()
        modules, step_of = contenders(SIZES[size], *data(steps))
        for _ in range(times):
            modules.zero_grad()
            step_of[name]()
    print(peak() - before)


def print_memory():
    names = [n for n in contenders(Sizes(2, 2, 2, 2), *data(2))[1] if n != COMPILED]
    print("| peak memory, MiB | T | " + " | ".join(names) + " |")
    print("|---|---|" + "---|" * len(names))
    for size in SIZES:
        for num_steps in LENGTHS:
            cells = [size, str(num_steps)]
            for name in names:
                command = [sys.executable, __file__, "--peak-of", name, size, str(num_steps)]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                cells.append(f"{float(run.stdout):.0f}")
            print("| " + " | ".join(cells) + " |", flush=True)


def print_compiling(name, num_steps):
    """Seconds of the first step, of the second, and of the first with twice the timesteps."""
    times = []
    modules, step_of = contenders(SIZES[name], *data(num_steps))
    _, longer = contenders(SIZES[name], *data(2 * num_steps))
    for steps in (step_of, step_of, longer):
        modules.zero_grad()
        start = time.perf_counter()
        steps[COMPILED]()
        times.append(time.perf_counter() - start)
    print(" ".join(f"{seconds:.2f}" for seconds in times))


def print_compile_times():
    print("| seconds, compiled loop | T | first step | second | first with 2 T |")
    print("|---|---|---|---|---|")
    for size in SIZES:
        for num_steps in LENGTHS:
            command = [sys.executable, __file__, "--compiling", size, str(num_steps)]
            environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
            run = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            cells = [size, str(num_steps), *run.stdout.split()]
            print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--compiling", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        name, size, num_steps = options.peak_of
        pyro.enable_validation(False)
        return print_peak(name, size, int(num_steps))
    if options.compiling:
        name, num_steps = options.compiling
        pyro.enable_validation(False)
        return print_compiling(name, int(num_steps))
    check(options.device)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{options.device}, {options.threads} thread(s); B = {BATCH}, D = 88, "
        + ("float32\n" if options.memory else "T = 129; ms a step, ratio to Trace_ELBO\n")
    )
    if options.memory:
        print_memory()
    elif options.compile:
        print_compile_times()
    else:
        print_times(options)


if __name__ == "__main__":
    main()
