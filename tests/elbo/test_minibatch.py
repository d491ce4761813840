"""The aggregate posterior from minibatches: against loops, whole data and all minibatches."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import log_weight, mean_and_stderr, rows
from torch.utils._python_dispatch import TorchDispatchMode

from pyproelbo._terms.terms import Latent
from pyproelbo._terms.traces import PARTICLES, Plate
from pyproelbo.elbo.minibatch import log_densities, log_weights

ESTIMATORS = ["stratified", "weighted"]
B, N = 6, 50


def latent(q, value=None, plates=None):
    """A sample of q, whose last batch dim is the plate "data" unless plates say otherwise."""
    plates = plates or [Plate("data", -1, q.batch_shape[-1], q.batch_shape[-1])]
    if value is None:
        value = q.rsample() if q.has_rsample else q.sample()
    return Latent(value, q, None, frozenset(plates), 1.0, None, False)


def tril(scale):
    return torch.eye(3) * scale[..., None] + 0.4 * torch.ones(3, 3).tril(-1)


# a distribution of parameters (..., 3) and (..., 3), the latter positive; and its marginals
FAMILIES = {
    "Normal": (lambda a, b: dist.Normal(a, b).to_event(1), dist.Normal),
    "Laplace": (lambda a, b: dist.Laplace(a, b).to_event(1), dist.Laplace),
    "Gamma": (lambda a, b: dist.Gamma(a.exp(), b).to_event(1), lambda a, b: dist.Gamma(a.exp(), b)),
    "LogNormal": (lambda a, b: dist.LogNormal(a, b).to_event(1), dist.LogNormal),
    "MultivariateNormal": (
        lambda a, b: dist.MultivariateNormal(a, scale_tril=tril(b)),
        lambda a, b: dist.Normal(a, (tril(b) @ tril(b).mT).diagonal(dim1=-2, dim2=-1).sqrt()),
    ),
    "LowRankMultivariateNormal": (
        lambda a, b: dist.LowRankMultivariateNormal(a, a[..., None], b),
        lambda a, b: dist.Normal(a, (b + a.square()).sqrt()),
    ),
    "mixture": (
        lambda a, b: dist.MixtureSameFamily(
            dist.Categorical(logits=a[..., :2]),
            dist.Normal(torch.stack([a, -2 * b], -2), torch.stack([b, b.sqrt()], -2)).to_event(1),
        ),
        None,
    ),
    "scalar": (
        lambda a, b: dist.Normal(a[..., 0], b[..., 0]),
        lambda a, b: dist.Normal(a[..., :1], b[..., :1]),
    ),
}


def parameters(*shape):
    return 0.7 * rows(*shape, 3), rows(*shape, 3).flip(0).mul(0.4).exp()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_a_loop(family, estimator):
    """Each pair of data and each dimension by itself."""
    make, marginal = FAMILIES[family]
    a, b = parameters(B)
    q = make(a, b)
    z = q.sample()
    ours = log_densities([latent(q, z)], "data", N, estimator)
    for i in range(B):
        posteriors = [(log_weight(estimator, i, j, B, N), a[j], b[j]) for j in range(B)]
        joint = torch.stack([w + make(a, b).log_prob(z[i]) for w, a, b in posteriors])
        torch.testing.assert_close(ours.own[i, 0], make(a[i], b[i]).log_prob(z[i]))
        torch.testing.assert_close(ours.joint[i, 0], joint.logsumexp(0))
        if marginal is None:
            assert ours.by_dim is None
            continue
        by_dim = torch.stack([w + marginal(a, b).log_prob(z[i]) for w, a, b in posteriors])
        torch.testing.assert_close(ours.by_dim[i, 0], by_dim.logsumexp(0).sum())


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_dims_of_inner_plates_and_events_are_dimensions():
    """The data in any dim, an event of any shape: as one flat vector for each datum."""
    shape = (B, 2, 4, 3)  # data, inner plate, event
    loc, scale = rows(*shape), rows(*shape).flip(0).exp()
    z = dist.Normal(loc, scale).sample()
    flat = dist.Normal(loc.flatten(1), scale.flatten(1)).to_event(1)
    expected = log_densities([latent(flat, z.flatten(1))], "data", N)

    inner = [Plate("data", -2, B, B), Plate("inner", -1, 2, 2)]
    q = dist.Normal(loc, scale).to_event(2)
    assert_same(log_densities([latent(q, z, inner)], "data", N), expected)

    outer = [Plate("data", -1, B, B), Plate("inner", -3, 2, 2)]
    turned = [t.transpose(0, 1).unsqueeze(1) for t in (loc, scale, z)]  # (2, 1, B, 4, 3)
    q = dist.Normal(*turned[:2]).to_event(2)
    assert_same(log_densities([latent(q, turned[2], outer)], "data", N), expected)


def test_particles_are_held_against_their_own_posteriors():
    a, b = parameters(3, B)
    q = dist.Normal(a, b).to_event(1)
    z = q.sample()
    plates = [Plate(PARTICLES, -2, 3, 3), Plate("data", -1, B, B)]
    together = log_densities([latent(q, z, plates)], "data", N)
    for p in range(3):
        alone = log_densities([latent(dist.Normal(a[p], b[p]).to_event(1), z[p])], "data", N)
        assert_same([part[:, p] for part in together], [part[:, 0] for part in alone])


def test_several_latents_are_one_vector():
    a, b = parameters(B)
    z = dist.Normal(a, b).sample()
    whole = log_densities([latent(dist.Normal(a, b).to_event(1), z)], "data", N)
    first = latent(dist.Normal(a[:, :2], b[:, :2]).to_event(1), z[:, :2])
    last = latent(dist.Normal(a[:, 2], b[:, 2]), z[:, 2])
    assert_same(log_densities([first, last], "data", N), whole)
    make, _ = FAMILIES["mixture"]
    both = log_densities([first, latent(make(a, b))], "data", N)
    assert both.by_dim is None


class Largest(TorchDispatchMode):
    """The size of the largest tensor that comes out of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_rows(family):
    """The same values and gradients in blocks; and less memory, in the backward pass too."""
    make, _ = FAMILIES[family]
    a, b = (t.requires_grad_() for t in parameters(40))
    results, largest = [], []
    for max_elements in (2**26, 300):
        torch.manual_seed(0)
        z = latent(make(a, b))
        with Largest() as mode:
            ours = log_densities([z], "data", N, max_elements=max_elements)
            loss = sum(part.square().sum() for part in ours if part is not None)
            grads = torch.autograd.grad(loss, (a, b), allow_unused=True)
        results.append([*ours, *grads])
        largest.append(mode.numel)
    assert_same([r for r in results[0] if r is not None], [r for r in results[1] if r is not None])
    assert largest[0] >= 40 * 40
    assert largest[1] < largest[0] / 4


