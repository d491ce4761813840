"""Posteriors of posteriordb whose truth is known, as Pyro programs.

posteriordb (Magnusson et al.; BSD 3-Clause, the Stan developers) is a data base of real posteriors
with reference draws by long, checked MCMC. ``load`` reads one of 29 from a folder with

- ``index.json``: by the posterior's name, its model, its data and its parameters in order;
- ``data.json``: the data by name;
- ``reference.npz``: ``NAME/mean`` and ``NAME/sd`` of the reference draws.

The programs have no arguments, float64 latents and no local latents. They count dims from the
right, so that inside plates at the left they work for many particles at once. Flat priors are
improper: 0 nats on the constrained scale. ``Restricted`` priors are not normalised, as in Stan;
all other densities are. Where a prior is half of another, or a hidden chain starts with weights
1/2, they thus differ from those of Stan's programs by a constant, never more.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

Program = Callable[[], None]
Values = Mapping[str, Tensor]


class Posterior(NamedTuple):
    """A posterior of posteriordb as a Pyro program.

    ``reported`` takes latents by site, (S, ...) each, also with the dims of size 1 that plates
    leave, and gives what the reference reports, (S, P). ``initial`` has a constrained value of
    every latent to start from; that of a regression is least squares.
    """

    name: str
    model: Program
    reported: Callable[[Values], Tensor]
    initial: Values
    mean: np.ndarray
    sd: np.ndarray


class Restricted(dist.ImproperUniform):
    """The density of a distribution where a constraint holds, not normalised to one there."""

    def __init__(self, base: dist.TorchDistribution, support: constraints.Constraint):
        super().__init__(support, base.batch_shape, base.event_shape)
        self.base = base

    def expand(self, batch_shape, _instance=None):
        return Restricted(self.base.expand(batch_shape), self._support)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value)


def names(folder: Path) -> list[str]:
    """The names of all posteriors in a folder."""
    return sorted(json.loads((Path(folder) / "index.json").read_text()))


def load(folder: Path, name: str) -> Posterior:
    """One posterior: its program, and the means and sds of the reference draws."""
    folder = Path(folder)
    entry = json.loads((folder / "index.json").read_text())[name]
    data = json.loads((folder / "data.json").read_text())[entry["data"]]
    data = {key: real(value) if isinstance(value, list) else value for key, value in data.items()}
    if entry["model"] in REGRESSIONS:
        model, initial = regression(*REGRESSIONS[entry["model"]](data))
    else:
        model, initial = OTHERS[entry["model"]](data)
    reported = schools if entry["model"].startswith("eight_schools") else in_order(*initial)
    with np.load(folder / "reference.npz") as reference:
        mean, sd = reference[f"{name}/mean"], reference[f"{name}/sd"]
    return Posterior(name, model, reported, initial, mean, sd)


def real(value) -> Tensor:
    """Numbers as a tensor of doubles."""
    return torch.tensor(value, dtype=torch.float64)


def normal(loc, scale) -> dist.Normal:
    """A Normal of doubles."""
    return dist.Normal(*torch.broadcast_tensors(real(loc), real(scale)))


def flat(constraint: constraints.Constraint, *event_shape: int) -> dist.ImproperUniform:
    """The prior whose density is 0 nats everywhere."""
    return dist.ImproperUniform(constraint, (), event_shape)


def in_order(*sites: str) -> Callable[[Values], Tensor]:
    """All sites' values beside each other."""
    return lambda values: torch.cat([values[s].reshape(len(values[s]), -1) for s in sites], -1)


def schools(values: Values) -> Tensor:
    """The effects of eight schools, their mean and their scale."""
    eta, mu, tau = (in_order(site)(values) for site in ("eta", "mu", "tau"))
    return torch.cat([mu + tau * eta, mu, tau], -1)


# Regressions: a response and its design, by rows


def regression(y: Tensor, x: Tensor, beta=None, sigma=None) -> tuple[Program, Values]:
    """y ~ normal(x beta, sigma), with flat priors where none are given."""
    beta = beta or flat(constraints.real, x.shape[-1])
    sigma = sigma or flat(constraints.positive)

    def model():
        b = pyro.sample("beta", beta)
        s = pyro.sample("sigma", sigma)
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("y", dist.Normal((x * b).sum(-1), s), obs=y)

    least = torch.linalg.lstsq(x, y.unsqueeze(-1)).solution.squeeze(-1)
    return model, {"beta": least, "sigma": (y - x @ least).std()}


