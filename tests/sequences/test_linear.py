"""Linear chains, all steps at once, against the loop over their steps."""

import pyro.distributions as dist
import pytest
import torch
from helpers.oracles import rows

from pyproelbo._distributions.row_noise import Noise, draw
from pyproelbo.sequences import LinearGaussianChain, MarkovChain
from pyproelbo.sequences.linear import linear_scan, times

SIZES = [(1, 2, ()), (2, 3, (4,)), (7, 2, (3,)), (64, 3, (2, 5)), (101, 1, (2,))]
KINDS = ("constant", "by step", "by row")


def parts(num_steps, k, batch_shape, kind):
    """Initial distribution, matrices, offsets and scales."""
    shape = {"constant": (), "by step": (num_steps,), "by row": (*batch_shape, num_steps)}[kind]
    matrix = 0.8 * rows(*shape, k, k) / k**0.5
    scale_tril = (0.3 * rows(*shape, k, k)).tril(-1) + 0.5 * torch.eye(k)
    initial = dist.MultivariateNormal(rows(*batch_shape, k), scale_tril=2.0 * torch.eye(k))
    leaves = matrix, rows(*batch_shape, num_steps, k), scale_tril
    return initial, *(x.requires_grad_() for x in leaves)


def in_steps(initial, matrix, offsets, scale_tril, noise):
    """The sample, one step after the other."""
    num_steps = offsets.shape[-2]
    A, L = (
        x.expand(num_steps, *x.shape) if x.dim() == 2 else x.movedim(-3, 0)
        for x in (matrix, scale_tril)
    )
    z = [initial.loc + times(initial.scale_tril, noise[..., 0, :])]
    for t in range(1, num_steps):
        z.append(times(A[t], z[-1]) + offsets[..., t, :] + times(L[t], noise[..., t, :]))
    return torch.stack(z, -2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_steps, k, batch_shape", SIZES)
def test_a_sample_is_that_of_the_loop(num_steps, k, batch_shape, kind):
    initial, *leaves = parts(num_steps, k, batch_shape, kind)
    noise = rows(*batch_shape, num_steps, k)
    found = LinearGaussianChain(initial, *leaves).of_noise(noise)
    expected = in_steps(initial, *leaves, noise)
    torch.testing.assert_close(found, expected)
    weights = rows(*found.shape)
    if num_steps == 1:  # which knows nothing of these
        return
    for one, other in zip(*(grads(y, weights, leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def grads(y, weights, leaves):
    found = torch.autograd.grad((weights * y).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_is_that_of_the_chain_of_its_steps(kind):
    initial, matrix, offsets, scale_tril = parts(7, 2, (3,), kind)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    linear = LinearGaussianChain(initial, matrix, offsets, scale_tril, mask)
    wide = [x.expand(3, 7, 2, 2).flatten(-2) for x in (matrix, scale_tril)]

    def transition(z, u):
        b, A, L = u.split([2, 4, 4], -1)
        A, L = A.unflatten(-1, (2, 2)), L.unflatten(-1, (2, 2))
        return dist.MultivariateNormal(times(A, z) + b, scale_tril=L)

    chain = MarkovChain(initial, transition, inputs=torch.cat([offsets, *wide], -1), mask=mask)
    z = linear.rsample()
    torch.testing.assert_close(linear.log_prob(z), chain.log_prob(z))
    torch.testing.assert_close(linear.log_prob_by_time(z), chain.log_prob_by_time(z))
    larger = linear.expand((5, 3))
    assert larger.rsample().shape == (5, 3, 7, 2) == larger.shape()
    torch.testing.assert_close(larger.log_prob(z)[4], chain.log_prob(z))


def test_samples_have_the_moments_of_the_chain():
    """Means and covariances by the recursion; of 20,000 samples, within 5 standard errors."""
    num, (initial, A, b, L) = 20_000, parts(6, 2, (), "constant")
    with torch.no_grad():
        z = LinearGaussianChain(initial, A, b, L).sample((num,))
        mean, covariance = initial.loc, initial.covariance_matrix
        for t in range(6):
            if t > 0:
                mean, covariance = A @ mean + b[t], A @ covariance @ A.mT + L @ L.mT
            sd = covariance.diagonal().sqrt()
            assert ((z[:, t].mean(0) - mean).abs() < 5 * sd / num**0.5).all()
            error = ((sd[:, None] * sd) ** 2 + covariance**2).sqrt() / num**0.5
            assert ((torch.cov(z[:, t].mT) - covariance).abs() < 5 * error).all()


def test_draws_are_of_their_rows():
    initial, *leaves = parts(5, 2, (7,), "by row")
    noise = Noise.of_site("z", (3,), range(1), 0, None, -1)
    whole = draw(LinearGaussianChain(initial, *leaves), noise)
    part = dist.MultivariateNormal(initial.loc[3:5], scale_tril=initial.scale_tril[3:5])
    some = LinearGaussianChain(part, *(x[3:5] for x in leaves))
    torch.testing.assert_close(draw(some, noise._replace(start=3)), whole[3:5])


def test_a_thousand_steps_stay_exact():
    """An unstable matrix would overflow in the loop, too; a rotation does not."""
    turn = torch.linalg.matrix_exp(torch.tensor([[0.0, 0.1], [-0.1, 0.0]]))
    x = rows(4096, 2)
    y = [x[0]]
    for each in x[1:]:
        y.append(turn @ y[-1] + each)
    torch.testing.assert_close(linear_scan(turn, x), torch.stack(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"matrix": torch.eye(3)}, "matrix should have shape"),
        ({"scale_tril": torch.ones(4, 2, 2)}, "scale_tril should have shape"),
        ({"offsets": torch.zeros(5, 3)}, "offsets should have shape"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, "needs at least one step"),
        ({"offsets": torch.zeros(0, 2)}, "needs at least one step"),
    ],
)
def test_bad_input(changed, message):
    initial, matrix, offsets, scale_tril = parts(5, 2, (), "constant")
    given = {"matrix": matrix, "offsets": offsets, "scale_tril": scale_tril}
    with pytest.raises(ValueError, match=message):
        LinearGaussianChain(initial, **(given | changed))
