"""A particle filter's bound on the evidence of sequences."""

from collections.abc import Iterator
from typing import Unpack, cast, get_args

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyproelbo._distributions.closed_form import is_same
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.terms import Terms
from pyproelbo._terms.traces import Program, Site, Traces
from pyproelbo.elbo.base import TermsELBO
from pyproelbo.elbo.options import KLOptions
from pyproelbo.elbo.smc import Beliefs, Gradient, ParticleFilter, particle_filter
from pyproelbo.sequences import Emission, SequenceDistribution


class ParticleFilterELBO(TermsELBO):
    r"""L = E[log Z], where Z is a particle filter's estimate of p(x_0, ..., x_{T-1}).

    K particles are drawn from the guide step by step, weighted, and resampled where their effective
    sample size falls below a fraction of K. Z is unbiased, and L therefore bounds the evidence from
    below; L rises with K, where the ELBO's variance grows with T. With one particle it is the ELBO;
    without resampling, the importance-weighted bound (IWAE). Known as FIVO (Maddison et al. 2017,
    "Filtering Variational Objectives", eq. 4), AESMC (Le et al. 2018) and VSMC (Naesseth et al.
    2018); the objective of deep variational reinforcement learning (Igl et al. 2018). There the
    gradient leaves out the choice of ancestors; here that choice is called "biased":

    - "biased" is not the gradient of log p(x), and does not approach it with more particles: the
      effect of parameters on the choice of ancestors is lost.
    - "unbiased" starts resampled particles with w / w.detach(), w their ancestors' normalised
      weights: values are the same, and the gradient of Z has the mean grad p(x). The gradient of
      log Z therefore tends to grad log p(x), with a bias that falls as 1 / K (Scibior & Wood 2021,
      "Differentiable Particle Filtering without Modifying the Forward Pass"). It is not the
      gradient of L itself: as p(x) does not depend on the guide, the guide's gradient tends to 0 as
      K grows, and noise is left.

    The price of "unbiased" is variance, which rises with T as few ancestors of the first steps are
    left. For an LGSSM in the plane with a fitted filter, one parameter's gradient was -5.78 at T =
    20, K = 128; "biased" found -1.65 (standard error 0.15), "unbiased" -6.26 (0.18), with 1.3 times
    the variance over all parameters of the model, and 11 times at T = 100.

    The programs have one latent site, a sequence (:mod:`pyproelbo.sequences`), and data whose
    distributions are ``Emission`` of it. ``last_terms`` has log Z of each sequence
    as ``log_evidence``, and no other terms; its ``elbo`` is their sum.

    Args:
        particles: K, for each sequence.
        resample_below: resample where the effective sample size is less than this fraction of K:
            from 0 (never) to 1.
        gradient: "biased" or "unbiased", as above.
        **kwargs: as in :class:`TermsELBO`, without ``num_particles``.

    Raises:
        ValueError: at the first evaluation, for other latents or data, for steps that cannot be
            reparameterised when a gradient is asked for, and for masks or scales that differ
            between sites.
    """

    additive = True

    def __init__(
        self,
        particles: int = 16,
        resample_below: float = 0.5,
        gradient: Gradient = "biased",
        **kwargs: Unpack[KLOptions],
    ) -> None:
        if not isinstance(particles, int) or particles < 1:
            raise ValueError(f"particles should be a positive whole number, got {particles!r}")
        if not 0 <= resample_below <= 1:
            raise ValueError(f"resample_below should be from 0 to 1, got {resample_below}")
        if gradient not in get_args(Gradient):
            raise ValueError(f"gradient should be one of {get_args(Gradient)}, got {gradient!r}")
        if "num_particles" in kwargs:
            raise ValueError("num_particles is called particles here: they are not independent")
        super().__init__(**kwargs)
        self.particles, self.resample_below = particles, resample_below
        self.gradient: Gradient = gradient

    def objective(self, terms: Terms) -> Tensor:
        """The sum of log Z over all sequences, mean over runs of the filter."""
        return terms.mean(terms.log_evidence.values())

    def filter(
        self, model: Program, guide: Program, *args: object, **kwargs: object
    ) -> ParticleFilter:
        """One run of the filter, without a graph and without counting a step."""
        with torch.no_grad():
            return self._filter(model, guide, args, kwargs)[0]

    def beliefs(self, model: Program, guide: Program, *args: object, **kwargs: object) -> Beliefs:
        """The beliefs about z_t at every time t: the weighted particles of one run of the filter.

        In a partially observed decision process this is the belief on which a policy acts: what is
        known about the state from the observations and actions so far (Igl et al. 2018). All
        particles are kept, T K numbers for each dimension of each sequence.

        >>> import torch
        >>> from pyproelbo.guides.lgssm import ExactFilter
        >>> from pyproelbo.models.lgssm import LGSSM
        >>> model = LGSSM(num_latents=2, num_features=3, num_inputs=1)
        >>> actions = torch.randn(5, 7, 1)
        >>> x = model(inputs=actions).detach()
        >>> filtered = ParticleFilterELBO(100)
        >>> z, weights = filtered.beliefs(model, ExactFilter(model), x, inputs=actions)
        >>> (weights.unsqueeze(-1) * z).sum(1).shape  # its means: 7 steps of 5 sequences
        torch.Size([7, 5, 2])

        Raises:
            ValueError: as any evaluation, for programs other than those described above.
        """
        with torch.no_grad():
            found = self._filter(model, guide, args, kwargs, keep=True)[0].beliefs
        assert found is not None
        return found

    def _filter(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, keep: bool = False
    ) -> tuple[ParticleFilter, str, float | Tensor]:
        """The filter's result, the latent's name, and the scale of the plates."""
        traces = _structure(model, guide, args, kwargs)
        q, p, data = _sites(traces)
        if torch.is_grad_enabled() and not q["fn"].has_rsample:
            raise ValueError(
                f"the steps of {q['name']!r} cannot be reparameterised, and the bound of a "
                "particle filter has no gradient here: use SequentialELBO, or only evaluate"
            )
        pairs = [(cast(Emission, site["fn"]), site["value"]) for site in data]
        of_q, of_p = (cast(SequenceDistribution, site["fn"]) for site in (q, p))
        result = particle_filter(
            of_q, of_p, pairs, self.particles, self.resample_below, self.gradient, keep
        )
        return result, q["name"], q["scale"]

    def _particles(
        self, model: Program, guide: Program, args: tuple, kwargs: dict
    ) -> Iterator[Terms]:
        for _ in range(self.num_particles):
            result, name, scale = self._filter(model, guide, args, kwargs)
            yield Terms(
                log_likelihood={},
                log_prior={},
                log_q={},
                kl={},
                factors={},
                log_evidence={name: result.log_evidence * scale},
            )


