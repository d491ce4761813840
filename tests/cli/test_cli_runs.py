"""Runs that are interrupted, killed or damaged, or meet a full disk: nothing is lost or halved."""

import errno
import json
import os
import shutil
import signal
import sys

import numpy as np
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

from pyproelbo.__main__ import main
from pyproelbo.cli import checkpoints, files, load_run, training
from pyproelbo.cli.interrupts import Interrupts

pytestmark = pytest.mark.slow


def check(*arguments):
    return main(["check", *map(str, arguments), "--num-samples", "25", "--max-data", "4"])


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs, and one of three, of the same options."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_default_dtype(torch.float32)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(40, 5)))
    for epochs in (2, 3):
        out = folder / f"run{epochs}"
        assert fit(folder / "x.npy", *TINY, "--epochs", epochs, "--out", out) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    torch.set_default_dtype(torch.float32)
    return shutil.copytree(finished / "run2", tmp_path / "run")


# Checkpoints


@pytest.mark.parametrize("batch_size", [16, 64])
def test_every_checkpoint_resumes_to_the_numbers_of_a_fit_straight_through(
    images,
    tmp_path,
    monkeypatch,
    batch_size,
):
    """From after each step and each epoch; epochs of one step, too."""
    whole, kept, write = tmp_path / "whole", [], checkpoints.Checkpoints.write

    def written(self, trainer):
        write(self, trainer)
        kept.append(self.path.read_bytes())

    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints.Checkpoints, "write", written)
    options = [images, *TINY, "--anneal", "linear:9", "--batch-size", batch_size]
    assert fit(*options, "--epochs", 2, "--out", whole) == 0
    assert len(kept) == (9 if batch_size == 16 else 3)
    for i, checkpoint in enumerate(tuple(kept[:-1])):
        out = tmp_path / str(i)
        out.mkdir()
        shutil.copy(whole / "config.json", out)
        (out / "last.ckpt").write_bytes(checkpoint)
        assert fit("--resume", out) == 0
        for name in ("terms.csv", "summary.json"):
            assert (out / name).read_text() == (whole / name).read_text(), i
        ours, theirs = (load_run(o).model.state_dict() for o in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_checkpoints_come_at_each_new_best_and_by_time(images, tmp_path, monkeypatch):
    steps, write = [], checkpoints.Checkpoints.write

    def written(self, trainer):
        steps.append(trainer.global_step)
        write(self, trainer)

    monkeypatch.setattr(checkpoints.Checkpoints, "write", written)
    monkeypatch.setattr(checkpoints, "COST", 0.0)
    assert fit(images, *TINY, "--epochs", 3, "--out", tmp_path / "a") == 0
    elbo = [float(row["val_elbo"]) for row in trace_of(tmp_path / "a")]
    best = [4 * i + 4 for i in range(3) if elbo[i] == max(elbo[: i + 1])]
    assert steps == [*best, 12]
    steps.clear()
    monkeypatch.setattr(checkpoints, "COST", float("inf"))
    assert fit(images, *TINY, "--epochs", 3, "--out", tmp_path / "b") == 0
    assert steps == [12]


def test_what_is_not_finite_is_no_checkpoint(images, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "out", checkpoints.Checkpoints.write

    def written(self, trainer):
        if trainer.global_step == 3:
            trainer.callback_metrics["train_elbo"].fill_(torch.nan)
        write(self, trainer)

    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    monkeypatch.setattr(checkpoints.Checkpoints, "write", written)
    message = refused(capsys, np_rows(tmp_path), *TINY, "--out", out)
    assert "the ELBO is nan at step 3: try a smaller --lr in a new run" in message
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 2
    assert f"--resume {out} --max-steps 2 reports the earlier state" in message
    assert fit("--resume", out, "--max-steps", 2) == 0
    assert summary_of(out)["steps"] == 2


def np_rows(folder):
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(60, 5)))
    return folder / "rows.npy"


# Interrupts: the signals go to a process that trains until it gets them


