"""The memory of reports and of the command on Parquet files, measured from outside.

    python tests/benchmarks/parquet_memory.py

N rows of 8 float32 columns, in row groups of 100,000, written a row group at a time. Each call has
a fresh process, whose peak (``ru_maxrss``) the operating system tells the parent when it ends: all
of it, torch and pyarrow included. ``pe.evidence`` with 4 draws for PPCA with 2 latents and its best
diagonal guide, whose result has some numbers for each datum; for comparison, of the tensor in
memory; and ``pe.decompositions`` after it, which takes the evidence. The
command fits a VAE for 1,000 steps, and reports.
"""

import argparse
import dataclasses
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GROUP, FEATURES, DRAWS, BATCH = 100_000, 8, 4, 20_000
CALLS = ("one pass", "fit, command", "evidence", "evidence, in memory", "decompositions")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}  # what is freed, at once


def write(path, num):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(2, FEATURES)).astype("float32")
    schema = pa.schema([(f"x{i}", pa.float32()) for i in range(FEATURES)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num, GROUP):
            size = min(GROUP, num - start)
            x = rng.normal(size=(size, 2)).astype("float32") @ loadings
            x += rng.normal(size=x.shape).astype("float32")
            columns = {f"x{i}": x[:, i] for i in range(FEATURES)}
            writer.write_table(pa.table(columns, schema))


def call(name, path):
    if name == "fit, command":
        from pyproelbo.__main__ import main

        options = ["--max-steps", "1000", "--out", path + ".run", "--device", "cpu"]
        return main(["fit", path, *options, "--latent", "2", "--hidden", "32"])
    import torch

    import pyproelbo as pe
    from pyproelbo.datasets import Files, load
    from pyproelbo.guides.ppca import Diagonal
    from pyproelbo.models.ppca import PPCA

    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = Files(path, BATCH)
    if name == "one pass":
        for batch in files:
            batch.sum()
        return print(0)
    model = PPCA(2, FEATURES)
    data = load(path).x if name.endswith("in memory") else files
    options = {"num_samples": DRAWS, "batch_size": BATCH, "progress": False}
    result = pe.evidence(model, Diagonal.optimum(model), data, **options)
    if name == "decompositions":
        pe.decompositions(model, Diagonal.optimum(model), data, evidence=result, **options)
    values = (getattr(result, field.name) for field in dataclasses.fields(result))
    print(sum(x.nbytes for x in values if isinstance(x, torch.Tensor)) / 2**20)


def measured(name, path):
    """Seconds, the peak of the process, and the size of its result, in MiB."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--call", name, "--path", str(path)]
    process = subprocess.Popen(
        command,
        env={**os.environ, **GIVE_BACK, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    scale = 2**20 if sys.platform == "darwin" else 2**10
    size = 0.0 if name == "fit, command" else float(said)
    return time.perf_counter() - start, usage.ru_maxrss / scale, size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = (100_000, 1_000_000, 10_000_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes, metavar="N")
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=CALLS)
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        sys.exit(call(options.call, options.path))
    print(f"Python {platform.python_version()}, cpu, 1 thread, float32\n")
    print("| call | N | file, MiB | seconds | peak of the process, MiB | result, MiB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        paths = {num: Path(folder) / f"{num}.parquet" for num in options.sizes}
        for num, path in paths.items():
            write(path, num)
        for name in options.calls:
            for num, path in paths.items():
                seconds, most, result = measured(name, path)
                numbers = (num, path.stat().st_size / 2**20, seconds, most, result)
                row = [name, *(f"{number:,.0f}" for number in numbers)]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
