"""The prior of z from a word: standard, mixture:50 or vamp:50."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyproelbo.cli.standardising import ScaledGuide, Standardised
from pyproelbo.priors import GaussianMixture, RandomInputs, RowsOf, StandardNormal, VampPrior

STANDARD, MIXTURE, VAMP = "standard", "mixture", "vamp"
MIXTURES = (MIXTURE, VAMP)
MOST = 2**31 - 1  # components


class PriorChoice(NamedTuple):
    """A prior, and the number of its components; 1 for the standard normal."""

    name: str
    num_components: int = 1

    @staticmethod
    def parse(word: str) -> "PriorChoice":
        """Read --prior; a ValueError if it is invalid."""
        if word == STANDARD:
            return PriorChoice(word)
        name, _, num = word.partition(":")
        if name not in MIXTURES or not num.isdecimal() or int(num) < 1:
            raise ValueError(
                f"--prior should be {STANDARD}, or {' or '.join(MIXTURES)} with a number of "
                f"components, as in vamp:50, got {word!r}"
            )
        if int(num) > MOST:
            raise ValueError(f"--prior should have at most {MOST:,} components, got {word!r}")
        return PriorChoice(name, int(num))

    def make(
        self, guide: nn.Module, latent: int, size: int, images: bool, rows: Tensor | None
    ) -> nn.Module:
        """The prior for a guide.

        Args:
            size: of an input, D.
            images: whether inputs are within [0, 1].
            rows: from which pseudo-inputs start; None where their values will be loaded.

        Raises:
            ValueError: for more pseudo-inputs than rows.
        """
        if self.name == STANDARD:
            return StandardNormal(latent)
        if self.name == MIXTURE:
            return GaussianMixture(self.num_components, latent)
        if rows is not None and self.num_components > len(rows):
            raise ValueError(
                f"--prior vamp:{self.num_components} has more components than the {len(rows)} "
                "rows to train on: take fewer"
            )
        init = RandomInputs((size,), 0.5, 0.0) if rows is None else RowsOf(rows)
        support = constraints.unit_interval if images else constraints.real
        if isinstance(guide, ScaledGuide):
            support = Standardised(guide)
        encoder: Callable[[Tensor], Distribution] = guide.posterior  # type: ignore[assignment]
        return VampPrior(encoder, self.num_components, init, constraint=support)
