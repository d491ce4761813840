"""Pyro programs for laws that hold over all of them: functions that return (model, guide).

Each takes no data: what it observes is in its closure, made from a fixed generator, so that two
calls at one seed do the same.
"""

from functools import cache

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.testing import fakes
from pyro.infer import autoguide, config_enumerate, reparam
from pyro.infer.enum import iter_discrete_traces
from torch.distributions import constraints


def noise(*shape):
    return _noise(shape, torch.get_default_dtype(), torch.get_default_device()).clone()


@cache  # drawn once, since no graph can be captured of draws from another generator than torch's
def _noise(shape, dtype, device):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(device)


def positive(name, *shape):
    return pyro.param(name, lambda: noise(*shape).exp(), constraint=constraints.positive)


def real(name, *shape):
    return pyro.param(name, lambda: noise(*shape))


def local_normal():
    """A diagonal Normal for each datum, linear decoder."""
    x = noise(5, 3)

    def model():
        w = real("w", 2, 3)
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1), obs=x)

    def guide():
        loc, scale = real("loc", 5, 2), positive("scale", 5, 2)
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def nested_plates():
    """A global latent, one latent an outer element and one an inner element."""
    x = noise(4, 3)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, positive("sb")))
            with pyro.plate("inner", 4, dim=-2):
                c = pyro.sample("c", dist.Normal(b, 0.5))
                pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide():
        a = pyro.sample("a", dist.Normal(real("la"), positive("sa")))
        with pyro.plate("outer", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(real("lb", 3) + a, positive("qb", 3)))
            with pyro.plate("inner", 4, dim=-2):
                pyro.sample("c", dist.Normal(real("lc", 4, 3) + b, positive("qc", 4, 3)))

    return model, guide


def subsampled():
    """A random half of the data at each call."""
    x = noise(6)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide():
        pyro.sample("m", dist.Normal(real("lm"), positive("sm")))
        loc, scale = real("loc", 6), positive("scale", 6)
        with pyro.plate("data", 6, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(loc[i], scale[i]))

    return model, guide


def scaled_and_masked():
    """One scale and one mask on both sides, another of each on the model's alone."""
    x, both, one = noise(5), noise(5) > 0, noise(5) < 0.5

    def model():
        with poutine.scale(scale=3.0), pyro.plate("data", 5), poutine.mask(mask=both):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=one), poutine.scale(scale=0.5):
                y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, positive("s")).mask(one), obs=x)

    def guide():
        with poutine.scale(scale=3.0), pyro.plate("data", 5), poutine.mask(mask=both):
            pyro.sample("z", dist.Normal(real("lz", 5), positive("sz", 5)))
            pyro.sample("y", dist.Normal(real("ly", 5), positive("sy", 5)))

    return model, guide


def factors():
    """pyro.factor in the model, and in the guide as the Jacobian of a transform."""

    def model():
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.factor("potential", -((z - real("c")) ** 2))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    def guide():
        u = pyro.sample("u", dist.Normal(real("l"), positive("s")), infer={"is_auxiliary": True})
        pyro.factor("jacobian", -u, has_rsample=True)
        pyro.sample("z", dist.Delta(u.exp()))

    return model, guide


