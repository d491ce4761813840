"""The options of the command line, and its messages."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pyproelbo.cli.interrupts import Interrupts

PROGRAM = "python -m pyproelbo"
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
LARGEST, MOST_DRAWS = 2**31 - 1, 100_000
_RESUMABLE = {"resume", "epochs", "max_steps", "device", "compile"}


@app.callback()
def _program() -> None:
    """See, weight and judge every part of an ELBO.

    Without a command it fits, with all defaults.
    """


@app.command()
def fit(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="A .npy, .npz or .csv file of rows or images, or 'digits'. For sequences: x (N, "
            "T, D) as .npy, or as .npz with x, lengths (N,) and observed (N, T)."
        ),
    ] = "digits",
    header: Annotated[
        bool | None,
        typer.Option(
            "--header/--no-header",
            help="Whether the first line of a .csv file has the names of the columns; where that "
            "is clear it is found out, and said.",
        ),
    ] = None,
    index_col: Annotated[
        bool | None,
        typer.Option(
            "--index-col/--no-index-col",
            help="Whether its first column is the index of the rows, which is left out.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="vae of rows or images, or dmm of sequences.")] = "vae",
    guide: Annotated[
        str,
        typer.Option(help="Of a dmm: smoothing (auto), filtering, bidirectional or mean-field."),
    ] = "auto",
    prior: Annotated[
        str,
        typer.Option(help="Of a vae: standard, mixture:K of Gaussians, or vamp:K pseudo-inputs."),
    ] = "standard",
    latent: Annotated[int, typer.Option(help="Dimensions of the latent.")] = 10,
    hidden: Annotated[int, typer.Option(help="Width of the hidden layers.")] = 256,
    beta: Annotated[float, typer.Option(help="Weight of the KL; 1 is the ELBO.")] = 1.0,
    anneal: Annotated[
        str, typer.Option(help="Raise beta from 0 over N steps: linear:N, cosine:N or sigmoid:N.")
    ] = "none",
    likelihood: Annotated[
        str, typer.Option(help="bernoulli, gaussian, or auto: bernoulli for data in [0, 1].")
    ] = "auto",
    standardise: Annotated[
        bool | None,
        typer.Option(
            "--standardise/--no-standardise",
            help="Let the nets see each feature with mean 0 and standard deviation 1; so by "
            "default where the likelihood is gaussian. All results are of the data as given.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data, in all.")] = 200,
    max_steps: Annotated[int, typer.Option(help="End after so many steps; -1 for no limit.")] = -1,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = 3e-3,
    holdout: Annotated[float, typer.Option(help="Fraction of the rows not trained on.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Train by compiled steps: faster after half a minute."),
    ] = False,
    out: Annotated[Path, typer.Option(help="A new folder for what comes out.")] = Path("run"),
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a run to go on with; takes its options.")
    ] = None,
) -> None:
    """Fit a VAE or a deep Markov model (dmm) by the beta-weighted ELBO.

    Its state, tables and figures go to a folder.
    """
    # Imported late, so that --help and wrong options need not wait for torch.
    import pyro

    from pyproelbo.cli import files
    from pyproelbo.cli.runs import Config
    from pyproelbo.cli.training import make_task

    interrupts: Interrupts = context.obj
    try:
        config = Config(
            data=data if data == "digits" else str(Path(data).absolute()),
            model=model,
            guide=guide,
            prior=prior,
            latent=latent,
            hidden=hidden,
            beta=beta,
            anneal=anneal,
            likelihood=likelihood,
            standardise=standardise,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            lr=lr,
            holdout=holdout,
            seed=seed,
            header=header,
            index_col=index_col,
        )
        accelerator = _accelerator(device)
        if resume is None:
            config.check()
            _check_new(out)
            values = config.read()
            config = config.of(values)
        else:
            out = resume
            given = {n for n in context.params if _is_given(context, n)}
            config = _resumed(resume, {n: context.params[n] for n in given})
            values = config.read()
        train, val = config.split(values.x)
        pyro.set_rng_seed(config.seed)
        task = make_task(config, train, compile)
        out.mkdir(parents=True, exist_ok=True)
        with files.locked(out):
            if resume is None:
                _check_new(out)
                if values.note:
                    _say(f"note: {values.note}")
            rows = _trained(config, task, train, val, out, accelerator, interrupts, resume is None)
            _report(config, task, train, val, out, rows, interrupts)
    except (ValueError, ImportError, OSError) as error:
        if interrupts.num:  # an import that was interrupted says so in its own way
            raise KeyboardInterrupt from error
        _fail(error)


@app.command()
def surgery(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a fitted run.")],
    on: Annotated[str, typer.Option(help="The data: train or held-out.")] = "train",
    num_samples: Annotated[
        int, typer.Option(min=1, max=MOST_DRAWS, help="Draws of the guide a datum.")
    ] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, max=LARGEST, help="Rows that the nets see at once.")
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Of the draws.")] = 0,
) -> None:
    """Take a run's ELBO apart, at its q(z).

    Table and figures go to surgery/ in the run's folder, those of the held-out data to
    surgery_held_out/. Time grows with the square of the rows.
    """
    from pyproelbo.cli.surgery import PARTS, take_apart

    try:
        result, paths = take_apart(folder, on, num_samples, batch_size, seed)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    typer.echo(f"{folder}, {PARTS[on]}")
    typer.echo(result)
    typer.echo(f"wrote {paths[0].parent}: {', '.join(path.name for path in paths)}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a fitted run.")],
    on: Annotated[str, typer.Option(help="The data: train or held-out.")] = "held-out",
    max_data: Annotated[
        int, typer.Option(min=2, max=LARGEST, help="Rows to judge by: the first.")
    ] = 1000,
    num_samples: Annotated[
        int, typer.Option(min=25, max=MOST_DRAWS, help="Draws of the guide a datum.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST, help="Of the draws.")] = 0,
) -> None:
    """Say whether a run's posterior is fine, doubtful or bad, and why.

    The numbers and figures go to check/ in the run's folder.
    """
    from pyproelbo.cli.check import judge
    from pyproelbo.cli.surgery import PARTS

    try:
        result, paths = judge(folder, on, max_data, num_samples, seed)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    typer.echo(f"{folder}, {PARTS[on]}")
    typer.echo(result)
    typer.echo(f"wrote {paths[0].parent}: {', '.join(path.name for path in paths)}")


def run(arguments: list[str]) -> int:
    """Run the program and return its exit status."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "--help"):
        arguments = ["fit", *arguments]
    interrupts = Interrupts()
    with interrupts.listening():
        try:
            status = app(arguments, prog_name=PROGRAM, standalone_mode=False, obj=interrupts)
        except (KeyboardInterrupt, typer.Abort):
            status = 130
        except Exception as error:
            message = getattr(error, "format_message", None)  # the base of typer's errors has moved
            if message is not None:
                _say(f"error: {message()} (--help lists what there is)")
            elif _is_of_memory(error):
                _say(
                    "error: there is not enough memory: take smaller --latent, --hidden, "
                    "--batch-size or --num-samples, or fewer components of --prior"
                )
            else:
                raise
            return 2
    if status == 130:  # of an interrupt, which typer may take itself
        _say(interrupts.last_words)
    return status if isinstance(status, int) else 0


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _accelerator(device: str) -> str:
    import torch

    there = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device not in there:
        raise ValueError(f"--device should be one of {', '.join(there)}, got {device!r}")
    if not there[device]:
        raise ValueError(f"--device {device} is not to be had here: use auto or cpu")
    return device


