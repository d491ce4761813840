"""How large log p(x) is, beside its bound."""

from pyproelbo.evidence.annealed import Annealed as Annealed
from pyproelbo.evidence.decompositions import Decompositions as Decompositions
from pyproelbo.evidence.decompositions import decompositions as decompositions
from pyproelbo.evidence.gaps import InferenceGap as InferenceGap
from pyproelbo.evidence.gaps import inference_gap as inference_gap
from pyproelbo.evidence.importance import Evidence as Evidence
from pyproelbo.evidence.importance import UnfinishedWarning as UnfinishedWarning
from pyproelbo.evidence.importance import evidence as evidence
from pyproelbo.evidence.psis import Psis as Psis
from pyproelbo.evidence.psis import pareto_smooth as pareto_smooth
from pyproelbo.evidence.psis import psis as psis