def other_order():
    """The guide samples the model's latents in another order, with a dependence against it."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(2.0))

    def guide():
        b = pyro.sample("b", dist.Normal(real("lb"), positive("sb")))
        pyro.sample("a", dist.Normal(real("la") * b, positive("sa")))
        pyro.sample("c", dist.Normal(real("lc"), positive("sc")))

    return model, guide


def imputed():
    """obs_mask: some of the data are latent."""
    x, mask = noise(5), noise(5) > 0

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(m, positive("s")), obs=x, obs_mask=mask)

    def guide():
        pyro.sample("m", dist.Normal(real("lm"), positive("sm")))
        with pyro.plate("data", 5), poutine.mask(mask=~mask):
            pyro.sample("x_unobserved", dist.Normal(real("l", 5), positive("q", 5)))

    return model, guide


def reparameterised():
    """Sites rewritten by poutine.reparam; a deterministic site beside them."""
    config = {"z": reparam.LocScaleReparam(0.5), "y": reparam.TransformReparam()}

    @poutine.reparam(config=config)
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            y = pyro.sample("y", dist.LogNormal(z, 1.0))
            pyro.deterministic("w", z + y)
            pyro.sample("x", dist.Normal(z * y, positive("s")), obs=noise(3))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z_decentered", dist.Normal(real("lz", 3), positive("sz", 3)))
            pyro.sample("y_base", dist.Normal(real("ly", 3), positive("sy", 3)))

    return model, guide


def parameters_only():
    """MAP: a guide of Deltas at parameters."""

    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, z), obs=noise(3))

    def guide():
        pyro.sample("z", dist.Delta(positive("z_hat")))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Delta(real("y_hat", 3)))

    return model, guide


def nothing_latent():
    """An empty guide."""

    def model():
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(real("m"), positive("s")), obs=noise(4))

    return model, lambda: None


def sequential():
    """A plate as a loop, and a chain by pyro.markov."""

    def model():
        z = 0.0
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Normal(real("a") * z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=noise(3)[t])
        for i in pyro.plate("rest", 2):
            y = pyro.sample(f"y_{i}", dist.Normal(z, 1.0))
            pyro.sample(f"w_{i}", dist.Normal(y, 1.0), obs=noise(2)[i])

    def guide():
        z = 0.0
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Normal(real("l", 3)[t] + z, positive("s", 3)[t]))
        for i in pyro.plate("rest", 2):
            pyro.sample(f"y_{i}", dist.Normal(real("m", 2)[i], positive("q", 2)[i]))

    return model, guide


def full_covariance():
    """A full-covariance guide against a diagonal prior, and a transformed pair."""

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(real("m", 3), positive("s", 3)).to_event(1))
            y = pyro.sample("y", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1) * y, 1.0), obs=noise(4))

    def guide():
        tril = torch.eye(3) + 0.3 * torch.tril(real("tril", 4, 3, 3), -1)
        with pyro.plate("data", 4):
            pyro.sample("z", dist.MultivariateNormal(real("l", 4, 3), scale_tril=tril))
            pyro.sample("y", dist.LogNormal(real("ly", 4), positive("sy", 4)))

    return model, guide


def score_function():
    """Sites that cannot be reparameterised, in nested plates, beside one that can."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(real("pa").sigmoid()))
        with pyro.plate("outer", 3, dim=-1):
            b = pyro.sample("b", dist.Poisson(2.0 + a))
            r = pyro.sample("r", dist.Normal(a, 1.0))
            with pyro.plate("inner", 2, dim=-2):
                c = pyro.sample("c", fakes.NonreparameterizedNormal(b, 1.0))
                pyro.sample("x", dist.Normal(c + r, 1.0), obs=noise(2, 3))

    def guide():
        a = pyro.sample("a", dist.Bernoulli(real("qa").sigmoid()))
        with pyro.plate("outer", 3, dim=-1):
            b = pyro.sample("b", dist.Poisson(positive("qb", 3) + a))
            pyro.sample("r", dist.Normal(real("lr", 3) + a, positive("sr", 3)))
            with pyro.plate("inner", 2, dim=-2):
                loc = real("lc", 2, 3) + b
                pyro.sample("c", fakes.NonreparameterizedNormal(loc, positive("sc", 2, 3)))

    return model, guide


def huge_plate():
    """A plate of a million that only fits because the batch is small."""

    def model():
        with pyro.plate("data", 1_000_000, subsample_size=4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, positive("s")), obs=noise(4))

    def guide():
        with pyro.plate("data", 1_000_000, subsample_size=4):
            pyro.sample("z", dist.Normal(real("l"), positive("q")))

    return model, guide


def of_autoguide(make):
    """A model of three latents that are constrained, and the guide that is made of it."""

    def program():
        x = noise(4)

        def model():
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("data", 4):
                p = pyro.sample("p", dist.Beta(2.0, 3.0))
                pyro.sample("x", dist.Normal(w.sum(-1) + p, scale), obs=x)

        guide = make(model)
        with pyro.poutine.block():
            guide()  # makes its parameters
        return model, guide

    return program


def _list(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["scale", "w"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["p"])))
    return guide


AUTO = {
    f.__name__.lstrip("_"): of_autoguide(f)
    for f in (
        autoguide.AutoDelta,
        autoguide.AutoNormal,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoIAFNormal,
        autoguide.AutoStructured,
        autoguide.AutoGaussian,
        autoguide.AutoNormalMessenger,
        autoguide.AutoHierarchicalNormalMessenger,
        autoguide.AutoRegressiveMessenger,
        _list,
    )
}

REPARAMETERISED = {
    f.__name__: f
    for f in (
        local_normal,
        nested_plates,
        subsampled,
        scaled_and_masked,
        factors,
        other_order,
        imputed,
        reparameterised,
        parameters_only,
        nothing_latent,
        sequential,
        full_covariance,
        huge_plate,
    )
} | AUTO
SCORE_FUNCTION = {"score_function": score_function}


def guide_enumerated():
    """A discrete latent for each datum, enumerated by the guide, with one under it."""

    def model():
        mu = real("mu", 3)
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(real("pk", 3).softmax(-1)))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.7])[k]))
            pyro.sample("x", dist.Normal(mu[k] + b, 1.0), obs=noise(4))

    @config_enumerate
    def guide():
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(real("qk", 4, 3).softmax(-1)))
            pyro.sample("b", dist.Bernoulli((real("qb", 3)[k] / 2).sigmoid()))

    return model, guide


