"""Trainings by two processes of Lightning's DDP are those of one; faults end them clearly."""

import pytest
import torch
from helpers.two_processes import NAMED, NOISE, NUM, Guide, Model, data, launch, with_given_noise

import pyproelbo as pe
from pyproelbo.datasets import Minibatches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

AFTER = [name for name in NAMED if name != "killed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def killed(folder):
    """The exit codes, and what was printed."""
    return launch(folder, ["killed"])


@pytest.fixture(scope="module")
def found(folder, killed):
    """What both processes have found in the training of a name."""
    codes, printed = launch(folder, AFTER)
    assert codes == [0, 0], printed
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


def assert_close(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["given", "captured"])
def test_two_processes_train_as_one_with_all_their_batches(found, name):
    """Also in the last step of an epoch, with two data in one process and one in the other."""
    one = with_given_noise(1)
    for two in found(name):
        assert len(two["gradients"]) == len(one["gradients"]) == two["step"] == 9
        for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
            assert_close(ours, theirs)
        assert_close(two["parameters"], one["parameters"])


def test_what_is_logged_is_of_the_data_of_both(found):
    """In validation, too: of 11 data in batches of 10 and 1 by one process, of 6 and 5 by two."""
    one = with_given_noise(1)
    for two in found("given"):
        for part in ("logged", "validated"):
            assert len(two[part]) == len(one[part]) > 0
            for ours, theirs in zip(two[part], one[part], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-12) and "elbo" in " ".join(ours)


def test_gradients_are_weighted_by_data_where_each_process_draws_its_own_global_latent(found):
    """By hand, from the loss of each process: 12 data, and 11, each as if it were all 23."""
    torch.manual_seed(3)
    model, guide = Model(), Guide()
    rows = next(iter(Minibatches(data(), NUM)))
    total = 0.0
    for rank, noise in enumerate(NOISE):
        guide.noise = noise
        part = rows[rank::2]
        loss = pe.BetaELBO(beta=0.5).differentiable_loss(model, guide, part)
        total = total + len(part) / NUM * loss / NUM
    total.backward()
    parts = {"module.model": model, "module.guide": guide}
    expected = {f"{k}.{n}": p.grad for k, m in parts.items() for n, p in m.named_parameters()}
    for process in found("own"):
        assert_close(process["gradients"][0], expected)


RESUMED = {  # from within an epoch, from the last checkpoint before a kill, and with a DataLoader
    "resumed": ("straight", 7),
    "after kill": ("straight", 6),
    "resumed by sampler": ("straight by sampler", 6),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_has_the_numbers_of_one_straight_through(found, name):
    of, steps = RESUMED[name]
    for straight, again in zip(found(of), found(name), strict=True):
        assert_close(again["parameters"], straight["parameters"], 0.0)
        assert again["logged"] == straight["logged"][-steps:]
        assert again["validated"] == straight["validated"][-len(again["validated"]) :]
        assert torch.equal(again["generators"][1], straight["generators"][1])
        assert again["step"] == straight["step"] == 12


def test_processes_with_one_seed_draw_different_numbers(found):
    first, second = (process["generators"][0] for process in found("straight"))
    assert not torch.equal(first, second)


def test_a_training_of_one_process_waits_for_no_other(found):
    assert [process["step"] for process in found("alone")] == [3, 6]


def test_a_killed_process_ends_the_other_with_a_message(killed):
    codes, printed = killed
    assert codes[1] == -9 and codes[0] == 1
    assert "Process 0 of 2 cannot reach another one, which has ended or hangs" in printed[0]
    assert "Trainer.fit(..., ckpt_path=...)" in printed[0]


def test_warnings_come_once_and_repeated_data_are_said(found):
    first, second = found("sampler")
    assert (first["seen"] + second["seen"]).count(0.0) > first["seen"].count(0.0)
    training, validation = (
        f"23 {part} data are no multiple of 2 processes, and the sampler repeats 1"
        for part in ("training", "validation")
    )
    assert sum(text.startswith(training) for text in first["warnings"]) == 1
    assert sum(text.startswith(validation) for text in first["warnings"]) == 1
    assert sum("beta changes until step 1000" in text for text in first["warnings"]) == 1
    assert sum(text.startswith("steps run eagerly") for text in first["warnings"]) == 1
    assert len(first["warnings"]) == 4 and second["warnings"] == []


def test_a_batch_that_passes_for_all_data_is_said(found):
    (split, same), others = (process["warnings"] for process in found("partial"))
    assert len(split) == 1 and "mu sees no more than that" in split[0]
    assert same == [] and others == [[], []]


def test_loaders_for_which_one_process_would_wait_are_refused(found):
    for errors in found("refused"):
        assert "the processes have 2 and 3 batches in an epoch" in errors["unequal"]
        assert "the epoch is over for process 0, but not for the others" in errors["unsized"]
        assert "let them share the rows by Minibatches(..., distributed" in errors["same"]
        assert "each would use only a part of its own" in errors["parts of parts"]
        assert "parts" not in errors  # since these are each process's own