def design(*columns: Tensor) -> Tensor:
    """A column of ones and other columns, (N, D)."""
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def crossed(a: Tensor, b: Tensor) -> Tensor:
    """The design of two columns and their product."""
    return design(a, b, a * b)


def standardised(x: Tensor, sds: float = 1.0) -> Tensor:
    """A column less its mean, in units of so many standard deviations."""
    return (x - x.mean()) / (sds * x.std())


def levels(x: Tensor) -> list[Tensor]:
    """Whether a column is 2, 3 or 4, as three columns."""
    return [(x == level).double() for level in (2, 3, 4)]


def half_cauchy() -> dist.HalfCauchy:
    """The prior of many a scale in posteriordb."""
    return dist.HalfCauchy(real(2.5))


def vague(size: int) -> dist.TorchDistribution:
    """Coefficients ~ normal(0, 10)."""
    return normal([0.0] * size, 10.0).to_event(1)


def kids(*columns: str) -> Callable[[dict], tuple]:
    """The children's scores by columns, with a proper prior of the scale."""
    return lambda d: (d["kid_score"], design(*(d[c] for c in columns)), None, half_cauchy())


def kids_crossed(change: Callable[[Tensor], Tensor]) -> Callable[[dict], tuple]:
    """The children's scores by two columns that were changed, and their product."""
    return lambda d: (d["kid_score"], crossed(change(d["mom_hs"]), change(d["mom_iq"])))


def mesquite(which: str) -> Callable[[dict], tuple]:
    """The bushes' log weights by logs of their sizes; which of these, one letter for each."""

    def response_and_design(d):
        one, two, canopy, total, density = (
            d[key].log() for key in ("diam1", "diam2", "canopy_height", "total_height", "density")
        )
        columns = {"1": one, "2": two, "c": canopy, "t": total, "d": density, "g": d["group"]}
        columns |= {"v": one + two + canopy, "a": one + two, "s": one - two}
        return d["weight"].log(), design(*(columns[letter] for letter in which))

    return response_and_design


def party(d: dict) -> tuple[Tensor, Tensor]:
    """Party identification in the National Election Studies."""
    before, after = ("real_ideo", "race_adj"), ("educ1", "gender", "income")
    age = levels(d["age_discrete"])
    return d["partyid7"], design(*(d[k] for k in before), *age, *(d[k] for k in after))


def autoregression(d: dict) -> tuple:
    """A series by its last K values: beta has alpha first, then one for each lag."""
    y, lags = d["y"], d["K"]
    before = [y[lags - k : len(y) - k] for k in range(1, lags + 1)]
    return y[lags:], design(*before), vague(1 + lags), half_cauchy()


REGRESSIONS: dict[str, Callable[[dict], tuple]] = {
    "earn_height": lambda d: (d["earn"], design(d["height"])),
    "log10earn_height": lambda d: (d["earn"].log10(), design(d["height"])),
    "logearn_height": lambda d: (d["earn"].log(), design(d["height"])),
    "logearn_height_male": lambda d: (d["earn"].log(), design(d["height"], d["male"])),
    "logearn_logheight_male": lambda d: (d["earn"].log(), design(d["height"].log(), d["male"])),
    "logearn_interaction_z": lambda d: (
        d["earn"].log(),
        crossed(standardised(d["height"]), d["male"]),
    ),
    "kidscore_momhs": kids("mom_hs"),
    "kidscore_momiq": kids("mom_iq"),
    "kidscore_momhsiq": kids("mom_hs", "mom_iq"),
    "kidscore_interaction_c": kids_crossed(lambda x: x - x.mean()),
    "kidscore_interaction_z": kids_crossed(lambda x: standardised(x, 2.0)),
    "kidscore_mom_work": lambda d: (d["kid_score"], design(*levels(d["mom_work"]))),
    "logmesquite": mesquite("12ctdg"),
    "logmesquite_logvolume": mesquite("v"),
    "logmesquite_logva": mesquite("vag"),
    "logmesquite_logvas": mesquite("vastdg"),
    "nes": party,
    "blr": lambda d: (d["y"], d["X"], vague(d["D"]), dist.HalfNormal(real(10.0))),
    "arK": autoregression,
}


# All others: the program and its initial values, in the order in which they are reported


