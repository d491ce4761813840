from itertools import chain

import numpy as np
import pandas
import pytest
import torch

from pyproelbo._processes import TrainingProcesses
from pyproelbo.datasets import Minibatches, digits, load, minibatches, read


def test_digits():
    x, shape = digits()
    assert x.shape == (1797, 64) and shape == (8, 8)
    assert x.min() == 0 and x.max() == 1
    assert x.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 4, 4), (5, 3, 4, 4)])
def test_npy_and_npz_keep_values_and_remember_the_shape_of_a_datum(tmp_path, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", array)
    for name in ("a.npy", "a.npz"):
        data = load(tmp_path / name)
        assert data.shape == (shape[1:] or (1,))
        np.testing.assert_array_equal(data.x.numpy(), array.reshape(5, -1))


@pytest.mark.parametrize("names", ["", "height,width\n"])
def test_csv(tmp_path, names):
    (tmp_path / "a.csv").write_text(names + "1,2.5\n-3e1, 4\n\n")
    torch.testing.assert_close(load(tmp_path / "a.csv").x, torch.tensor([[1.0, 2.5], [-30.0, 4.0]]))


X = np.array([[1.5, 2.0, -3.0], [4.0, 5.5, 6.0], [0.25, 8.0, 9.0], [1.0, 1.0, 2.5]])


def _frame(x=X, **kwargs):
    return pandas.DataFrame(x, **kwargs)


FRAMES = {  # how a frame was made and written, and what of the file is no data
    "defaults": (_frame(), {}, (True, True)),
    "no index": (_frame(), {"index": False}, (True, False)),
    "names": (_frame(columns=[*"abc"]), {}, (True, True)),
    "names alone": (_frame(columns=[*"abc"]), {"index": False}, (True, False)),
    "index of names": (_frame(index=[*"wxyz"]), {}, (True, True)),
    "index of dates": (_frame(index=pandas.date_range("2020", periods=4)), {}, (True, True)),
    "part of a frame": (_frame(index=[7, 3, 9, 1]), {}, (True, True)),
    "some names": (_frame(columns=["a", 0, 1]), {"index": False}, (True, False)),
    "all quoted": (_frame(), {"quoting": 1}, (True, True)),
    "numbers alone": (_frame(), {"index": False, "header": False}, (False, False)),
    "one column": (_frame(X[:, :1]), {"index": False}, (True, False)),
    "a series": (pandas.Series(X[:, 0]), {}, (True, True)),
    "whole numbers": (_frame(X.round().astype(int) + 3, columns=[*"abc"]), {}, (True, True)),
}


@pytest.mark.parametrize("case", FRAMES)
def test_what_pandas_writes_is_read_as_it_was(tmp_path, case):
    frame, how, no_data = FRAMES[case]
    frame.to_csv(tmp_path / "a.csv", **how)
    (x, shape), columns = read(tmp_path / "a.csv")
    values = frame.to_numpy().reshape(len(frame), -1)
    np.testing.assert_array_equal(x.numpy(), values)
    assert shape == values.shape[1:] and columns == no_data
    header, index_col = no_data
    again = load(tmp_path / "a.csv", header=header, index_col=index_col)
    assert torch.equal(again.x, x)


def test_a_frame_saved_twice_has_an_unnamed_column(tmp_path):
    _frame(columns=[*"abc"]).to_csv(tmp_path / "a.csv")
    pandas.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "b.csv", index=False)
    np.testing.assert_array_equal(load(tmp_path / "b.csv").x.numpy(), X)


