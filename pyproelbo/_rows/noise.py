"""Sample sites that draw by the row and by the number of the draw, and by nothing else."""

from pyro.poutine.messenger import Messenger

from pyproelbo._backend.pyro_private import site_is_subsample
from pyproelbo._backend.sites import Site
from pyproelbo._distributions.row_noise import Noise, draw
from pyproelbo._distributions.sobol import Points
from pyproelbo._terms.traces import PARTICLES


class RowNoise(Messenger):
    """Within this context sites draw by row: from the seed, the site's name, the number of the
    draw and the number of the row in the data, and from nothing else.

    So the draws do not depend on how the rows are batched, on how many draws are made at once, on
    the device, or on torch's random state, which stays as it is. A site outside of the plate has
    one value for all rows. Noise is vectorised for normal distributions, for those with an
    inverse distribution function, categorical ones, gamma, beta, Dirichlet, Student, Poisson and
    binomial ones, sequences of steps of these, and mixtures and transforms of these; others draw
    row by row, as do classes that override how they draw. A distribution of which single rows
    cannot be had (it has parameters that ``arg_constraints`` does not tell) draws for its whole
    batch.

    Args:
        plate: the name of the plate over the rows; None where a draw is one of all data.
        start: the number of the first row at hand.
        draws: the numbers of the draws: several where they are vectorised particles.
        key: whole numbers, not negative: the seed, and what tells one use of it from others.
        points: the Sobol points that draws are made of, in which sites have dims in the order in
            which they are first drawn; by default draws are independent.
    """

    def __init__(
        self,
        plate: str | None,
        start: int,
        draws: range,
        *key: int,
        points: Points | None = None,
    ) -> None:
        super().__init__()
        self.plate, self.start, self.draws, self.key = plate, start, draws, key
        self.points = points

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        dims = {f.name: f.dim for f in msg["cond_indep_stack"] if f.vectorized}
        plate = None if self.plate is None else dims.get(self.plate)
        noise = Noise.of_site(
            msg["name"], self.key, self.draws, self.start, dims.get(PARTICLES), plate, self.points
        )
        msg["value"] = draw(msg["fn"], noise)
