"""The command line at tiny sizes: what it writes, goes on from, and refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import warnings

import numpy as np
import pyro
import pytest
import torch
from helpers.command import (
    TINY,
    WRITTEN_OF_IMAGES,
    endless,
    fit,
    refused,
    summary_of,
    surgery,
    trace_of,
)

import pyproelbo as pe
from pyproelbo.__main__ import main
from pyproelbo.cli import load_run


def test_a_fit_writes_its_state_tables_and_figures(images, tmp_path, capsys):
    out = tmp_path / "out"
    torch.randn(3)
    assert fit(images, *TINY, "--epochs", 3, "--beta", 4, "--anneal", "linear:8", "--out", out) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN_OF_IMAGES
    assert all(
        (out / name).read_bytes()[:4] == b"\x89PNG" for name in WRITTEN_OF_IMAGES if "png" in name
    )
    printed = capsys.readouterr().out
    for word in ("objective (beta = 4)", "ELBO", "reconstruction", "KL", "held out", "dimension"):
        assert word in printed
    assert re.search(r"mutual information .* ± .*\n.* at most log N .* 3\.99 ", printed)
    assert "marginal KL" in printed and "active units" in printed
    assert f"python -m pyproelbo surgery {out}" in printed

    trace = trace_of(out)
    assert [row["step"] for row in trace] == ["4", "8", "12"]
    for part in ("train", "val"):
        elbo, fits, kl = (float(trace[0][f"{part}_{n}"]) for n in ("elbo", "reconstruction", "kl"))
        assert elbo == pytest.approx(fits - kl)
    summary = summary_of(out)
    assert summary["beta"] == 4 and summary["num_train"] == 54 and summary["num_held_out"] == 6
    train = summary["train"]
    assert train["objective"] == pytest.approx(train["reconstruction"] - 4 * train["kl"])
    parts = summary["surgery"]
    assert (parts["num_data"], parts["log_n"]) == (54, pytest.approx(np.log(54)))
    assert sum(parts["kl_per_dim"]) == pytest.approx(train["kl"])
    assert parts["mutual_information"] + parts["marginal_kl"] == pytest.approx(train["kl"])
    assert json.loads((out / "config.json").read_text())["likelihood"] == "bernoulli"


def test_a_run_loads_without_training(images, tmp_path):
    out = tmp_path / "out"
    assert fit(images, *TINY, "--epochs", 2, "--out", out) == 0
    run = load_run(out)
    x = torch.as_tensor(np.load(images).reshape(60, 16))
    assert run.model.decode(run.guide.posterior(x).mean).mean.shape == (60, 16)
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, state[f"module.model.{name}"])


@pytest.mark.slow
def test_a_run_depends_on_its_seed_alone(images, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.randn(ord(name))
        fit(images, *TINY, "--epochs", 2, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (trace_of(tmp_path / name) for name in "abc")
    assert a == b != c


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "more"), [(2, []), (5, ["--max-steps", 6])])
def test_resuming_gives_the_numbers_of_a_fit_straight_through(images, tmp_path, epochs, more):
    options = [images, *TINY, "--anneal", "linear:18"]
    assert fit(*options, "--epochs", 5, "--out", tmp_path / "whole") == 0
    assert fit(*options, "--epochs", epochs, *more, "--out", tmp_path / "parts") == 0
    assert len(trace_of(tmp_path / "parts")) == 2
    assert fit("--resume", tmp_path / "parts", "--epochs", 5) == 0
    assert trace_of(tmp_path / "whole") == trace_of(tmp_path / "parts")
    whole, parts = (load_run(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "guide"):
        pairs = zip(
            getattr(whole, part).parameters(), getattr(parts, part).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert summary_of(tmp_path / "whole") == summary_of(tmp_path / "parts")


@pytest.mark.slow
def test_compiled_steps_have_the_same_numbers(images, tmp_path):
    """Two batch sizes, within one epoch, and after it."""
    options = [images, *TINY, "--epochs", 4, "--anneal", "linear:12"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pe.CaptureWarning)
        assert fit(*options, "--compile", "--max-steps", 6, "--out", tmp_path / "parts") == 0
        assert fit("--resume", tmp_path / "parts", "--compile") == 0
    assert fit(*options, "--out", tmp_path / "whole") == 0
    ours, theirs = (trace_of(tmp_path / name) for name in ("parts", "whole"))
    for name in ours[0]:
        values = [[float(row[name]) for row in table] for table in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5), name


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learned_and_the_run_can_go_on(images, tmp_path):
    with endless(images, tmp_path) as (process, out):
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    step = int(re.search(r"stopped at step (\d+)", said).group(1))
    assert f"python -m pyproelbo fit --resume {out}" in said
    assert "Terms of the ELBO" in printed and "Traceback" not in said
    assert {path.name for path in out.iterdir()} == WRITTEN_OF_IMAGES
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == step
    assert fit("--resume", out, "--max-steps", step + 3) == 0
    assert summary_of(out)["steps"] == step + 3


def test_the_progress_bar_shows_the_terms(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")  # all of a line, however long the rate is
    fit(images, *TINY, "--epochs", 5, "--beta", 4, "--out", tmp_path / "out")
    bars = capsys.readouterr().err
    assert re.search(r"20/20 .*ELBO=-\d.*reconstruction=-\d.*KL=\d.*beta=4\.00", bars)


def test_without_arguments_it_fits_the_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--max-steps", "3", "--hidden", "8"]) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == WRITTEN_OF_IMAGES
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == "digits" and config["shape"] == [8, 8]


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_real_rows_take_a_gaussian_likelihood(tmp_path, suffix):
    x, path = np.random.default_rng(0).normal(size=(30, 5)), tmp_path / f"x.{suffix}"
    if suffix == "csv":
        np.savetxt(path, x, delimiter=",")
    else:
        np.savez(path, x)
    assert fit(path, *TINY, "--epochs", 1, "--out", tmp_path / "out") == 0
    assert load_run(tmp_path / "out").config.likelihood == "gaussian"


@pytest.mark.slow
def test_what_a_csv_was_taken_for_is_said_and_kept(tmp_path, capsys):
    x, path = np.random.default_rng(0).normal(size=(30, 2)), tmp_path / "x.csv"
    rows_of = [f"{i},{a!r},{b!r}" for i, (a, b) in enumerate(x.tolist())]
    path.write_text("\n".join([",0,1", *rows_of]))
    assert fit(path, *TINY, "--epochs", 1, "--out", tmp_path / "a") == 0
    said = capsys.readouterr().err
    assert "x.csv holds 30 data of 2 features; the first line is taken for names" in said
    assert "the first column for an index, left out" in said
    config = load_run(tmp_path / "a").config
    assert (config.header, config.index_col, config.shape) == (True, True, (2,))
    assert fit("--resume", tmp_path / "a", "--epochs", 2) == 0

    path.write_text("\n".join(rows_of))
    message = refused(capsys, path, *TINY, "--out", tmp_path / "b")
    assert "may be their index or a feature" in message and "--no-index-col" in message
    options = ["--no-header", "--no-index-col", "--epochs", 1]
    assert fit(path, *TINY, *options, "--out", tmp_path / "b") == 0
    assert "no line is names, no column an index" in capsys.readouterr().err
    run = load_run(tmp_path / "b")
    assert run.config.shape == (3,) and run.config.read().x.shape == (30, 3)
    message = refused(capsys, "--resume", tmp_path / "b", "--index-col")
    assert "--resume takes index-col from" in message


def test_an_array_without_features_is_data_of_one(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.arange(6.0))
    assert fit(tmp_path / "x.npy", *TINY, "--epochs", 1, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert (
        "x.npy is taken for 6 data of one feature; one datum of 6 features has shape (1, 6)" in said
    )


def test_the_advice_is_that_of_the_run(images, tmp_path, capsys):
    """Where steps are left, to go on; where none are, more of what has run out."""
    out = tmp_path / "out"
    options = [images, *TINY, "--epochs", 2, "--anneal", "linear:100"]
    assert fit(*options, "--max-steps", 3, "--out", out) == 0
    said = capsys.readouterr().err
    assert "changes until step 100: continue: python -m pyproelbo fit --resume" in said
    assert "ended at step 3, by --max-steps; to continue: python -m pyproelbo fit" in said
    assert "give more --max-steps than 3" in refused(capsys, "--resume", out, "--max-steps", 2)
    assert fit("--resume", out, "--max-steps", 8) == 0
    assert "give more --epochs than 2" in capsys.readouterr().err
    message = refused(capsys, "--resume", out, "--max-steps", 20)
    assert "has had 8 steps already: give more --epochs than 2" in message
    assert "give more --epochs than 2" in refused(capsys, "--resume", out, "--epochs", 1)


def test_an_unfinished_annealing_is_said(images, tmp_path, capsys):
    fit(images, *TINY, "--epochs", 1, "--anneal", "cosine:100", "--out", tmp_path / "out")
    assert "changes until step 100: give more --epochs" in capsys.readouterr().err


# Priors


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["vamp:7", "mixture:7"])
def test_a_learned_prior_is_reported_and_goes_on(images, tmp_path, capsys, prior):
    options = [images, *TINY, "--prior", prior]
    assert fit(*options, "--epochs", 3, "--out", tmp_path / "whole") == 0
    printed = capsys.readouterr().out
    assert "Prior of 7 components, at the codes of 54 data" in printed
    figures = {"pseudo_inputs.png"} if prior == "vamp:7" else set()
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert written == WRITTEN_OF_IMAGES - {"kl_per_dim.png"} | figures
    summary = summary_of(tmp_path / "whole")
    assert sum(summary["prior"]["usage"]) == pytest.approx(1.0)

    assert fit(*options, "--epochs", 1, "--out", tmp_path / "parts") == 0
    assert fit("--resume", tmp_path / "parts", "--epochs", 3) == 0
    assert trace_of(tmp_path / "whole") == trace_of(tmp_path / "parts")
    run = load_run(tmp_path / "whole")
    x = run.config.split(run.config.read().x)[0]
    result = pe.surgery(run.model, run.guide, x, progress=False)
    assert result.elbo == pytest.approx(summary["train"]["elbo"])

    assert surgery(tmp_path / "whole") == 0
    written = {path.name for path in (tmp_path / "whole" / "surgery").iterdir()}
    assert written == SURGERY - {"kl_per_dim.png"}


def test_pseudo_inputs_of_images_stay_images_and_others_need_not(images, tmp_path):
    assert fit(images, *TINY, "--epochs", 1, "--prior", "vamp:5", "--out", tmp_path / "a") == 0
    u = load_run(tmp_path / "a").model.prior.pseudo_inputs
    assert u.min() > 0 and u.max() < 1
    np.save(tmp_path / "x.npy", 5 * np.random.default_rng(0).normal(size=(30, 5)))
    options = [*TINY, "--epochs", 1, "--prior", "vamp:5", "--out", tmp_path / "b"]
    assert fit(tmp_path / "x.npy", *options) == 0
    u = load_run(tmp_path / "b").model.prior.pseudo_inputs
    assert u.min() < -1 and u.max() > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prior", "vamp"], "--prior should be standard, or mixture or vamp with a number"),
        (["--prior", "vamp:0"], "as in vamp:50, got 'vamp:0'"),
        (["--prior", "normal:3"], "got 'normal:3'"),
        (["--prior", "vamp:55"], "--prior vamp:55 has more components than the 54 rows"),
        (["--model", "dmm", "--prior", "vamp:5"], "--prior vamp:5 is not available with --model"),
    ],
)
def test_priors_that_are_refused(images, tmp_path, capsys, options, message):
    assert fit(images, *TINY, *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The surgery of a run

SURGERY = {"surgery.json", "surgery.png", "kl_per_dim.png", "aggregate_posterior.png"}


def fitted(data, tmp_path, *options):
    assert fit(data, *TINY, "--epochs", 1, "--out", tmp_path / "out", *options) == 0
    return tmp_path / "out"


def test_a_surgery_writes_beside_what_the_fit_wrote(images, tmp_path, capsys):
    out = fitted(images, tmp_path)
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert surgery(out) == 0
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert {path.name for path in (out / "surgery").iterdir()} == SURGERY

    run = load_run(out)
    train, held_out = run.config.split(run.config.read().x)
    result = pe.surgery(run.model, run.guide, train, progress=False)
    assert str(result) in capsys.readouterr().out
    saved = json.loads((out / "surgery" / "surgery.json").read_text())
    assert saved["data"] == "training data of images.npy" and saved["notes"] == result.notes
    for name in ("elbo", "mutual_information", "total_correlation", "log_n"):
        assert saved[name] == pytest.approx(getattr(result, name))
    assert saved["stderr"]["kl_per_dim"] == [0, 0, 0]
    summary = summary_of(out)
    assert summary["surgery"]["elbo"] == pytest.approx(result.elbo)

    assert saved["num_points"] == len(train)
    assert surgery(out, "--max-pairs", 10**12) == 0
    assert str(result) in capsys.readouterr().out

    assert surgery(out, "--on", "held-out", "--num-samples", 2, "--batch-size", 4, "--seed", 1) == 0
    saved = json.loads((out / "surgery_held_out" / "surgery.json").read_text())
    assert (saved["num_data"], saved["num_samples"], saved["seed"]) == (len(held_out), 2, 1)


@pytest.mark.slow
def test_processes_find_the_same(images, tmp_path, capsys):
    out = fitted(images, tmp_path)
    for command, file in (("surgery", "surgery.json"), ("check", "check.json")):
        options = ["--on", "train", "--num-samples", "50"] if command == "check" else []
        found = []
        for num in (1, 2):
            assert main([command, str(out), "--num-workers", str(num), *options]) == 0
            found.append(json.loads((out / command / file).read_text()))
        assert _numbers(found[0]) == pytest.approx(_numbers(found[1]))
    capsys.readouterr()


def _numbers(value):
    """All numbers of a tree."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [x for part in parts for x in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.slow
