"""DTensors merged where their shards are, on 2 and 4 processes over Gloo (docs/distributed.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sharded_cases import CASES
from sharded_ranks import Processes

distributed = pytest.importorskip("torch.distributed")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch has no gloo")
    started = Processes("sharded_cases", 4, Path(tmp_path_factory.mktemp("store")) / "store")
    yield started
    started.end()


@pytest.mark.parametrize("name", CASES)
def test_as_the_full_tensors(processes: Processes, name: str) -> None:
    answers = processes.run(name)
    assert not any(answers), "\n".join(answers)