def arma11(d: dict) -> tuple[Program, Values]:
    """A series with one autoregressive and one moving-average term."""
    y = d["y"]

    def model():
        mu = pyro.sample("mu", normal(0.0, 10.0))
        phi = pyro.sample("phi", normal(0.0, 2.0))
        theta = pyro.sample("theta", normal(0.0, 2.0))
        sigma = pyro.sample("sigma", half_cauchy())
        nu = [mu + phi * mu]
        for value in y[:-1]:
            nu.append(mu + phi * value + theta * (value - nu[-1]))
        series = dist.Normal(torch.stack(nu, -1), sigma.unsqueeze(-1)).to_event(1)
        pyro.sample("y", series, obs=y)

    initial = {"mu": real(0.0), "phi": real(0.5), "theta": real(0.0), "sigma": y.std()}
    return model, initial


def eight_schools(d: dict) -> tuple[Program, Values]:
    """The effects of coaching in eight schools, by effects without units."""
    y, sigma = d["y"], d["sigma"]

    def model():
        eta = pyro.sample("eta", normal([0.0] * len(y), 1.0).to_event(1))
        mu = pyro.sample("mu", normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(real(5.0)))
        theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * eta
        pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    return model, {"eta": torch.zeros_like(y), "mu": y.mean(), "tau": real(5.0)}


def gp_regr(d: dict) -> tuple[Program, Values]:
    """A Gaussian process with a squared-exponential kernel, its values summed out."""
    y, squares = d["y"], (d["x"].unsqueeze(-1) - d["x"]).square()

    def model():
        rho = pyro.sample("rho", dist.Gamma(real(25.0), real(4.0)))[..., None, None]
        alpha = pyro.sample("alpha", dist.HalfNormal(real(2.0)))[..., None, None]
        sigma = pyro.sample("sigma", dist.HalfNormal(real(1.0)))[..., None, None]
        kernel = alpha.square() * (-0.5 * squares / rho.square()).exp()
        covariance = kernel + sigma * torch.eye(len(y), dtype=y.dtype)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), covariance), obs=y)

    return model, {"rho": real(6.0), "alpha": real(2.0), "sigma": real(1.0)}


def chain(rows: list[Tensor], emission: dist.TorchDistribution, length: int) -> dist.DiscreteHMM:
    """A hidden chain summed out: the rows of its transition, what each state emits at one time."""
    step = torch.stack(rows, -2).log().unsqueeze(-3)
    start = torch.zeros_like(step)  # Pyro's chain makes a step before the first datum: a flat one
    steps = torch.cat([start, step.expand(*step.shape[:-3], length - 1, *step.shape[-2:])], -3)
    return dist.DiscreteHMM(torch.zeros_like(step[..., 0, 0, :]), steps, emission)


def hmm_example(d: dict) -> tuple[Program, Values]:
    """Two hidden states, each with the mean of a Normal."""
    y = d["y"].unsqueeze(-1)

    def model():
        rows = [pyro.sample(f"theta{k}", flat(constraints.simplex, 2)) for k in (1, 2)]
        prior = normal([3.0, 10.0], 1.0).to_event(1)
        mu = pyro.sample("mu", Restricted(prior, constraints.positive_ordered_vector))
        emission = dist.Normal(mu.unsqueeze(-2).unsqueeze(-1), 1.0).to_event(1)
        pyro.sample("y", chain(rows, emission, len(y)), obs=y)

    theta = {"theta1": real([0.7, 0.3]), "theta2": real([0.3, 0.7])}
    return model, {**theta, "mu": real([3.0, 10.0])}


def hmm_drive(d: dict) -> tuple[Program, Values]:
    """Two hidden states, each with the rates of two Exponentials."""
    uv = torch.stack([d["u"], d["v"]], -1)

    def model():
        rows = [pyro.sample(f"theta{k}", dist.Dirichlet(d["alpha"][k - 1])) for k in (1, 2)]
        prior = Restricted(normal([0.0, 3.0], 1.0).to_event(1), constraints.positive_ordered_vector)
        rates = torch.stack([pyro.sample(site, prior) for site in ("phi", "lambda")], -1)
        emission = dist.Exponential(rates.unsqueeze(-3)).to_event(1)
        pyro.sample("uv", chain(rows, emission, len(uv)), obs=uv)

    spread = real([0.5, 2.0]) / uv.mean(0).unsqueeze(-1)
    theta = {"theta1": real([0.7, 0.3]), "theta2": real([0.3, 0.7])}
    return model, {**theta, "phi": spread[0], "lambda": spread[1]}


