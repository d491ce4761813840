"""The memory of ``pe.evidence``, ``pe.psis`` and ``pe.from_svi``, measured from outside.

    python tests/benchmarks/evidence_memory.py

A Bernoulli VAE 64-64-10 and N rows of data. Each call has a fresh process; its peak is less what
it held after the same call with 10 rows. Beside it is the size of the result, which is all that
should grow with N. glibc is told to give back what is freed, so that the peak is what was held.
"""

import argparse
import dataclasses
import os
import platform
import subprocess
import sys
import time

import pyro
import torch
from aggregate import peak

import pyproelbo as pe
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.vae import VAE, BernoulliLikelihood

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}


def draws(model, guide, x, **options):
    return pe.from_svi(model, guide, (x,), groups=("posterior", "log_likelihood"), **options)


CALLS = {
    "psis": (pe.psis, 256, {"num_samples": 200}),
    "psis, larger batches": (pe.psis, 2048, {"num_samples": 200}),
    "evidence, importance": (pe.evidence, 256, {"num_samples": 200}),
    "evidence, importance, larger chunks": (
        pe.evidence,
        256,
        {"num_samples": 200, "chunk": 100},
    ),
    "evidence, annealed": (
        pe.evidence,
        2048,
        {"num_samples": 10, "method": pe.Annealed(num_temperatures=3, num_leapfrog=2)},
    ),
    "from_svi": (draws, None, {"num_samples": 50}),
}


def print_peak(name, num_data):
    """Seconds, the peak and the size of the result, MiB."""
    torch.manual_seed(0)
    x = torch.rand(num_data, 64).round()
    model, guide = VAE(10, 64, (64,), BernoulliLikelihood()), Diagonal(10, 64, (64,))
    function, batch_size, options = CALLS[name]
    if batch_size is not None:
        options = {**options, "batch_size": batch_size}
    function(model, guide, x[:10], **options)
    before, start = peak(), time.perf_counter()
    result = function(model, guide, x, **options)
    seconds, most = time.perf_counter() - start, peak()
    print(seconds, most - before, size_of(result) / 2**20)


def size_of(result):
    if not dataclasses.is_dataclass(result):
        return sum(group.dataset.nbytes for group in result.subtree)
    values = (getattr(result, field.name) for field in dataclasses.fields(result))
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=(6_000, 60_000), metavar="N")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    if options.peak_of:
        return print_peak(options.peak_of, *options.sizes)
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        "cpu, 1 thread, float32, validation off\n"
    )
    print("| call | batch | draws | chunk | N | seconds | peak memory, MiB | result, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (_, batch_size, settings) in CALLS.items():
        batch = "all" if batch_size is None else f"{batch_size:,}"
        cells = [name, batch, settings["num_samples"], settings.get("chunk", "default")]
        for num in options.sizes:
            command = [sys.executable, __file__, "--peak-of", name, "--sizes", str(num)]
            environment = {**os.environ, **GIVE_BACK}
            run = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            seconds, most, size = map(float, run.stdout.split())
            row = [*cells, f"{num:,}", f"{seconds:.0f}", f"{most:.1f}", f"{size:.1f}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
