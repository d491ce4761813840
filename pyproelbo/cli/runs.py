"""The folder of a run: its options, and the fitted model and guide.

config.json            the options and what the data were like
state.pt               the parameters of model and guide
last.ckpt              Lightning's checkpoint, for ``--resume``, written again and again
terms.csv              the terms of the ELBO, an epoch a row
summary.json           the terms after training; of the training data the surgery, or, of
                       sequences, the ELBO by timestep
*.png                  figures; with the two above they are the report, of which summary.json
                       is written last
surgery/               written by ``python -m pyproelbo surgery``
surgery_held_out/      the same for the held-out data check/                 written by ``python -m
pyproelbo check``
"""

import hashlib
import io
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from pyproelbo.cli import files
from pyproelbo.cli.kinds import DIGITS, GAUSSIAN, KINDS, LIKELIHOODS, Kind, Values
from pyproelbo.cli.priors import STANDARD, VAMP, PriorChoice
from pyproelbo.cli.rows import Rows, extent, features, num_rows, take
from pyproelbo.cli.standardising import ScaledGuide, ScaledLikelihood, Scaling
from pyproelbo.datasets import Columns, Files
from pyproelbo.datasets.tables import TABLES
from pyproelbo.schedules import Cosine, Linear, Schedule, Sigmoid, as_schedule

AUTO = "auto"
CONFIG, STATE, CHECKPOINT, SUMMARY = "config.json", "state.pt", "last.ckpt", "summary.json"
_LARGEST = 2**31 - 1  # of sizes; and of seeds, which numpy has below 2**32
_ANNEALS = {"linear": Linear, "cosine": Cosine, "sigmoid": Sigmoid}


