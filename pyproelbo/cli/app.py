"""The options of the command line, and its messages."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from pyproelbo.cli import PROGRAM, options
from pyproelbo.cli.interrupts import Interrupts

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def _program() -> None:
    """See, weight and judge every part of an ELBO.

    Without a command it fits with all defaults.
    """


@app.command()
def fit(
    context: typer.Context,
    data: options.DataFile = "digits",
    header: options.Header = None,
    index_col: options.IndexColumn = None,
    columns: options.ColumnNames = None,
    model: options.Model = "vae",
    guide: options.Guide = "auto",
    prior: options.Prior = "standard",
    latent: options.Latent = 10,
    hidden: options.Hidden = 256,
    beta: options.Beta = 1.0,
    anneal: options.Anneal = "none",
    likelihood: options.Likelihood = "auto",
    standardise: options.Standardise = None,
    epochs: options.Epochs = 200,
    max_steps: options.MaxSteps = -1,
    batch_size: options.BatchSize = 64,
    lr: options.LearningRate = 3e-3,
    holdout: options.Holdout = 0.1,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    compile: options.Compile = False,
    out: options.Out = Path("run"),
    resume: options.Resume = None,
) -> None:
    """Fit a VAE or a deep Markov model (dmm) by the beta-weighted ELBO.

    Its state, tables and figures go to a folder.
    """
    # Imported late: --help and wrong options need not wait for torch.
    from pyproelbo.cli.fitting import begun, carry_out, resumed
    from pyproelbo.cli.runs import Config

    interrupts: Interrupts = context.obj
    given = context.params.copy()
    of_config = {name: given[name] for name in given if name not in _NOT_OF_THE_MODEL}
    of_config["data"] = data if data == "digits" else str(Path(data).absolute())
    try:
        config = Config(**of_config)
        if resume is None:
            fitting = begun(config, out, compile)
        else:
            named = {name: value for name, value in given.items() if _is_given(context, name)}
            fitting = resumed(resume, named, compile)
        carry_out(fitting, device, interrupts)
    except (ValueError, ImportError, OSError) as error:
        if interrupts.raised:
            raise KeyboardInterrupt from error
        _fail(error)


_NOT_OF_THE_MODEL = ("device", "compile", "out", "resume")  # options of this one fit


@app.command()
def surgery(
    folder: options.RunFolder,
    on: options.On = "train",
    num_samples: options.NumDraws = 1,
    max_pairs: options.MaxPairs = None,
    batch_size: options.RowsAtOnce = 256,
    seed: options.SeedOfDraws = 0,
    num_workers: options.Workers = 1,
) -> None:
    """Split a run's ELBO at its aggregate posterior q(z).

    Table and figures go to surgery/ in the run's folder, or to surgery_held_out/ for the held-out
    data. Time grows with the square of the number of rows, or with --max-pairs.
    """
    from pyproelbo.cli.surgery import take_apart

    size = num_samples, max_pairs, batch_size
    _report(folder, on, lambda: take_apart(folder, on, *size, seed, num_workers))


@app.command()
def check(
    folder: options.RunFolder,
    on: options.On = "held-out",
    max_data: options.MaxData = 1000,
    num_samples: options.ManyDraws = 1000,
    seed: options.SeedOfDraws = 0,
    num_workers: options.Workers = 1,
) -> None:
    """Judge a run's posterior: fine, doubtful or bad, and why.

    The numbers and figures go to check/ in the run's folder.
    """
    from pyproelbo.cli.check import judge

    _report(folder, on, lambda: judge(folder, on, max_data, num_samples, seed, num_workers))


def _report(folder: Path, on: str, make: Callable[[], tuple[object, list[Path]]]) -> None:
    """Make a report of a run, show it, and print where it was written."""
    from pyproelbo.cli.surgery import PARTS

    try:
        result, paths = make()
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
            if interrupts.raised:  # an interrupted import raises another error
                status = 130
            elif message is not None:
                _say(f"error: {message()} (--help lists what there is)")
                status = 2
            elif _is_of_memory(error):
                _say(
                    "error: there is not enough memory: take smaller --latent, --hidden, "
                    "--batch-size or --num-samples, or fewer components of --prior"
                )
                status = 2
            else:
                raise
    if status == 130:  # from an interrupt, which typer may handle itself
        _say(interrupts.last_words)
    return status if isinstance(status, int) else 0


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _is_of_memory(error: Exception) -> bool:
    """Whether memory was short, which torch reports in several ways."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    )


def _say(message: str) -> None:
    typer.echo(message, err=True)


def _fail(error: Exception) -> NoReturn:
    words = str(error).partition("tensor(")[0]  # errors of torch show whole tensors
    _say("error: " + " ".join(words.split()))
    raise typer.Exit(2)
