"""What is kept of each batch, in few blocks of memory."""

from typing import NamedTuple

import torch

from pyproelbo._rows.batches import Batch
from pyproelbo._rows.passes import by_batch
from pyproelbo._rows.shelf import Shelf


class Part(NamedTuple):
    numbers: torch.Tensor
    others: dict
    name: str


def part(i):
    generator = torch.Generator().manual_seed(i)
    numbers = torch.randn(3, 4, dtype=torch.float64, generator=generator).mT
    others = {"is": numbers > 0, "few": torch.zeros(0, 5), "one": torch.tensor(i), "big": None}
    return Part(numbers, others, str(i))


def addresses(of):
    values = of.numbers, *list(of.others.values())[:3]
    return [x.untyped_storage().data_ptr() for x in values]


def assert_same(found, expected):
    assert found.name == expected.name and torch.equal(found.numbers, expected.numbers)
    for name, value in expected.others.items():
        if value is not None:
            assert torch.equal(found.others[name], value)
            assert found.others[name].dtype == value.dtype


def test_all_is_as_it_was_and_lies_together():
    shelf = Shelf()
    kept = [shelf.kept(part(i)) for i in range(1000)]
    for i, each in enumerate(kept):
        assert_same(each, part(i))
    for column in zip(*map(addresses, kept), strict=True):
        assert len(set(column)) == 1
    assert not {*addresses(kept[0])[:1]} & {*addresses(kept[0])[1:]}


def test_what_is_large_or_has_a_graph_stays_where_it_is():
    large, leaf = torch.zeros(10**6), torch.zeros(2, requires_grad=True)
    assert all(x is y for x, y in zip(Shelf().kept((large, leaf)), (large, leaf), strict=True))


def test_reports_keep_the_parts_of_their_batches_there():
    batches = [Batch((torch.zeros(1),), {}, i, 1) for i in range(200)]
    kept = by_batch(batches, lambda batch: part(batch.start), lambda parts, _: parts, "x", False)
    for i, each in enumerate(kept):
        assert_same(each, part(i))
    others = kept[1:]  # the first is alone in results of one batch
    assert all(len(set(column)) == 1 for column in zip(*map(addresses, others), strict=True))
