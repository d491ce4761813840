"""A module within another that is no part of it: of nn.Module, of copies and of pickles."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyproelbo as pe
from pyproelbo._backend.unregistered import Unregistered
from pyproelbo.guides import ppca, sequences, vrnn
from pyproelbo.guides.vae import Diagonal
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA
from pyproelbo.models.vrnn import VRNN


class Holder(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = Unregistered(held)


def copies(x):
    return copy.deepcopy(x), pickle.loads(pickle.dumps(x))


def test_a_module_is_not_registered():
    layer = nn.Linear(2, 3)
    holder = Holder(layer)
    assert holder.held.module is layer and not isinstance(holder.held, nn.Module)
    assert not holder.state_dict() and list(holder.modules()) == [holder]
    holder.double()
    assert layer.weight.dtype == torch.get_default_dtype()


def test_copies_and_pickles_have_a_copy_and_in_one_call_the_same():
    layer = nn.Linear(2, 3)
    for twin in copies(Holder(layer)):
        assert twin.held.module is not layer
        assert twin.held.module.weight.equal(layer.weight)
    for twin, holder in copies((layer, Holder(layer))):
        assert holder.held.module is twin is not layer


def test_of_a_bound_method_it_is_the_module_that_is_copied():
    layer = nn.Linear(2, 3)
    for twin, holder in copies((layer, Holder(layer.forward))):
        assert holder.held.module.__self__ is twin is not layer


def encoded(make):
    guide = Diagonal(2, 3)
    return guide, make(guide.posterior)


HIDDEN = {
    "PPCA's exact guide": lambda: (m := PPCA(2, 3), ppca.Exact(m)),
    "the LGSSM's": lambda: (m := LGSSM(2, 3), sequences.Exact(m)),
    "a VRNN's": lambda: (m := VRNN(2, 3, 4), vrnn.Filtering(m, 4)),
    "VampPrior": lambda: encoded(lambda f: pe.VampPrior(f, 4, pe.priors.RandomInputs((3,)))),
    "aggregate": lambda: encoded(lambda f: pe.priors.AggregatePosterior(f, torch.zeros(4, 3))),
}


def hidden(holder):
    held = holder._model if hasattr(holder, "_model") else holder._encoder
    return getattr(held.module, "__self__", held.module)


@pytest.mark.parametrize("make", HIDDEN.values(), ids=HIDDEN)
def test_what_the_library_hides(make):
    module, holder = make()
    own = {id(parameter) for parameter in holder.parameters()}
    assert hidden(holder) is module
    assert not own & {id(parameter) for parameter in module.parameters()}
    assert holder.state_dict().keys() >= dict(holder.named_parameters()).keys()
    for twin in copies(holder):
        assert hidden(twin) is not module
        assert dict(hidden(twin).state_dict()).keys() == module.state_dict().keys()
    for twin, of_twin in copies((module, holder)):
        assert hidden(of_twin) is twin is not module
