"""Time and memory of Pareto-smoothed weights: of many rows at once, and of ``pe.psis`` whole.

    python tests/benchmarks/psis.py
    python tests/benchmarks/psis.py --sizes 1000000

Log-weights k E with E exponential, whose tail has shape k = 0.6: smoothed by ``pe.pareto_smooth``
and by ArviZ's ``psislw``, row by row, in turns. Then ``pe.psis`` and ``pe.evidence`` of PPCA with 2
latents and 5 features and a mean-field guide, N rows and 1,000 draws: each in a fresh process,
whose peak is less what it held after the same call with 300 rows. Smoothing is the share of the
time that the same calls of it take alone. Times are of the CPU, one thread.
"""

import argparse
import dataclasses
import platform
import subprocess
import sys
import time

import numpy as np
import pyro
import scipy
import torch
from aggregate import peak

import pyproelbo as pe
from pyproelbo._evidence.pareto import tail_khat, tail_size
from pyproelbo._evidence.psis import PsisPart
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

ROWS, DRAWS, ROUNDS = 256, 1000, 5


def arviz_psislw():
    try:
        from arviz_stats.base import array_stats
    except ImportError:  # ArviZ before 1.0
        from arviz import psislw

        return psislw
    return lambda w: array_stats.psislw(-w)


def weights(num_draws):
    return 0.6 * np.random.default_rng(0).standard_exponential((num_draws, ROWS))


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def print_smoothing():
    psislw = arviz_psislw()
    print("| draws | ArviZ, us a row | pareto_smooth | ratio |")
    print("|---|---|---|---|")
    for num_draws in (100, 1_000, 10_000):
        w = weights(num_draws)
        rows = np.ascontiguousarray(w.T)
        calls = lambda w=w: pe.pareto_smooth(w), lambda rows=rows: psislw(rows.copy())
        rounds = [[seconds(call) / ROWS * 1e6 for call in calls] for _ in range(ROUNDS + 1)]
        ours, theirs = np.median(rounds[1:], 0)
        print(f"| {num_draws:,} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.1f} |", flush=True)


def smoothing(name):
    """What a batch costs in the smoothing alone, seconds a row."""
    w = weights(DRAWS)
    largest = torch.as_tensor(w).topk(tail_size(DRAWS) + 1, 0).values
    call = {"psis": lambda: PsisPart.of(w), "evidence": lambda: tail_khat(largest)}[name]
    return np.median([seconds(call) for _ in range(20)]) / ROWS


def print_report(name, num_data):
    """Seconds of the call and of the smoothing, peak memory and size of the result, MiB."""
    torch.manual_seed(0)
    model = PPCA(2, 5)
    guide, x = Diagonal.optimum(model), torch.randn(num_data, 5)

    def call(x):
        return getattr(pe, name)(model, guide, x, num_samples=DRAWS, progress=False)

    call(x[:300])
    before, start = peak(), time.process_time()
    result = call(x)
    used, most = time.process_time() - start, peak()
    values = (getattr(result, field.name) for field in dataclasses.fields(result))
    size = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
    print(used, smoothing(name) * num_data, most - before, size / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=(20_000, 200_000), metavar="N")
    parser.add_argument("--report", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    if options.report:
        return print_report(options.report, *options.sizes)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, numpy {np.__version__}, scipy "
        f"{scipy.__version__}, Python {platform.python_version()}, cpu, 1 thread\n"
    )
    print_smoothing()
    print("\n| call | N | us a row | smoothing | peak memory, MiB | result, MiB |")
    print("|---|---|---|---|---|---|")
    for name in ("psis", "evidence"):
        for num in options.sizes:
            command = [sys.executable, __file__, "--report", name, "--sizes", str(num)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            used, part, most, size = map(float, run.stdout.split())
            row = [name, f"{num:,}", f"{used / num * 1e6:.0f}", f"{part / used:.0%}"]
            print(f"| {' | '.join([*row, f'{most:.1f}', f'{size:.1f}'])} |", flush=True)


if __name__ == "__main__":
    main()