def _check_new(out: Path) -> None:
    """Raise a ValueError for what would be overwritten: anything but a fit that kept nothing."""
    if not out.exists():
        return
    from pyproelbo.cli.files import partials

    if not out.is_dir() or {*out.iterdir()} - {out / "config.json", *partials(out)}:
        is_run = (out / "config.json").is_file()
        raise ValueError(
            f"{out} exists and is not overwritten: choose another folder by --out"
            + f", or go on with its run by --resume {out}" * is_run
        )


def _resumed(folder: Path, given: dict[str, Any]) -> Any:
    """The options of a run, with those of them that may change."""
    from pyproelbo.cli.runs import Config

    if wrong := sorted(set(given) - _RESUMABLE):
        raise ValueError(
            f"--resume takes {wrong[0].replace('_', '-')} from {folder}: leave it out, or begin a "
            "new run with --out"
        )
    config = Config.load(folder)
    # A limit on steps is that of one call; the run itself ends with its epochs.
    changes = {"max_steps": given.get("max_steps", -1)}
    if "epochs" in given:
        changes["epochs"] = given["epochs"]
    config = dataclasses.replace(config, **changes)
    config.check()
    return config


def _is_unfinished(config: Any, num_train: int, folder: Path) -> bool:
    """Whether there are steps left; a ValueError if not even the report is."""
    from pyproelbo.cli.report import is_written
    from pyproelbo.cli.runs import STATE
    from pyproelbo.cli.training import num_steps, steps_done

    step = steps_done(folder)
    if step < num_steps(config, num_train):
        return True
    if is_written(folder, step) and (folder / STATE).is_file():
        whole = dataclasses.replace(config, max_steps=-1)
        more = (
            f"--max-steps than {step}"
            if step < num_steps(whole, num_train)
            else f"--epochs than {config.epochs * step // num_steps(whole, num_train)}"
        )
        raise ValueError(f"{folder} has had {step} steps already: give more {more}")
    return False