def test_the_stratified_weights_are_the_papers_averaged():
    """Chen et al., C.2: own 1/N, others 1/M but one (N - M)/(N M); mean over which that one is."""
    M = B - 1
    own, rest, odd = 1 / N, 1 / M, (N - M) / (N * M)
    papers = torch.full((B, B), (odd + (M - 1) * rest) / M).fill_diagonal_(own)
    ours = log_weights("stratified", range(B), B, N, papers)
    torch.testing.assert_close(ours.exp(), papers)
    torch.testing.assert_close(ours.logsumexp(1), torch.zeros(B))
    weighted = log_weights("weighted", range(B), B, N, papers)
    torch.testing.assert_close(weighted.logsumexp(1), torch.full((B,), -math.log(N)))


def test_over_all_minibatches():
    """Of 10 data all batches of 4: stratified is unbiased for q(z), its logarithm is low."""
    size, num = 10, 4
    loc, scale = 1.5 * rows(size), rows(size).flip(0).mul(0.3).exp()
    z = dist.Normal(loc, scale).sample()
    log_q = dist.Normal(loc, scale).log_prob(z[:, None]).logsumexp(1) - math.log(size)
    found = {name: [[] for _ in range(size)] for name in ESTIMATORS}
    for batch in itertools.combinations(range(size), num):
        i = torch.tensor(batch)
        for name, values in found.items():
            ours = log_densities([latent(dist.Normal(loc[i], scale[i]), z[i])], "data", size, name)
            for n, value in zip(batch, ours.joint[:, 0], strict=True):
                values[n].append(value)
    found = {name: torch.tensor(values) for name, values in found.items()}

    torch.testing.assert_close(found["stratified"].exp().mean(1), log_q.exp())
    bias = log_q - found["stratified"].mean(1)  # of the mutual information, at each z
    assert (bias > 0).all()
    assert (bias < math.log(size) - (dist.Normal(loc, scale).log_prob(z) - log_q)).all()
    assert (found["weighted"].exp().mean(1) < log_q.exp()).all()
    assert (log_q - found["weighted"].mean(1) > bias).all()