@dataclass(frozen=True)
class Config:
    """The options of a run; ``shape``, ``digest`` and what was "auto" come from the data."""

    data: str
    latent: int
    hidden: int
    beta: float
    anneal: str
    likelihood: str
    epochs: int
    max_steps: int
    batch_size: int
    lr: float
    holdout: float
    seed: int
    model: str = "vae"
    guide: str = "diagonal"
    prior: str = STANDARD
    shape: tuple[int, ...] = ()
    digest: str = ""
    standardise: bool | None = False  # None is "auto"; absent in older runs
    header: bool | None = None
    index_col: bool | None = None
    columns: str | None = None

    @property
    def kind(self) -> Kind:
        """The kind of the model."""
        return KINDS[self.model]

    def check(self) -> None:
        """Raise a ValueError, with what to do, for invalid options."""
        for name in ("latent", "hidden", "epochs", "batch_size"):
            value, option = getattr(self, name), name.replace("_", "-")
            if value < 1:
                raise ValueError(f"--{option} should be at least 1, got {value}")
            if value > _LARGEST:
                raise ValueError(f"--{option} should be at most {_LARGEST:,}, got {value}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"--max-steps should be at least 1, got {self.max_steps}")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"--beta should be 0 or a positive number, got {self.beta}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr should be positive, got {self.lr}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"--holdout should be a fraction between 0 and 1, got {self.holdout}")
        if self.seed < 0:
            raise ValueError(f"--seed should not be negative, got {self.seed}")
        if self.seed > _LARGEST:
            raise ValueError(f"--seed should be at most {_LARGEST:,}, got {self.seed}")
        for name in ("header", "index_col"):
            is_csv = Path(self.data).suffix == ".csv" or Path(self.data).is_dir()
            if getattr(self, name) is not None and not is_csv:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is for .csv files: leave it out with {self.data}")
        if self.columns is not None and not _in_files(self.data):
            raise ValueError(
                f"--columns is for .parquet and .arrow files: leave it out with {self.data}"
            )
        self._check_choice("model", KINDS)
        self._check_choice("guide", (AUTO, *self.kind.guides), f" with --model {self.model}")
        self._check_choice("likelihood", (AUTO, *LIKELIHOODS))
        if PriorChoice.parse(self.prior).name not in self.kind.priors:
            raise ValueError(
                f"--prior {self.prior} is not available with --model {self.model}, only "
                f"{', '.join(self.kind.priors)}"
            )
        self.schedule()

    def _check_choice(self, name: str, choices: Collection[str], where: str = "") -> None:
        choice = getattr(self, name)
        if choice not in choices:
            allowed = ", ".join(choices)
            raise ValueError(f"--{name} should be one of {allowed}{where}, got {choice!r}")

    def schedule(self) -> Schedule:
        """beta at each step."""
        if self.anneal == "none":
            return as_schedule(self.beta)
        name, _, steps = self.anneal.partition(":")
        if name not in _ANNEALS or not steps.isdecimal() or int(steps) < 1:
            raise ValueError(
                f"--anneal should be none or one of {', '.join(_ANNEALS)} with a number of steps, "
                f"as in linear:2000, got {self.anneal!r}"
            )
        return _ANNEALS[name](0.0, self.beta, int(steps))

    def read(self) -> Values:
        """The data; a ValueError if they are no longer those of this run."""
        columns = Columns(self.header, self.index_col)
        if _in_files(self.data):
            names = None if self.columns is None else self.columns.split(",")
            values = self.kind.read_files(Files(self.data, columns=names, **columns._asdict()))
        else:
            values = self.kind.read(self.data, columns)
        if self.digest and (self.digest, self.shape) != (digest(values.x), values.shape):
            raise ValueError(
                f"{self.data} has changed since this run started: restore it, or start a new run"
            )
        return values

    def of(self, values: Values) -> "Config":
        """These options with those that depend on the data filled in."""
        least, most = extent(values.x)
        binary = least >= 0 and most <= 1
        likelihood = self.likelihood
        if likelihood == AUTO:
            likelihood = "bernoulli" if binary else "gaussian"
        elif likelihood == "bernoulli" and not binary:
            raise ValueError(
                "--likelihood bernoulli needs data in [0, 1]: scale the data, or use gaussian"
            )
        guide = next(iter(self.kind.guides)) if self.guide == AUTO else self.guide
        standardise = likelihood == GAUSSIAN if self.standardise is None else self.standardise
        if standardise and likelihood != GAUSSIAN:
            raise ValueError(
                "--standardise is for --likelihood gaussian: give that too, since the data are in "
                "[0, 1], or leave it out"
            )
        found = {"likelihood": likelihood, "guide": guide, "standardise": standardise}
        found |= values.columns._asdict()
        return replace(self, shape=values.shape, digest=digest(values.x), **found)

    def split(self, x: Rows) -> tuple[Rows, Rows]:
        """The training and the held-out rows, by a seeded random choice; at least one of each."""
        rows = num_rows(x)
        if rows < 2:
            raise ValueError(
                f"the data have {rows} row: one to train on and one to hold out are needed"
            )
        if isinstance(x, Files):
            return x.split(self.holdout, self.seed)
        num = min(max(round(self.holdout * rows), 1), rows - 1)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
        return take(x, order[num:]), take(x, order[:num])

    def build(self, data: Rows | None = None) -> tuple[nn.Module, nn.Module]:
        """The model and the guide, untrained.

        Args:
            data: the training data, which determine the standardisation and at which the prior may
                start; None where a state will be loaded.
        """
        size = self.kind.num_features(self.shape)
        likelihood, seeing = LIKELIHOODS[self.likelihood](), _as_it_is
        if self.standardise:
            scaling = Scaling.none(size) if data is None else Scaling.of(data)
            likelihood, seeing = ScaledLikelihood(scaling), partial(ScaledGuide, scaling=scaling)
        prior = partial(
            PriorChoice.parse(self.prior).make,
            latent=self.latent,
            size=size,
            images=self.likelihood == "bernoulli",
            rows=None if data is None else self._pseudo_inputs(data),
        )
        sizes = self.guide, self.latent, self.hidden, self.shape
        return self.kind.build(*sizes, likelihood, prior, seeing)

    def _pseudo_inputs(self, data: Rows) -> Tensor | None:
        """The rows from which a prior may start."""
        if not isinstance(data, Files):
            return features(data)
        prior = PriorChoice.parse(self.prior)
        if prior.name != VAMP:
            return None
        return data.sample(max(10_000, prior.num_components), self.seed)

    def save(self, folder: Path) -> None:
        """Write the options to ``config.json`` in the run's folder."""
        files.write(folder / CONFIG, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> "Config":
        """The options in a folder's ``config.json``; a ValueError if it is missing or damaged."""
        path = folder / CONFIG
        if not path.is_file():
            raise ValueError(f"{folder} is not a run's folder, it has no {CONFIG}: check its name")
        try:
            config = Config(**json.loads(path.read_text(encoding="utf-8")))
            for name, hint in get_type_hints(Config).items():
                _check_type(name, getattr(config, name), hint)
            if AUTO in (config.likelihood, config.guide) or not (config.digest and config.shape):
                raise ValueError("likelihood, guide, shape and digest do not describe data")
            config = replace(config, shape=tuple(config.shape))
            config.check()
        except (ValueError, TypeError, RecursionError) as error:
            names = ", ".join(field.name for field in fields(Config))
            raise ValueError(
                f"{path} is damaged, it should be a JSON object with {names} ({error}): restore "
                "it, or begin a new run"
            ) from error
        return config


def _in_files(data: str) -> bool:
    """Whether data are read from files when they are needed, rather than at once."""
    return data != DIGITS and (Path(data).suffix in TABLES or Path(data).is_dir())


def _as_it_is(guide: nn.Module) -> nn.Module:
    return guide


def _check_type(name: str, value: object, hint: object) -> None:
    """Raise a TypeError for a value with another type in JSON."""
    if hint == tuple[int, ...]:
        right = isinstance(value, list) and all(type(size) is int and size > 0 for size in value)
    elif hint is float:
        right = type(value) in (int, float)
    else:  # bool is a subclass of int
        is_right = isinstance(value, hint)  # type: ignore[arg-type]
        right = is_right and (hint is not int or type(value) is int)
    if not right:
        raise TypeError(f"{name} is {value!r}")


class Run(NamedTuple):
    """A fitted model and guide, and the options of the fit."""

    model: Any
    guide: Any
    config: Config


def load_run(folder: str | Path) -> Run:
    """Load a fit by ``python -m pyproelbo fit --out FOLDER``.

    Raises:
        ValueError: for a folder without a finished run, or a damaged one.

    >>> run = load_run("run")  # doctest: +SKIP
    >>> z = run.guide.posterior(x).mean  # doctest: +SKIP
    """
    folder = Path(folder)
    config = Config.load(folder)
    path = folder / STATE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {STATE}, its fit has not ended: continue it by --resume {folder}"
        )
    with damaged(path, f"remove it, and write it again by --resume {folder}"):
        state = load_tensors(path)
        model, guide = config.build()
        if set(state) != {"model", "guide"}:
            raise KeyError("it should hold model and guide")
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
    if not all(p.isfinite().all() for p in (*model.parameters(), *guide.parameters())):
        raise ValueError(
            f"{path} holds NaN or infinite parameters, its fit has diverged: start a new run with "
            "a smaller --lr"
        )
    return Run(model.eval(), guide.eval(), config)


def load_tensors(path: Path) -> dict[str, Any]:
    """The tensors and plain values, by name, of a file by ``torch.save``."""
    values = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(values, dict):
        raise TypeError(f"it holds a {type(values).__name__}, not values by name")
    return values


@contextmanager
def damaged(path: Path, cure: str) -> Iterator[None]:
    """Report every error within this as a damaged file, which fails in many ways.

    Raises:
        ValueError: with what to do, and the first words of the error.
        OSError: for a file that cannot be read at all.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:100]
        raise ValueError(
            f"{path} is damaged, or does not match {CONFIG} ({reason or type(error).__name__}): "
            f"{cure}"
        ) from error


def save_state(folder: Path, model: nn.Module, guide: nn.Module) -> None:
    """Write the state that :func:`load_run` loads."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, file)
    files.write(folder / STATE, file.getvalue())


def digest(data: Rows) -> str:
    """A digest of the data, or of their files, to detect changes."""
    if isinstance(data, Files):
        whole = hashlib.sha256()
        for path in data.paths:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()
    parts = [data] if isinstance(data, Tensor) else data.values()
    return hashlib.sha256(b"".join(x.float().numpy().tobytes() for x in parts)).hexdigest()