UNCLEAR = {  # text, what is unclear, and the data if it is not what it looks like
    "counts above whole numbers": ("0,1,2\n5,3,4\n1,1,1\n", "header", 3),
    "years": ("2019,2020\n1.5,2.5\n3.5,4.5\n", "header", 3),
    "columns that are left": ("1,2,4\n1.5,2.5,0.5\n", "header", 2),
    "a count of whole numbers": ("0\n5\n3\n", "header", 3),
    "an index without a header": ("0,1.5\n1,2.5\n2,0.5\n", "index_col", 3),
    "an index from 1": ("1,1.5\n2,2.5\n3,0.5\n", "index_col", 3),
    "an index with a name": ("id,a\n0,1.5\n1,2.5\n2,0.5\n", "index_col", 3),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_may_be_a_name_or_a_datum_is_to_be_said(tmp_path, case):
    text, name, num = UNCLEAR[case]
    path = tmp_path / "a.csv"
    path.write_text(text)
    option = name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{name}=True or False \(--{option} or --no-{option}\)"):
        load(path)
    width = text.split("\n")[1].count(",") + 1
    assert load(path, **{name: False}).x.shape == (num, width)
    less = load(path, **{name: True}).x
    assert less.shape == ((num - 1, width) if name == "header" else (num, width - 1))


def test_names_and_indices_that_are_given(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("7,8\n1,2\n")
    assert load(path).x.tolist() == [[7, 8], [1, 2]]
    assert load(path, header=True).x.tolist() == [[1, 2]]
    assert load(path, index_col=True).x.tolist() == [[8], [2]]
    assert load(path, header=True, index_col=True).x.tolist() == [[2]]
    path.write_text("a,7\nb,8\n")
    assert load(path, index_col=True).x.tolist() == [[7], [8]]
    with pytest.raises(ValueError, match=r"'a' in data row 0.*--index-col"):
        load(path)
    path.write_text("7\n8\n")
    with pytest.raises(ValueError, match="one column, which cannot be an index"):
        load(path, index_col=True)
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(ValueError, match=r"header is of \.csv files: leave it out for a\.npy"):
        load(tmp_path / "a.npy", header=True)


def _csv(text):
    return lambda path: path.write_text(text)


def _npy(array, **kwargs):
    return lambda path: np.save(path, array, **kwargs)


WRONG = {
    "no file": ("a.npy", lambda path: None, "there is no file"),
    "a folder": ("a.npy", lambda path: path.mkdir(), "there is no file"),
    "suffix": ("a.txt", _csv("1"), "should end in .npy, .npz, .csv"),
    "no rows": ("a.npy", _npy(np.zeros((0, 3))), "no data"),
    "no columns": ("a.npy", _npy(np.zeros((3, 0))), "no data"),
    "a scalar": ("a.npy", _npy(np.array(1.0)), "no data"),
    "empty csv": ("a.csv", _csv(""), "no data"),
    "names alone": ("a.csv", _csv("a,b\n"), "no data"),
    "text": ("a.npy", _npy(np.array(["a", "b"])), "not numbers"),
    "objects": ("a.npy", _npy(np.array([{}]), allow_pickle=True), "not a readable array"),
    "complex": ("a.npy", _npy(np.array([1j])), "complex"),
    "no array": ("a.npy", _csv("hello"), "not a readable array"),
    "no archive": ("a.npz", _csv("hello"), "not a readable archive"),
    "two arrays": ("a.npz", lambda p: np.savez(p, b=[1], c=[2]), r"holds 2 \(b, c\)"),
    "words": ("a.csv", _csv("1,2\n3,four\n"), "'four' in data row 1"),
    "a gap": ("a.csv", _csv("1,2\n3,\n"), "'' in data row 1"),
    "ragged": ("a.csv", _csv("1,2\n3\n"), "1 columns in data row 1"),
    "nan": ("a.npy", _npy(np.array([[0.0, 1], [np.nan, 1]])), r"1 of 2 rows .*row 1"),
    "inf": ("a.csv", _csv("1,2\ninf,3\n"), "NaN or infinite"),
    "too large": ("a.npy", _npy(np.array([1e300, 1e-3], np.longdouble) ** 2), "NaN or infinite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path, case):
    name, write, message = WRONG[case]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def _epochs(batches, num):
    return [[batch.tolist() for batch in batches] for _ in range(num)]


def test_minibatches_visit_every_row_once_in_an_epoch_in_ever_new_order():
    epochs = _epochs(Minibatches(torch.arange(10), 3), 3)
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[3, 3, 3, 1]] * 3
    flat = [list(chain(*epoch)) for epoch in epochs]
    assert all(sorted(rows) == list(range(10)) for rows in flat)
    assert flat[0] != flat[1] != flat[2]
    assert _epochs(Minibatches(torch.arange(10), 3), 3) == epochs
    assert _epochs(Minibatches(torch.arange(10), 3, seed=1), 3) != epochs


@pytest.mark.parametrize("num_seen", range(1, 9))
def test_minibatches_resume_where_they_were(num_seen):
    expected = list(chain(*_epochs(Minibatches(torch.arange(10), 3), 4)))
    batches, seen = Minibatches(torch.arange(10), 3), []
    while len(seen) < num_seen:
        for batch in batches:
            seen.append(batch.tolist())
            if len(seen) == num_seen:
                break
    resumed = Minibatches(torch.arange(10), 3)
    resumed.load_state_dict(batches.state_dict())
    while len(seen) < len(expected):
        seen += [batch.tolist() for batch in resumed]
    assert seen == expected


def test_an_epoch_broken_off_starts_anew():
    batches = Minibatches(torch.arange(10), 3)
    first = next(iter(batches)).tolist()
    assert next(iter(batches)).tolist() == first
    batches.set_epoch(1)
    assert next(iter(batches)).tolist() != first


@pytest.mark.parametrize("num", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 4, 10, 11, 12, 13, 25])
def test_processes_share_the_batches_of_one(monkeypatch, size, num):
    """Each row once, equally many batches of nearly equal size; a small remainder joins a batch."""
    whole = list(Minibatches(torch.arange(size), 2 * num))
    parts = []
    for rank in range(num):
        processes = TrainingProcesses(rank, num)
        monkeypatch.setattr(minibatches, "all_processes", lambda processes=processes: processes)
        batches = Minibatches(torch.arange(size), 2, distributed=True)
        parts.append(list(batches))
        assert len(parts[-1]) == len(batches) and all(len(batch) for batch in parts[-1])
        assert batches.state_dict() == {"epoch": 1, "batch": 0}
    together = [torch.cat(batch).sort().values.tolist() for batch in zip(*parts, strict=True)]
    expected = [batch.sort().values.tolist() for batch in whole]
    if len(expected) > 1 and len(expected[-1]) < num:
        expected[-2:] = [sorted(expected[-2] + expected[-1])]
    assert together == expected
    for batch in zip(*parts, strict=True):
        assert max(map(len, batch)) - min(map(len, batch)) <= 1


def test_fewer_rows_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(minibatches, "all_processes", lambda: TrainingProcesses(0, 4))
    with pytest.raises(ValueError, match="x has 3 rows, too few for 4 processes"):
        len(Minibatches(torch.arange(3), 2, distributed=True))


def test_minibatches_refuse_an_empty_batch():
    with pytest.raises(ValueError, match="batch_size should be at least 1"):
        Minibatches(torch.arange(3), 0)
