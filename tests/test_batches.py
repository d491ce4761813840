"""Data in batches."""

import pytest
import torch
from oracles import rows
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyproelbo.batches import Batches, device_of


def test_a_tensor_tensors_a_mapping_and_a_loader_give_the_same_rows():
    x, y = rows(10, 3), rows(10)
    whole = Batches((x, y), 4)
    assert len(whole) == 3 and [(b.start, b.size) for b in whole] == [(0, 4), (4, 4), (8, 2)]
    loader = Batches(DataLoader(TensorDataset(x, y), batch_size=4), 99)
    assert len(loader) == 3
    named = Batches({"x": x, "y": y}, 4)
    for a, b, c in zip(whole, loader, named, strict=True):
        for i, name in enumerate("xy"):
            torch.testing.assert_close(a.args[i], b.args[i])
            torch.testing.assert_close(a.args[i], c.kwargs[name])
    only = next(iter(Batches(x, 4)))
    torch.testing.assert_close(only.args[0], x[:4])


def test_repeated_rows_keep_what_is_no_tensor_of_rows():
    (batch,) = Batches(DataLoader([(1.0, 5), (2.0, 6)], batch_size=2), 1)
    batch = batch._replace(args=(*batch.args, "as it is", torch.ones(3)))
    repeated = batch.repeat(2)
    assert repeated.size == 4 and repeated.args[0].tolist() == [1.0, 2.0, 1.0, 2.0]
    assert repeated.args[2] == "as it is" and len(repeated.args[3]) == 3


def test_batches_go_to_a_device():
    batches = Batches(rows(4, 2).cpu(), 2, device=torch.device("meta"))
    assert all(batch.args[0].device.type == "meta" for batch in batches)
    assert device_of(print, nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(print, nn.ReLU()) is None


@pytest.mark.parametrize("data, cause", [
    (rows(0, 2), "at least one row"), ([rows(2), rows(3)[0]], "one row for each datum"),
    (iter([rows(2)]), "gone through several times"), (3, "got int"), ([], "at least one row"),
    ([["a"]], "one row for each datum"),
])  # fmt: skip
def test_other_data(data, cause):
    with pytest.raises(ValueError, match=cause):
        list(Batches(data, 2))
