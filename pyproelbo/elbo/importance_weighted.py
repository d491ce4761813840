"""The importance-weighted bound."""

from typing import Unpack

from pyproelbo.elbo.options import DrawsOptions
from pyproelbo.elbo.renyi import Gradient, RenyiELBO


class ImportanceWeightedELBO(RenyiELBO):
    r"""L = sum_n N/B log (1/K) sum_k w_nk, w_nk = p(x_n, z_nk) / q(z_nk | x_n), z_nk ~ q(z | x_n).

    A bound on log p(x) that rises with K, from the ELBO at K = 1 to log p(x) itself (Burda, Grosse
    & Salakhutdinov 2016, "Importance Weighted Autoencoders", eq. 8). It is a bound for each datum:
    where one plate encloses all sites, each row has its own K weights, and the scale N / B of a
    plate that subsamples is outside the logarithm. Where no plate encloses all (global latents), it
    is one bound for all data together, which cannot be subsampled.

    With normalised weights v_k = w_k / sum_j w_j, the gradient for parameters theta of p is always
    sum_k v_k d log p(x, z_k) / d theta. For parameters phi of q, ``gradient`` is one of

    - "standard": the gradient of the bound at the draws. As K grows its mean falls by 1 / K and its
      standard deviation only by 1 / sqrt(K) (Rainforth et al. 2018, "Tighter Variational Bounds
      are Not Necessarily Better"). Draws without a gradient (discrete ones) contribute their score
      times what they add to the bound (VIMCO: Mnih & Rezende 2016, "Variational Inference for Monte
      Carlo Objectives").
    - "doubly_reparameterised": sum_k v_k^2 (d log w_k / dz_k) (dz_k / d phi), with the same mean
      (Tucker et al. 2019, "Doubly Reparameterized Gradient Estimators for Monte Carlo
      Objectives").
    - "path": sum_k v_k (d log w_k / dz_k) (dz_k / d phi) (Roeder, Wu & Duvenaud 2017, "Sticking the
      Landing"). At K = 1 it has the mean of the others. For K > 1 its mean is the gradient of the
      bound plus that of wake-sleep (:class:`~pyproelbo.ReweightedWakeSleepELBO`).

    The latter two need draws that are differentiable functions of phi. Where q is the posterior
    they are zero at every draw, while "standard" is noise. Near it they have less variance: on PPCA
    (``tests/benchmarks``), summed over phi, 858, 268 and 77 at K = 1, 5, 50 ("doubly"), against
    31,900, 10,200 and 1,880 ("standard"). Far from it they may have more.

    >>> objective = ImportanceWeightedELBO(16, gradient="doubly_reparameterised")

    Args:
        num_particles: K; ``vectorize_particles=True`` draws them at once.
        gradient: for q's parameters, as above.
        plate: the plate over the data, to be named where all sites share several.
        **kwargs: as in :class:`TermsELBO`, without ``kl``.

    Raises:
        ValueError: for another ``gradient``. At the first evaluation, for a site outside ``plate``,
            for densities scaled by anything other than the plate over the data, for enumeration by
            the guide, and for a draw that has no gradient where one is needed.
    """

    def __init__(
        self,
        num_particles: int,
        gradient: Gradient = "standard",
        plate: str | None = None,
        **kwargs: Unpack[DrawsOptions],
    ) -> None:
        super().__init__(0.0, num_particles, gradient, plate, **kwargs)