def test_bias_on_five_thousand_data():
    """Batches of 64 against the whole: 8 dimensions, means from N(0, I), scales 0.3."""
    size, num, num_batches = 5000, 64, 20
    loc, scale = rows(size, 8), torch.tensor(0.3)
    estimates = {"exact": []} | {name: [] for name in ESTIMATORS}
    for _ in range(num_batches):
        i = torch.randperm(size)[:num]
        q = dist.Normal(loc[i], scale).to_event(1)
        z = q.sample()
        each = -((z[:, None] - loc) / scale).square() / 2  # (batch, size, dimension)
        each -= scale.log() + math.log(2 * math.pi) / 2
        joint = each.sum(-1).logsumexp(1) - math.log(size)
        by_dim = (each.logsumexp(1) - math.log(size)).sum(-1)
        exact = q.log_prob(z), joint, by_dim
        for name, values in estimates.items():
            if name != "exact":
                exact = (p[:, 0] for p in log_densities([latent(q, z)], "data", size, name))
            own, joint, by_dim = exact
            values.append(torch.stack([(own - joint).mean(), (joint - by_dim).mean()]))
    estimates = {name: torch.stack(values) for name, values in estimates.items()}

    means = {name: value.mean(0) for name, value in estimates.items()}
    _, stderr = mean_and_stderr(estimates["exact"])
    assert (means["exact"] - torch.tensor([8.01, 1.97])).abs().lt(4 * stderr + 0.01).all()
    bias, stderr = mean_and_stderr(estimates["stratified"] - estimates["exact"])
    assert abs(bias[0] - 0.40) < 4 * stderr[0] + 0.01
    assert abs(bias[1]) < 4 * stderr[1] + 0.02
    assert means["stratified"][0] < math.log(size) < means["weighted"][0] < math.log(size * num)
    bias, stderr = mean_and_stderr(estimates["weighted"] - estimates["exact"])
    assert abs(bias[0] - 4.65) < 4 * stderr[0] + 0.01
    assert bias[1] > 7 * math.log(size)


def test_limits():
    same = dist.Normal(torch.ones(B), 2.0)
    ours = log_densities([latent(same)], "data", N)
    torch.testing.assert_close(ours.own, ours.joint)  # all posteriors alike: no information
    ours = log_densities([latent(same)], "data", N, "weighted")
    torch.testing.assert_close(ours.own - ours.joint, torch.full((B, 1), math.log(N)))

    apart = latent(dist.Normal(1e4 * torch.arange(B), 1.0))
    information = {("stratified", N): N, ("stratified", B): B, ("weighted", N): N * B}
    for (name, size), most in information.items():
        ours = log_densities([apart], "data", size, name)
        torch.testing.assert_close(ours.own - ours.joint, torch.full((B, 1), math.log(most)))


@pytest.mark.parametrize("family", ["Normal", "MultivariateNormal"])
def test_float32(family):
    """Narrow posteriors: as exact as the distance of a sample from its mean."""
    make, _ = FAMILIES[family]
    a, b = parameters(200)
    b = 0.01 * b if family == "Normal" else b  # the helper's covariance does not shrink with b
    z = make(a, b).sample()
    exact = log_densities([latent(make(a, b), z)], "data", 10**6)
    torch.set_default_dtype(torch.float32)
    ours = log_densities([latent(make(a.float(), b.float()), z.float())], "data", 10**6)
    for part, reference in zip(ours, exact, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), reference, rtol=0, atol=1e-3)


def test_discrete_latents():
    q = dist.Categorical(logits=rows(B, 4))
    z = q.sample()
    ours = log_densities([latent(q, z)], "data", N)
    mean = (log_weights("stratified", range(B), B, N, rows(1)) + q.logits[:, z].mT).logsumexp(1)
    torch.testing.assert_close(ours.joint[:, 0], mean)
    torch.testing.assert_close(ours.by_dim, ours.joint)


class Stubborn(dist.Normal):
    """A distribution whose log_prob is of as many values as it has rows."""

    def log_prob(self, value):
        return super().log_prob(value.reshape(-1)[: len(self.loc)])


def test_complaints():
    a, b = parameters(B)
    z = latent(dist.Normal(a[:, 0], b[:, 0]))
    with pytest.raises(ValueError, match="dataset_size=5 is less than the 6 data of the batch"):
        log_densities([z], "data", 5)
    with pytest.raises(ValueError, match=r"a batch of 1 cannot distinguish q\(z\) from"):
        log_densities([latent(dist.Normal(a[:1, 0], b[:1, 0]))], "data", N)
    q = Stubborn(a[:, 0], b[:, 0], validate_args=False)
    with pytest.raises(ValueError, match="log_prob of Stubborn has shape"):
        log_densities([latent(q)], "data", N)