def _trained(
    config: Any,
    task: Any,
    train: Any,
    val: Any,
    out: Path,
    accelerator: str,
    interrupts: Interrupts,
    is_new: bool,
) -> list[dict[str, float]]:
    """Train a task, or load what has been trained to its end; it returns the rows of the trace."""
    from pyproelbo.cli.rows import features
    from pyproelbo.cli.runs import CHECKPOINT, CONFIG
    from pyproelbo.cli.training import DivergedError, StoppedError, finished, fit

    if not (is_new or _is_unfinished(config, len(features(train)), out)):
        return finished(task, out)
    try:
        return fit(config, task, train, val, out, accelerator, interrupts)
    except (DivergedError, StoppedError) as error:
        if is_new and not (out / CHECKPOINT).exists():  # so that another try may have the folder
            (out / CONFIG).unlink(missing_ok=True)
            out.rmdir()
        if isinstance(error, StoppedError):
            raise KeyboardInterrupt from error
        unscaled = config.likelihood == "gaussian" and not config.standardise
        advice = "try a smaller --lr" + unscaled * ", and leave out --no-standardise"
        raise ValueError(f"{error}: {advice}") from error


def _report(
    config: Any,
    task: Any,
    train: Any,
    val: Any,
    out: Path,
    rows: list[dict[str, float]],
    interrupts: Interrupts,
) -> None:
    """Tell and write what a fit has come to, and how to go on."""
    from pyproelbo.cli.report import write
    from pyproelbo.cli.reports import REPORTS
    from pyproelbo.cli.rows import features
    from pyproelbo.cli.training import num_steps

    step, schedule = task.objective.step, config.schedule()
    whole = num_steps(dataclasses.replace(config, max_steps=-1), len(features(train)))
    go_on = f"{PROGRAM} fit --resume {out}"
    num = interrupts.num
    interrupts.last_words = (
        f"stopped at step {step}, before the report was written; to go on: {go_on}"
    )
    if num > 1:
        raise KeyboardInterrupt
    report = REPORTS[config.model].of(config, task, train, val)
    figures = write(out, report, rows)
    report.show()
    if config.standardise:
        _say(
            "note: the nets see each feature standardised, unless --no-standardise is given; "
            "all results are of the data as given, in their units and nats"
        )
    end = schedule.settled()
    if end is not None and end > step:
        more = f"give more --epochs than {config.epochs}" if step >= whole else f"go on: {go_on}"
        _say(
            f"note: beta is {schedule(step):.3g} after {step} steps and changes until step {end}: "
            f"{more}"
        )
    if num:
        _say(f"stopped at step {step}; to go on: {go_on}")
    elif step < whole:
        _say(f"ended at step {step} of {whole}, by --max-steps; to go on: {go_on}")
    typer.echo(f"wrote {out}: state.pt, terms.csv, summary.json, {', '.join(figures)}")
    if report.hint:
        typer.echo(report.hint.format(out))


def _is_of_memory(error: Exception) -> bool:
    """Whether there was not enough of it, which torch says in several ways."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    )


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _fail(error: Exception) -> NoReturn:
    words = str(error).partition("tensor(")[0]  # errors of torch show whole tensors
    _say("error: " + " ".join(words.split()))
    raise typer.Exit(2)
