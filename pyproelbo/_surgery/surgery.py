r"""ELBO surgery: the parts of the KL, on the whole data set.

Hoffman & Johnson (2016), "ELBO surgery: yet another way to carve up the variational evidence
lower bound", split the average KL at the aggregate posterior q(z) = (1/N) sum_n q(z | x_n):

    (1/N) sum_n KL(q(z | x_n) || p(z)) = I(n; z) + KL(q(z) || p(z)),

the mutual information between a datum's index and its code, and the marginal KL. Where the prior's
dimensions are independent, Chen et al. (2018) split the latter in turn:

    KL(q(z) || p(z)) = KL(q(z) || prod_k q(z_k)) + sum_k KL(q(z_k) || p(z_k)),

the total correlation and the dimension-wise KL.

A hierarchical guide draws z1 given another latent z2, and q(z1 | x) is not known. The surgery is
possible for both jointly, for z2, and for z1 given z2:

    (1/N) sum_n E KL(q(z1 | x_n, z2) || p(z1 | z2))
        = I(n; z1 | z2) + E KL(q(z1 | z2) || p(z1 | z2)),    q(z1 | z2) = q(z1, z2) / q(z2).

By the chain rule each joint part is the sum over the two levels, for example I(n; z1, z2) = I(n;
z2) + I(n; z1 | z2).
"""

from collections.abc import Sequence
from concurrent.futures import Executor

from pyproelbo._rows.batches import Arguments, ReportData
from pyproelbo._rows.evaluating import evaluating
from pyproelbo._rows.passes import bar, by_part, until
from pyproelbo._rows.whole_reports import whole_reports
from pyproelbo._surgery.at_draws import at_all, at_some
from pyproelbo._surgery.drawing import Options, Parts, checked, drawing
from pyproelbo._surgery.held_globals import Held
from pyproelbo._surgery.over_globals import at_globals, is_nested, mean_of
from pyproelbo._surgery.points import num_points
from pyproelbo._surgery.result import Surgery
from pyproelbo._terms.traces import Program


