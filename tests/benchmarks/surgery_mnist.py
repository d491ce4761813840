"""The table of Hoffman & Johnson (2016): where the KL of a VAE goes on MNIST.

    python tests/benchmarks/surgery_mnist.py FOLDER [--latents 2 10 20] [--epochs 60]

FOLDER has the IDX files of MNIST (or of data alike). The pixels are made 0 or 1 by one draw,
so that the data are a fixed set of N = 60,000. One VAE for each number of latents (784-400-K,
Bernoulli likelihood, N(0, I) prior, diagonal Gaussian guide) is trained by SurgeryELBO, whose
loss is the ELBO's, and then taken apart by pe.surgery on all of the training data. What is
trained is kept in --out after each epoch: the same command goes on where it was stopped.
"""

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import pyro
import torch
from idx import images
from tqdm import tqdm

import pyproelbo as pe
from pyproelbo.datasets import Minibatches
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.vae import VAE, BernoulliLikelihood

COLUMNS = ("elbo", "reconstruction", "average_kl", "mutual_information", "marginal_kl",
           "total_correlation", "dimension_wise_kl")  # fmt: skip


def fit(k, x, options, checkpoint):
    """A VAE of k latents after ``--epochs`` epochs, and the last minibatch estimates."""
    pyro.set_rng_seed(options.seed)
    widths = (k, x.shape[1], (options.hidden,))
    model, guide = VAE(*widths, BernoulliLikelihood()), Diagonal(*widths)
    modules = torch.nn.ModuleList([model, guide]).to(options.device)
    optimiser = torch.optim.Adam(modules.parameters(), lr=options.lr)
    objective = pe.SurgeryELBO(len(x), max_plate_nesting=1)
    loss = objective(model, guide)
    batches = Minibatches(x, options.batch_size, seed=options.seed)
    states = {"modules": modules, "optimiser": optimiser, "batches": batches}
    start, rng = 0, None
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=options.device, weights_only=True)
        start = saved["epoch"]
        for name, part in states.items():
            part.load_state_dict(saved[name])
        rng = saved["rng"].cpu()
        torch.set_rng_state(rng)
    for epoch in tqdm(range(start, options.epochs), desc=f"{k} latents", initial=start):
        for batch in batches:
            optimiser.zero_grad(set_to_none=True)
            (loss(batch) / len(batch)).backward()
            optimiser.step()
        saved = {name: part.state_dict() for name, part in states.items()}
        torch.save(saved | {"epoch": epoch + 1, "rng": torch.get_rng_state()}, checkpoint)
    return model, guide, objective.last_surgery


def table(rows):
    """Markdown, one row for each number of latents."""
    heads = ("latents", *(name.replace("_", " ") for name in COLUMNS), "log N", "active units")
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for k, row in rows.items():
        cells = [
            "" if row[n] is None else f"{row[n]:.2f} ± {row['stderr'][n]:.2f}" for n in COLUMNS
        ]
        yield f"| {k} | " + " | ".join(cells) + f" | {row['log_n']:.2f} | {row['active']} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with train-images-idx3-ubyte, raw or .gz")
    parser.add_argument("--latents", type=int, nargs="+", default=[2, 10, 20])
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("run/surgery_mnist"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    x = images(options.folder).bernoulli(generator=generator).to(options.device)
    rows = {}
    for k in options.latents:
        done = options.out / f"{k}.json"
        if not done.is_file():
            begun = time.perf_counter()
            with pyro.validation_enabled(False):
                model, guide, last = fit(k, x, options, options.out / f"{k}.pt")
                fitted = time.perf_counter()
                result = pe.surgery(model, guide, x, batch_size=1000)
            seconds = (fitted - begun, time.perf_counter() - fitted)
            row = {name: getattr(result, name) for name in (*COLUMNS, "log_n")}
            row["stderr"] = {name: float(result.stderr[name]) for name in COLUMNS}
            row["active"] = int(result.active_units.sum())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(result)
            if last is not None:
                print("last minibatch:", {n: round(float(v), 3) for n, v in last._asdict().items()})
            print(f"fit {seconds[0]:.0f} s, surgery {seconds[1]:.0f} s, peak {peak:.2f} GiB\n")
            done.write_text(json.dumps(row))
        rows[k] = json.loads(done.read_text())
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{options.device}; {options.epochs} epochs of batches of {options.batch_size}, Adam "
        f"{options.lr:g}, hidden {options.hidden}; nats per datum\n"
    )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
