"""Deep Markov models of the JSB chorales: nats per frame, against Krishnan et al. (2017).

    python tests/benchmarks/jsb.py FILE --guide smoothing [--steps 20000] [--out run/jsb]
    python tests/benchmarks/jsb.py FILE --guide smoothing --evaluate

FILE has the Boulanger-Lewandowski split of the chorales on a quarter-note grid: a mapping from
"train", "valid" and "test" to pieces, each a list of frames, each a list of MIDI pitches from 21
to 108. A DMM of the paper's size (z 100, emission 100, transition 200, recurrent net 600) is
trained with batches of 20 pieces, Adam, and beta rising linearly from 0 to 1 over 5,000 steps.
The state that is best on the validation part is kept, beside the last one, from which the same
command goes on where it was stopped. With --model-of the guide alone is trained, for the model of
another run.

--evaluate prints, for the best state and the test part, minus log p(x) in nats per frame:
importance-sampled; the one-sample bound, as a mean over frames and as a mean over the pieces'
own means; the bound of a particle filter.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import pyro
import torch
from tqdm import trange

import pyproelbo as pe
from pyproelbo.datasets import Minibatches
from pyproelbo.guides import dmm as guides
from pyproelbo.models.dmm import DMM
from pyproelbo.schedules import Linear

LOWEST, KEYS = 21, 88
GUIDES = {
    "smoothing": guides.Smoothing,
    "filtering": guides.Filtering,
    "bidirectional": guides.Bidirectional,
    "mean-field": guides.MeanField,
}


def pieces(path, part, device):
    """The pieces of a part as x (N, T, 88) of zeros and ones, and their lengths (N,)."""
    lists = json.loads(Path(path).read_text())[part]
    lengths = torch.tensor([len(frames) for frames in lists])
    x = torch.zeros(len(lists), int(lengths.max()), KEYS)
    for n, frames in enumerate(lists):
        for t, pitches in enumerate(frames):
            x[n, t, [pitch - LOWEST for pitch in pitches]] = 1
    return x.to(device), lengths.to(device)


def programs(options):
    """The model and the guide, before training."""
    pyro.set_rng_seed(options.seed)
    model = DMM(options.latents, KEYS, (options.emission,) * 2, options.transition)
    guide = GUIDES[options.guide](options.latents, KEYS, options.hidden)
    if options.model_of is not None:
        saved = torch.load(options.model_of, map_location="cpu", weights_only=True)
        own = {name[2:]: value for name, value in saved.items() if name.startswith("0.")}
        model.load_state_dict(own)
    return model.to(options.device), guide.to(options.device)


def cut(x, lengths, index):
    """The pieces ``index``, up to the longest of them."""
    lengths = lengths[index]
    return x[index, : int(lengths.max())], lengths


@torch.no_grad()
def bound(model, guide, x, lengths, draws=1):
    """The ELBO of each piece, the mean of some draws, in nats: (N,)."""
    objective = pe.SequentialELBO(max_plate_nesting=1)
    total = 0
    for _ in range(draws):
        terms = objective.terms(model, guide, x, lengths)
        total = total + (terms.reconstruction_by_time - terms.kl_by_time).sum(0)
    return total / draws


def fit(options):
    """Train until ``--steps``; what is there of an earlier call is gone on from."""
    train, valid = (pieces(options.file, part, options.device) for part in ("train", "valid"))
    model, guide = programs(options)
    modules = torch.nn.ModuleList([model, guide])
    trained = modules if options.model_of is None else guide
    optimiser = torch.optim.Adam(trained.parameters(), lr=options.lr, betas=(0.9, 0.999))
    objective = pe.SequentialELBO(Linear(0.0, 1.0, steps=options.anneal), max_plate_nesting=1)
    batches = Minibatches(torch.arange(len(train[0])), options.batch_size, seed=options.seed)
    loss = objective(model, guide)
    parts = {"modules": modules, "optimiser": optimiser, "batches": batches, "loss": objective}
    last, log = options.out / "last.pt", []
    if last.is_file():
        saved = torch.load(last, map_location=options.device, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log = saved["log"]
        torch.set_rng_state(saved["rng"].cpu())
    best = min((entry["valid"] for entry in log), default=float("inf"))
    seconds = log[-1]["seconds"] if log else 0.0
    bar = trange(options.steps, initial=objective.step, desc=options.guide, mininterval=10)
    while objective.step < options.steps:
        start, total = time.perf_counter(), 0.0
        for index in batches:
            x, lengths = cut(*train, index.to(options.device))
            modules.zero_grad(set_to_none=True)
            value = loss(x, lengths)
            (value / lengths.sum()).backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), options.clip)
            optimiser.step()
            total += objective.last_terms.elbo
            bar.update()
        seconds += time.perf_counter() - start
        if objective.step % (len(batches) * options.every):
            continue
        per_frame = -bound(model, guide, *valid, draws=4).sum() / valid[1].sum()
        log.append({
            "step": objective.step,
            "train": -total.item() / train[1].sum().item(),
            "valid": per_frame.item(),
            "seconds": seconds,
        })  # fmt: skip
        bar.set_postfix({k: f"{v:.3f}" for k, v in log[-1].items() if k in ("train", "valid")})
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"log": log, "rng": torch.get_rng_state()}, last)
        if per_frame < best:
            best = per_frame.item()
            torch.save(modules.state_dict(), options.out / "best.pt")
    (options.out / "log.json").write_text(json.dumps(log))


def evaluate(options):
    """Print a row of the table: minus log p(x) of the test part, in nats per frame."""
    x, lengths = pieces(options.file, "test", options.device)
    model, guide = programs(options)
    modules = torch.nn.ModuleList([model, guide])
    saved = torch.load(options.out / "best.pt", map_location=options.device, weights_only=True)
    modules.load_state_dict(saved)
    log = torch.load(options.out / "last.pt", map_location="cpu", weights_only=False)["log"]
    best = min(log, key=lambda entry: entry["valid"])
    frames = lengths.sum()
    pyro.set_rng_seed(options.seed)
    one = -bound(model, guide, x, lengths, draws=options.draws)
    start = time.perf_counter()
    result = pe.evidence(
        model, guide, (x, lengths), num_samples=options.samples, batch_size=8, chunk=25
    )
    filter_ = pe.ParticleFilterELBO(options.particles)
    smc = -filter_.filter(model, guide, x, lengths).log_evidence
    error = result.stderr.square().sum().sqrt() / frames
    print(
        f"| {options.guide} | {best['step']:,} | {best['seconds'] / 60:.0f} | "
        f"{best['valid']:.3f} | {-result.log_evidence.sum() / frames:.3f} ± {error:.3f} | "
        f"{one.sum() / frames:.3f} | {(one / lengths).mean():.3f} | {smc.sum() / frames:.3f} | "
        f"{result.effective_sample_size.median():.1f} | {time.perf_counter() - start:.0f} |"
    )


HEAD = """\
| guide | steps | minutes | valid, bound | test, importance-sampled | bound | \
bound, mean of pieces | particle filter | effective sample size | seconds |
|---|---|---|---|---|---|---|---|---|---|"""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the chorales, as JSON")
    parser.add_argument("--guide", choices=GUIDES, default="smoothing")
    parser.add_argument("--model-of", type=Path, help="a best.pt, whose model is kept as it is")
    parser.add_argument("--evaluate", action="store_true", help="print the table's row")
    parser.add_argument("--out", type=Path, default=None, help="run/jsb-GUIDE by default")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--anneal", type=int, default=5_000, help="steps until beta is 1")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--clip", type=float, default=10.0, help="norm of the gradient per frame")
    parser.add_argument("--every", type=int, default=10, help="epochs between validations")
    parser.add_argument("--latents", type=int, default=100)
    parser.add_argument("--emission", type=int, default=100)
    parser.add_argument("--transition", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=600)
    parser.add_argument("--samples", type=int, default=2000, help="of importance sampling")
    parser.add_argument("--draws", type=int, default=20, help="of which the bound is the mean")
    parser.add_argument("--particles", type=int, default=500, help="of the particle filter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.out = options.out or Path(f"run/jsb-{options.guide}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}")
    if options.evaluate:
        print(HEAD)
        evaluate(options)
    else:
        fit(options)