def test_a_collapsed_posterior_is_called_so(images, tmp_path, capsys):
    out = fitted(images, tmp_path, "--epochs", 60, "--beta", 100, "--lr", 0.01)
    assert "Posterior collapse" in capsys.readouterr().out
    assert surgery(out) == 0
    assert re.search(r"active units +0 of 3\nPosterior collapse", capsys.readouterr().out)
    saved = json.loads((out / "surgery" / "surgery.json").read_text())
    assert saved["average_kl"] < 0.1 and "Posterior collapse" in saved["notes"][0]


def test_a_single_dimension_has_no_plane_to_be_drawn_in(images, tmp_path, capsys):
    out = fitted(images, tmp_path, "--latent", 1)
    assert surgery(out) == 0
    assert {path.name for path in (out / "surgery").iterdir()} == SURGERY - {
        "aggregate_posterior.png"
    }


@pytest.mark.parametrize("long, more", [(600.0, ""), (0.0, r" \(sooner with --max-pairs\)")])
def test_of_many_rows_the_first_are_taken_apart_by_a_fit(
    images, tmp_path, capsys, monkeypatch, long, more
):
    monkeypatch.setattr("pyproelbo.cli.row_report.LONG", long)
    monkeypatch.setattr("pyproelbo.cli.row_report.MANY", 50)
    monkeypatch.setattr("pyproelbo.cli.row_report.FIRST", 20)
    out = fitted(images, tmp_path)
    printed = capsys.readouterr().out
    assert "train (20 of 54)" in printed
    assert re.search(rf"for all 54 rows, in about \d+ seconds: .* surgery {out}{more}\n", printed)
    summary = summary_of(out)
    assert summary["num_train"] == 54 and summary["surgery"]["num_data"] == 20


