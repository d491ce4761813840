"""The folder of a run: what was asked for, and the model and guide that came of it.

config.json            the options and what the data were like
state.pt               the parameters of model and guide
last.ckpt              Lightning's checkpoint, for ``--resume``
terms.csv              the terms of the ELBO, an epoch a row
summary.json           the terms after training; of the training data the surgery, or, of
                       sequences, the ELBO by timestep
*.png                  figures
surgery/               what ``python -m pyproelbo surgery`` has written
surgery_held_out/      the same of the held-out data
"""

import hashlib
import json
import pickle
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyproelbo.cli.kinds import KINDS, LIKELIHOODS, Kind, Values
from pyproelbo.cli.priors import STANDARD, PriorChoice
from pyproelbo.cli.rows import Rows, features, take
from pyproelbo.schedules import Cosine, Linear, Schedule, Sigmoid, as_schedule

AUTO = "auto"
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

    @property
    def kind(self) -> Kind:
        """What there is to know of the model."""
        return KINDS[self.model]

    def check(self) -> None:
        """Raise a ValueError, with what to do, for options that cannot be."""
        for name in ("latent", "hidden", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} should be at least 1, got {getattr(self, name)}")
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
        self._check_choice("model", KINDS)
        self._check_choice("guide", (AUTO, *self.kind.guides), f" with --model {self.model}")
        self._check_choice("likelihood", (AUTO, *LIKELIHOODS))
        if PriorChoice.parse(self.prior).name not in self.kind.priors:
            raise ValueError(
                f"--prior {self.prior} is not to be had with --model {self.model}, only "
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
        """The data, a ValueError if they are no longer those of this run."""
        values = self.kind.read(self.data)
        if self.digest and self.digest != digest(values.x):
            raise ValueError(
                f"{self.data} has changed since this run began: restore it, or begin a new run"
            )
        return values

    def of(self, values: Values) -> "Config":
        """This with what the data decide."""
        x = features(values.x)
        binary = bool(((x >= 0) & (x <= 1)).all())
        likelihood = self.likelihood
        if likelihood == AUTO:
            likelihood = "bernoulli" if binary else "gaussian"
        elif likelihood == "bernoulli" and not binary:
            raise ValueError(
                "--likelihood bernoulli needs data in [0, 1]: scale the data, or use gaussian"
            )
        guide = next(iter(self.kind.guides)) if self.guide == AUTO else self.guide
        found = {"likelihood": likelihood, "guide": guide, "digest": digest(values.x)}
        return replace(self, shape=values.shape, **found)

    def split(self, x: Any) -> tuple[Any, Any]:
        """The rows to train on and those held out, a seeded random choice; at least one of each."""
        rows = len(features(x))
        if rows < 2:
            raise ValueError(
                f"the data have {rows} row: one to train on and one to hold out are needed"
            )
        num = min(max(round(self.holdout * rows), 1), rows - 1)
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed))
        return take(x, order[num:]), take(x, order[:num])

    def build(self, rows: Tensor | None = None) -> tuple[nn.Module, nn.Module]:
        """The model and the guide, not trained.

        Args:
            rows: data at which the prior may start; None where a state will be loaded.
        """
        likelihood = LIKELIHOODS[self.likelihood]()
        choice, images = PriorChoice.parse(self.prior), self.likelihood == "bernoulli"
        prior = partial(choice.make, latent=self.latent, shape=self.shape, images=images, rows=rows)
        return self.kind.build(self.guide, self.latent, self.hidden, self.shape, likelihood, prior)

    def save(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(folder: Path) -> "Config":
        path = folder / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{folder} is no folder of a run, it has no config.json: check its name"
            )
        try:
            values = json.loads(path.read_text())
            config = Config(**(values | {"shape": tuple(values["shape"])}))
        except (ValueError, TypeError, KeyError) as error:
            names = ", ".join(field.name for field in fields(Config))
            raise ValueError(
                f"{path} is damaged, it should be a JSON object with {names}: begin a new run"
            ) from error
        config.check()
        return config


class Run(NamedTuple):
    """A fitted model and guide, and the options that they were fitted with."""

    model: Any
    guide: Any
    config: Config


def load_run(folder: str | Path) -> Run:
    """Load what ``python -m pyproelbo fit --out FOLDER`` has fitted.

    Raises:
        ValueError: for a folder without a finished run, or a damaged one.

    >>> run = load_run("run")  # doctest: +SKIP
    >>> z = run.guide.posterior(x).mean  # doctest: +SKIP
    """
    folder = Path(folder)
    config = Config.load(folder)
    model, guide = config.build()
    path = folder / "state.pt"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no state.pt, its fit has not ended: go on with it by --resume {folder}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, it does not fit config.json: begin a new run") from (
            error
        )
    return Run(model.eval(), guide.eval(), config)


def save_state(folder: Path, model: nn.Module, guide: nn.Module) -> None:
    """Write what :func:`load_run` loads."""
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, folder / "state.pt")


def digest(data: Rows) -> str:
    """A short name of the data, by which a change of them is seen."""
    parts = [data] if isinstance(data, Tensor) else data.values()
    return hashlib.sha256(b"".join(x.float().numpy().tobytes() for x in parts)).hexdigest()