def test_sigterm_stops_as_ctrl_c_does_and_a_second_one_leaves_the_report_out(tmp_path, capsys):
    with endless(np_rows(tmp_path), tmp_path) as (process, out):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert f"to continue: python -m pyproelbo fit --resume {out}" in said
    step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    assert f"stopped at step {step}" in said
    load_run(out)
    assert fit("--resume", out, "--max-steps", step) == 0  # the report alone
    assert summary_of(out)["steps"] == step
    assert len(trace_of(out)) in (step // 4, step // 4 + 1)


def test_a_killed_run_goes_on_from_its_checkpoint_and_holds_no_lock(tmp_path, capsys):
    with endless(np_rows(tmp_path), tmp_path) as (process, out):
        assert "another command is writing to" in refused(capsys, "--resume", out)
        message = refused(capsys, np_rows(tmp_path), *TINY, "--out", out)
        assert "exists and is not overwritten" in message
        process.kill()
        process.communicate(timeout=60)
    step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    assert fit("--resume", out, "--max-steps", step + 5) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN_OF_IMAGES


def test_interrupts_are_raised_or_wait():
    interrupts = Interrupts()
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with interrupts.listening():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.num == 2 and not interrupts.raised
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.num == 3 and interrupts.raised
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():
            raise AssertionError("one that an import has swallowed counts")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def interrupting(monkeypatch, target, name):
    """Let a function be interrupted when it is called."""

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(target, name, interrupted)


def test_interrupted_before_there_is_anything_to_keep(run, tmp_path, monkeypatch, capsys):
    data, out = np_rows(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupting(patch, np, "load")
        assert fit(data, *TINY, "--out", out) == 130
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "on_load_checkpoint", lambda *_: None)
        patch.setattr(training, "num_steps", lambda *_: signal.raise_signal(signal.SIGINT) or 9)
        assert fit(data, *TINY, "--out", out) == 130
        before = content(run)
        assert fit("--resume", run, "--epochs", 3) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert not out.exists() and content(run) == before


def test_an_import_that_was_interrupted_has_stopped(tmp_path, monkeypatch, capsys):
    def importing(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr(np, "load", importing)
    assert fit(np_rows(tmp_path), *TINY, "--out", tmp_path / "out") == 130
    assert capsys.readouterr().err == "stopped\n"


def test_a_report_that_was_interrupted_is_written_by_resuming(finished, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        torch.set_default_dtype(torch.float32)
        interrupting(patch, sys.modules["pyproelbo.cli.report"], "save_figure")
        assert fit(finished / "x.npy", *TINY, "--epochs", 2, "--out", out) == 130
    said = capsys.readouterr().err
    assert "before the report was written; to continue: python -m pyproelbo fit --resume" in said
    assert {path.name for path in out.iterdir()} == {"config.json", "last.ckpt", "state.pt"}
    assert fit("--resume", out) == 0
    for name in ("summary.json", "terms.csv", "config.json"):
        assert (out / name).read_text() == (finished / "run2" / name).read_text()
    assert "give more --epochs than 2" in refused(capsys, "--resume", out)


# Folders


def test_a_folder_without_a_checkpoint_is_begun_anew(finished, tmp_path, capsys):
    options = [finished / "x.npy", *TINY, "--epochs", 2]
    for left in ((), ("config.json",), ("config.json", ".last.ckpt.partial")):
        out = tmp_path / f"out{len(left)}"
        out.mkdir()
        for name in left:
            (out / name).write_text("")
        if left:
            refused(capsys, "--resume", out)
        torch.set_default_dtype(torch.float32)
        assert fit(*options, "--out", out) == 0
        assert (out / "terms.csv").read_text() == (finished / "run2" / "terms.csv").read_text()
        assert {path.name for path in out.iterdir()} == WRITTEN_OF_IMAGES


def test_a_run_without_its_checkpoint_says_how_to_begin_anew(run, capsys):
    (run / "last.ckpt").unlink()
    assert "start a new run with another --out" in refused(capsys, "--resume", run, "--epochs", 3)
    for path in run.iterdir():
        if path.name != "config.json":
            path.unlink()
    assert f"begin it anew by --out {run}" in refused(capsys, "--resume", run, "--epochs", 3)


def test_two_commands_do_not_write_to_one_run(run, capsys):
    (run / "surgery").mkdir()
    (run / "check").mkdir()
    with files.locked(run), files.locked(run / "surgery"), files.locked(run / "check"):
        before = content(run)
        for command, options in ((fit, ["--resume", run, "--epochs", 3]), (surgery, [run])):
            message = refused(capsys, *options, command=command)
            assert "another command is writing to" in message and "wait until it" in message
        assert "another command" in refused(capsys, run, command=check)
        assert content(run) == before
    assert fit("--resume", run, "--epochs", 3) == 0


# Files


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write(path, "old")
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()):

        def full(_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(type(error)) as caught:
                files.write(path, b"new and longer")
        assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"
        if isinstance(error, OSError):
            assert "a cannot be written (No space left on device)" in str(caught.value)
    files.write(path, b"new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["last.ckpt", "state.pt", "config.json", "summary.json"])
def test_a_full_disk_leaves_the_files_as_they_were(run, tmp_path, monkeypatch, capsys, name):
    write = files.write

    def full(path, content):
        if path.name == name:
            path = path.parent / "gone" / name
        write(path, content)

    before = content(run)[run / name]
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        message = refused(capsys, "--resume", run, "--epochs", 3)
        assert f"{name} cannot be written (No such file or directory)" in message
        assert content(run)[run / name] == before
    assert fit("--resume", run, "--epochs", 3) == 0
    assert summary_of(run)["steps"] == 9


def _random(path):
    path.write_bytes(np.random.default_rng(0).bytes(500))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _folder(path):
    path.unlink()
    path.mkdir()


def _flip(path):
    data = bytearray(path.read_bytes())
    for i in range(0, len(data), 97):
        data[i] ^= 255
    path.write_bytes(data)


def _text(text):
    return lambda path: path.write_text(text)


def _json(name, value=None):
    def change(path):
        values = json.loads(path.read_text())
        if value is None:
            del values[name]
        else:
            values[name] = value
        path.write_text(json.dumps(values))

    return change


def _inside(*names, value=None):
    """Put a value into a file of torch's, or take one out."""

    def change(path):
        values = within = torch.load(path, weights_only=True)
        for name in names[:-1]:
            within = within[name]
        if value is None:
            del within[names[-1]]
        else:
            within[names[-1]] = value
        torch.save(values, path)

    return change


FORMS = {"random": _random, "empty": _text(""), "cut": _cut, "folder": _folder, "flipped": _flip}
CONFIGS = {
    **FORMS,
    "list": _text("[]"),
    "deep": _text("[" * 100_000),
    "no shape": _json("shape"),
    "no digest": _json("digest"),
    "no lr": _json("lr"),
    "extra": _json("extra", 1),
    **{f"latent {value!r}": _json("latent", value) for value in ("3", 1.5, True, 0, [], 10**30)},
    **{f"beta {value!r}": _json("beta", value) for value in ("1", True, -1, float("nan"))},
    **{f"shape {value!r}": _json("shape", value) for value in (5, [], [-5], ["5"], [6], {})},
    **{f"model {value!r}": _json("model", value) for value in (1, "", "dmm")},
    "likelihood": _json("likelihood", "auto"),
    "standardise": _json("standardise", "yes"),
    "no standardise": _json("standardise", False),
    "data": _json("data", ["a"]),
}
CHECKPOINTS = {
    **FORMS,
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "state": lambda path: shutil.copy(path.parent / "state.pt", path),
    "no step": _inside("global_step"),
    "step": _inside("global_step", value="6"),
    "no loops": _inside("loops"),
    "loops": _inside("loops", value=3),
    "no progress": _inside("loops", "fit_loop", "epoch_progress"),
    "no rows": _inside("callbacks", "Trace", "rows"),
    "rows": _inside("callbacks", "Trace", "rows", value=[{"epoch": "a"}] * 2),
    "sums": _inside("callbacks", "Trace", "sums", value="a"),
    "best": _inside("callbacks", "Checkpoints", "best", value="a"),
    "no optimiser": _inside("optimizer_states"),
    "no state of it": _inside("optimizer_states", value=[]),
    "no random state": _inside("pyproelbo.rng"),
    "no weight": _inside("state_dict", "module.model.decoder.0.weight"),
    "weight": _inside("state_dict", "module.model.decoder.0.weight", value=torch.zeros(2)),
    "another weight": _inside("state_dict", "more", value=torch.zeros(2)),
    "objective": _inside("state_dict", "module.elbo._extra_state", "step", value="a"),
}
STATES = {
    **FORMS,
    "list": lambda path: torch.save([1], path),
    "checkpoint": lambda path: shutil.copy(path.parent / "last.ckpt", path),
    "no guide": _inside("guide"),
    "model": _inside("model", value=3),
    "extra": _inside("extra", value=3),
    "no weight": _inside("model", "decoder.0.weight"),
    "weight": _inside("model", "decoder.0.weight", value=torch.zeros(2)),
}


def damaged(run, capsys, change, name, commands):
    change(run / name)
    before = content(run)
    for command, *options in commands:
        message = refused(capsys, *options, command=command)
        assert name in message or "has changed since this run started" in message
        assert content(run) == before


@pytest.mark.parametrize("case", CONFIGS)
def test_damaged_options(run, capsys, case):
    commands = [(fit, "--resume", run, "--epochs", 3), (surgery, run), (check, run)]
    damaged(run, capsys, CONFIGS[case], "config.json", commands)
    with pytest.raises((ValueError, OSError)):
        load_run(run)


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints(run, capsys, case):
    commands = [(fit, "--resume", run, "--epochs", 3)]
    damaged(run, capsys, CHECKPOINTS[case], "last.ckpt", commands)
    load_run(run)


@pytest.mark.parametrize("case", STATES)
def test_damaged_states(run, capsys, case):
    damaged(run, capsys, STATES[case], "state.pt", [(surgery, run), (check, run)])
    with pytest.raises(ValueError, match=f"--resume {run}"):
        load_run(run)
    if case != "folder":
        (run / "state.pt").unlink()
        assert fit("--resume", run) == 0  # as the message says
        load_run(run)


def test_a_state_that_has_diverged_is_no_run(run, capsys):
    weight = torch.full((8, 3), torch.nan, dtype=torch.float32)
    _inside("model", "decoder.0.weight", value=weight)(run / "state.pt")
    for command in (surgery, check):
        message = refused(capsys, run, command=command)
        assert "NaN or infinite parameters, its fit has diverged" in message


@pytest.mark.parametrize("name", ["config.json", "state.pt", "last.ckpt"])
def test_files_that_may_not_be_read(run, capsys, monkeypatch, name):
    opened = open

    def refusing(path, *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refusing)
    monkeypatch.setattr("io.open", refusing)
    command, options = (surgery, [run]) if name == "state.pt" else (fit, ["--resume", run])
    message = refused(capsys, *options, *(["--epochs", 3] * (command is fit)), command=command)
    assert name in message and "Permission denied" in message
