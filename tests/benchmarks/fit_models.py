"""Fits of models with parameters and nets that end by themselves, beside Adam at five rates.

    python tests/benchmarks/fit_models.py [--seeds 3] [--processes 2] [--out rows.json]

A PPCA, a mixture of Gaussians whose guide is enumerated, a VAE of scikit-learn's digits, and a deep
Markov model of sequences of a linear-Gaussian state space model. Each is fitted by ``pe.fit`` as it
is, and by Pyro's SVI with Adam at each of five rates, that fall to a hundredth, from the same
start; the best of these counts. Of the models with nets, a part of the data is held out: it ends
``pe.fit``, the best of Adam's parameters by it are kept, looked at after every fiftieth of its
steps, and the ELBO is that of these data.
"""

import copy
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from fit_pairs import Best, Pair, false, near, pairs_of, parser, table
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import ClippedAdam

import pyproelbo as pe
from pyproelbo.datasets import digits
from pyproelbo.guides import dmm, gmm, ppca, vae
from pyproelbo.models.dmm import DMM
from pyproelbo.models.gmm import GMM
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vae import VAE, BernoulliLikelihood, GaussianLikelihood

RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
LOOKS = 50
HEADS = ("model", "seed", "ended", "ELBO", "Adam's", "at rate", "steps")


class Case(NamedTuple):
    """Programs and their data.

    Attributes:
        enumerated: whether the guide is.
        steps: of Adam.
    """

    model: torch.nn.Module
    guide: torch.nn.Module
    train: torch.Tensor
    held_out: torch.Tensor | None = None
    batch_size: int | None = None
    enumerated: bool = False
    steps: int = 3000

    @property
    def guiding(self) -> Callable:
        """The guide, as it is called."""
        return config_enumerate(self.guide) if self.enumerated else self.guide

    def elbo(self) -> torch.Tensor:
        """Of 32 draws of the data that are compared, (32,), in nats per datum."""
        x = self.train if self.held_out is None else self.held_out
        objective, num = pe.BetaELBO(), 1 if self.enumerated else 32
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(7)
            found = [objective.terms(self.model, self.guiding, x).elbo for _ in range(num)]
        return torch.stack(found) / len(x)


def of_ppca() -> Case:
    """Ten features of three latents."""
    x = torch.randn(500, 3) @ torch.randn(3, 10) + 0.5 * torch.randn(500, 10)
    return Case(PPCA(3, 10), ppca.Diagonal(3, 10), x)


def of_gmm() -> Case:
    """Three clusters in the plane."""
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    x = centres[torch.randint(3, (600,))] + torch.randn(600, 2)
    return Case(GMM(3, 2), gmm.Softmax(3, 2, hidden=(16,)), x, enumerated=True)


def of_vae() -> Case:
    """Images of digits, binarised."""
    x = (digits().x > 0.5).float()
    x = x[torch.randperm(len(x))]
    model = VAE(10, 64, hidden=(64,), likelihood=BernoulliLikelihood())
    return Case(model, vae.Diagonal(10, 64, hidden=(64,)), x[200:], x[:200], 100)


def of_dmm() -> Case:
    """Sequences of 20 steps."""
    with torch.no_grad():
        x = LGSSM(2, 3)(num=500, num_steps=20)
    model = DMM(2, 3, hidden=(16,), transition=16, likelihood=GaussianLikelihood(3))
    return Case(model, dmm.Smoothing(2, 3, hidden=16), x[100:], x[:100], 50)


CASES = {"PPCA": of_ppca, "GMM": of_gmm, "digits VAE": of_vae, "DMM": of_dmm}


def adam(case: Case, rate: float) -> float:
    """The ELBO by Pyro's SVI; of held-out data the best of some looks."""
    objective = TraceEnum_ELBO() if case.enumerated else Trace_ELBO()
    optimiser = ClippedAdam({"lr": rate, "lrd": 0.01 ** (1 / case.steps)})
    svi = SVI(case.model, case.guiding, optimiser, objective)
    best, size = -float("inf"), case.batch_size or len(case.train)
    try:
        for step in range(1, case.steps + 1):
            rows = torch.randperm(len(case.train))[:size]
            svi.step(case.train if case.batch_size is None else case.train[rows])
            if step == case.steps or (case.held_out is not None and step % LOOKS == 0):
                best = max(best, case.elbo().mean().item())
    except ValueError:  # a parameter that is not valid any more
        pass
    return best


def pair(which: tuple[str, int]) -> Pair:
    """Fit one case in both ways."""
    name, seed = which
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pyro.set_rng_seed(seed)
    start = CASES[name]()

    def of_adam(rate: float) -> float:
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        return adam(copy.deepcopy(start), rate)

    best = Best.of(RATES, of_adam)
    pyro.clear_param_store()
    case = copy.deepcopy(start)
    options = {"batch_size": case.batch_size, "held_out": case.held_out, "seed": seed}
    fit = pe.fit(case.model, case.guiding, case.train, progress=False, **options)
    elbo = case.elbo()
    error = elbo.std().item() / len(elbo) ** 0.5 if len(elbo) > 1 else 0.0
    ended = fit.reason, elbo.mean().item(), error, fit.seconds, fit.num_steps
    return Pair({"case": name, "seed": seed}, *ended, best)


def cells(p: Pair) -> tuple[str, ...]:
    """Of the columns before the times."""
    elbos = f"{p.elbo:.3f} ± {p.stderr:.3f}", f"{p.adam.elbo:.3f}", f"{p.adam.rate:g}"
    return str(p.of["case"]), str(p.of["seed"]), p.reason, *elbos, f"{p.steps:,}"


def report(pairs: list[Pair]) -> None:
    """Print each pair, and the rates that count."""
    table(pairs, HEADS, cells)
    print(f"\n{near(pairs)}")
    print(false(pairs))


def main() -> None:
    options = parser()
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--only", choices=list(CASES))
    given = options.parse_args()
    names = [given.only] if given.only else list(CASES)
    work = [(name, seed) for name in names for seed in range(given.seeds)]
    report(pairs_of(pair, work, given.processes, given.out))


if __name__ == "__main__":
    main()
