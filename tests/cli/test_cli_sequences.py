"""The command line on sequences, at tiny sizes: what it reads, fits, tells and refuses."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.command import WRITTEN, fit, refused, summary_of, surgery, trace_of

import pyproelbo as pe
from pyproelbo.cli import load_run
from pyproelbo.cli.sequences import load_sequences

pytestmark = pytest.mark.slow

N, T, D = 24, 6, 3
TINY = ["--model", "dmm", "--latent", "2", "--hidden", "4", "--batch-size", "8", "--device", "cpu"]
WRITTEN_OF_SEQUENCES = WRITTEN | {"kl_by_time.png", "reconstruction_by_time.png"}


def arrays():
    """Sequences of zeros and ones, NaN where they do not count."""
    rng = np.random.default_rng(0)
    x, lengths = rng.integers(0, 2, (N, T, D)).astype(float), rng.integers(1, T, N)
    lengths[-1] = T - 1  # so that one step is nobody's
    observed = rng.random((N, T)) < 0.9
    x[~observed | (np.arange(T) >= lengths[:, None])] = np.nan
    return {"x": x, "lengths": lengths, "observed": observed}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture
def whole(tmp_path):
    """Real numbers, all sequences of one length."""
    path = tmp_path / "x.npy"
    np.save(path, np.random.default_rng(0).normal(size=(N, T, D)))
    return path


def test_a_fit_to_sequences_writes_and_tells_by_time(data, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--epochs", 3, "--beta", 4, "--anneal", "linear:8", "--out", out]
    assert fit(data, *TINY, *options) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN_OF_SEQUENCES
    assert all(
        (out / name).read_bytes()[:4] == b"\x89PNG"
        for name in WRITTEN_OF_SEQUENCES
        if "png" in name
    )
    printed = capsys.readouterr().out
    assert "beta = 4" in printed and "per sequence" in printed and "per frame" in printed
    assert re.search(r"ELBO +│ +-\d+\.\d\d+ ± \d+\.\d\d+ │ +-\d\.\d\d\d ", printed)
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Training data: ELBO by"))
    assert "(22 sequences of 1 to 5 steps" in lines[start]
    assert lines[start + 1].split() == [
        *("timestep", "frames", "observed", "reconstruction", "KL", "ELBO")
    ]
    assert lines[start + 2].startswith("0 ") and lines[start + 6].startswith("4 ")
    assert "surgery" not in printed

    config = json.loads((out / "config.json").read_text())
    assert (config["model"], config["guide"], config["likelihood"]) == (
        "dmm",
        "smoothing",
        "bernoulli",
    )
    assert config["shape"] == [T - 1, D]
    for row in trace_of(out):
        for part in ("train", "val"):
            elbo, fits, kl = (float(row[f"{part}_{n}"]) for n in ("elbo", "reconstruction", "kl"))
            assert elbo == pytest.approx(fits - kl)
    summary = summary_of(out)
    train, by_time = summary["train"], summary["by_time"]
    assert train["elbo"] == pytest.approx(train["reconstruction"] - train["kl"])
    assert train["objective"] == pytest.approx(train["reconstruction"] - 4 * train["kl"])
    assert by_time["time"] == list(range(T - 1)) and by_time["frames"][0] == 22
    frames = np.array(by_time["frames"])
    elbo = (frames * by_time["elbo"]).sum()
    assert elbo / 22 == pytest.approx(train["elbo"])
    assert elbo / frames.sum() == pytest.approx(train["elbo_per_frame"])
    assert 0 < train["elbo_stderr"] < 5
    run = load_run(out)
    sequences = run.config.split(run.config.read().x)[0]
    assert frames.sum() == int(sequences["lengths"].sum())
    assert sum(by_time["observed"]) == int(sequences["observed"].sum())


def test_a_run_of_sequences_loads(data, tmp_path):
    out = tmp_path / "out"
    assert fit(data, *TINY, "--epochs", 1, "--guide", "filtering", "--out", out) == 0
    run = load_run(out)
    assert type(run.guide).__name__ == "Filtering"
    train, held_out = run.config.split(run.config.read().x)
    assert len(train["x"]) == 22 and len(held_out["x"]) == 2
    terms = pe.SequentialELBO().terms(run.model, run.guide, **train)
    assert terms.elbo.isfinite() and terms.kl_by_time.shape == (T - 1, 22)
    state = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, state[f"module.model.{name}"])


@pytest.mark.parametrize("guide", ["smoothing", "filtering", "bidirectional", "mean-field"])
def test_every_guide_fits_real_sequences(whole, tmp_path, guide):
    out = tmp_path / "out"
    assert fit(whole, *TINY, "--epochs", 1, "--guide", guide, "--out", out) == 0
    config = load_run(out).config
    assert (config.guide, config.likelihood) == (guide, "gaussian")


def test_without_data_the_digits_are_sequences_of_their_rows(tmp_path):
    out = tmp_path / "out"
    assert fit(*TINY, "--max-steps", 2, "--out", out) == 0
    run = load_run(out)
    assert run.config.read().x["x"].shape == (1797, 8, 8)
    assert run.model.num_features == 8


@pytest.mark.parametrize(("epochs", "more"), [(2, []), (3, ["--max-steps", 5])])
def test_resuming_sequences_gives_the_numbers_of_a_fit_straight_through(
    data, tmp_path, epochs, more
):
    options = [data, *TINY, "--anneal", "linear:7"]
    assert fit(*options, "--epochs", 3, "--out", tmp_path / "whole") == 0
    assert fit(*options, "--epochs", epochs, *more, "--out", tmp_path / "parts") == 0
    assert fit("--resume", tmp_path / "parts", "--epochs", 3) == 0
    assert trace_of(tmp_path / "whole") == trace_of(tmp_path / "parts")
    assert summary_of(tmp_path / "whole") == summary_of(tmp_path / "parts")


def test_a_diverging_fit_of_sequences_says_so(tmp_path, capsys):
    np.save(tmp_path / "x.npy", 1e3 * np.random.default_rng(0).normal(size=(N, T, D)))
    arguments = [tmp_path / "x.npy", *TINY, "--epochs", 50, "--lr", 1e4, "--out", tmp_path / "out"]
    assert "try a smaller --lr" in refused(capsys, *arguments)
    assert not (tmp_path / "out").exists()


def test_changed_lengths_are_changed_data(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert fit(data, *TINY, "--epochs", 1, "--out", out) == 0
    changed = arrays()
    changed["lengths"][0] = changed["lengths"][0] % (T - 1) + 1
    np.savez(data, **{**changed, "x": np.nan_to_num(changed["x"])})
    assert "has changed since" in refused(capsys, "--resume", out, "--epochs", 2)


def test_the_surgery_of_sequences_of_one_length(whole, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert fit(whole, *TINY, "--epochs", 1, "--out", out) == 0
    capsys.readouterr()
    assert surgery(out) == 0
    assert "average KL" in capsys.readouterr().out
    assert {path.name for path in (out / "surgery").iterdir()} == {"surgery.json", "surgery.png"}
    assert fit(data, *TINY, "--epochs", 1, "--out", tmp_path / "ragged") == 0
    message = refused(capsys, tmp_path / "ragged", command=surgery)
    assert "have different lengths" in message and "fit sequences of one length" in message


# Files


def test_what_does_not_count_is_zero_and_what_says_nothing_is_left_out(data, whole, tmp_path):
    given, sequences = arrays(), load_sequences(data)
    assert set(sequences) == {"x", "lengths", "observed"}
    assert sequences["x"].shape == (N, T - 1, D) and sequences["observed"].shape == (N, T - 1)
    there = (given["observed"] & (np.arange(T) < given["lengths"][:, None]))[:, : T - 1]
    np.testing.assert_array_equal(sequences["observed"].numpy(), there)
    x = np.where(there[..., None], given["x"][:, : T - 1], 0.0)
    np.testing.assert_array_equal(sequences["x"].numpy(), x)

    assert set(load_sequences(whole)) == {"x"}
    path = tmp_path / "named.npz"
    np.savez(path, x=np.load(whole), lengths=np.full(N, T), observed=np.ones((N, T)))
    assert set(load_sequences(path)) == {"x"}
    np.savez(path, np.load(whole))
    assert load_sequences(path)["x"].shape == (N, T, D)


X = np.zeros((4, 5, 2))
FILES = [
    ({"x": X[0]}, r"x.npz should hold sequences, numbers x of shape \(N, T, D\), got .*\(5, 2\)"),
    ({"x": X, "lengths": [1, 2, 3]}, "one for each of the 4 sequences, got int64 of shape"),
    ({"x": X, "lengths": [1.0, 2.0, 3.0, 4.0]}, "lengths in x.npz should be whole numbers"),
    ({"x": X, "lengths": [0, 1, 2, 3]}, "from 1 to the 5 steps of x, got 0 to 3: leave empty"),
    ({"x": X, "lengths": [6, 1, 2, 3]}, "from 1 to the 5 steps of x, got 1 to 6"),
    ({"x": X, "observed": np.ones((5, 4))}, r"bool of shape \(4, 5\), one for each step, got"),
    ({"x": X, "observed": np.full((4, 5), 0.5)}, "observed in x.npz should be bool"),
    ({"x": X + np.nan, "lengths": [1, 1, 1, 1]}, "NaN or infinite at steps that count"),
    ({"y": X, "lengths": [1, 1, 1, 1]}, r"but holds y, lengths: save it with numpy.savez\("),
    ({"x": X, "lenghts": [1, 1, 1, 1]}, "but holds x, lenghts"),
    ({"x": np.full((4, 5, 2), "a"), "lengths": [5] * 4}, "numbers x"),
]


@pytest.mark.parametrize(("named", "message"), FILES, ids=[m[:20] for _, m in FILES])
def test_wrong_files_of_sequences(tmp_path, capsys, named, message):
    np.savez(tmp_path / "x.npz", **named)
    assert re.search(message, refused(capsys, tmp_path / "x.npz", *TINY, "--out", tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_rows_are_no_sequences_and_sequences_no_rows(data, whole, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    np.savetxt(tmp_path / "rows.csv", np.zeros((4, 3)), delimiter=",")
    np.save(tmp_path / "rows.npy", np.zeros((4, 3)))
    for name in ("rows.csv", "rows.npy"):
        message = refused(capsys, tmp_path / name, *TINY, *out)
        assert f"{name} should hold sequences" in message and "without --model" in message
    assert "there is no file" in refused(capsys, tmp_path / "gone.npz", *TINY, *out)
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    assert "not a readable archive" in refused(capsys, tmp_path / "broken.npz", *TINY, *out)
    message = refused(capsys, data, *out)
    assert "x.npz holds sequences: fit them by --model dmm" in message
    assert fit(whole, "--hidden", 4, "--max-steps", 1, *out) == 0  # as images
    said = capsys.readouterr().err
    assert "taken for images of 6 x 3 pixels; for sequences of 6 steps give --model dmm" in said


def test_wrong_models_and_guides(data, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    for options, message in (
        (["--model", "rnn"], "--model should be one of vae, dmm, got 'rnn'"),
        (["--model", "dmm", "--guide", "diagonal"], "mean-field with --model dmm, got 'diagonal'"),
        (["--guide", "smoothing"], "--guide should be one of auto, diagonal with --model vae"),
        ([*TINY, "--likelihood", "poisson"], "--likelihood should be one of auto, bernoulli"),
    ):
        assert message in refused(capsys, data, *options, *out)
    real = {**arrays(), "x": np.nan_to_num(arrays()["x"]) + 2}
    np.savez(data, **real)
    assert "needs data in [0, 1]" in refused(capsys, data, *TINY, "--likelihood", "bernoulli", *out)
