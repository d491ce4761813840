"""Priors that are learned: ``pyro.sample("z", prior())``.

A prior is an ``nn.Module`` whose call returns the distribution of z, with batch shape (), and can
replace any other. From independent of the data to fully determined by them:
:class:`StandardNormal`; :class:`GaussianMixture`; :class:`VampPrior`, a mixture of posteriors of
learned inputs; :class:`AggregatePosterior`, the mixture of the posteriors of all data.
"""

from pyproelbo.priors.aggregate_posterior import AggregatePosterior as AggregatePosterior
from pyproelbo.priors.gaussian_mixture import GaussianMixture as GaussianMixture
from pyproelbo.priors.inputs import MomentsOf as MomentsOf
from pyproelbo.priors.inputs import RandomInputs as RandomInputs
from pyproelbo.priors.inputs import RowsOf as RowsOf
from pyproelbo.priors.mixture import Mixture as Mixture
from pyproelbo.priors.mixture import MixturePrior as MixturePrior
from pyproelbo.priors.standard_normal import StandardNormal as StandardNormal
from pyproelbo.priors.usage import Usage as Usage
from pyproelbo.priors.usage import usage as usage
from pyproelbo.priors.vamp import VampPrior as VampPrior
