"""Sample sites whose draws depend only on the row and the index of the draw."""

from pyro.poutine.messenger import Messenger

from pyproelbo._backend.pyro_private import site_is_subsample
from pyproelbo._backend.sites import Site
from pyproelbo._distributions.row_noise import Noise, Places, draw
from pyproelbo._distributions.sobol import Points
from pyproelbo._terms.traces import PARTICLES


class RowNoise(Messenger):
    """Within this context sites draw by row: from the seed, the site's name, the index of the
    draw and the index of the row in the data only.

    The draws therefore do not depend on how the rows are batched, on how many draws are made at
    once, on the device, or on torch's random state, which is unchanged. A site outside the plate
    has one value for all rows. Noise is vectorised for normal distributions, for those with an
    inverse distribution function, categorical ones, gamma, beta, Dirichlet, Student, Poisson and
    binomial ones, sequences of steps of these, and mixtures and transforms of these; others draw
    row by row, as do classes that override how they draw. A distribution whose single rows are not
    available (it has parameters that ``arg_constraints`` does not list) draws for its whole batch.

    Args:
        plate: the name of the plate over the rows; None where a draw is for all data.
        start: the index of the first row of the batch; or those of all its rows, where they do not
            follow each other.
        draws: the indices of the draws: several for vectorised particles.
        key: whole numbers, not negative: the seed, and what distinguishes its uses.
        points: the Sobol points that draws are made from, in which sites have dims in the order in
            which they are first drawn; by default draws are independent.
    """

    def __init__(
        self,
        plate: str | None,
        start: Places,
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
