r"""The aggregate posterior's log-density, estimated from one minibatch.

q(z) = 1/N sum_n q(z | x_n) is a sum over all N data. With the B data of a minibatch and their
samples z_i ~ q(z | x_i) it is estimated by

    log q(z_i) ~ log sum_j w_ij q(z_i | x_j),

and likewise log q(z_d) for each dimension d (Chen et al. 2018, "Isolating Sources of
Disentanglement in Variational Autoencoders", appendix C). Both estimators assume that the batch is
drawn at random, without replacement:

"stratified"
    w_ii = 1/N and w_ij = (N - 1) / (N (B - 1)): unbiased for q(z_i). This is the paper's
    stratified sampling, whose weights single out one of the other data; here the weights are
    averaged over that choice, which keeps the expectation and does not raise the variance. The
    logarithm of an unbiased estimate is low (Jensen): the mutual information errs high, but never
    exceeds log N, marginal KL and dimension-wise KL err low, and the total correlation may err
    either way. Where no two posteriors of a batch overlap, the mutual information is log N,
    whatever the truth. With N = B, the batch is taken for the whole: the mutual information
    saturates at log B.
"weighted"
    w_ij = 1 / (N B): the weights add up to 1/N, not to 1. q(z_i) is therefore too small, and most
    of all where posteriors overlap: log q(z_i) is then low by log N. The mutual information errs
    high, and may exceed log N, up to log(N B); with D dimensions, whose posteriors overlap more
    than the posteriors of z as a whole, the total correlation is too high by about (D - 1) log N or
    more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.checkpoint import checkpoint

from pyproelbo._distributions.marginals import is_factorised, marginals
from pyproelbo._terms.terms import Latent
from pyproelbo._terms.traces import PARTICLES

Estimator = Literal["stratified", "weighted"]

# from z of some data at every datum's x, by site, (rows, particles, ..., B, ..., event), to the
# distributions from which the guide would draw it there
AtPairs = Callable[[Mapping[str, Tensor]], Mapping[str, Distribution]]

_PAIRS = 2**16  # of a sample and a datum, for which a guide runs in one call


class MinibatchSurgery(NamedTuple):
    r"""The parts of an ELBO's KL, estimated from a minibatch: scalars per datum, in nats.

    average_kl = mutual_information + marginal_kl (Hoffman & Johnson 2016, "ELBO surgery"), and
    marginal_kl = total_correlation + dimension_wise_kl (Chen et al. 2018, eq. 2), all from the same
    samples. On the errors of the estimates, see :mod:`pyproelbo.elbo.minibatch`.

    Attributes:
        reconstruction: E[log p(x | z)].
        average_kl: E[log q(z | x) - log p(z)], sampled. Where the model draws z given latents
            that were not chosen, p(z) is given their samples.
        mutual_information: E[log q(z | x) - log q(z)], between a datum's index and its z.
        marginal_kl: E[log q(z) - log p(z)].
        total_correlation: E[log q(z) - sum_d log q(z_d)]; None where the guide's marginals are
            not known, as for mixtures and flows, and where it draws one of the latents given
            another.
        dimension_wise_kl: E[sum_d log q(z_d) - log p(z)], with a prior that factorises the sum
            of KL(q(z_d) || p(z_d)); None as above.
    """

    reconstruction: Tensor
    average_kl: Tensor
    mutual_information: Tensor
    marginal_kl: Tensor
    total_correlation: Tensor | None
    dimension_wise_kl: Tensor | None


def mean_of(surgeries: Sequence[MinibatchSurgery]) -> MinibatchSurgery:
    """The mean over several particles, detached."""
    parts = zip(*surgeries, strict=True)
    return MinibatchSurgery._make(map(_mean, parts))


def _mean(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [value.detach() for value in values if value is not None]
    return torch.stack(known).mean(0) if known else None


class LogDensities(NamedTuple):
    """Log-densities of each sample of a batch, (B, particles), in nats.

    Attributes:
        own: log q(z_i | x_i).
        joint: log q(z_i), estimated.
        by_dim: sum_d log q(z_id), estimated; None where a marginal is not known.
    """

    own: Tensor
    joint: Tensor
    by_dim: Tensor | None


def log_weights(
    estimator: Estimator, rows: range, batch_size: int, dataset_size: int, like: Tensor
) -> Tensor:
    """log w_ij for some rows i: (rows, B), with the dtype and on the device of ``like``.

    Raises:
        ValueError: for a batch of fewer than two data, or of more than there are.
    """
    B, N = batch_size, dataset_size
    if B < 2:
        raise ValueError(
            f"a batch of {B} cannot distinguish q(z) from q(z | x): take batches of at least 2 "
            "data (drop_last=True drops a data loader's short last batch)"
        )
    if N < B:
        raise ValueError(
            f"dataset_size={N} is less than the {B} data of the batch: it should be the number "
            "of all data"
        )
    if estimator == "weighted":
        return like.new_full((len(rows), B), -math.log(N * B))
    weights = like.new_full((len(rows), B), math.log((N - 1) / (N * (B - 1))))
    weights.diagonal(rows.start).fill_(-math.log(N))
    return weights


def log_densities(
    latents: Sequence[Latent],
    plate: str,
    dataset_size: int,
    estimator: Estimator = "stratified",
    max_elements: int = 2**26,
    at_pairs: AtPairs | None = None,
) -> LogDensities:
    """Log-densities of the samples of several latents together.

    Dims of other plates and of events are all dimensions of z. Vectorised particles are kept apart:
    each sample is compared with the posteriors of its own particle.

    Args:
        latents: independent given x, unless ``at_pairs`` is given; all in the plate.
        plate: the plate over the data, B of them.
        dataset_size: N.
        max_elements: about how many of the B x B x particles x dimensions numbers to hold at once.
            Beyond it, rows of samples are taken in blocks and computed again for the gradient.
        at_pairs: q for each pair of a sample and a datum, where the guide draws one of the latents
            given another; the guide then runs for each pair.

    Raises:
        ValueError: as :func:`log_weights`; for a q whose log_prob does not broadcast.
    """
    pairs = _Pairs.of(latents, plate)
    own = torch.stack([pair.own() for pair in pairs]).sum(0)
    B, elements_of_a_row = len(own), sum(pair.samples.numel() for pair in pairs)
    step = max(1, max_elements // elements_of_a_row)
    if at_pairs is not None:
        step = min(step, max(1, _PAIRS // own.numel()))

    def aggregate(rows: range) -> tuple[Tensor, Tensor | None]:
        weights = log_weights(estimator, rows, B, dataset_size, like=own)
        return _aggregate(pairs, rows, weights, at_pairs)

    if step >= B:
        return LogDensities(own, *aggregate(range(B)))
    joint, by_dim = zip(
        *(
            checkpoint(
                aggregate,
                range(start, min(start + step, B)),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start in range(0, B, step)
        ),
        strict=True,
    )
    return LogDensities(own, torch.cat(joint), None if by_dim[0] is None else torch.cat(by_dim))


def is_own_density(latents: Sequence[Latent], plate: str, at_pairs: AtPairs) -> bool:
    """Whether ``at_pairs`` gives some z_i at x_i the density with which they were drawn.

    Reads values, and therefore waits for the device.
    """
    pairs = _Pairs.of(latents, plate)
    rows = range(min(2, len(pairs[0].samples)))
    found = at_pairs({pair.name: pair.at(rows) for pair in pairs})
    again = (pair(found[pair.name], rows).sum(-1)[rows, rows] for pair in pairs)
    return all(
        torch.allclose(log_q, pair.own()[: len(rows)], rtol=1e-4, atol=1e-4)
        for log_q, pair in zip(again, pairs, strict=True)
    )


def _aggregate(
    pairs: list["_Pairs"], rows: range, weights: Tensor, at_pairs: AtPairs | None
) -> tuple[Tensor, Tensor | None]:
    """log q(z_i) and sum_d log q(z_id) for some rows i: (rows, particles) each."""
    joint, by_dim = weights.unsqueeze(-1), weights.new_zeros(())
    if at_pairs is not None:
        found = at_pairs({pair.name: pair.at(rows) for pair in pairs})
        joint = sum((pair(found[pair.name], rows).sum(-1) for pair in pairs), joint)
        return _log_sum_exp(joint), None
    for pair in pairs:
        each = None if pair.marginals is None else pair(pair.marginals, rows)
        if each is None:
            by_dim = None
        elif by_dim is not None:
            by_dim = by_dim + _log_sum_exp(each + weights[..., None, None]).sum(-1)
        q = each if each is not None and pair.is_factorised else pair(pair.q, rows)
        joint = joint + q.sum(-1)
    return _log_sum_exp(joint), by_dim


def _log_sum_exp(e: Tensor) -> Tensor:
    """torch.logsumexp over dim 1, without the exponentials that underflow: they are slow."""
    top = e.detach().amax(1, keepdim=True).clamp(min=torch.finfo(e.dtype).min)
    return (e - top).clamp(min=-80.0).exp().sum(1).log() + top.squeeze(1)


class _Pairs:
    """The samples of one latent, paired with the posteriors of all data of the batch.

    Args:
        nesting: how many dims, from the right, belong to plates, particles excluded.

    Attributes:
        samples: z with the data leading, (B, particles or 1, ..., event).
    """

    def __init__(self, latent: Latent, plate: str, nesting: int) -> None:
        q, num_event = latent.q, len(latent.q.event_shape)
        self.name, self.q = latent.name, q
        self.marginals, self.is_factorised = marginals(q), is_factorised(q)
        shape = torch.broadcast_shapes(latent.value.shape, q.batch_shape + q.event_shape)
        self._value = latent.value.expand(shape)
        dims = {p.name: p.dim - num_event for p in latent.plates}
        if PARTICLES not in dims:
            dims[PARTICLES] = -1 - nesting - num_event
            missing = -dims[PARTICLES] - self._value.dim()
            self._value = self._value[(None,) * missing]
        self._data, self._particles = dims[plate], dims[PARTICLES]
        self.samples = self._value.movedim(self._data, 0)

    @classmethod
    def of(cls, latents: Sequence[Latent], plate: str) -> list["_Pairs"]:
        """The pairs of several latents, with their particles along the same dim."""
        nesting = max(-p.dim for z in latents for p in z.plates if p.name != PARTICLES)
        return [cls(latent, plate, nesting) for latent in latents]

    def own(self) -> Tensor:
        """log q(z_i | x_i): (B, particles)."""
        return self._log_prob(self.q, self._value, data=0).sum(-1)

    def at(self, rows: range) -> Tensor:
        """z_i for some rows i, in the place of every z_j: (rows, *shape of the sample)."""
        z = self.samples[rows.start : rows.stop].unsqueeze(self._data)
        return z.expand(len(z), *self._value.shape)

    def __call__(self, d: Distribution, rows: range) -> Tensor:
        """log d(z_i | x_j) for some rows i: (rows, B, particles, dimensions)."""
        z = self.samples[rows.start : rows.stop]
        return self._log_prob(d, z.unsqueeze(self._data), data=1)

    def _log_prob(self, d: Distribution, z: Tensor, data: int) -> Tensor:
        """log d(z) with the data at dim ``data``, the particles next, then all other dims as one.

        Raises:
            ValueError: if it lacks the dims of the plates, and would not broadcast.
        """
        num_event = len(d.event_shape)
        log_prob = d.log_prob(z)
        shape = z.shape[:data] + self._value.shape[: self._value.dim() - num_event]
        if log_prob.shape != shape:
            raise ValueError(
                f"log_prob of {type(d).__name__} has shape {tuple(log_prob.shape)} for values of "
                f"shape {tuple(z.shape)}, but should have shape {tuple(shape)}: use a distribution "
                "that broadcasts"
            )
        dims = self._data + num_event, self._particles + num_event
        return log_prob.movedim(dims, (data, data + 1)).reshape(
            *shape[:data], self._value.shape[self._data], self._value.shape[self._particles], -1
        )
