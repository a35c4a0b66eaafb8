"""Rows gathered from several stored tensors, whatever part of them is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from folder_cases import write_model

from pymerge.checkpoint.gather import LONG, PIECE, GatheredTensor
from pymerge.checkpoint.inputs import open_models
from pymerge.checkpoint.stored import StoredTensor
from pymerge.checkpoint.types import MEAN, PADDING, ZERO, Rows, Source

WIDTH = 6


@pytest.fixture(params=["mmap", "read"])
def stored(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[StoredTensor]]:
    """Rows 0 to 9 of one tensor, and 10 to 19 of another; every row holds its own number."""
    monkeypatch.setenv("PYMERGE_IO", request.param)
    folders = []
    for k in range(2):
        table = torch.arange(10 * k, 10 * k + 10.0).repeat_interleave(WIDTH).reshape(10, WIDTH)
        folders.append(write_model(tmp_path / f"m{k}", {"w": table}))
    models = open_models(map(str, folders))
    yield [model.tensors["w"] for model in models]
    for model in models:
        model.close()


@pytest.mark.parametrize("long", [1, LONG])
@pytest.mark.parametrize("piece", [1, 3 * 4 * WIDTH, PIECE])
def test_every_part_is_of_the_rows(stored: list[StoredTensor], long: int, piece: int) -> None:
    """A run of both tensors, single rows, zeros, a mean (V4) and padding (V5): read whole, and in
    parts that begin and end within a row.
    """
    chosen = [(0, 2), (0, 3), (0, 4), (1, 9), (1, 0), (ZERO, -1), (MEAN, 1), (PADDING, -1)]
    choice = np.array([choice for choice, _ in chosen], np.int32)
    places = np.full((2, len(chosen)), -1, np.int32)
    for row, (tensor, place) in enumerate(chosen):
        if tensor >= 0:
            places[tensor, row] = place
        elif tensor == MEAN:
            places[:, row] = place
    rows = Rows((len(chosen), WIDTH), "float32", (Source(0, "w"), Source(1, "w")), places, choice)
    numbers = [2.0, 3.0, 4.0, 19.0, 10.0, 0.0, (1 + 11) / 2]
    wanted = np.repeat(np.float32([*numbers, sum(numbers) / len(numbers)]), WIDTH).tobytes()
    gathered = GatheredTensor("w", rows, stored, long=long, piece=piece)
    for step in (len(wanted), 56, 20):
        found = b""
        for begin in range(0, len(wanted), step):
            target = bytearray(min(step, len(wanted) - begin))
            gathered.read_into(begin, memoryview(target))
            found += target
        assert found == wanted
