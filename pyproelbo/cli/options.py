"""The options of the commands, with their help texts."""

from pathlib import Path
from typing import Annotated

import typer

LARGEST, MOST_DRAWS = 2**31 - 1, 100_000

# of a fit
DataFile = Annotated[
    str,
    typer.Argument(
        help="A .npy, .npz, .csv, .parquet or .arrow file of rows or images, a folder of such "
        "files of one kind, or 'digits'. Folders, .parquet and .arrow files need not fit memory. "
        "For sequences: x (N, T, D) as .npy, or as .npz with x, lengths (N,) and observed (N, T)."
    ),
]
Header = Annotated[
    bool | None,
    typer.Option(
        "--header/--no-header",
        help="Whether the first line of a .csv file has the names of the columns; inferred where "
        "that is clear, and reported.",
    ),
]
IndexColumn = Annotated[
    bool | None,
    typer.Option(
        "--index-col/--no-index-col",
        help="Whether its first column is the index of the rows, which is left out.",
    ),
]
ColumnNames = Annotated[
    str | None,
    typer.Option(
        help="The columns of .parquet or .arrow files that are the features, by commas; all by "
        "default."
    ),
]
Model = Annotated[str, typer.Option(help="vae for rows or images, or dmm for sequences.")]
Guide = Annotated[
    str, typer.Option(help="For a dmm: smoothing (auto), filtering, bidirectional or mean-field.")
]
Prior = Annotated[
    str, typer.Option(help="For a vae: standard, mixture:K of Gaussians, or vamp:K pseudo-inputs.")
]
Latent = Annotated[int, typer.Option(help="Dimensions of the latent.")]
Hidden = Annotated[int, typer.Option(help="Width of the hidden layers.")]
Beta = Annotated[float, typer.Option(help="Weight of the KL; 1 is the ELBO.")]
Anneal = Annotated[
    str, typer.Option(help="Raise beta from 0 over N steps: linear:N, cosine:N or sigmoid:N.")
]
Likelihood = Annotated[
    str, typer.Option(help="bernoulli, gaussian, or auto: bernoulli for data in [0, 1].")
]
Standardise = Annotated[
    bool | None,
    typer.Option(
        "--standardise/--no-standardise",
        help="Let the nets see each feature with mean 0 and standard deviation 1; the default "
        "for a gaussian likelihood. All results refer to the data as given.",
    ),
]
Epochs = Annotated[int, typer.Option(help="Passes over the data, in all.")]
MaxSteps = Annotated[int, typer.Option(help="Stop after this many steps; -1 for no limit.")]
BatchSize = Annotated[int, typer.Option(help="Rows per step.")]
LearningRate = Annotated[float, typer.Option(help="Adam's learning rate.")]
Holdout = Annotated[float, typer.Option(help="Fraction of the rows not trained on.")]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Train with compiled steps: faster after half a minute.")
]
Out = Annotated[Path, typer.Option(help="A new folder for the results.")]
Resume = Annotated[Path | None, typer.Option(help="Folder of a run to continue; uses its options.")]

# of reports
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a fitted run.")]
On = Annotated[str, typer.Option(help="The data: train or held-out.")]
NumDraws = Annotated[int, typer.Option(min=1, max=MOST_DRAWS, help="Draws of the guide.")]
MaxPairs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Evaluate q(z) at the draws of as many rows as this number of pairs of a draw and a "
        "row allows: for large data. The errors then include this choice.",
    ),
]
ManyDraws = Annotated[int, typer.Option(min=25, max=MOST_DRAWS, help="Draws of the guide.")]
RowsAtOnce = Annotated[int, typer.Option(min=1, max=LARGEST, help="Rows in one call of the nets.")]
MaxData = Annotated[int, typer.Option(min=2, max=LARGEST, help="Rows to judge by.")]
SeedOfDraws = Annotated[int, typer.Option(min=0, max=LARGEST, help="Of the draws.")]
Workers = Annotated[
    int, typer.Option(min=1, max=1024, help="Processes that compute, which share the threads.")
]
