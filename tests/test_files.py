"""Files that need not fit memory: the same rows, numbers and draws as of the tensor in memory."""

import multiprocessing
import pickle
import sys
from itertools import chain, islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo._processes import TrainingProcesses
from pyproelbo._rows.batches import Batches
from pyproelbo.datasets import Files, load
from pyproelbo.guides.ppca import Diagonal
from pyproelbo.models.ppca import PPCA

pa = pytest.importorskip("pyarrow")
feather = pytest.importorskip("pyarrow.feather")
pq = pytest.importorskip("pyarrow.parquet")

X = np.random.default_rng(0).normal(size=(57, 3))


def table(x=X):
    return pa.table({name: x[:, i] for i, name in enumerate("abc")})


def stream(x, path):
    with pa.ipc.new_stream(path, table(x).schema) as writer:
        writer.write_table(table(x), max_chunksize=9)


WRITERS = {
    "parquet": lambda x, path: pq.write_table(table(x), path, row_group_size=10),
    "one group.parquet": lambda x, path: pq.write_table(table(x), path),
    "feather": lambda x, path: feather.write_feather(table(x), path, chunksize=7),
    "plain.feather": lambda x, p: feather.write_feather(table(x), p, compression="uncompressed"),
    "arrow": stream,
    "npy": lambda x, path: np.save(path, x),
    "npz": lambda x, path: np.savez(path, x),
    "csv": lambda x, path: np.savetxt(path, x, delimiter=",", header="a,b,c", comments=""),
}


def written(folder, kind, sizes=(57,)):
    """A file of X, or a folder of several."""
    suffix = kind.rpartition(".")[2]
    if len(sizes) == 1:
        WRITERS[kind](X, path := str(folder / f"x.{suffix}"))
        return path
    (folder / "parts").mkdir()
    for i, x in enumerate(np.split(X, np.cumsum(sizes)[:-1])):
        WRITERS[kind](x, str(folder / "parts" / f"part-{i + 8}.{suffix}"))  # 8, 9, 10, ...
    return folder / "parts"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("sizes", [(57,), (20, 1, 30, 6)], ids=["file", "folder"])
def test_batches_have_the_rows_in_order_whatever_the_parts(tmp_path, kind, sizes):
    path = written(tmp_path, kind, sizes)
    files = Files(path, batch_size=8)
    assert files.num_data == 57 and len(files) == 8 and files.shape == (3,)
    for _ in range(2):
        batches = [*files]
        assert [len(batch) for batch in batches] == [8] * 7 + [1]
        assert all(batch.dtype == torch.float64 for batch in batches)
        np.testing.assert_array_equal(torch.cat(batches), X)
    assert [len(batch) for batch in files.batched(50)] == [50, 7]
    again = pickle.loads(pickle.dumps(files))
    np.testing.assert_array_equal(torch.cat([*again]), X)
    np.testing.assert_array_equal(files.first(20), X[:20])
    assert next(iter(Files(path, dtype=torch.float32))).dtype == torch.float32
    if len(sizes) > 1:
        assert [path.stem for path in files.paths] == ["part-8", "part-9", "part-10", "part-11"]
        assert repr(files) == "Files(4 files: 57 rows of 3 features)"
    else:
        np.testing.assert_array_equal(load(path).x, X)


def test_columns_of_all_kinds_of_numbers(tmp_path):
    rng = np.random.default_rng(0)
    pair, plane = rng.normal(size=(9, 2)), rng.normal(size=(9, 2, 3)).astype(np.float32)
    columns = {
        "whole": pa.array(range(9), pa.uint8()),
        "half": pa.array(np.arange(9, dtype=np.float16)),
        "yes": pa.array([i % 2 == 0 for i in range(9)]),
        "money": pa.array(range(9), pa.decimal128(9, 2)),
        "pair": pa.FixedSizeListArray.from_arrays(pair.ravel(), 2),
        "list": pa.array([*pair]),
        "plane": pa.FixedShapeTensorArray.from_numpy_ndarray(plane),
        "a.b": pa.array(rng.normal(size=9)),
    }
    whole = np.arange(9.0)[:, None]
    expected = [whole, whole, whole % 2 == 0, whole, pair, pair, plane.reshape(9, 6)]
    expected = np.hstack([*expected, columns["a.b"].to_numpy()[:, None]])
    for name, write in (("parquet", pq.write_table), ("arrow", feather.write_feather)):
        write(pa.table({**columns, "name": ["x"] * 9}), path := tmp_path / f"x.{name}")
        files = Files(path, 4, columns=[*columns])
        assert files.names == (*columns,)
        np.testing.assert_array_equal(torch.cat([*files]), expected)
        files = Files(path, 4, columns=["pair", "whole"])
        np.testing.assert_array_equal(torch.cat([*files]), np.hstack([pair, whole]))