def gauss_mix(d: dict) -> tuple[Program, Values]:
    """A mixture of two Normals in order of their means."""
    y = d["y"]

    def model():
        prior = normal([0.0, 0.0], 2.0).to_event(1)
        mu = pyro.sample("mu", Restricted(prior, constraints.ordered_vector))
        sigma = pyro.sample("sigma", dist.HalfNormal(real([2.0, 2.0])).to_event(1))
        theta = pyro.sample("theta", dist.Beta(real(5.0), real(5.0)))
        which = dist.Categorical(probs=torch.stack([theta, 1.0 - theta], -1))
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("y", dist.MixtureSameFamily(which, dist.Normal(mu, sigma)), obs=y)

    initial = {"mu": y.quantile(real([0.25, 0.75])), "sigma": real([1.0, 1.0])}
    return model, {**initial, "theta": real(0.5)}


def solution(field, state: Tensor, times: list[float], steps: int) -> list[Tensor]:
    """The states at all times but the first, by the Runge-Kutta method, so many steps between."""
    states = []
    for first, last in itertools.pairwise(times):
        h = (last - first) / steps
        for i in range(steps):
            t = first + i * h
            k1 = field(t, state)
            k2 = field(t + 0.5 * h, state + 0.5 * h * k1)
            k3 = field(t + 0.5 * h, state + 0.5 * h * k2)
            k4 = field(t + h, state + h * k3)
            state = state + (h / 6.0) * (k1 + 2.0 * (k2 + k3) + k4)
        states.append(state)
    return states


def lotka_volterra(d: dict) -> tuple[Program, Values]:
    """Hares and lynxes, solved for the logs of their numbers."""
    y = torch.cat([d["y_init"].unsqueeze(0), d["y"]])
    times = [0.0, *d["ts"].tolist()]

    def model():
        prior = normal([1.0, 0.05, 1.0, 0.05], [0.5, 0.05, 0.5, 0.05]).to_event(1)
        theta = pyro.sample(
            "theta", Restricted(prior, constraints.independent(constraints.positive, 1))
        )
        start = dist.LogNormal(real([math.log(10.0)] * 2), 1.0).to_event(1)
        z_init = pyro.sample("z_init", start)
        sigma = pyro.sample("sigma", dist.LogNormal(real([-1.0, -1.0]), 1.0).to_event(1))
        signed = theta * real([1.0, -1.0, -1.0, 1.0])
        growth, eaten = signed[..., 0::2], signed[..., 1::2]

        def field(t, logs):  # no numbers beyond exp(10), which would overflow
            return growth + eaten * logs.flip(-1).clamp(max=10.0).exp()

        logs = [z_init.log(), *solution(field, z_init.log(), times, steps=3)]
        numbers = dist.LogNormal(torch.stack(logs, -2), sigma.unsqueeze(-2)).to_event(2)
        pyro.sample("y", numbers, obs=y)

    hares, lynxes = y.mean(0)  # in equilibrium; small cycles around it would take ten years
    theta = 0.2 * math.pi * torch.stack([real(1.0), 1.0 / lynxes, real(1.0), 1.0 / hares])
    return model, {"theta": theta, "z_init": d["y_init"], "sigma": real([0.4, 0.4])}


def one_compartment(d: dict) -> tuple[Program, Values]:
    """A drug that is absorbed and eliminated, solved for the concentration eliminated so far."""
    c_hat, volume, dose = d["C_hat"], d["V"], d["D"] / d["V"]
    times = [d["t0"], *d["times"].tolist()]

    def model():
        prior = dist.HalfCauchy(real(1.0))
        k_a, k_m, v_m, sigma = (pyro.sample(site, prior) for site in ("k_a", "K_m", "V_m", "sigma"))

        def left(t, eliminated):  # never quite zero, whose log is taken
            return (-dose * torch.expm1(-k_a * t) - eliminated).clamp(min=1e-8)

        def field(t, eliminated):
            c = left(t, eliminated)
            return v_m / volume * c / (k_m + c)

        states = solution(field, torch.zeros_like(k_a), times, steps=3)
        c = torch.stack([left(*pair) for pair in zip(times[1:], states, strict=True)], -1)
        concentration = dist.LogNormal(c.log(), sigma.unsqueeze(-1)).to_event(1)
        pyro.sample("C_hat", concentration, obs=c_hat)

    return model, {site: real(v) for site, v in (("k_a", 1), ("K_m", 1), ("V_m", 1), ("sigma", 1))}


OTHERS: dict[str, Callable[[dict], tuple[Program, Values]]] = {
    "arma11": arma11,
    "eight_schools_noncentered": eight_schools,
    "gp_regr": gp_regr,
    "hmm_example": hmm_example,
    "hmm_drive_0": hmm_drive,
    "low_dim_gauss_mix": gauss_mix,
    "lotka_volterra": lotka_volterra,
    "one_comp_mm_elim_abs": one_compartment,
}
