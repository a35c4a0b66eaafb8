"""Low-rank updates as tensors are read (docs/spec/low_rank.md): no bit depends on where a read
begins or ends, nor on the instruction set level.
"""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from pymerge.backends import native
from pymerge.checkpoint import low_rank
from pymerge.checkpoint.low_rank import AdaptedTensor, LowRank
from pymerge.checkpoint.stored import LoadedTensor
from pymerge.checkpoint.types import TensorInfo
from pymerge.dtypes import name_of, torch_dtype
from pymerge.reference import low_rank as reference


def stored(tensor: torch.Tensor) -> LoadedTensor:
    return LoadedTensor(TensorInfo("w", name_of(tensor.dtype), tuple(tensor.shape)), tensor)


class Case:
    def __init__(
        self, rows: int, columns: int, rank: int, dtype: torch.dtype, magnitude: int | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.base = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)
        self.left = torch.randn(rows, rank, generator=generator).numpy()
        self.right = torch.randn(rank, columns, generator=generator).numpy()
        self.size = None if magnitude is None else (rows, columns)[magnitude]
        sizes = torch.rand(self.size or 1, generator=generator).numpy() + 0.5
        self.magnitude = None if magnitude is None else sizes
        self.by_column = magnitude == 1

    def tensor(self) -> AdaptedTensor:
        magnitude: Any = None if self.magnitude is None else lambda: self.magnitude
        update = LowRank(lambda: self.left, lambda: self.right, 0.75, magnitude, self.by_column)
        return AdaptedTensor(stored(self.base), update, len(self.base))

    def wanted(self) -> torch.Tensor:
        left, right = torch.from_numpy(self.left), torch.from_numpy(self.right)
        total = reference.add_low_rank(self.base, left, right, 0.75)
        if self.magnitude is None:
            return total
        sizes = torch.from_numpy(self.magnitude)
        return reference.with_magnitudes(total, sizes, by_column=self.by_column)


def whole(tensor: AdaptedTensor) -> bytearray:
    held = bytearray(tensor.nbytes)
    tensor.read_into(0, memoryview(held))
    return held


def values(tensor: AdaptedTensor) -> torch.Tensor:
    flat = torch.frombuffer(whole(tensor), dtype=torch_dtype(tensor.info.dtype))
    return flat.reshape(tensor.info.shape)


LEVELS = [name for name, usable in native.cpu_levels().items() if usable]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(70, 97), (3, 30_001), (1, 1), (5, 3), (9, 64), (4, 16)])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_it_is_the_references_to_the_bit(
    dtype: torch.dtype,
    shape: tuple[int, int],
    rank: int,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """L2 and L5."""
    monkeypatch.setenv("PYMERGE_CPU_LEVEL", level)
    case = Case(*shape, rank, dtype)
    tensor = case.tensor()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert tensor.info.dtype == name_of(wide) and tensor.info.result_dtype == name_of(dtype)
    assert torch.equal(values(tensor), case.wanted())


@pytest.mark.parametrize("magnitude", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_magnitudes(dtype: torch.dtype, magnitude: int) -> None:
    """L4: sums of squares in another order differ in binary64, and hardly ever once rounded."""
    case = Case(700, 901, 5, dtype, magnitude)
    precision = 1e-14 if dtype == torch.float64 else 2e-7
    torch.testing.assert_close(values(case.tensor()), case.wanted(), rtol=precision, atol=0)


def test_special_values() -> None:
    """NaN and infinity of the base or of a factor are where they belong; subnormals are kept."""
    case = Case(20, 40, 3, torch.float32)
    case.base[1, 2], case.base[2, 3] = torch.inf, torch.nan
    case.left[4, 1] = np.inf
    case.base[7], case.left[7], case.right[0] = 1e-42, [1e-20, 0, 0], 1e-20
    result, wanted = values(case.tensor()), case.wanted()
    assert torch.equal(result.isnan(), wanted.isnan()) and bool(result[2, 3].isnan())
    assert torch.equal(result.nan_to_num(), wanted.nan_to_num())
    assert bool((result[7] > 0).all())


@pytest.mark.parametrize("columns", [700_001, 3])
def test_rows_longer_and_shorter_than_a_part(columns: int) -> None:
    case = Case(2 if columns > 9 else 200_001, columns, 2, torch.bfloat16)
    assert torch.equal(values(case.tensor()), case.wanted())


@pytest.mark.parametrize("magnitude", [None, 0, 1])
def test_reads_of_any_part_give_the_same_bits(magnitude: int | None) -> None:
    """One after the other, in any order, and by several threads; a second time too."""
    case = Case(1500, 701, 6, torch.bfloat16, magnitude)
    known = whole(case.tensor())
    tensor = case.tensor()
    draw = random.Random(1)
    cuts = sorted({0, len(known), *(4 * draw.randrange(len(known) // 4) for _ in range(40))})
    parts = list(itertools.pairwise(cuts))
    held = bytearray(len(known))
    for _ in range(2):
        draw.shuffle(parts)
        held[:] = bytes(len(known))

        def read(mine: list[tuple[int, int]]) -> None:
            for begin, end in mine:
                tensor.read_into(begin, memoryview(held)[begin:end])

        threads = [threading.Thread(target=read, args=(parts[k::4],)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert held == known


def test_factors_are_held_only_while_they_are_read() -> None:
    """Once for all parts of a tensor, and let go behind the last one."""
    calls = []

    def left() -> Any:
        calls.append(1)
        return np.ones((64, 1), np.float32)

    update = LowRank(left, lambda: np.ones((1, 64), np.float32), 1.0)
    tensor = AdaptedTensor(stored(torch.zeros(64, 64)), update, 64)
    half = bytearray(tensor.nbytes // 2)
    tensor.read_into(0, memoryview(half))
    assert calls == [1] and tensor._held is not None
    tensor.read_into(len(half), memoryview(half))
    assert calls == [1] and tensor._held is None
    tensor.read_into(0, memoryview(half))
    assert calls == [1, 1]


def test_what_is_read_in_part_is_not_held_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_MOST_HOLDERS", 2)
    tensors = [Case(8, 8, 2, torch.float32).tensor() for _ in range(4)]
    for tensor in tensors:
        tensor.read_into(0, memoryview(bytearray(4)))
    assert [tensor._held is not None for tensor in tensors] == [False, False, True, True]
    assert whole(tensors[0]) == whole(tensors[3])


def test_an_empty_weight() -> None:
    update = LowRank(lambda: np.ones((0, 1), np.float32), lambda: np.ones((1, 4), np.float32), 1.0)
    assert whole(AdaptedTensor(stored(torch.zeros(0, 4)), update, 0)) == b""


def test_values_of_any_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor = torch.tensor([[1.5, -2.0], [0.25, 3.0]], dtype=dtype)
        assert low_rank.values_of(stored(tensor)).tolist() == tensor.tolist()