def test_wrong_surgery(images, tmp_path, capsys):
    assert "no config.json" in refused(capsys, tmp_path / "gone", command=surgery)
    out = fitted(images, tmp_path)
    for options, message in (
        (["--on", "both"], "--on should be train or held-out, got 'both'"),
        (["--num-samples", 0], "Invalid value for '--num-samples'"),
        (["--batch-size", 0], "Invalid value for '--batch-size'"),
        (["--seed", -1], "Invalid value for '--seed'"),
        (["--max-pairs", 0], "Invalid value for '--max-pairs'"),
        (["--max-pairs", 99], "max_pairs should be at least 2_916, for the draws of 54 of 54 data"),
        (["--nonsense"], "--nonsense"),
    ):
        assert message in refused(capsys, out, *options, command=surgery)
    x = np.load(images)
    np.save(images, x + 1)
    assert "has changed since" in refused(capsys, out, command=surgery)
    np.save(images, x)
    (out / "state.pt").write_bytes(b"not a state")
    assert "state.pt is damaged" in refused(capsys, out, command=surgery)
    (out / "state.pt").unlink()
    assert f"continue it by --resume {out}" in refused(capsys, out, command=surgery)
    assert not (out / "surgery").exists()


# Complaints: one line on stderr, status 2, nothing written


