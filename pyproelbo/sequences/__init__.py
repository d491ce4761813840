"""Distributions of whole sequences, written as functions of one step."""

from pyproelbo._backend.opaque import opaque as opaque
from pyproelbo.sequences import loops as loops
from pyproelbo.sequences.base import SequenceDistribution as SequenceDistribution
from pyproelbo.sequences.base import lengths_mask as lengths_mask
from pyproelbo.sequences.chains import Autoregressive as Autoregressive
from pyproelbo.sequences.chains import MarkovChain as MarkovChain
from pyproelbo.sequences.emission import Emission as Emission
from pyproelbo.sequences.independent import IndependentSteps as IndependentSteps
from pyproelbo.sequences.linear import LinearGaussianChain as LinearGaussianChain
from pyproelbo.sequences.unrolled import unrolled as unrolled