def surgery(
    model: Program,
    guide: Program,
    data: ReportData,
    *,
    arguments: Arguments | None = None,
    site: str | Sequence[str] | None = None,
    given: str | Sequence[str] | None = None,
    plate: str | None = None,
    num_samples: int = 1,
    num_nested: int = 10,
    max_pairs: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
) -> Surgery:
    """Split the ELBO of a whole data set at the aggregate posterior (see :class:`Surgery`).

    The sum over the data in q(z) is exact; only z is sampled, with ``num_samples`` draws for each
    datum. log q(z) of each dimension is computed to 1e-5 nats where posteriors are independent and
    normal. Where the KL of the draws is known in closed form, it corrects the estimates (as a
    control variate). Time grows with N^2: seconds for N = 10,000, minutes for 60,000. A guide that
    draws one of the latents given another runs on each of the N^2 pairs of data: with nets of 300
    units this takes about a minute for N = 1,000. If more than ten minutes are expected, a
    :class:`~pyproelbo.LongRunWarning` is given after the first pairs.

    ``max_pairs`` is for more data. q(z) remains a sum over all N, and its logarithm unbiased, but
    it is evaluated only at the draws of m = max_pairs / (S N) data, one at random from each of m
    strata in their order. With y = log q(z | x_n) - log q(z), and covariates C known at all draws
    (log q(z | x_n), the KL, a Normal fitted to the codes, the marginals of normal posteriors), the
    mutual information is

        I(n; z) = mean_m(y) + (mean_N(C) - mean_m(C)) . b,    b by least squares of y on C,

    with the variance (1 - m / N) s^2 / m in addition to that of N draws, where s^2 is the variance
    of the residuals. What does not need q(z) uses all data, as do marginals of independent normal
    posteriors; all identities remain exact. Memory: N draws of K latents, for any m (Cochran 1977,
    "Sampling Techniques", chapters 7 and 12).

    Modules are evaluated in eval mode; their mode, Pyro's parameter store and random number
    generators are restored. Nothing finished is lost: Ctrl-C returns the surgery of the first data,
    with ``max_pairs`` the one with fewer points, or the one without the marginals, which are
    computed last, with an :class:`~pyproelbo.UnfinishedWarning`; an error has it as its attribute
    ``surgery``. If all draws can be made by row (see :mod:`pyproelbo._rows.noise`), the result
    depends on the seed, but not on ``batch_size`` or torch's generators.

    Args:
        model: a Pyro program, called as ``model(x)``; its latents are drawn for every datum
            under one ``pyro.plate``.
        guide: its guide, called likewise. q(z | x) may be of any kind whose density can be
            evaluated; independent normal ones are fast.
        data, arguments: as in :func:`evidence`. A ``DataLoader`` is iterated over once, and its
            batches are kept until the end, since another pass may have other rows.
        site: the latent, or the latents jointly, of the surgery; None for all.
        given: a latent, or several, to condition on: for z1 of a guide that draws z2 and then z1
            given z2, "z2". Their KL is in ``other_kl``.
        plate: the name of the plate over the data, where others have the size of a batch.
        num_samples: S, the number of draws of the guide for each datum.
        num_nested: where ``site`` names latents of single data, and the guide also draws global
            ones, the number of draws of these over which the surgery is a mean. Each draw takes a
            full surgery; their KL is in ``global_kl``.
        max_pairs: the largest number of pairs of a draw and a posterior to sum, over all
            ``num_nested`` surgeries; None for all. With a single draw there are up to a quarter
            more, for its noise.
        batch_size: the number of rows in one call of model and guide; a loader has its own.
        seed: of the draws.
        executor: as in :func:`evidence`: its workers make the draws, batch by batch, and then sum
            q(z), each over some of the posteriors at all draws.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        ValueError: for a global latent that ``site`` does not leave out; for latents whose q(z |
            x_n) cannot be evaluated or that have no common prior (conditional on others that are
            neither chosen nor given, enumerated, masked or scaled); for terms that are not finite;
            for data without rows; for ``max_pairs`` too small for the draws of 100 data.

    >>> import torch
    >>> from pyproelbo.models.ppca import PPCA
    >>> from pyproelbo.guides.ppca import Exact
    >>> x = torch.randn(200, 5)
    >>> ppca = PPCA.optimum(x, num_latents=2)
    >>> result = surgery(ppca, Exact(ppca), x)
    >>> result.mutual_information <= result.log_n
    True
    >>> surgery(ppca, Exact(ppca), x, max_pairs=100 * 200).num_points
    100
    """
    options = Options(
        arguments, site, given, plate, num_samples, batch_size, max_pairs, seed, executor, progress
    )
    checked(options, num_nested)
    if is_nested(model, guide, data, options):
        return _nested(model, guide, data, num_nested, options)
    return _local(model, guide, data, options)


def _nested(
    model: Program, guide: Program, data: ReportData, num: int, options: Options
) -> Surgery:
    """The mean of surgeries at ``num`` draws of the global latents."""
    programs, each = at_globals(model, guide, data, num, options)

    def added(found: _Found | None, drawn: tuple[int, Held]) -> _Found:
        s, at = drawn
        with whole_reports():
            one = _local(
                at.model, at.guide, data, each._replace(seed=options.seed + s), 0 if s else num
            )
        return [*(found or []), (one, at.kl)]

    return by_part(
        bar(enumerate(programs), "global latents", options.progress, num),
        added,
        lambda found, _: mean_of(found),
        "surgery",
        lambda drawn: f"{drawn[0] + 1} draws of the global latents",
    )


_Found = list[tuple[Surgery, float]]


def _local(
    model: Program, guide: Program, data: ReportData, options: Options, num_runs: int = 1
) -> Surgery:
    """The surgery of latents of single data.

    Args:
        num_runs: the number of surgeries that take as long, including this one; 0 if that was
            reported.
    """
    progress = options.progress
    with evaluating(model, guide, seed=options.seed):
        begun = drawing(model, guide, data, options)

        def taken_apart(parts: Parts, _: bool) -> Surgery:
            whole = begun.drawn(parts)
            num = num_points(options.max_pairs, whole.num_data, options.num_samples)
            if num < whole.num_data:
                return at_some(whole, num, options.seed, progress)
            return at_all(whole, num_runs, progress, begun.total)

        return by_part(
            bar(begun.parts, "draws", progress, begun.total),
            lambda parts, done: [*(parts or []), done[1]],
            taken_apart,
            "surgery",
            until,
        )