OPTIONS = [
    (["--beta", "-1"], "--beta should be 0 or a positive number, got -1.0"),
    (["--beta", "nan"], "--beta should be 0 or a positive number"),
    (["--beta", "four"], "Invalid value for '--beta'"),
    (["--anneal", "linear"], "as in linear:2000, got 'linear'"),
    (["--anneal", "linear:0"], "--anneal should be none or one of linear, cosine, sigmoid"),
    (["--anneal", "steep:10"], "--anneal should be none or one of"),
    (["--epochs", "0"], "--epochs should be at least 1, got 0"),
    (["--max-steps", "0"], "--max-steps should be at least 1"),
    (["--latent", "0"], "--latent should be at least 1"),
    (["--batch-size", "0"], "--batch-size should be at least 1"),
    (["--lr", "0"], "--lr should be positive"),
    (["--holdout", "1"], "--holdout should be a fraction between 0 and 1"),
    (["--seed", "-1"], "--seed should not be negative"),
    (["--seed", "9" * 30], "--seed should be at most"),
    (["--latent", "9" * 30], "--latent should be at most"),
    (["--hidden", "2000000000"], "not enough memory: take smaller --latent, --hidden"),
    (["--prior", "mixture:2000000000"], "not enough memory"),
    (["--lr", "inf"], "--lr should be positive"),
    (["--lr", "nan"], "--lr should be positive"),
    (["--holdout", "nan"], "--holdout should be a fraction"),
    (["--prior", "mixture:" + "9" * 30], "--prior should have at most"),
    (["--header"], "--header is for .csv files"),
    (["--index-col"], "--index-col is for .csv files"),
    (["--standardise"], "--standardise is for --likelihood gaussian"),
    (["--likelihood", "poisson"], "one of auto, bernoulli, gaussian, got 'poisson'"),
    (["--device", "abacus"], "--device should be one of auto, cpu, cuda, mps"),
    (["--nonsense"], "--nonsense"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda x: " ".join(x)[:20])
def test_wrong_options(images, tmp_path, capsys, options, message):
    assert message in refused(capsys, images, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_wrong_data(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "there is no file" in refused(capsys, tmp_path / "gone.npy", *out)
    np.save(tmp_path / "nan.npy", np.array([[1.0], [np.nan]]))
    assert "NaN or infinite" in refused(capsys, tmp_path / "nan.npy", *out)
    np.save(tmp_path / "one.npy", np.array([[1.0]]))
    assert "1 row" in refused(capsys, tmp_path / "one.npy", *out)
    np.save(tmp_path / "real.npy", np.array([[1.0], [2.0]]))
    message = refused(capsys, tmp_path / "real.npy", *out, "--likelihood", "bernoulli")
    assert "needs data in [0, 1]" in message
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(images, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "exists and is not overwritten" in refused(capsys, images, "--out", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    message = refused(capsys, images, "--out", out / "mine.txt" / "below")
    assert "mine.txt" in message


def test_wrong_resuming(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no config.json" in refused(capsys, "--resume", tmp_path)
    assert fit(images, *TINY, "--epochs", 1, "--out", out) == 0
    assert "give more --epochs than 1" in refused(capsys, "--resume", out)
    message = refused(capsys, "--resume", out, "--epochs", 2, "--beta", 2)
    assert "--resume takes beta from" in message
    before = (out / "state.pt").read_bytes()
    np.save(images, np.random.default_rng(1).random((60, 4, 4)))
    assert "has changed since" in refused(capsys, "--resume", out, "--epochs", 2)
    assert (out / "state.pt").read_bytes() == before
    (out / "config.json").write_text("{}")
    assert "is damaged" in refused(capsys, "--resume", out, "--epochs", 2)


def test_a_diverging_fit_says_so(tmp_path, capsys):
    np.save(tmp_path / "x.npy", 1e3 * np.random.default_rng(0).normal(size=(40, 3)))
    arguments = [tmp_path / "x.npy", *TINY, "--epochs", 50, "--lr", 1e4, "--out", tmp_path / "out"]
    assert "try a smaller --lr" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in [n for n in sys.modules if n.startswith("pyproelbo.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "error: the command line needs: pip install pyproelbo[cli]\n"
    )


def test_the_process_is_left_as_it_was(images, tmp_path):
    import logging

    handler = signal.getsignal(signal.SIGINT)
    level = logging.getLogger("lightning.pytorch").level
    assert surgery(fitted(images, tmp_path)) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert logging.getLogger("lightning.pytorch").level == level
    assert not pyro.get_param_store()


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n +fit .*\n +surgery ", printed) and "every part of an ELBO" in printed


def test_help_is_quick_to_print():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pyproelbo", "fit", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 0
    assert "--anneal" in done.stdout
    assert not re.search(r"\| +(torch|pyro|numpy|lightning|matplotlib)\b", done.stderr)
