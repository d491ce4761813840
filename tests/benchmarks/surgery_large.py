"""A surgery of many data: how long it takes, in how much memory, and with what errors.

    python tests/benchmarks/surgery_large.py [--data 1000000] [--max-pairs 20000000000]

The data are 40 numbers each, in 10 clusters: linear in codes that are drawn around one of 10 means.
Model and guide are PPCA of maximum likelihood and the best guide with independent dimensions, so
that the codes have clusters too, and q(z) is not normal. All is float32. The memory is the peak of
the process, and what it held before the surgery.
"""

import argparse
import platform
import resource
import time

import pyro
import torch

import pyproelbo as pe
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

FEATURES, CLUSTERS = 40, 10
SHOWN = ("average_kl", "mutual_information", "marginal_kl", "total_correlation",
         "dimension_wise_kl")  # fmt: skip


def clustered(num, num_latents):
    """x (N, 40), made in slices."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    means, loadings = 2 * normal(CLUSTERS, num_latents), normal(num_latents, FEATURES)
    x = torch.empty(num, FEATURES)
    for part in x.split(100_000):
        which = torch.randint(CLUSTERS, (len(part),), generator=generator)
        z = means[which] + normal(len(part), num_latents)
        part.copy_(z @ loadings + 3.0 * normal(*part.shape))
    return x


def peak():
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=20)
    parser.add_argument("--max-pairs", type=int, nargs="+", default=[20_000_000_000])
    parser.add_argument("--batch-size", type=int, default=4096)
    options = parser.parse_args()

    x = clustered(options.data, options.latents)
    model = PPCA.optimum(x, options.latents)
    guide = Diagonal.optimum(model)
    pe.surgery(model, guide, x[:1000], progress=False)  # what is loaded once
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"cpu, {torch.get_num_threads()} thread(s); N = {len(x):,}, {options.latents} latents; "
        f"{peak():.2f} GiB before; nats per datum\n"
    )
    heads = ("max_pairs", "points", "seconds", "CPU s", "peak, GiB", *SHOWN)
    print("| " + " | ".join(head.replace("_", " ") for head in heads) + " |")
    print("|---" * (5 + len(SHOWN)) + "|")
    for max_pairs in options.max_pairs:
        begun, cpu = time.perf_counter(), time.process_time()
        with pyro.validation_enabled(False):
            found = pe.surgery(model, guide, x, max_pairs=max_pairs, batch_size=options.batch_size)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        cells = [f"{max_pairs:.3g}", f"{found.num_points:,}", f"{seconds:.0f}", f"{cpu:.0f}"]
        cells += [f"{peak():.2f}"]
        cells += [f"{getattr(found, n):.4f} ± {found.stderr[n]:.4f}" for n in SHOWN]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