class _Unsampled(Messenger):
    """Programs run to find their distributions; sequences are not drawn."""

    def _pyro_sample(self, msg: Site) -> None:
        fn = msg["fn"]
        if isinstance(fn, SequenceDistribution) and msg["value"] is None:
            msg["value"], msg["done"] = fn.placeholder(), True


def _structure(model: Program, guide: Program, args: tuple, kwargs: dict) -> Traces:
    with _Unsampled():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    return Traces(poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace, 0, 1)


def _sites(traces: Traces) -> tuple[Site, Site, list[Site]]:
    """The latent in the guide and in the model, and the data.

    Raises:
        ValueError: where a particle filter cannot take them.
    """
    sites = Sites.of(traces)
    names = [*sites.guide, *sites.factors]
    latents = [name for name in names if name in sites.latents]
    if len(names) != 1 or len(latents) != 1:
        raise ValueError(
            f"a particle filter takes one latent site, a sequence, and no factors; got {names}: "
            "put what belongs to one step into one vector"
        )
    q, p = sites.guide[latents[0]], sites.latents[latents[0]]
    for site in (q, p):
        if not isinstance(site["fn"], SequenceDistribution):
            raise ValueError(
                f"site {site['name']!r} should be a whole sequence in model and guide, such as "
                f"pyproelbo.sequences.MarkovChain, got {type(site['fn']).__name__}"
            )
    data = list(sites.data.values())
    for site in data:
        if not isinstance(site["fn"], Emission) or site["fn"].z is not q["value"]:
            raise ValueError(
                f"site {site['name']!r} should have the distribution Emission(emit, "
                f"{q['name']}): a particle filter needs its distribution at one step for any z"
            )
    for site in (p, *data):
        if site["plates"] != q["plates"] or not is_same(site["scale"], q["scale"]):
            raise ValueError(
                f"site {site['name']!r} should have the plates and the scale of {q['name']!r} in "
                "the guide: the evidence is a number for each whole sequence"
            )
    for site in (q, p, *data):
        if site["mask"] is not None and site["mask"] is not True:
            raise ValueError(
                f"site {site['name']!r} is masked from outside: give the mask to the sequence"
            )
    return q, p, data
