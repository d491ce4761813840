"""The models that the command can fit, with their data, guides and objective."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyproelbo.cli.priors import MIXTURES, STANDARD
from pyproelbo.cli.rows import Rows
from pyproelbo.cli.sequences import arrays_of, load_sequences
from pyproelbo.datasets import Columns, Files, digits, read
from pyproelbo.elbo import BetaELBO, SequentialELBO, TermsELBO
from pyproelbo.guides import dmm, vae
from pyproelbo.models.dmm import DMM
from pyproelbo.models.vae import VAE, BernoulliLikelihood, GaussianLikelihood

DIGITS = "digits"
GAUSSIAN = "gaussian"
MakePrior = Callable[[nn.Module], nn.Module]  # of a guide
Seeing = Callable[[nn.Module], nn.Module]  # of a guide


class Values(NamedTuple):
    """The data of a run.

    Attributes:
        x: the arguments of model and guide.
        shape: of one datum.
        columns: which parts of the file were taken for names and for an index.
        note: how else it was interpreted, to be printed before a fit.
    """

    x: Rows
    shape: tuple[int, ...]
    columns: Columns = Columns()
    note: str | None = None


class Kind(ABC):
    """A model, and what the command needs to know about it.

    Attributes:
        guides: by name; the first is the default.
        priors: the names of the priors that z can have; the first is the default.
        objective: the one to maximise, made with ``beta``.
    """

    guides: ClassVar[Mapping[str, Callable[..., nn.Module]]]
    priors: ClassVar[tuple[str, ...]] = (STANDARD,)
    objective: ClassVar[Callable[..., TermsELBO]]

    @abstractmethod
    def read(self, data: str, columns: Columns) -> Values:
        """The data of a file, or the digits."""

    def read_files(self, files: Files) -> Values:
        """Data that are read when they are needed; a ValueError where they must fit memory."""
        raise ValueError(
            f"{files.paths[0].name} is read row by row, which needs --model vae: for other models "
            "give one .npy or .npz file"
        )

    @abstractmethod
    def num_features(self, shape: tuple[int, ...]) -> int:
        """The number of features in the likelihood, for the shape of a datum."""

    @abstractmethod
    def build(
        self,
        guide: str,
        latent: int,
        hidden: int,
        shape: tuple[int, ...],
        likelihood: nn.Module,
        prior: MakePrior,
        seeing: Seeing,
    ) -> tuple[nn.Module, nn.Module]:
        """The model and the guide, untrained.

        Args:
            prior: makes the prior of z from the guide.
            seeing: makes a guide of the data as given from one of transformed data.
        """


class RowKind(Kind):
    """The VAE, of rows and images."""

    guides: ClassVar = {"diagonal": vae.Diagonal}
    priors = (STANDARD, *MIXTURES)
    objective = BetaELBO

    def read(self, data: str, columns: Columns) -> Values:
        """Rows (N, D) of a file, or the digits, with the shape of each as an image."""
        if data == DIGITS:
            return Values(*digits())
        path = Path(data)
        if {"lengths", "observed"} & set(arrays_of(path)):
            raise ValueError(f"{path.name} holds sequences: fit them by --model dmm")
        (x, shape), columns = read(path, columns)
        return Values(x, shape, columns, _note(path, len(x), shape, columns))

    def read_files(self, files: Files) -> Values:
        """Rows of files, as they are."""
        return Values(files, files.shape, files.columns, _note_of_files(files))

    def num_features(self, shape: tuple[int, ...]) -> int:
        """D, the product of a datum's shape."""
        return math.prod(shape)

    def build(
        self,
        guide: str,
        latent: int,
        hidden: int,
        shape: tuple[int, ...],
        likelihood: nn.Module,
        prior: MakePrior,
        seeing: Seeing,
    ) -> tuple[nn.Module, nn.Module]:
        """A VAE with one hidden layer, and the guide of that name."""
        sizes = latent, self.num_features(shape), (hidden,)
        made = seeing(self.guides[guide](*sizes))
        return VAE(*sizes, likelihood=likelihood, prior=prior(made)), made


class SequenceKind(Kind):
    """The deep Markov model, of sequences."""

    guides: ClassVar = {
        "smoothing": dmm.Smoothing,
        "filtering": dmm.Filtering,
        "bidirectional": dmm.Bidirectional,
        "mean-field": dmm.MeanField,
    }
    objective = SequentialELBO

    def read(self, data: str, columns: Columns) -> Values:
        """Sequences {"x": (N, T, D), ...} from a file; for the digits, the rows of their images."""
        if data == DIGITS:  # an image is a sequence of its rows
            images, shape = digits()
            return Values({"x": images.unflatten(1, shape)}, shape)
        sequences = load_sequences(Path(data))  # in no .csv file
        return Values(sequences, tuple(sequences["x"].shape[1:]))

    def num_features(self, shape: tuple[int, ...]) -> int:
        """D, the features of one step."""
        return shape[-1]

    def build(
        self,
        guide: str,
        latent: int,
        hidden: int,
        shape: tuple[int, ...],
        likelihood: nn.Module,
        prior: MakePrior,
        seeing: Seeing,
    ) -> tuple[nn.Module, nn.Module]:
        """A deep Markov model with two hidden layers, and the guide of that name."""
        model = DMM(latent, shape[-1], (hidden, hidden), hidden, likelihood)
        return model, seeing(self.guides[guide](latent, shape[-1], hidden))


def _note(path: Path, num: int, shape: tuple[int, ...], columns: Columns) -> str | None:
    """How a file of rows was interpreted, where it might be meant otherwise."""
    if path.suffix == ".csv":
        line = "the first line is taken for names" if columns.header else "no line is names"
        column = (
            "the first column for an index, left out" if columns.index_col else "no column an index"
        )
        return f"{path.name} holds {num:,} data of {shape[0]:,} features; {line}, {column}"
    if shape == (1,):
        return (
            f"{path.name} is taken for {num:,} data of one feature; one datum of {num:,} features "
            f"has shape (1, {num})"
        )
    if len(shape) == 2:
        return (
            f"{path.name} is taken for images of {shape[0]} x {shape[1]} pixels; for sequences of "
            f"{shape[0]} steps give --model dmm"
        )
    return None


def _note_of_files(files: Files) -> str | None:
    first, *others = files.paths
    if files.names is None:
        return _note(first, files.num_data, files.shape, files.columns)
    names = ", ".join(files.names[:8]) + ", ..." * (len(files.names) > 8)
    name = f"{first.parent.name}, {len(files.paths):,} files," if others else first.name
    return f"{name} holds {files.num_data:,} data of {files.shape[0]:,} features: {names}"


class Grey(BernoulliLikelihood):
    """Grey x in [0, 1] is the probability that a pixel is 1: E[log p] over it is linear in x."""

    def forward(self, logits: Tensor) -> TorchDistribution:
        """Bernoulli(logits), event shape (D,), whose density is evaluated at any x in [0, 1]."""
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)


KINDS: dict[str, Kind] = {"vae": RowKind(), "dmm": SequenceKind()}
LIKELIHOODS: dict[str, Callable[[], nn.Module]] = {
    "bernoulli": Grey,
    GAUSSIAN: GaussianLikelihood,
}
