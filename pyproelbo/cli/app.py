"""The options of the command line, and its messages."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from pyproelbo.cli import PROGRAM
from pyproelbo.cli.interrupts import Interrupts

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
LARGEST, MOST_DRAWS = 2**31 - 1, 100_000


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
    from pyproelbo.cli.fitting import begun, carry_out, resumed
    from pyproelbo.cli.runs import Config

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
        if resume is None:
            fitting = begun(config, out, compile)
        else:
            given = {n: context.params[n] for n in context.params if _is_given(context, n)}
            fitting = resumed(resume, given, compile)
        carry_out(fitting, device, interrupts)
    except (ValueError, ImportError, OSError) as error:
        if interrupts.raised:
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
            if interrupts.raised:  # an import that was interrupted says so in its own way
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
    if status == 130:  # of an interrupt, which typer may take itself
        _say(interrupts.last_words)
    return status if isinstance(status, int) else 0


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


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