def test_an_index_of_pandas_is_no_feature(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=[*"abc"])
    for name, index in (("counted", None), ("named", [f"row {i}" for i in range(57)])):
        frame.set_index(frame.index if index is None else pandas.Index(index)).to_parquet(
            path := tmp_path / f"{name}.parquet"
        )
        assert Files(path).names == ("a", "b", "c")


def test_images_keep_their_shape(tmp_path):
    np.save(path := tmp_path / "x.npy", np.arange(24.0).reshape(6, 2, 2))
    files = Files(path, 4)
    assert files.shape == (2, 2) and next(iter(files)).shape == (4, 4)


REPORTS = {"evidence": 20, "psis": 50, "decompositions": 20, "surgery": 2}  # and their draws


def assert_alike(report, *data):
    """The same numbers for all of these data."""
    model, guide = PPCA(2, 3), Diagonal(2, 3)
    options = {"num_samples": REPORTS[report], "progress": False}
    ours, theirs = (getattr(pe, report)(model, guide, x, **options).to_xarray() for x in data)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-10, atol=1e-10, err_msg=str(name))


@pytest.mark.parametrize("report", REPORTS)
def test_reports_have_the_numbers_of_the_tensor(tmp_path, report):
    files = Files(written(tmp_path, "parquet", (20, 1, 30, 6)), batch_size=8)
    assert_alike(report, files, torch.from_numpy(X))


@pytest.mark.parametrize("report", ["evidence", "surgery"])
def test_reports_of_a_loader_with_workers_have_them_too(report):
    loader = DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=8, num_workers=2)
    assert_alike(report, loader, torch.from_numpy(X))
    assert not multiprocessing.active_children()


# Parts, and orders of training


def rows(batches):
    """The first numbers of rows, in order."""
    return torch.cat([*batches])[:, 0].tolist()


@pytest.fixture
def numbered(tmp_path):
    x = np.arange(100.0)[:, None]
    pq.write_table(pa.table({"a": x[:, 0]}), path := tmp_path / "x.parquet", row_group_size=7)
    return path


def test_a_split_shares_the_rows_out(numbered, monkeypatch):
    monkeypatch.setattr("pyproelbo.datasets.sources.BLOCK", 30)
    files = Files(numbered, 8)
    train, held_out = files.split(0.2, seed=3)
    assert (train.num_data, held_out.num_data, len(train)) == (80, 20, 10)
    found = rows(train), rows(held_out)
    assert all(part == sorted(part) for part in found)
    assert sorted(found[0] + found[1]) == [*range(100)]
    for start in range(0, 90, 30):  # the same share of each block
        assert sum(start <= row < start + 30 for row in found[1]) == 6
    assert rows(files.split(0.2, seed=3)[1]) == found[1] != rows(files.split(0.2, seed=4)[1])
    assert sorted(rows(held_out.shuffled(6))) == found[1]
    with pytest.raises(ValueError, match="whole files"):
        train.split(0.5)
    with pytest.raises(ValueError, match="holdout should be a fraction"):
        files.split(1.0)


def test_a_sample_is_of_all_rows(numbered):
    files = Files(numbered)
    counts = np.zeros(100)
    for seed in range(300):
        found = rows([files.sample(10, seed)])
        assert len({*found}) == 10 and found == sorted(found)
        counts[np.array(found, int)] += 1
    assert counts.sum() == 3000 and abs(counts - 30).max() < 5 * 27**0.5
    assert rows([files.sample(1000)]) == rows(files)