def guide_enumerated_chain():
    """A discrete chain, with pyro.markov reusing dims."""

    def model():
        probs, k = real("trans", 2, 2).softmax(-1), torch.tensor(0)
        for t in pyro.markov(range(4)):
            k = pyro.sample(f"k_{t}", dist.Categorical(probs[k]))
            pyro.sample(f"x_{t}", dist.Normal(k + 0.0, positive("s")), obs=noise(4)[t])

    @config_enumerate
    def guide():
        probs, k = real("q", 4, 2, 2).softmax(-1), torch.tensor(0)
        for t in pyro.markov(range(4)):
            k = pyro.sample(f"k_{t}", dist.Categorical(probs[t][k]))

    return model, guide


def guide_enumerated_and_sampled():
    """Enumerated, reparameterised and score-function sites, global and local."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.3))
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
            z = pyro.sample("z", dist.Normal(k + a, 1.0))
            pyro.sample("x", dist.Normal(z + g, 1.0), obs=noise(4))

    def guide():
        enumerate_ = {"enumerate": "parallel"}
        pyro.sample("a", dist.Bernoulli(real("qa").sigmoid()))
        pyro.sample("g", dist.Normal(real("lg"), positive("sg")))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(real("qk", 4, 2).softmax(-1)), infer=enumerate_)
            loc = real("lz", 2)[k]
            pyro.sample("z", dist.Normal(loc, positive("sz")))

    return model, guide


def model_enumerated():
    """A mixture summed out by the model, beside a latent of the guide."""

    def model():
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            enumerate_ = {"enumerate": "parallel"}
            k = pyro.sample("k", dist.Categorical(real("pk", 3).softmax(-1)), infer=enumerate_)
            pyro.sample("x", dist.Normal(real("mu", 3)[k] + g, 1.0), obs=noise(4))

    def guide():
        pyro.sample("g", dist.Normal(real("lg"), positive("sg")))

    return model, guide


def model_enumerated_chain():
    """A hidden Markov model, for each of three sequences."""

    @config_enumerate
    def model():
        probs, k = real("trans", 2, 2).softmax(-1), torch.tensor(0)
        with pyro.plate("sequences", 3):
            for t in pyro.markov(range(4)):
                k = pyro.sample(f"k_{t}", dist.Categorical(probs[k]))
                pyro.sample(f"x_{t}", dist.Normal(k + 0.0, positive("s")), obs=noise(4, 3)[t])

    return model, lambda: None


def model_enumerated_global():
    """One discrete latent over a plate."""

    def model():
        k = pyro.sample("k", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(k + real("m"), positive("s")), obs=noise(4))

    return model, lambda: None


def model_enumerated_above_latents():
    """Latents of the guide, whose prior the model sums a discrete site out of."""

    def model():
        with pyro.plate("data", 4):
            k = pyro.sample(
                "k", dist.Bernoulli(real("pk").sigmoid()), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(3 * k, 1.0))
            y = pyro.sample("y", dist.Normal(-k, 1.0))
            pyro.sample("x", dist.Normal(z + y + k, positive("s")), obs=noise(4))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(real("lz", 4), positive("sz", 4)))
            pyro.sample("y", dist.Normal(real("ly", 4), positive("sy", 4)))

    return model, guide


def both_enumerated():
    """One discrete site enumerated by the guide, one under it by the model; a subsample."""

    def model():
        with pyro.plate("data", 8, subsample_size=4):
            j = pyro.sample("j", dist.Bernoulli(0.4))
            probs = torch.tensor([0.3, 0.8])[j.long()]
            k = pyro.sample("k", dist.Bernoulli(probs), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(k + j + real("m"), positive("s")), obs=noise(4))

    @config_enumerate
    def guide():
        with pyro.plate("data", 8, subsample_size=4):
            pyro.sample("j", dist.Bernoulli(real("qj", 4).sigmoid()))

    return model, guide


def guide_enumerated_in_sequence():
    """One run for each pair of values, in and out of a plate."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.3))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("x", dist.Normal(a + b + real("m"), 1.0), obs=noise(3))
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(0.3))

    @config_enumerate(default="sequential")
    def guide():
        a = pyro.sample("a", dist.Bernoulli(real("qa").sigmoid()))
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli((real("qb", 3) + a).sigmoid()))

    return model, guide


def multiply_sampled():
    """Tensor Monte Carlo: several samples of a site in a dim of their own."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=noise(3))

    @config_enumerate(num_samples=5, expand=True)
    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(real("l", 3), positive("s", 3)))
            pyro.sample("k", dist.Bernoulli(real("qk", 3).sigmoid()))

    return model, guide


ENUMERATED = {
    f.__name__: f
    for f in (
        guide_enumerated,
        guide_enumerated_chain,
        guide_enumerated_and_sampled,
        model_enumerated,
        model_enumerated_chain,
        model_enumerated_global,
        model_enumerated_above_latents,
        both_enumerated,
        guide_enumerated_in_sequence,
        multiply_sampled,
    )
}


def enumerated_site(how="parallel"):
    """A site of a guide that has all of its values, at once or in a run for each, and is packed."""

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": how})

    program = poutine.enum(guide, first_available_dim=-2)
    trace = next(iter(iter_discrete_traces("flat", program)))
    trace.compute_log_prob()
    trace.pack_tensors()
    return trace.nodes["c"]
