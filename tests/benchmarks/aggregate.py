"""The time, error and memory of the aggregate posterior's log density, beside a bare product.

    python tests/benchmarks/aggregate.py [--rounds 5] [--threads 1] [--large | --marginals]

M points and N diagonal Normals in D dimensions, float32, means up to hundreds of scales apart.
All contenders are run in turn, in one process, so that a machine whose speed drifts slows all
alike; printed are medians, ratios to the bare product z @ loc.mT, and the largest error against
the same sum in float64. Peak memory is that of a fresh process that runs one contender once, less
what it held before. ``--large`` runs N = M = 60,000 instead, on all cores. ``--marginals`` compares
the marginals by interpolation with those of all pairs, in turn, in CPU seconds: the latter at one
of 40 points, times 40.
"""

import argparse
import functools
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyro
import torch
from torch.distributions import Normal

from pyproelbo._distributions.interpolated_marginals import interpolated_marginals
from pyproelbo._distributions.mixture_kernel import log_aggregate_marginals, log_aggregate_posterior


def data(m, n, d):
    """Means and scales as an encoder could give them, and samples of some of these Normals."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.empty(n, d).uniform_(math.log(0.02), math.log(2.0), generator=generator).exp()
    loc = 300.0 * scale * torch.randn(n, d, generator=generator)
    which = torch.randint(n, (m,), generator=generator)
    return loc[which] + scale[which] * torch.randn(m, d, generator=generator), loc, scale


def bare(z, loc, scale):
    return z @ loc.mT


def product(z, loc, scale):
    """The exponents as one product in the dtype of the data, all held at once."""
    w = scale.square().reciprocal()
    e = z @ (w * loc).mT - 0.5 * z.square() @ w.mT - 0.5 * (w * loc.square()).sum(1)
    e = e - scale.log().sum(1) - 0.5 * loc.shape[1] * math.log(2 * math.pi)
    return e.logsumexp(1) - math.log(len(loc))


def broadcast(z, loc, scale, joint=True):
    """A Normal's log_prob of every pair in every dimension, 20 points at a time."""
    normal = Normal(loc, scale, validate_args=False)

    def of(points):
        e = normal.log_prob(points[:, None])
        return (e.sum(-1) if joint else e).logsumexp(1)

    return torch.cat([of(points) for points in z.split(20)]) - math.log(len(loc))


