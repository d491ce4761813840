"""Fits that end by themselves, beside Adam with the best of five learning rates.

    python tests/benchmarks/fit.py PATH [--steps 5000] [--processes 2] [--out rows.json]

PATH is a folder with posteriors of posteriordb, as of ``posteriordb.py``. Each is fitted by
AutoNormal and AutoMultivariateNormal: by ``pe.fit`` as it is, and by Pyro's SVI with Adam, for so
many steps at each of five rates, that fall to a hundredth, from the same start; of these the best
is taken, as one who tunes by hand would. A fit that says "converged" is false where its ELBO is
more than 0.1 nats below the best of both, by more than two standard errors.
"""

import warnings
from functools import partial
from pathlib import Path

import posteriordb_models as posteriors
import pyro
import torch
from fit_pairs import Best, Pair, false, near, pairs_of, parser, table
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_value

import pyproelbo as pe

RATES = (0.3, 0.1, 0.03, 0.01, 0.003)
GUIDES = ("AutoNormal", "AutoMultivariateNormal")
DRAWS = 10_000  # of which an ELBO is the mean
HEADS = ("posterior", "guide", "ended", "ELBO", "Adam's", "at rate")


def pair(folder: Path, steps: int, which: tuple[str, str]) -> Pair:
    """Fit one guide to one posterior in both ways."""
    name, kind = which
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    truth = posteriors.load(folder, name)

    def new_guide() -> autoguide.AutoGuide:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        start = init_to_value(values=dict(truth.initial))
        return getattr(autoguide, kind)(truth.model, init_loc_fn=start)

    def elbo(guide: autoguide.AutoGuide) -> tuple[float, float]:
        found = pe.evidence(truth.model, guide, None, num_samples=DRAWS, seed=7, progress=False)
        return float(found.elbo), float(found.elbo_stderr)

    def of_adam(rate: float) -> float:
        guide = new_guide()
        optimiser = pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / steps)})
        svi = SVI(truth.model, guide, optimiser, Trace_ELBO())
        try:
            for _ in range(steps):
                svi.step()
            return elbo(guide)[0]
        except ValueError:  # a parameter that is not valid any more
            return -float("inf")

    guide = new_guide()
    fit = pe.fit(truth.model, guide, None, progress=False)
    ended = fit.reason, *elbo(guide), fit.seconds, fit.num_steps
    return Pair({"posterior": name, "guide": kind}, *ended, Best.of(RATES, of_adam))


def cells(p: Pair) -> tuple[str, ...]:
    """Of the columns before the times."""
    names = str(p.of["posterior"]).partition("-")[2], str(p.of["guide"]).removeprefix("Auto")
    elbos = f"{p.elbo:.2f} ± {p.stderr:.2f}", f"{p.adam.elbo:.2f}", f"{p.adam.rate:g}"
    return *names, p.reason, *elbos


def report(pairs: list[Pair]) -> None:
    """Print the rates that count, and each pair."""
    table(pairs, HEADS, cells)
    print(f"\n{near(pairs)} ({sum(p.is_near for p in pairs) / len(pairs):.1%})")
    print(false(pairs))
    ratio = sorted(p.seconds / p.adam.seconds for p in pairs)[len(pairs) // 2]
    print(f"time beside that of the best rate alone, median: {ratio:.2f}")


def main() -> None:
    options = parser()
    options.add_argument("path", type=Path)
    options.add_argument("--steps", type=int, default=5000)
    given = options.parse_args()
    work = [(name, kind) for name in posteriors.names(given.path) for kind in GUIDES]
    of = partial(pair, given.path, given.steps)
    report(pairs_of(of, work, given.processes, given.out))


if __name__ == "__main__":
    main()