@pytest.mark.parametrize("buffer", [None, 20, 1])
def test_epochs_have_every_row_once_in_ever_new_order(numbered, buffer):
    batches = Files(numbered, 8).shuffled(buffer=buffer)
    epochs = [rows(batches) for _ in range(3)]
    assert len(batches) == 13
    assert all(sorted(epoch) == [*range(100)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = Files(numbered, 8).shuffled(buffer=buffer)
    assert [rows(again) for _ in range(3)] == epochs
    assert rows(Files(numbered, 8).shuffled(buffer=buffer, seed=1)) != epochs[0]


def test_a_large_buffer_mixes_all_rows_evenly(numbered):
    batches = Files(numbered, 50).shuffled()
    share = np.mean([next(iter(batches)).numpy()[:, 0] < 50 for _ in range(40) if rows(batches)])
    assert abs(share - 0.5) < 5 * (0.25 / 2000) ** 0.5


@pytest.mark.parametrize("buffer", [None, 20, 3])
@pytest.mark.parametrize("num_seen", [1, 5, 12, 13, 14])
def test_training_resumes_where_it_was(numbered, buffer, num_seen):
    def batches():
        return Files(numbered, 8).split(0.1)[0].shuffled(buffer=buffer)

    whole, started, seen = batches(), batches(), []
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    while len(seen) < num_seen:
        for batch in started:
            seen.append(batch.tolist())
            if len(seen) == num_seen:
                break
    resumed = batches()
    resumed.load_state_dict(started.state_dict())
    while len(seen) < len(expected):
        seen += [batch.tolist() for batch in resumed]
    assert seen == expected


@pytest.mark.parametrize("num", [1, 2])
def test_a_fit_mixes_files_and_processes_share_their_batches(numbered, num):
    data = Batches(Files(numbered, 10).batched(10), 64)
    parts = [islice(data.shuffled(0, rank, num), 20 // num) for rank in range(num)]
    found = [batch.args[0] for part in parts for batch in part]
    assert all(len(batch) == 10 for batch in found)
    assert sorted(rows(found)) == sorted([*range(100)] * 2)
    assert rows(found[:1]) != [*range(10)]


@pytest.mark.parametrize("buffer", [None, 20])
@pytest.mark.parametrize("first", [0, 2])
def test_processes_share_the_rows_of_an_epoch(numbered, monkeypatch, buffer, first):
    def batches(rank, num, size):
        processes = TrainingProcesses(rank, num)
        monkeypatch.setattr("pyproelbo.datasets.minibatches.all_processes", lambda: processes)
        loader = Files(numbered).shuffled(size, buffer=buffer, distributed=True)
        loader.load_state_dict({"epoch": 1, "batch": first})
        assert len(loader) == 100 // (num * size) + (num == 1)
        return [batch[:, 0].tolist() for batch in loader]

    shared = [batches(rank, 3, 11) for rank in range(3)]  # 99 rows and one that is too few
    whole = [*chain(*batches(0, 1, 33))]
    for i, parts in enumerate(zip(*shared, strict=True)):
        part = whole[33 * i : None if i == 2 - first else 33 * (i + 1)]
        assert sorted(chain(*parts)) == sorted(part)
        assert parts[0] == part[::3]


# What is refused


def with_column(values, **options):
    return lambda path: pq.write_table(pa.table({"a": [1.0, 2.0], "b": values}), path, **options)


TABLES = {
    "strings": (with_column(["x", "y"]), "column 'b' of x.parquet holds string, not numbers"),
    "dates": (with_column(pa.array([1, 2], pa.date32())), "column 'b' .* holds date32"),
    "categories": (with_column(pa.array(["x", "y"]).dictionary_encode()), "'b' .* dictionary"),
    "lists": (with_column([[1.0], [2.0, 3.0]]), "'b' .* 1 numbers in row 0 and 2 in row 1"),
    "a missing list": (with_column([None, [2.0]]), "column 'b' .* holds list<.*columns="),
    "lists of strings": (with_column([["x"], ["y"]]), "column 'b' .* holds list<.*string>"),
    "nulls": (with_column([1.0, None]), "NaN or infinite numbers.* in row 1"),
    "no number": (with_column([True, None]), "in row 1"),
    "nan": (with_column([1.0, np.nan]), "in row 1 .*missing=True"),
    "inf": (with_column([np.inf, 1.0]), "in row 0"),
    "no list": (
        with_column(pa.array([[1.0, 2.0], None], pa.list_(pa.float64(), 2))),
        "'b' of x.parquet has no list in row 1|x.parquet cannot be read",  # before pyarrow 16
    ),
    "no rows": (lambda p: pq.write_table(table(X[:0]), p), "no data"),
    "no columns": (lambda p: pq.write_table(pa.table({}), p), "no columns of data"),
    "no table": (lambda p: p.write_text("hello"), "x.parquet is not a readable Parquet file"),
}


@pytest.mark.parametrize("case", TABLES)
def test_what_is_wrong_with_a_table_is_said_in_one_line(tmp_path, case):
    write, message = TABLES[case]
    write(path := tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message) as error:
        list(Files(path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError):
        load(path)


def test_missing_numbers_are_passed_on_when_asked(tmp_path):
    with_column([1, None])(path := tmp_path / "x.parquet")
    (batch,) = Files(path, missing=True)
    np.testing.assert_array_equal(batch, [[1, 1], [2, np.nan]])
    with_column([True, None])(path)
    (batch,) = Files(path, missing=True)
    np.testing.assert_array_equal(batch, [[1, 1], [2, np.nan]])
    np.save(path := tmp_path / "x.npy", [[1e300]])
    with pytest.raises(ValueError, match="larger ones than float32 has"):
        list(Files(path, dtype=torch.float32))


def refuses(message, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as error:
        Files(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_files_that_differ_are_refused(tmp_path):
    folder = written(tmp_path, "parquet", (20, 1, 30, 6))
    pq.write_table(pa.table({"a": [1.0]}), folder / "part-12.parquet")
    refuses("part-12.parquet has other features than part-8.parquet: 'a' of 1, not 'a'", folder)
    assert Files(folder, columns=["a"]).num_data == 58
    refuses("part-12.parquet has no column 'b': its columns are 'a'", folder, columns=["a", "b"])
    other = table()
    pq.write_table(other.select(["c", "b", "a"]), folder / "part-12.parquet")
    np.testing.assert_array_equal(torch.cat([*Files(folder)]), np.vstack([X, X]))
    pq.write_table(other.append_column("d", other["a"]), folder / "part-12.parquet")
    refuses("'d' of 1, not 'a' of 1", folder)
    for i, width in enumerate((2, 3)):
        np.save(tmp_path / f"{i}.npy", np.ones((4, width)))
    refuses("1.npy has other features", [tmp_path / "0.npy", tmp_path / "1.npy"])
    for i, text in enumerate(("a,b\n1.5,2\n", "1.5,2\n3,4\n")):
        (tmp_path / f"{i}.csv").write_text(text)
    paths = [tmp_path / "0.csv", tmp_path / "1.csv"]
    refuses("1.csv has another header or index than 0.csv: say header=", paths)
    assert Files(paths, header=True, index_col=False).num_data == 2


def test_folders_that_are_unclear_are_refused(tmp_path):
    folder = written(tmp_path, "npy", (20, 37))
    (folder / "_SUCCESS").touch()
    (folder / ".hidden").touch()
    assert Files(folder).num_data == 57
    (folder / "README.md").touch()
    refuses("parts holds README.md beside files of data", folder)
    (folder / "README.md").rename(folder / "x.csv")
    refuses("one kind, got .csv and .npy", folder)
    (tmp_path / "empty").mkdir()
    refuses("holds no files that end in .parquet", tmp_path / "empty")
    refuses("there is no file", tmp_path / "gone.parquet")
    refuses("got none", [])
    refuses("should end in .parquet", [folder / "x.csv", folder / "_SUCCESS"])


def test_options_that_are_refused(tmp_path):
    np.save(path := tmp_path / "x.npy", X)
    refuses("leave it out for x.npy", path, columns=["a"])
    refuses("give \\['a'\\]", path, columns="a")
    refuses("batch_size should be at least 1", path, 0)
    refuses("dtype should be torch.float32", path, dtype=torch.int64)
    refuses("header and index_col are of .csv files", path, header=True)
    with pytest.raises(ValueError, match="buffer should be at least 1"):
        Files(path).shuffled(buffer=0)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(table(), path)
    files, content = Files(path), bytearray(path.read_bytes())
    content[4:100] = bytes(96)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        list(files)


def test_pyarrow_is_asked_for(tmp_path, monkeypatch):
    path = written(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for read in (Files, load):
        with pytest.raises(ImportError, match=r"x\.parquet needs pyarrow: pip install pyproelbo\["):
            read(path)


def test_a_file_that_changes_is_noticed(tmp_path):
    files = Files(written(tmp_path, "parquet"))
    pq.write_table(table(X[:50]), tmp_path / "x.parquet", row_group_size=10)
    with pytest.raises(ValueError, match=r"x\.parquet has changed since it was opened"):
        list(files)