def backward(function):
    """``function`` and the gradients of its sum."""

    @functools.wraps(function)
    def run(*tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        value = function(*tensors)
        value.sum().backward()
        return value.detach()

    return run


marginals = functools.partial(broadcast, joint=False)
CONTENDERS = {
    "bare product": (bare, None),
    "log_aggregate_posterior": (log_aggregate_posterior, broadcast),
    "product in float32, logsumexp": (product, broadcast),
    "broadcast, in slices": (broadcast, broadcast),
    "bare product, with gradients": (backward(bare), None),
    "log_aggregate_posterior, with gradients": (backward(log_aggregate_posterior), broadcast),
    "log_aggregate_marginals": (log_aggregate_marginals, marginals),
    "marginals broadcast, in slices": (marginals, marginals),
    "log_aggregate_marginals, with gradients": (backward(log_aggregate_marginals), marginals),
}


def peak():
    """The most memory that this process has held, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held before this program began
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def print_peak(name, tensors):
    function = CONTENDERS[name][0]
    function(*(x[:10] for x in tensors))
    before = peak()
    function(*tensors)
    print(peak() - before)


def peak_of(name):
    run = subprocess.run(
        [sys.executable, *sys.argv, "--peak-of", name], capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def measure(tensors, rounds):
    times = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, (function, _) in CONTENDERS.items():
            start = time.perf_counter()
            function(*tensors)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def error(function, exact, tensors, points=60):
    z, loc, scale = tensors
    expected = exact(z[:points].double(), loc.double(), scale.double())
    return (function(z, loc, scale)[:points] - expected).abs().max().item()


def table(sizes, rounds):
    tensors, (m, n, d) = data(*sizes), sizes
    times = measure(tensors, rounds)
    print("| | ms | ratio to bare | ns per M N D | error, nats | peak memory, MiB |")
    print("|---|---|---|---|---|---|")
    for name, (function, exact) in CONTENDERS.items():
        seconds, kind = times[name], ", with gradients"
        base = times["bare product" + (kind if name.endswith(kind) else "")]
        largest = "-" if exact is None else f"{error(function, exact, tensors):.1e}"
        print(
            f"| {name} | {1e3 * seconds:.0f} | {seconds / base:.2f} | "
            f"{1e9 * seconds / (m * n * d):.3f} | {largest} | {peak_of(name):.0f} |",
            flush=True,
        )


def large():
    tensors = data(60_000, 60_000, 40)
    z, loc, scale = (x.double() for x in tensors)
    measured = []
    for function in (log_aggregate_posterior, log_aggregate_marginals):
        start = time.perf_counter()
        found = function(*tensors)[:8]
        measured.append((function.__name__, time.perf_counter() - start, peak(), found))
    print("| N = M = 60,000, D = 40 | seconds | error, nats | peak of the process, MiB |")
    print("|---|---|---|---|")
    for (name, seconds, most, found), exact in zip(measured, (broadcast, marginals), strict=True):
        worst = (found - exact(z[:8], loc, scale)).abs().max()
        print(f"| {name} | {seconds:.0f} | {worst:.1e} | {most:.0f} |")


def log_uniform(low, high, n, d):
    return torch.empty(n, d).uniform_(math.log(low), math.log(high)).exp()


def vae(n, d):
    """An encoder's: each dimension of the codes has the variance 1; every fourth tells nothing."""
    scale = log_uniform(0.05, 1.0, 1, d) * log_uniform(0.7, 1.4, n, d)
    scale[:, ::4] = log_uniform(0.98, 1.0, n, len(scale[0, ::4]))
    return (1.0 - scale.clamp(max=1.0).square()).sqrt() * torch.randn(n, d), scale


CODES = {
    "a VAE's": vae,
    "scales 0.05 to 1": lambda n, d: (torch.randn(n, d), log_uniform(0.05, 1.0, n, d)),
    "scales 1e-4 to 1e2": lambda n, d: (3.0 * torch.randn(n, d), log_uniform(1e-4, 1e2, n, d)),
    "isolated": lambda n, d: (1e6 * torch.randn(n, d), torch.ones(n, d)),
    "means to 300 scales": lambda n, d: data(1, n, d)[1:],
    "points in far tails": lambda n, d: (torch.randn(n, d), log_uniform(0.05, 1.0, n, d)),
}


def cpu_seconds(function, *tensors):
    start = time.process_time()
    return function(*tensors), time.process_time() - start


def interpolation(m, n, d, rounds):
    print("| codes | all pairs, CPU s | interpolated, CPU s | ratio | error, nats |")
    print("|---|---|---|---|---|")
    for name, codes in CODES.items():
        torch.manual_seed(0)
        loc, scale = codes(n, d)
        which = torch.randint(n, (m,))
        far = 40.0 if name == "points in far tails" else 1.0
        z = far * (loc[which] + scale[which] * torch.randn(m, d))
        part, pairs, ours = z[::40], [], []
        for _ in range(rounds):
            _, seconds = cpu_seconds(log_aggregate_marginals, part, loc, scale)
            pairs.append(seconds * m / len(part))
            found, seconds = cpu_seconds(interpolated_marginals, z, loc, scale)
            ours.append(seconds)
        few = slice(0, None, max(1, m // 40))
        exact = marginals(z[few].double(), loc.double(), scale.double())
        error = (found[few] - exact).abs().max()
        of_pairs, of_ours = statistics.median(pairs), statistics.median(ours)
        print(
            f"| {name} | {of_pairs:.1f} | {of_ours:.2f} | {of_pairs / of_ours:.1f} | {error:.1e} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sizes", type=int, nargs=3, default=(2_000, 10_000, 40), metavar="M N D")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--marginals", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = options.threads or ((os.cpu_count() or 1) if options.large else 1)
    torch.set_num_threads(threads)
    pyro.enable_validation(False)
    if options.peak_of:
        return print_peak(options.peak_of, data(*options.sizes))
    m, n, d = options.sizes
    size = "" if options.large else f"; M = {m:,}, N = {n:,}, D = {d}, float32"
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"cpu, {threads} thread(s){size}\n"
    )
    if options.marginals:
        interpolation(*options.sizes, options.rounds)
    elif options.large:
        large()
    else:
        table(options.sizes, options.rounds)


if __name__ == "__main__":
    main()
