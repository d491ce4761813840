"""VAEs with a VampPrior on images: log p(x), against Tomczak & Welling (2018).

    python tests/benchmarks/vamp.py FOLDER --prior vamp [--model hvae] [--binarise static]
    python tests/benchmarks/vamp.py FOLDER --prior vamp --evaluate [--test-rows 1000]

FOLDER has the IDX files of MNIST or of Fashion-MNIST; a pixel is the probability of a 1. The
training data are drawn anew whenever they are used (dynamic), or once (static: a draw of our own
in place of Larochelle's files, which the paper uses). Validation data, the last 10,000 of the
training images, and test data are drawn once.

The model is the paper's: gated dense layers of 300, 40 latents in each level, log variances that
nets give from -6 to 2, pseudo-inputs in [0, 1] that start at training data. So is its
training: batches of 100, Adam with normalised gradients, beta rising from 0 to 1 over 100 epochs,
then until the ELBO of the validation data has had no new best for 50 epochs. The best state is
kept, beside the last, from which the same command goes on where it was stopped.

--evaluate prints the best state's row of the table, in nats per test datum. log p(x) is
importance-sampled; its data are kept as they are done, so that the same command goes on.
"""

import argparse
import contextlib
import platform
import time
from functools import partial
from pathlib import Path

import pyro
import torch
from idx import images
from torch import nn
from torch.distributions import constraints
from tqdm import tqdm, trange

import pyproelbo as pe
from pyproelbo.datasets import Minibatches
from pyproelbo.guides import hvae as hvae_guides
from pyproelbo.guides import vae as vae_guides
from pyproelbo.models.hvae import HVAE
from pyproelbo.models.nets import gated_mlp
from pyproelbo.models.vae import VAE, BernoulliLikelihood
from pyproelbo.schedules import Linear

LATENTS, HIDDEN, LOG_SCALE = 40, (300, 300), (-3.0, 1.0)
TRAIN, WARM_UP, PATIENCE = 50_000, 100, 50
BLOCK, DRAWS = 100, 20  # test data evaluated at a time; samples of each for its ELBO
MODELS = {
    "vae": (VAE, vae_guides.Diagonal, LATENTS),
    "hvae": (partial(HVAE, log_scale=LOG_SCALE), hvae_guides.Diagonal, (LATENTS, LATENTS)),
}
PAPER, NOROUZI = "Tomczak & Welling (2018)", "Norouzi et al. (2020)"
REFERENCES = {
    ("mnist", "dynamic", "vae", "standard"): f"-84.45, {NOROUZI}",
    ("mnist", "dynamic", "vae", "vamp"): f"-82.43, {NOROUZI}",
    ("fashion", "dynamic", "vae", "standard"): f"-228.70, {NOROUZI}",
    ("fashion", "dynamic", "vae", "vamp"): f"-227.35, {NOROUZI}",
    ("mnist", "static", "vae", "standard"): f"-88.56, {PAPER}, Larochelle's draw",
    ("mnist", "static", "vae", "vamp"): f"-85.57, {PAPER}, Larochelle's draw",
    ("mnist", "static", "hvae", "standard"): f"-86.05, {PAPER}, Larochelle's draw",
    ("mnist", "static", "hvae", "vamp"): f"-83.19, {PAPER}, Larochelle's draw",
}


def data(options):
    """Training, validation and test data, (N, 784); what is drawn once is zeros and ones."""
    generator = torch.Generator().manual_seed(0)
    pixels, test = images(options.folder), images(options.folder, "t10k")
    drawn, test = (x.bernoulli(generator=generator) for x in (pixels, test))
    train = (pixels if options.binarise == "dynamic" else drawn)[:TRAIN]
    return [x.to(options.device) for x in (train, drawn[TRAIN:], test)]


def programs(x, options):
    """Model and guide before training; pseudo-inputs are from the training data x."""
    pyro.set_rng_seed(options.seed)
    model_type, guide_type, latents = MODELS[options.model]
    guide = guide_type(latents, x.shape[1], HIDDEN, net=gated_mlp, log_scale=LOG_SCALE)
    if options.prior == "standard":
        prior = None
    elif options.prior == "mixture":
        prior = pe.priors.GaussianMixture(options.components, LATENTS)
    else:
        rows = pe.priors.RowsOf(x.cpu())
        prior = pe.VampPrior(
            guide.posterior, options.components, rows, constraint=constraints.unit_interval
        )
    model = model_type(
        latents, x.shape[1], HIDDEN, likelihood=BernoulliLikelihood(), prior=prior, net=gated_mlp
    )
    modules = nn.ModuleList([model, guide])
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return modules.to(options.device)


