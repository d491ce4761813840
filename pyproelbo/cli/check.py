"""The verdict on a run's posterior and its figures, in a folder within the run's."""

import json
from pathlib import Path

from pyproelbo._diagnostics.check import check
from pyproelbo._diagnostics.check_result import Check
from pyproelbo._rows.whole_reports import whole_reports
from pyproelbo.cli import files
from pyproelbo.cli.figures import new_figure, save_figure
from pyproelbo.cli.rows import num_rows, some
from pyproelbo.cli.surgery import PARTS, load_part
from pyproelbo.cli.workers import workers
from pyproelbo.plots import plot_khat


def judge(
    folder: Path, on: str, max_data: int, num_samples: int, seed: int, num_workers: int = 1
) -> tuple[Check, list[Path]]:
    """Judge a run on the first rows of one part of its data, or a sample of files.

    Returns:
        The check, and the files that it is written to.

    Raises:
        ValueError: for an unknown part, a folder without a run, data that have changed.
    """
    run, data = load_part(folder, on)
    num = min(max_data, num_rows(data))
    x = some(data, num, run.config.seed)
    with whole_reports(), workers(num_workers) as executor:
        result = check(
            run.model, run.guide, x, num_samples=num_samples, seed=seed, executor=executor
        )
    into = folder / "check"
    into.mkdir(exist_ok=True)
    with files.locked(into):
        values = {"num_data": num, "num_samples": num_samples, "seed": seed}
        return result, _write(into, f"{PARTS[on]} of {Path(run.config.data).name}", result, values)


def _write(folder: Path, of: str, result: Check, values: dict[str, int]) -> list[Path]:
    paths = [folder / "check.json", folder / "khat.png"]
    text = json.dumps({"data": of, **values, **result.as_json()}, indent=2)
    files.write(paths[0], text + "\n")
    figure = new_figure(7, 3.6)
    plot_khat(result.psis, ax=figure.subplots()).set_title(f"Importance weights: {of}")
    save_figure(figure, paths[1])
    return paths
