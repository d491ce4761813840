"""The keywords that objectives share, as types: for completion and type checkers."""

from collections.abc import Mapping
from typing import TypedDict

from pyproelbo._terms.collect import KL
from pyproelbo.capture import Capture
from pyproelbo.elbo.baselines import Baselines


class PyroOptions(TypedDict, total=False):
    """The keywords of Pyro's ``ELBO``, except ``num_particles``.

    Keys:
        max_plate_nesting: how many dims, from the right, the programs' plates take; by default it
            is found at the first call.
        max_iarange_nesting: its old name.
        vectorize_particles: whether particles are drawn at once.
        retain_graph: whether a backward pass keeps the graph.
        strict_enumeration_warning, ignore_jit_warnings, jit_options, tail_adaptive_beta: they do
            nothing here, with a warning where they differ from the default.
    """

    max_plate_nesting: float
    max_iarange_nesting: int | None
    vectorize_particles: bool
    strict_enumeration_warning: bool
    ignore_jit_warnings: bool
    jit_options: Mapping[str, object] | None
    retain_graph: bool | None
    tail_adaptive_beta: float


class ParticleOptions(PyroOptions, total=False):
    """All keywords of Pyro's ``ELBO``.

    Keys:
        num_particles: the number of draws of the guide over which a step takes the mean.
    """

    num_particles: int


class Options(ParticleOptions, total=False):
    """The keywords of Pyro's ``ELBO``, and two of our own.

    Keys:
        baselines: "leave_one_out" or "none".
        compile: whether, and how, training steps are captured in a graph and compiled.
    """

    baselines: Baselines
    compile: bool | Capture | Mapping[str, object]


class KLOptions(Options, total=False):
    """The keywords of objectives that have no ``kl`` of their own.

    Keys:
        kl: "auto", "analytic" or "sampled".
    """

    kl: KL


class DrawsOptions(PyroOptions, total=False):
    """The keywords of objectives that have their own ``num_particles``, and no ``kl``.

    Keys:
        compile: whether, and how, training steps are captured in a graph and compiled.
    """

    compile: bool | Capture | Mapping[str, object]
