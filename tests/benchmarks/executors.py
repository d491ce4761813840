"""Reports by the workers of an executor, beside one process.

    OMP_NUM_THREADS=1 python tests/benchmarks/executors.py [--workers 2] [--dask]

A VAE 784-400-20 and its guide on N random images. One process with one thread and the workers, with
one thread each, take turns; the workers run before anything is measured, and each of them has the
job from its first batch on, whose sending is part of the time. Medians of the wall time.
"""

import argparse
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyro
import torch

import pyproelbo as pe
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.vae import VAE, BernoulliLikelihood

ROUNDS = 3
REPORTS = {
    "psis": (4_000, {"num_samples": 100}),
    "decompositions": (512, {"num_samples": 50, "batch_size": 64}),
    "inference_gap": (256, {"steps": 50, "num_samples": 100, "batch_size": 32}),
    "repair": (128, {"steps": 20, "num_samples": 100, "methods": ["correlated"], "batch_size": 16}),
    "surgery": (60_000, {}),
}


@contextmanager
def workers(num, is_dask):
    if is_dask:
        from dask.distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=num, threads_per_worker=1) as cluster,
            Client(cluster) as client,
        ):
            yield client.get_executor()
        return
    with ProcessPoolExecutor(num, multiprocessing.get_context("spawn")) as pool:
        yield pool


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dask", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VAE(20, 784, (400,), BernoulliLikelihood())
    guide = Diagonal(20, 784, (400,))
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"cpu, {options.workers} workers {'of Dask' if options.dask else 'of a pool'}\n"
    )
    print("| report | N | one process, s | workers, s | ratio |\n|---|---|---|---|---|")
    with workers(options.workers, options.dask) as executor:
        for name, (num, settings) in REPORTS.items():
            x = torch.rand(num, 784).round()

            def run(executor, name=name, x=x, settings=settings):
                start = time.perf_counter()
                getattr(pe, name)(model, guide, x, executor=executor, progress=False, **settings)
                return time.perf_counter() - start

            pe.evidence(model, guide, x[:512], executor=executor, num_samples=2, progress=False)
            times = [(run(None), run(executor)) for _ in range(ROUNDS)]
            one, several = np.median(times, 0)
            print(
                f"| {name} | {num:,} | {one:.1f} | {several:.1f} | {one / several:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
