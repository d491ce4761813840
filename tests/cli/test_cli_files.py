"""Data that need not fit memory: fitted and judged from their files."""

import json

import numpy as np
import pytest
import torch
from helpers.command import TINY, fit, refused, summary_of, surgery, trace_of

import pyproelbo as pe
from pyproelbo.__main__ import main
from pyproelbo.cli import load_run, row_report
from pyproelbo.cli.standardising import Scaling
from pyproelbo.datasets import Files

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def data(tmp_path):
    """100 rows of 4 features in other units, as Parquet, and in a folder."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2)) @ rng.normal(size=(2, 4)) + 0.1 * rng.normal(size=(100, 4))
    x = np.array([1e4, -3.0, 0.0, 7.0]) + np.array([1e3, 1e-3, 1.0, 40.0]) * x
    table = pa.table({name: x[:, i] for i, name in enumerate("abcd")})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=13)
    (tmp_path / "parts").mkdir()
    for i in range(3):
        part = table.slice(40 * i, 40)
        pq.write_table(part, tmp_path / "parts" / f"{i}.parquet", row_group_size=13)
    return tmp_path


def check(*arguments):
    return main(["check", *map(str, arguments)])


def test_a_fit_and_its_reports(data, capsys):
    out = data / "out"
    assert fit(data / "x.parquet", *TINY, "--epochs", 4, "--out", out) == 0
    said = capsys.readouterr()
    assert "x.parquet holds 100 data of 4 features: a, b, c, d" in said.err
    assert "the nets see each feature standardised" in said.err
    summary = summary_of(out)
    assert (summary["num_train"], summary["num_held_out"]) == (90, 10)
    assert [row["step"] for row in trace_of(out)] == ["6", "12", "18", "24"]
    run = load_run(out)
    train, held_out = run.config.split(run.config.read().x)
    x = torch.cat([*train])
    torch.testing.assert_close(run.guide.data_shift, x.mean(0))
    torch.testing.assert_close(run.guide.data_scale, x.std(0, correction=0))
    assert surgery(out) == 0
    result = pe.surgery(run.model, run.guide, x, progress=False)
    assert json.loads((out / "surgery" / "surgery.json").read_text())["elbo"] == pytest.approx(
        result.elbo, abs=1e-10
    )
    assert summary["train"]["elbo"] == pytest.approx(result.elbo, abs=1e-10)
    assert check(out, "--num-samples", 50) == 0
    assert json.loads((out / "check" / "check.json").read_text())["num_data"] == 10
    assert held_out.num_data == 10


def test_a_folder_is_one_file_in_parts(data):
    for name in ("x.parquet", "parts"):
        options = ["--epochs", 1, "--out", data / f"of {name}"]
        assert fit(data / name, *TINY, *options) == 0
    one, parts = (load_run(data / f"of {name}") for name in ("x.parquet", "parts"))
    torch.testing.assert_close(one.guide.data_scale, parts.guide.data_scale)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--prior", "vamp:5"]])
@pytest.mark.parametrize("steps", [["--epochs", 1], ["--max-steps", 9]])
def test_it_resumes_to_the_same_numbers(data, options, steps):
    options = [data / "parts", *TINY, *options]
    assert fit(*options, "--epochs", 3, "--out", data / "whole") == 0
    first = steps if "--epochs" in steps else [*steps, "--epochs", 3]
    assert fit(*options, *first, "--out", data / "stopped") == 0
    assert fit("--resume", data / "stopped", "--epochs", 3) == 0
    assert trace_of(data / "whole") == trace_of(data / "stopped")


def test_some_of_many_rows_are_taken_apart(data, monkeypatch, capsys):
    monkeypatch.setattr(row_report, "MANY", 50)
    monkeypatch.setattr(row_report, "FIRST", 20)
    assert fit(data / "parts", *TINY, "--epochs", 1, "--out", data / "out") == 0
    assert "train (20 of 90)" in capsys.readouterr().out


def test_chosen_columns(data, capsys):
    out = data / "out"
    assert fit(data / "parts", *TINY, "--columns", "d,b", "--epochs", 1, "--out", out) == 0
    assert "parts, 3 files, holds 100 data of 2 features: d, b" in capsys.readouterr().err
    run = load_run(out)
    assert run.config.columns == "d,b" and run.config.shape == (2,)


@pytest.mark.parametrize("suffix", ["npy", "npz", "csv"])
def test_folders_of_other_files(tmp_path, suffix):
    x = np.random.default_rng(0).random((60, 3))
    (tmp_path / "parts").mkdir()
    for i, part in enumerate(np.split(x, 3)):
        path = tmp_path / "parts" / f"{i}.{suffix}"
        if suffix == "csv":
            np.savetxt(path, part, delimiter=",", header="a,b,c", comments="")
        else:
            {"npy": np.save, "npz": np.savez}[suffix](path, part)
    assert fit(tmp_path / "parts", *TINY, "--epochs", 1, "--out", tmp_path / "out") == 0
    run = load_run(tmp_path / "out")
    assert run.config.likelihood == "bernoulli" and summary_of(tmp_path / "out")["num_train"] == 54


def test_moments_of_batches_are_those_of_all(data):
    files = Files(data / "parts", 7)
    ours, theirs = Scaling.of(files), Scaling.of(torch.cat([*files]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    shifted = torch.cat([*files])[:, :1] * 1e-3 + 1e8
    np.save(data / "far.npy", shifted)
    assert Scaling.of(Files(data / "far.npy", 7)).scale == pytest.approx(
        shifted.std(0, correction=0).item(), rel=1e-7
    )


def test_what_is_refused(data, capsys):
    out = ["--out", data / "out"]
    path = data / "strings.parquet"
    pq.write_table(pa.table({"a": [1.0, 2.0], "name": ["x", "y"]}), path)
    message = refused(capsys, path, *out)
    assert "column 'name' of strings.parquet holds string, not numbers" in message
    assert "--columns" in message
    assert "no column 'c'" in refused(capsys, path, "--columns", "a,c", *out)
    assert fit(path, *TINY, "--columns", "a", "--epochs", 1, *out) == 0
    out = ["--out", data / "other"]
    pq.write_table(pa.table({"a": [1.0, None, 3.0]}), data / "nulls.parquet")
    assert "in row 1 (counted from 0)" in refused(capsys, data / "nulls.parquet", *out)
    message = refused(capsys, data / "x.parquet", "--model", "dmm", *out)
    assert "x.parquet is read row by row, which needs --model vae" in message
    assert "--header is for .csv" in refused(capsys, data / "x.parquet", "--header", *out)
    np.save(data / "x.npy", np.ones((3, 2)))
    assert "--columns is for" in refused(capsys, data / "x.npy", "--columns", "a", *out)
    pq.write_table(pa.table({"a": [1.0]}), data / "one.parquet")
    assert "1 row" in refused(capsys, data / "one.parquet", *out)
    pq.write_table(pa.table({"e": [1.0]}), data / "parts" / "3.parquet")
    assert "3.parquet has other features than 0.parquet" in refused(capsys, data / "parts", *out)
    assert not (data / "other").exists()


def test_files_that_have_changed_are_noticed(data, capsys):
    assert fit(data / "parts", *TINY, "--epochs", 1, "--out", data / "out") == 0
    (data / "parts" / "2.parquet").unlink()
    message = refused(capsys, data / "out", command=surgery)
    assert "parts has changed since this run started" in message
