"""Models and guides of sequences, each as a loop and with whole sequences."""

from functools import cache

import pyro
import pyro.distributions as dist
import torch
from helpers import programs
from helpers.oracles import rows
from pyro import poutine

from pyproelbo.sequences import (
    Autoregressive,
    IndependentSteps,
    MarkovChain,
    lengths_mask,
)

B, T, D, K = 3, 4, 2, 2
LENGTHS = torch.tensor([4, 1, 3], device="cpu")
real, positive = programs.real, programs.positive


def data():
    return rows(B, T, D)


def own():
    """One mask for all programs, as one that is an argument of model and guide."""
    return own_on(torch.get_default_device())


@cache
def own_on(device):
    return lengths_mask(LENGTHS.to(device), T)


def weight(name, *shape):
    """A parameter that is nothing special."""
    return pyro.param(name, lambda: 0.5 * rows(*shape) + 0.1)


def normal(loc, name):
    return dist.Normal(loc, positive(name)).to_event(1)


def together(z, u):
    return torch.cat([z, u.expand(z.shape[:-1] + u.shape[-1:])], -1)


def filtering(x, mask):
    """q(z_t | z_{t-1}, x_t): the programs of the seed's equations 9 and 10."""

    def step(z, u):
        return normal(together(z, u) @ weight("C", K + D, K), "q")

    with pyro.plate("data", B):
        first = step(torch.zeros(B, K), x[:, 0])
        pyro.sample("z", MarkovChain(first, step, inputs=x, mask=mask))


def filtering_loop(x, mask):
    z = torch.zeros(B, K)
    with pyro.plate("data", B):
        for t in pyro.markov(range(T)):
            loc = together(z, x[:, t]) @ weight("C", K + D, K)
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z_{t}", normal(loc, "q"))


def markov(x, mask):
    def step(z):
        return normal((z @ weight("A", K, K)).tanh(), "p")

    with pyro.plate("data", B):
        first = dist.Normal(torch.zeros(K), 1.0).to_event(1)
        z = pyro.sample("z", MarkovChain(first, step, T, mask=mask))
        emission = normal(z @ weight("H", K, D), "r")
        pyro.sample("x", IndependentSteps(emission, mask), obs=x)


def markov_loop(x, mask):
    prior = dist.Normal(torch.zeros(K), 1.0).to_event(1)
    with pyro.plate("data", B):
        for t in pyro.markov(range(T)):
            with poutine.mask(mask=mask[:, t]):
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", normal(z @ weight("H", K, D), "r"), obs=x[:, t])
            prior = normal((z @ weight("A", K, K)).tanh(), "p")


def data_first_loop(x, mask):
    """x_t is drawn from z_{t-1}, before z_t, some are missing, and the masks are made anew."""
    z = torch.zeros(B, K)
    with pyro.plate("data", B):
        for t in range(T):
            with poutine.mask(mask=mask[:, t] & (torch.arange(B) != t)):
                pyro.sample(f"x_{t}", normal(z @ weight("H", K, D), "r"), obs=x[:, t])
            with poutine.mask(mask=mask[:, t].clone()):
                z = pyro.sample(f"z_{t}", normal(z @ weight("A", K, K), "p"))


def masked_inside(x, mask, role="model"):
    """As Pyro's deep Markov model masks: the features, by slices of one mask."""
    z = torch.zeros(B, K)
    with pyro.plate("data", B):
        for t in pyro.markov(range(T)):
            here = mask[:, t : t + 1]
            if role == "guide":
                loc = together(z, x[:, t]) @ weight("C", K + D, K)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, positive("q")).mask(here).to_event(1))
            else:
                loc = (z @ weight("A", K, K)).tanh()
                z = pyro.sample(f"z_{t}", dist.Normal(loc, positive("p")).mask(here).to_event(1))
                emission = dist.Normal(z @ weight("H", K, D), positive("r")).mask(here)
                pyro.sample(f"x_{t}", emission.to_event(1), obs=x[:, t])


def whole_past(x, mask):
    """p(z_t | z_0, ..., z_{t-1}) by a recurrent state, with inputs."""
    u = 0.1 * x.flip(-1)

    def step(s, u):
        return normal(together(s, u) @ weight("S", 3 + D, K), "p")

    with pyro.plate("data", B):
        chain = Autoregressive(torch.zeros(B, 3), step, remember, inputs=u, mask=mask)
        z = pyro.sample("z", chain)
        emission = normal(z @ weight("H", K, D), "r")
        pyro.sample("x", IndependentSteps(emission, mask), obs=x)


def remember(s, z, u):
    return (0.5 * s + together(z, u) @ weight("R", K + D, 3)).tanh()


def whole_past_loop(x, mask):
    u, s = 0.1 * x.flip(-1), torch.zeros(B, 3)
    with pyro.plate("data", B):
        for t in range(T):
            with poutine.mask(mask=mask[:, t]):
                prior = normal(together(s, u[:, t]) @ weight("S", 3 + D, K), "p")
                z = pyro.sample(f"z_{t}", prior)
                pyro.sample(f"x_{t}", normal(z @ weight("H", K, D), "r"), obs=x[:, t])
            s = remember(s.expand((*z.shape[:-1], 3)), z, u[:, t])


def two_sites(x, mask):
    """A second latent and a second observation in each step."""
    with pyro.plate("data", B):
        first = dist.Normal(torch.zeros(K), 1.0).to_event(1)
        z = pyro.sample("z", MarkovChain(first, lambda z: normal(0.5 * z, "p"), T, mask=mask))
        w = pyro.sample("w", IndependentSteps(dist.Normal(z.sum(-1), positive("pw")), mask))
        pyro.sample("x", IndependentSteps(normal(z + w.unsqueeze(-1), "r"), mask), obs=x)
        pyro.sample("y", IndependentSteps(dist.Normal(w, 1.0), mask), obs=x[..., 0])


def two_sites_guide(x, mask):
    with pyro.plate("data", B):
        first = normal(x[:, 0] @ weight("C", D, K), "q")
        pyro.sample("z", MarkovChain(first, lambda z: normal(z, "q"), T, mask=mask))
        pyro.sample("w", IndependentSteps(dist.Normal(x @ weight("w", D), positive("qw")), mask))


def subsampled(program):
    """Under a plate that stands for more sequences."""

    def run(*args):
        with poutine.scale(scale=7.0):
            program(*args)

    return run


def arguments(mask=None):
    return data(), own() if mask is None else mask


def bound(*args):
    """Programs without arguments, as the helpers of other tests call them."""
    return [lambda program=program: program(*arguments()) for program in args]
