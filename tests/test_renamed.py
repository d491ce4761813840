"""Old names of arguments, attributes and members: they work, and warn at the user's line."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from pyproelbo._messages.renamed import renamed, renamed_attribute, renamed_members
from pyproelbo.guides import families, vae
from pyproelbo.guides.dmm import Smoothing
from pyproelbo.guides.ppca import Diagonal, Exact
from pyproelbo.models import base
from pyproelbo.models.lgssm import LGSSM
from pyproelbo.models.ppca import PPCA


@renamed(chunk="max_elements", n="num")
def report(x, max_elements=None, *, num=1):
    """What it does."""
    return x, max_elements, num


class Model:
    size = renamed_attribute("size", "dataset_size")

    @renamed(size="dataset_size")
    def __init__(self, dataset_size: int | None = None) -> None:
        self.dataset_size = dataset_size

    @classmethod
    @renamed(size="dataset_size")
    def of(cls, dataset_size):
        return cls(dataset_size)


class Sub(Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def one_warning(call):
    """What a call returns, and its message; the warning is at the line of the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    (warning,) = [w for w in caught if issubclass(w.category, DeprecationWarning)]
    assert warning.filename == __file__
    assert warning.lineno == call.__code__.co_firstlineno
    return result, str(warning.message)


def test_old_keywords_are_the_new_ones():
    result, message = one_warning(lambda: report(1, chunk=3))
    assert result == (1, 3, 1)
    assert message == "chunk= is deprecated: it is called max_elements="
    assert one_warning(lambda: Model(size=5))[0].dataset_size == 5
    assert one_warning(lambda: Model.of(size=5))[0].dataset_size == 5
    with pytest.warns(DeprecationWarning, match="^size= is deprecated: it is called dataset_size="):
        assert Sub(size=5).dataset_size == 5
    with pytest.warns(DeprecationWarning) as caught:
        assert report(1, n=2, chunk=3) == (1, 3, 2)
    assert len(caught) == 2


def test_new_names_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report(1, 2, num=3) == report(1, max_elements=2, num=3) == (1, 2, 3)
        assert Model(5).dataset_size == Model.of(dataset_size=5).dataset_size == 5


def test_the_function_looks_as_it_is_written():
    assert list(inspect.signature(report).parameters) == ["x", "max_elements", "num"]
    assert (report.__name__, report.__doc__) == ("report", "What it does.")
    assert report.__wrapped__(1) == report(1)
    assert pickle.loads(pickle.dumps(report)) is report


def test_a_value_is_given_once():
    with pytest.raises(TypeError, match="give only max_elements=: chunk= is its old name"):
        report(1, chunk=3, max_elements=3)
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(TypeError, match="multiple values for argument 'max_elements'"),
    ):
        report(1, 2, chunk=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        report(1, size=3)


def test_renames_of_nothing_are_refused():
    with pytest.raises(TypeError, match="no argument dataset_size"):
        renamed(size="dataset_size")(lambda num: num)
    with pytest.raises(TypeError, match="still has the argument size"):
        renamed(size="dataset_size")(lambda size, dataset_size: size)
    assert renamed(size="dataset_size")(lambda **kwargs: kwargs)(dataset_size=1)


def test_old_attributes_are_the_new_ones():
    model = Model(5)
    value, message = one_warning(lambda: model.size)
    assert value == 5 and message == "Model.size is deprecated: it is called Model.dataset_size"
    one_warning(lambda: setattr(model, "size", 7))
    assert vars(model) == {"dataset_size": 7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hasattr(Model.__new__(Model), "size")


def test_old_members_are_the_new_ones():
    get = renamed_members(__name__, Old="Model")
    assert one_warning(lambda: get("Old"))[0] is Model
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        get("Other")
    found, message = one_warning(lambda: base.Program)
    assert found is base.NamedModule
    assert message == "pyproelbo.models.base.Program is deprecated: it is called NamedModule"
    assert one_warning(lambda: base.data_plate)[0] is base.rows_plate
    assert one_warning(lambda: families.Family)[0] == families.GaussianFamily
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from pyproelbo.models.base import Nothing  # noqa: F401


def test_the_warning_is_at_the_line_that_imports():
    code = "import warnings\nfrom pyproelbo.models.base import Program"
    command = [sys.executable, "-W", "always::DeprecationWarning", "-c", code]
    stderr = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "<string>:2: DeprecationWarning: pyproelbo.models.base.Program is deprecated" in stderr


# --- the number of rows of the whole data, in models and guides --------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: PPCA(2, 3, size=9),
        lambda: PPCA.optimum(torch.randn(9, 3), 2, size=9),
        lambda: LGSSM(2, 3, size=9),
        lambda: Diagonal(2, 3, size=9),
        lambda: vae.FullCovariance(2, 3, size=9),
        lambda: Smoothing(2, 3, 4, size=9),
        lambda: base.rows_plate(3, size=9),
    ],
)
def test_size_is_dataset_size(make):
    program, message = one_warning(make)
    assert message == "size= is deprecated: it is called dataset_size="
    if isinstance(program, nn.Module):
        assert program.dataset_size == 9
        assert one_warning(lambda: program.size)[0] == 9
        one_warning(lambda: setattr(program, "size", 8))
        assert program.dataset_size == 8


class Whole(base.NamedModule):
    """A user's model of before, which sets and reads ``size``."""

    def __init__(self):
        super().__init__()
        self.num_features, self.size = 3, 9

    def posterior(self, x):
        return torch.distributions.Normal(x[..., :1], self.size)


class Duck:
    num_features, size = 3, 9


@pytest.mark.filterwarnings("ignore:.*size is deprecated:DeprecationWarning")
def test_models_of_users_may_have_a_size_still():
    guide = Exact(Whole())
    assert guide.dataset_size == guide.posterior(torch.ones(2, 3)).scale[0] == 9
    assert Exact(Duck()).dataset_size == 9
    with pytest.raises(AttributeError, match="dataset_size"):
        Exact(type("Nothing", (), {"num_features": 3})())


def test_copies_and_pickles_have_the_size():
    model = PPCA(2, 3, dataset_size=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        old = PPCA.__new__(PPCA)
        state = {**vars(model), "size": 9}
        del state["dataset_size"]
        old.__setstate__(state)
        for twin in (*twins, old):
            assert twin.dataset_size == 9 and "size" not in vars(twin)
            twin.load_state_dict(model.state_dict())
    assert state["size"] == 9