def bound(model, guide, x, draws=1):
    """ELBO, reconstruction and KL in nats per datum."""
    objective = pe.BetaELBO(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
    total = 0
    for batch in x.split(1000):
        terms = objective.terms(model, guide, batch)
        total = total + torch.stack([terms.elbo, terms.reconstruction, terms.shrinkage]).double()
    return (total / len(x)).tolist()


def label(options):
    """The prior's name, with its number of components."""
    return options.prior + ("" if options.prior == "standard" else f"-{options.components}")


def best_of(log):
    return max(log, key=lambda entry: entry["valid"])


def is_over(log):
    """Whether the best is ``PATIENCE`` epochs old, counted from the end of the warm-up."""
    return bool(log) and len(log) - max(best_of(log)["epoch"], WARM_UP) >= PATIENCE


def save(state, path):
    """Write a file, so that it is whole whenever it is there."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def fit(options):
    """Train until it is over or ``--minutes`` are; what is there is gone on from."""
    train, valid, _ = data(options)
    modules = programs(train, options)
    model, guide = modules
    parameters = list(modules.parameters())
    optimiser = torch.optim.Adam(parameters, lr=5e-4, fused=True)
    batches = Minibatches(train, 100, seed=options.seed)
    beta = Linear(0.0, 1.0, steps=WARM_UP * len(batches))
    objective = pe.BetaELBO(beta, max_plate_nesting=1, compile=options.compile)
    loss, log = objective(model, guide), []
    parts = {"modules": modules, "optimiser": optimiser, "batches": batches, "loss": objective}
    random = torch.cuda if "cuda" in options.device else torch
    last = options.out / "last.pt"
    if last.is_file():
        saved = torch.load(last, map_location=options.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        random.set_rng_state(saved["random"].cpu())
        log = saved["log"]
    began = time.perf_counter()
    while not is_over(log) and time.perf_counter() - began < 60 * options.minutes:
        start, total = time.perf_counter(), 0.0
        for x in tqdm(batches, desc=f"epoch {len(log) + 1}", leave=False, disable=None):
            if options.binarise == "dynamic":
                x = x.bernoulli()
            optimiser.zero_grad(set_to_none=True)
            loss(x).backward()
            for parameter in parameters:
                parameter.grad /= parameter.grad.norm() + 1e-7
            optimiser.step()
            total += objective.last_terms.elbo
        entry = {
            "epoch": len(log) + 1,
            "train": float(total) / len(train),
            "valid": bound(model, guide, valid)[0],
            "seconds": time.perf_counter() - start,
        }
        log.append(entry)
        print(", ".join(f"{k} {v:.6g}" for k, v in entry.items()), flush=True)
        if entry is best_of(log):
            save(modules.state_dict(), options.out / "best.pt")
        state = {name: part.state_dict() for name, part in parts.items()}
        save(state | {"random": random.get_rng_state(), "log": log}, last)


def evaluate(options):
    """Print the table of one row."""
    train, _, test = data(options)
    modules = programs(train, options)
    best = torch.load(options.out / "best.pt", map_location=options.device, weights_only=True)
    modules.load_state_dict(best)
    model, guide = modules
    log = torch.load(options.out / "last.pt", map_location="cpu", weights_only=True)["log"]
    best = best_of(log)
    x = test[: options.test_rows]
    kept = options.out / f"evidence-{best['epoch']}-{options.samples}.pt"
    rows = torch.load(kept) if kept.is_file() else torch.empty(3, 0, dtype=torch.float64)
    for start in trange(rows.shape[1], len(x), BLOCK, desc="evidence, blocks"):
        found = pe.evidence(
            model,
            guide,
            x[start : start + BLOCK],
            num_samples=options.samples,
            batch_size=10,
            seed=start,
            progress=False,
        )
        columns = (found.log_evidence, found.stderr, found.effective_sample_size)
        rows = torch.cat([rows, torch.stack(columns)], 1)
        save(rows, kept)
    log_evidence, stderr, ess = rows[:, : len(x)]
    pyro.set_rng_seed(options.seed)
    elbo, reconstruction, kl = bound(model, guide, x, DRAWS)
    setting = (options.data, options.binarise, options.model, options.prior)
    print(
        f"| {options.data}, {options.binarise} | {options.model} | {label(options)} "
        f"| {best['epoch']} of {len(log)}{'' if is_over(log) else ', so far'} "
        f"| {sum(entry['seconds'] for entry in log) / 60:.0f} | {best['valid']:.2f} "
        f"| {len(x):,} | {log_evidence.mean():.2f} ± {stderr.square().sum().sqrt() / len(x):.2f} "
        f"| {ess.median():.0f} | {elbo:.2f} | {reconstruction:.2f} | {kl:.2f} "
        f"| {REFERENCES.get(setting, '')} |"
    )


HEAD = """\
| data | model | prior | best epoch | minutes | valid, ELBO | test data | log p(x) \
| effective sample size | ELBO | reconstruction | KL | log p(x) by others |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the IDX files, raw or .gz")
    parser.add_argument("--data", choices=("mnist", "fashion"), default="mnist")
    parser.add_argument("--binarise", choices=("dynamic", "static"), default="dynamic")
    parser.add_argument("--model", choices=MODELS, default="vae")
    parser.add_argument("--prior", choices=("standard", "mixture", "vamp"), default="vamp")
    parser.add_argument("--components", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="train by captured steps")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this training")
    parser.add_argument("--evaluate", action="store_true", help="print the table's row")
    parser.add_argument("--samples", type=int, default=5000, help="of each datum, for log p(x)")
    parser.add_argument("--test-rows", type=int, help="evaluate on the first of the test data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="run/vamp/DATA-BINARISE-MODEL-PRIOR by default")
    options = parser.parse_args()
    if options.out is None:
        name = f"{options.data}-{options.binarise}-{options.model}-{label(options)}"
        options.out = Path("run/vamp") / name
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}")
    with pyro.validation_enabled(False), contextlib.suppress(KeyboardInterrupt):
        if options.evaluate:
            print(HEAD)
            evaluate(options)
        else:
            fit(options)
