"""A fit from its options to its report, with its messages: a new one, or a resumed one."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pyro
import torch
import typer

from pyproelbo.cli import PROGRAM, files
from pyproelbo.cli.checkpoints import DivergedError, StoppedError
from pyproelbo.cli.interrupts import Interrupts
from pyproelbo.cli.kinds import GAUSSIAN, Values
from pyproelbo.cli.report import is_written, write
from pyproelbo.cli.reports import REPORTS
from pyproelbo.cli.rows import Rows, num_rows
from pyproelbo.cli.runs import CHECKPOINT, CONFIG, STATE, Config
from pyproelbo.cli.training import finished, make_task, num_steps, steps_done, train
from pyproelbo.lightning import ELBOTask

_RESUMABLE = {"resume", "epochs", "max_steps", "device", "compile"}


@dataclass(frozen=True)
class Fitting:
    """What to fit, and where.

    Attributes:
        train: the data to train on.
        val: the held-out data.
        folder: of the run.
        is_new: whether it starts here.
        note: how the data were interpreted, to be printed first.
    """

    config: Config
    task: ELBOTask
    train: Rows
    val: Rows
    folder: Path
    is_new: bool
    note: str | None

    @property
    def num_steps(self) -> int:
        """The steps of this call."""
        return num_steps(self.config, num_rows(self.train))

    @property
    def whole(self) -> int:
        """The steps of the whole run, whatever the limit of this call."""
        config = dataclasses.replace(self.config, max_steps=-1)
        return num_steps(config, num_rows(self.train))


def begun(config: Config, folder: Path, compile: bool) -> Fitting:
    """A new run in a folder; a ValueError for invalid options or data."""
    config.check()
    _check_new(folder)
    values = config.read()
    return _prepared(config.of(values), values, folder, compile, is_new=True)


def resumed(folder: Path, given: dict[str, object], compile: bool) -> Fitting:
    """A resumed run, with those of its options that may change."""
    if wrong := sorted(set(given) - _RESUMABLE):
        raise ValueError(
            f"--resume takes {wrong[0].replace('_', '-')} from {folder}: leave it out, or start a "
            "new run with --out"
        )
    config = Config.load(folder)
    # A limit on steps applies to one call; the run itself ends with its epochs.
    changes = {"max_steps": given.get("max_steps", -1)}
    if "epochs" in given:
        changes["epochs"] = given["epochs"]
    config = dataclasses.replace(config, **changes)
    config.check()
    return _prepared(config, config.read(), folder, compile, is_new=False)


def carry_out(fitting: Fitting, device: str, interrupts: Interrupts) -> None:
    """Train, report, and print how to continue.

    Raises:
        ValueError: for a run that cannot be continued, or a fit that has diverged.
        OSError: for files that cannot be written.
    """
    accelerator = _accelerator(device)
    fitting.folder.mkdir(parents=True, exist_ok=True)
    with files.locked(fitting.folder):
        if fitting.is_new:
            _check_new(fitting.folder)
            if fitting.note:
                typer.echo(f"note: {fitting.note}", err=True)
        if fitting.is_new or _is_unfinished(fitting):
            rows = _trained(fitting, accelerator, interrupts)
        else:
            rows = finished(fitting.task, fitting.folder)
        _report(fitting, rows, interrupts)


def _prepared(config: Config, values: Values, folder: Path, compile: bool, is_new: bool) -> Fitting:
    train, val = config.split(values.x)
    pyro.set_rng_seed(config.seed)
    task = make_task(config, train, compile)
    return Fitting(config, task, train, val, folder, is_new, values.note)


def _accelerator(device: str) -> str:
    there = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device not in there:
        raise ValueError(f"--device should be one of {', '.join(there)}, got {device!r}")
    if not there[device]:
        raise ValueError(f"--device {device} is not available here: use auto or cpu")
    return device


def _check_new(folder: Path) -> None:
    """Raise a ValueError for what would be overwritten: anything but a fit that kept nothing."""
    if not folder.exists():
        return
    nothing = {folder / CONFIG, *files.partials(folder)}
    if not folder.is_dir() or {*folder.iterdir()} - nothing:
        raise ValueError(
            f"{folder} exists and is not overwritten: choose another folder by --out"
            + f", or continue its run by --resume {folder}" * (folder / CONFIG).is_file()
        )


def _is_unfinished(fitting: Fitting) -> bool:
    """Whether steps are left; a ValueError if not even the report is."""
    folder, step = fitting.folder, steps_done(fitting.folder)
    if step < fitting.num_steps:
        return True
    if is_written(folder, step) and (folder / STATE).is_file():
        more = (
            f"--max-steps than {step}"
            if step < fitting.whole
            else f"--epochs than {fitting.config.epochs * step // fitting.whole}"
        )
        raise ValueError(f"{folder} has had {step} steps already: give more {more}")
    return False


def _trained(fitting: Fitting, accelerator: str, interrupts: Interrupts) -> list[dict[str, float]]:
    """Train; it returns the rows of the trace."""
    config, folder = fitting.config, fitting.folder
    try:
        data = fitting.train, fitting.val
        return train(config, fitting.task, *data, folder, accelerator, interrupts)
    except (DivergedError, StoppedError) as error:
        kept = (folder / CHECKPOINT).exists()
        if fitting.is_new and not kept:  # another attempt may use the folder
            (folder / CONFIG).unlink(missing_ok=True)
            folder.rmdir()
        if isinstance(error, StoppedError):
            raise KeyboardInterrupt from error
        unscaled = config.likelihood == GAUSSIAN and not config.standardise
        advice = "try a smaller --lr" + unscaled * ", and leave out --no-standardise"
        if kept:
            before = f"--resume {folder} --max-steps {steps_done(folder)}"
            advice += f" in a new run; {before} reports the earlier state of this one"
        raise ValueError(f"{error}: {advice}") from error


def _report(fitting: Fitting, rows: list[dict[str, float]], interrupts: Interrupts) -> None:
    """Print and write the result of a fit, and how to continue."""
    config, task, folder = fitting.config, fitting.task, fitting.folder
    step, schedule = task.objective.step, config.schedule()
    go_on, num = f"{PROGRAM} fit --resume {folder}", interrupts.num
    interrupts.last_words = (
        f"stopped at step {step}, before the report was written; to continue: {go_on}"
    )
    if num > 1:
        raise KeyboardInterrupt
    report = REPORTS[config.model].of(config, task, fitting.train, fitting.val)
    figures = write(folder, report, rows)
    report.show()
    notes = []
    if config.standardise:
        notes.append(
            "note: the nets see each feature standardised, unless --no-standardise is given; "
            "all results refer to the data as given, in their units and nats"
        )
    end = schedule.settled()
    if end is not None and end > step:
        ended = step >= fitting.whole
        more = f"give more --epochs than {config.epochs}" if ended else f"continue: {go_on}"
        beta = f"beta is {schedule(step):.3g} after {step} steps and changes until step {end}"
        notes.append(f"note: {beta}: {more}")
    if step < fitting.whole:
        how = f"stopped at step {step}" if num else f"ended at step {step}, by --max-steps"
        notes.append(f"{how}; to continue: {go_on}")
    for note in notes:
        typer.echo(note, err=True)
    typer.echo(f"wrote {folder}: state.pt, terms.csv, summary.json, {', '.join(figures)}")
    if report.hint:
        typer.echo(report.hint.format(folder))
